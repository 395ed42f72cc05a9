"""How fast records are read from each kind of file, and how much memory that takes. Not a test: run it.

    python tests/data/rate_of_records.py [--records 1000000] [--kinds jsonl,csv,parquet,arrow]

The same records are written in every kind, as text of about 600 bytes and as messages, a tenth of them and all.
Each file is read in a process of its own. The rate is per second of processor time, so that other work on the
machine changes it little, and is compared with that of the first kind. The memory is the most that the process
held (VmHWM, so Linux only) beyond what it held before, the code of pyarrow included.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from minidpo.data import read_records

ROWS = 10_000  # written at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kinds", default="jsonl,csv,parquet,arrow")
    options = parser.parse_args()
    print(f"{'':<20}{'records':>10}{'MB':>8}{'per second':>12}{'ratio':>10}{'memory, MB':>12}")
    for shape in ("text", "messages"):
        for count in (options.records // 10, options.records):
            kinds = [kind for kind in options.kinds.split(",") if (shape, kind) != ("messages", "csv")]
            with tempfile.TemporaryDirectory() as place:
                files = {kind: Path(place) / f"a.{kind}" for kind in kinds}
                in_child("write", count, shape, *files.values())
                readings = {kind: in_child("read", file) for kind, file in files.items()}
                sizes = {kind: file.stat().st_size / 1e6 for kind, file in files.items()}
            for kind, (rate, memory) in readings.items():
                ratio = rate / readings[kinds[0]][0]
                of_file = f"{shape + ', ' + kind:<20}{count:>10}{sizes[kind]:>8.0f}"
                print(f"{of_file}{rate:>12.0f}{ratio:>10.2f}{memory:>12.0f}", flush=True)


def in_child(*arguments: object) -> list[float]:
    """What `write` or `read` returns in a new process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def read(file: Path) -> tuple[float, float]:
    """Records per second of processor time, and megabytes."""
    before, seconds = held(), time.process_time()
    count = sum(1 for _ in read_records(file))
    return count / (time.process_time() - seconds), held() - before


def held() -> float:
    """Megabytes: the most that this process has held so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return int(line.split()[1]) / 1e3


def write(count: int, shape: str, files: list[Path]) -> None:
    """The same records in every file, ROWS at a time. A parquet file has row groups of 100,000."""
    import csv

    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.Table.from_pylist([next(made(1, shape))]).schema
    for file in files:
        rows = made(count, shape)
        if file.suffix == ".jsonl":
            with file.open("w") as out:
                out.writelines(json.dumps(row) + "\n" for row in rows)
        elif file.suffix == ".csv":
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, schema.names)
                writer.writeheader()
                writer.writerows(rows)
        else:
            parquet = file.suffix == ".parquet"
            new = pyarrow.parquet.ParquetWriter if parquet else pyarrow.ipc.new_stream
            with new(file, schema) as out:
                for _ in range(0, count, 10 * ROWS):
                    some = [row for _, row in zip(range(10 * ROWS), rows, strict=False)]
                    table = pyarrow.Table.from_pylist(some, schema)
                    out.write_table(table, *([] if parquet else [ROWS]))


def made(count: int, shape: str) -> Iterator[dict]:
    draw = random.Random(0)
    words = "yes no maybe the a cat dog runs sleeps well badly and then it was good".split()
    book = " ".join(draw.choices(words, k=1_000_000))
    for _ in range(count):
        texts = []
        for _ in range(3):
            start = draw.randrange(len(book) - 300)
            texts.append(book[start : start + draw.randrange(100, 300)])
        if shape == "text":
            yield dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))
        else:
            prompt, chosen, rejected = texts
            yield {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
            }


if __name__ == "__main__":
    if sys.argv[1:2] == ["read"]:
        print(json.dumps(read(Path(sys.argv[2]))))
    elif sys.argv[1:2] == ["write"]:
        write(int(sys.argv[2]), sys.argv[3], [Path(file) for file in sys.argv[4:]])
        print("[]")
    else:
        main()
