"""A process of its own for `bench`: how long from its start to a first step, and how much memory at most.

    python -m minidpo.commands.bench_child ours|naive|trl:MODE DIRECTORY STARTED

DIRECTORY holds what bench.py wrote: the model, pairs.npz, settings.json; STARTED is when, in
seconds since 1970, it started this process. Prints one JSON line.
Only what the contestant itself needs is imported, for that is part of its start.
"""

import json
import resource
import sys
import time
from pathlib import Path

import numpy as np


def main(who: str, directory: Path, started: float) -> None:
    import torch

    from minidpo.commands.bench_cases import Settings
    from minidpo.device import choose_device
    from minidpo.packing import PairTokens

    described = json.loads((directory / "settings.json").read_text())
    settings = Settings(**described["settings"])
    arrays = np.load(directory / "pairs.npz")
    pairs = PairTokens(arrays["ids"], arrays["bounds"], np.arange(len(arrays["bounds"])))
    device = choose_device(settings.device, settings.threads)
    steps = len(pairs) // settings.batch_size
    seconds = []

    def first() -> None:
        seconds.append(time.time() - started)

    if who.startswith("trl"):
        from minidpo.commands.bench_peers import make_trainer, require_trl, train_telling

        require_trl(settings.loss)
        mode, model_path = who.removeprefix("trl:"), Path(described["trl_model"])
        trainer = make_trainer(model_path, pairs, settings, mode, directory / "out", steps)
        train_telling(trainer, first)
    else:
        from minidpo.commands.bench_stages import Step, TextbookStep
        from minidpo.weights import load_model

        kind = Step if who == "ours" else TextbookStep
        step = kind(load_model(described["model"], device=device), pairs, settings, device)
        for number, batch in enumerate(np.split(np.arange(len(pairs)), steps)):
            step(batch)
            if number == 0:
                first()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss()
    print(json.dumps({"seconds_to_first_step": seconds[0], "peak_bytes": peak}))


def peak_rss() -> int:
    """The most memory this program ever had resident, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        # Elsewhere. Not on Linux, where it begins with the high-water mark of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
