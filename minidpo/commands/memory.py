"""`python -m minidpo memory`: which model fits on how many GPUs, counted from its shape (minidpo/memory.py).

The peak of a training step in bf16 with AdamW in float32, in GB (10^9 bytes) a GPU, reference log-probs precomputed.
"""

import argparse
from pathlib import Path

from minidpo.errors import UserError
from minidpo.hf_config import read_config
from minidpo.memory import parameter_counts, step_memory
from minidpo.metrics import say
from minidpo.shapes import PUBLISHED, named_shape


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help=f"model directories or shapes (default: {' '.join(PUBLISHED)})",
    )
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--micro-tokens", type=int, default=16_384, help="tokens a pass (default 16384)")
    options = parser.parse_args(arguments)
    if min(*options.gpus, options.micro_tokens) < 1:
        raise UserError("--gpus and --micro-tokens: numbers from 1 up are meant")

    lines = [["GPUs", *map(str, options.gpus)]]
    for name in options.models or PUBLISHED:
        config = named_shape(name) if name in PUBLISHED else read_config(Path(name))
        layer, outside = parameter_counts(config)
        cells = []
        for gpus in options.gpus:
            plain, checkpointed = (
                step_memory(config, options.micro_tokens, gpus, checkpointing).total / 1e9
                for checkpointing in (False, True)
            )
            cells.append(f"{plain:.0f} ({checkpointed:.0f})")
        billions = (layer * config.num_hidden_layers + outside) / 1e9
        lines.append([f"{billions:.2f}B", *cells])
    say(f"GB a GPU, {options.micro_tokens:,} tokens a pass; in brackets with run.activation_checkpointing\n")
    for first, *cells in lines:
        say(f"{first:>7}" + "".join(f"{cell:>13}" for cell in cells))
