"""How fast records are read from .jsonl and .parquet, and how much memory that takes. Not a test: run it.

    python tests/data/rate_of_records.py [RECORDS]

The same records are written in both, as text of about 600 bytes and as messages, a tenth of them and all.
Each file is read in a process of its own. The rate is per second of processor time, and is compared with that
of .jsonl. The memory is the most that the process held (VmHWM, so Linux only) beyond what it held before, the
code of pyarrow included.
"""

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

from minidpo.data import read_records

ROWS = 100_000


def main() -> None:
    records = int(sys.argv[1]) if sys.argv[1:] else 1_000_000
    print(f"{'':<20}{'records':>10}{'MB':>8}{'per second':>12}{'ratio':>10}{'memory, MB':>12}")
    for shape in ("text", "messages"):
        for count in (records // 10, records):
            with tempfile.TemporaryDirectory() as place:
                files = {kind: Path(place) / f"a.{kind}" for kind in ("jsonl", "parquet")}
                write(count, shape, *files.values())
                rates = {}
                for kind, file in files.items():
                    with get_context("spawn").Pool(1) as process:
                        rates[kind], memory = process.apply(read, [file])
                    of_file = f"{shape + ', ' + kind:<20}{count:>10}{file.stat().st_size / 1e6:>8.0f}"
                    ratio = rates[kind] / rates["jsonl"]
                    print(f"{of_file}{rates[kind]:>12.0f}{ratio:>10.2f}{memory:>12.0f}", flush=True)


def read(file: Path) -> tuple[float, float]:
    """Records per second of processor time, and megabytes."""
    before, seconds = held(), time.process_time()
    count = sum(1 for _ in read_records(file))
    return count / (time.process_time() - seconds), held() - before


def held() -> float:
    """Megabytes: the most that this process has held so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3


def write(count: int, shape: str, jsonl: Path, parquet: Path) -> None:
    """The same records in both files. The parquet file has row groups of ROWS."""
    import pyarrow.json
    import pyarrow.parquet

    with jsonl.open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in made(count, shape))
    pyarrow.parquet.write_table(pyarrow.json.read_json(jsonl), parquet, row_group_size=ROWS)


def made(count: int, shape: str) -> Iterator[dict]:
    draw = random.Random(0)
    words = "yes no maybe the a cat dog runs sleeps well badly and then it was good".split()
    book = " ".join(draw.choices(words, k=1_000_000))
    for _ in range(count):
        starts = [draw.randrange(len(book) - 300) for _ in range(3)]
        texts = [book[start : start + draw.randrange(100, 300)] for start in starts]
        if shape == "messages":
            roles = ("user", "assistant", "assistant")
            texts = [[{"role": role, "content": text}] for role, text in zip(roles, texts, strict=True)]
        yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))


if __name__ == "__main__":
    main()
