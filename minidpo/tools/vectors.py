"""`python -m minidpo vectors`: test vectors of every loss, for programs in any language."""

import argparse
from pathlib import Path

from minidpo.files import require_regular, write_file, writing
from minidpo.verify.vectors import make_vectors, to_json


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo vectors", description=about)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args(arguments).out
    require_regular(out, "--out ")
    vectors = make_vectors()
    with writing(out):
        write_file(out, to_json(vectors))
    cases, gathered = vectors["losses"], len(vectors["gatherer"])
    pairs = sum(len(case["losses"]) for case in cases)
    print(f"wrote {out}: {len(cases)} cases of {pairs} pairs, {gathered} of the sums of log-probs")
