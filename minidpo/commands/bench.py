"""`python -m minidpo bench`: how fast one optimizer step is here, where its time goes, and how much memory it takes.

    python -m minidpo bench --shape A --against naive
    python -m minidpo bench --model models/mine --data pairs.jsonl --against trl
    python -m minidpo bench --config configs/hh_dpo.toml --data pairs.jsonl
    python -m minidpo bench --shape B --grow

The step is train_dpo.py's and train_rm.py's (rm without its language-modelling loss), the reference precomputed. The
last line printed is the same numbers as JSON.
"""

import argparse
import copy
import json
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from minidpo.commands.bench_against import OPPONENTS, against, run_child, write_for_children
from minidpo.commands.bench_cases import (
    LOSSES,
    SHAPES,
    Settings,
    find_model,
    from_run_config,
    random_pairs,
    read_pairs,
)
from minidpo.commands.bench_flops import matmul_peak, necessary_flops, textbook_tokens
from minidpo.commands.bench_grow import growth
from minidpo.commands.bench_peers import require_trl
from minidpo.commands.bench_report import quartiles, spread, tell
from minidpo.commands.bench_stages import Step, seconds
from minidpo.device import choose_device, describe
from minidpo.errors import UserError
from minidpo.metrics import say
from minidpo.model import Transformer
from minidpo.packing import PairTokens


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    settings, data = settings_of(options)
    if (options.against or "").startswith("trl"):
        require_trl(settings.loss, options.against.partition(":")[2])
    device = choose_device(settings.device, settings.threads)
    settings = replace(settings, device=device.type)
    name, model, directory = find_model(options, device)
    config = model.config
    say(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, hidden {config.hidden_size}, MLP"
        f" {config.intermediate_size}, {config.num_hidden_layers} layers, {config.num_attention_heads} heads"
        f" ({config.num_key_value_heads} of keys and values), vocabulary {config.vocab_size}")  # fmt: skip
    count = settings.batch_size * settings.steps
    max_length = min(options.max_length, config.max_length)
    if not data:
        pairs = random_pairs(config, max_length, count)
    elif directory is None:
        raise UserError("--data needs a tokenizer: give --model DIR with it, not random weights")
    else:
        pairs = read_pairs(data, config, directory, max_length, count)
    if len(pairs) < count:
        raise UserError(
            f"{len(pairs)} pairs do not fill {settings.steps} steps of {settings.batch_size}; lower --steps"
        )
    say(f"{settings.loss}, {settings.steps} steps of {settings.batch_size} pairs, micro-batches of"
        f" {settings.micro_tokens} tokens, on {describe(device, settings.run)}")  # fmt: skip

    result: dict[str, object] = {
        "model": name,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }
    result |= {"device": describe(device, settings.run)} | settings.as_dict()
    if options.grow:
        result["grow"] = [row._asdict() for row in growth(config, settings, device)]
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        places = write_for_children(Path(temporary), model, directory, pairs, settings)
        result |= measure(model, pairs, settings, device)
        ours = run_child("ours", places)
        result["ours"] = ours._asdict()
        tell("a process of its own", [("first step done after, s", ours.seconds_to_first_step),
             ("peak memory, MiB", ours.peak_bytes / 2**20)])  # fmt: skip
        if options.against:
            del model
            result["against"] = against(options.against, places, pairs, settings, device, ours)
    print(json.dumps(result))


def parse(arguments: list[str]) -> argparse.Namespace:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m minidpo bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--model", metavar="DIR", help="a model directory; a config.json alone means random weights"
    )
    which.add_argument(
        "--config", metavar="FILE.toml", help="a run's configuration: its model, data and settings"
    )
    which.add_argument("--shape", choices=SHAPES, help="random weights of a named shape")
    parser.add_argument(
        "--data", metavar="FILE", action="append", help="preference file (default: random pairs)"
    )
    parser.add_argument("--max-length", type=int, default=512, help="most tokens of prompt + one ending")
    parser.add_argument("--loss", choices=LOSSES, help=f"default {default.loss}")
    parser.add_argument(
        "--dtype", choices=("bf16", "float32"), help="bf16 (autocast, the default) or float32"
    )
    parser.add_argument("--batch-size", type=int, help=f"pairs a step (default {default.batch_size})")
    parser.add_argument(
        "--micro-tokens", type=int, help=f"tokens a pass holds (default {default.micro_tokens})"
    )
    parser.add_argument("--steps", type=int, help=f"steps measured (default {default.steps})")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--compile", action="store_true", default=None, help="torch.compile the layers")
    parser.add_argument("--activation-checkpointing", action="store_true", default=None)
    parser.add_argument(
        "--against", choices=OPPONENTS, help="in turn with the textbook's step, or with TRL's"
    )
    parser.add_argument(
        "--grow", action="store_true", help="how cost grows with each length, batch, vocabulary, depth"
    )
    return parser.parse_args(arguments)


def settings_of(options: argparse.Namespace) -> tuple[Settings, list[str]]:
    """Defaults, then the run's configuration, then what was typed; and the data files. Sets options.model."""
    settings = Settings(loss=options.loss or "dpo")
    data: list[str] = []
    if options.config:
        settings, options.model, data = from_run_config(options.config, settings)
    typed = {
        name: getattr(options, name)
        for name in settings.as_dict()
        if getattr(options, name, None) is not None
    }
    if "dtype" in typed:
        typed["dtype"] = {"bf16": "bf16", "float32": "fp32"}[typed["dtype"]]
    settings = replace(settings, **typed)
    for name, least in {"batch_size": 1, "micro_tokens": 1, "steps": 1, "threads": 0}.items():
        if getattr(settings, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(settings, name)}; it must be at least {least}"
            )
    if options.max_length < 8:
        raise UserError(f"--max-length {options.max_length}; it must be at least 8")
    return settings, options.data or data


def measure(
    model: Transformer, pairs: PairTokens, settings: Settings, device: torch.device
) -> dict[str, object]:
    """Our step alone: rates, utilisation and stages."""
    step = Step(copy.deepcopy(model), pairs, settings, device)
    batches = np.split(np.arange(len(pairs)), settings.steps)
    step(batches[0])  # warms up
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    times, peaks, shares = [], [], []
    for batch in batches:  # the peak anew before each step: what else a shared machine does changes it too
        peaks.append({name: matmul_peak(device, dtype) for name, dtype in dtypes.items()})
        times.append(seconds(step, batch, device))
        rate = necessary_flops(model.config, pairs.lengths[batch], step.wanted).total / times[-1]
        shares.append({name: rate / peak for name, peak in peaks[-1].items()})
    total = sum(times)
    flops = necessary_flops(model.config, pairs.lengths, step.wanted)
    step_seconds = spread(times)
    rates = {
        "pairs_per_s": len(pairs) / total,
        "logical_tokens_per_s": textbook_tokens(pairs.lengths, step.wanted) / total,
        "processed_tokens_per_s": float(step.tokens.sum()) / total,
        "necessary_tflops_per_step": flops.total / settings.steps / 1e12,
        "tflops_per_s": flops.total / total / 1e12,
    }
    peak_tflops = {name: statistics.median(peak[name] for peak in peaks) / 1e12 for name in dtypes}
    utilisation = {
        "utilisation": spread([share[settings.dtype] for share in shares]),
        "utilisation_of_float32_peak": spread([share["fp32"] for share in shares]),
    }
    tell("our step", [
        ("seconds a step, median (quartiles)", quartiles(step_seconds)),
        ("pairs/s", rates["pairs_per_s"]),
        ("hours for a million such pairs", 1e6 / rates["pairs_per_s"] / 3600),
        ("logical tokens/s (two rows a pair)", rates["logical_tokens_per_s"]),
        ("processed tokens/s", rates["processed_tokens_per_s"]),
        ("necessary TFLOP a step", rates["necessary_tflops_per_step"]),
        ("  in layers, attention, output, %", " ".join(f"{100 * part / flops.total:.0f}" for part in flops)),
        ("matrix product peak bf16, float32, TFLOP/s", "{bf16:.3g}, {fp32:.3g}".format(**peak_tflops)),
        ("utilisation of the dtype's peak (quartiles)", quartiles(utilisation["utilisation"])),
        ("utilisation of the float32 peak (quartiles)", quartiles(utilisation["utilisation_of_float32_peak"])),
    ])  # fmt: skip
    every = [step.in_stages(batch) for batch in batches]
    stages = {name: sum(each[name] for each in every) / len(every) for name in every[0]}
    whole = sum(stages.values())
    rows = [(name, f"{1000 * s:9.1f} ms {100 * s / whole:5.1f} %") for name, s in stages.items()]
    tell(f"stages of a step (together {1000 * whole:.1f} ms)", rows)
    result: dict[str, object] = {
        "step_seconds": step_seconds,
        **rates,
        "matmul_peak_tflops": peak_tflops,
        **utilisation,
    }
    return result | {"stages": stages}
