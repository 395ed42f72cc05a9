"""`python -m minidpo bench`: the speed and memory of an optimizer step here, and of others beside it.

    python -m minidpo bench --shape A --against textbook
    python -m minidpo bench --model models/mine --data pairs.jsonl --against trl:best
    python -m minidpo bench --config configs/hh_rm.toml --loss rm

The step is the one of train_dpo.py, or of train_rm.py without its language-modelling loss. The reference's
log-probs are computed beforehand. The last line printed is the same numbers as JSON.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minidpo.config import load_config
from minidpo.errors import UserError
from minidpo.log import print0
from minidpo.losses import DPO, LOSSES
from minidpo.model import Transformer, read_config
from minidpo.packing import pack
from minidpo.sections import DPOConfig, RewardConfig
from minidpo.settings import toml
from minidpo.tools.bench_steps import SHAPES, STEPS, Case, data_sheet_peak, make_case, matmul_peak, now
from minidpo.tools.bench_trl import NAMES, require_trl, train_trl
from minidpo.training.device import choose_device, describe

RM = "rm"  # the name of train_rm.py's loss on the command line
# Keys of a configuration that are options of this command, such as --batch-size.
KEYS = """optim.batch_size optim.micro_tokens run.dtype run.device run.threads run.compile
    run.activation_checkpointing run.attention""".split()


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        config = config_of(options, Path(temporary))
        optim, passes = config.optim, options.their_passes
        if config.loss.needs_z0 or config.loss.margin_from_data:
            raise UserError(f"bench has neither z0 nor margins, which {config.loss} reads")
        if options.against in NAMES:
            require_trl(config.loss)
        elif options.against and config.loss != DPO(beta=getattr(config.loss, "beta", 0.1)):
            raise UserError(
                f"--against textbook: minidpo/textbook.py has plain DPO alone, and this is {config.loss}"
            )
        if passes < 1 or optim.batch_size % passes:
            raise UserError(f"--their-passes {passes} must divide the {optim.batch_size} pairs of a step")
        case = make_case(options, config, Path(temporary))
        result = {"model": options.shape or config.model.path, "loss": str(config.loss)}
        result |= {"steps": options.steps, "batch_size": optim.batch_size, "micro_tokens": optim.micro_tokens}
        result |= {"device": describe(case.device, config.run), "torch": torch.__version__}
        result |= measure(case, options.against)
    for name, value in result.items():
        if isinstance(value, dict):
            value = "{median:.3g} ({q25:.3g} to {q75:.3g})".format(**value)
        print0(f"{name:<24} {value:.4g}" if isinstance(value, float) else f"{name:<24} {value}")
    print(json.dumps(result))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minidpo bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    which.add_argument("--shape", choices=SHAPES, help="random weights of a named shape")
    which.add_argument("--model", metavar="DIR", help="a model directory")
    which.add_argument("--config", metavar="FILE", help="a run's configuration: its model, data and settings")
    add("--data", metavar="FILE", action="append", help="preferences; default: random pairs")
    losses = [name for name, kind in LOSSES.items() if not kind.needs_z0]
    add("--loss", choices=(*losses, RM), help=f"default {DPO.name}")
    add("--steps", type=int, default=10, help="steps measured (default 10)")
    add("--against", choices=("textbook", *NAMES), help="another's steps in turn with ours")
    add("--their-passes", type=int, default=1, help="TRL: passes of a step whose pairs do not fit at once")
    for key in KEYS:
        option = "--" + key.partition(".")[2].replace("_", "-")
        add(option, dest=key, nargs="?", const="true", help=f"as {key} of a configuration")
    return parser.parse_args(arguments)


def config_of(options: argparse.Namespace, temporary: Path) -> DPOConfig | RewardConfig:
    """The configuration that is named, or else the defaults, with what was typed on top of it."""
    if options.steps < 1:
        raise UserError(f"--steps {options.steps}; it must be >= 1")
    if options.data and options.shape:
        raise UserError("--data needs a tokenizer: give --model DIR that has one, not --shape")
    file = Path(options.config or temporary / "defaults.toml")
    if not options.config:
        model = toml(options.model or str(temporary / "model"))
        file.write_text(f'model.path = {model}\ndata.train = ["-"]\noptim.batch_size = 8\nrun.out = "-"\n')
    typed = {key: vars(options)[key] for key in KEYS if vars(options)[key] is not None}
    typed |= {"data.eval": "", "data.eval_pairs": "0"}  # Steps may take every pair.
    if options.data:
        typed["data.train"] = toml(options.data)  # A name may have a comma.
    kind: type = RewardConfig if options.loss == RM else DPOConfig
    if kind is RewardConfig:
        typed |= {"loss.lm_weight": "0", "loss.margin_from_data": "false"}
    elif options.loss:
        typed["loss.name"] = options.loss
    return load_config(kind, [str(file), *(f"--{key}={value}" for key, value in typed.items())])


def measure(case: Case, opponent: str | None = None) -> dict[str, Any]:
    """What our step costs, and what an opponent's costs on the same pairs, in turn with ours."""
    times, batches, peaks = take_steps(case, opponent)
    torch.cuda.empty_cache()  # The processes that measure memory share the GPU.
    theirs, own = np.array(times[1:]).T  # The first step warms up.
    tokens = case.pairs.token_counts(case.config.loss.responses)[np.concatenate(batches[1:])]
    flops = np.array([necessary_flops(case, batch) for batch in batches[1:]])
    result: dict[str, Any] = {
        "step_seconds": spread(own),
        "pairs_per_s": len(tokens) / own.sum(),
        "tokens_per_s": tokens.sum() / own.sum(),
        "tflop_per_step": flops.mean() / 1e12,
        "matmul_peak_tflop_per_s": np.median(peaks) / 1e12,
        "utilisation": spread(flops / own / peaks[1:]),
    }
    if on_paper := data_sheet_peak(case.device, case.config.run.dtype):
        result["data_sheet_tflop_per_s"] = on_paper / 1e12
        result["utilisation_of_data_sheet"] = spread(flops / own / on_paper)
    result["peak_mib"] = peak_mib(case, "ours")
    if opponent:
        result |= {"against": opponent, "their_step_seconds": spread(theirs)}
        result |= {"time_ratio": spread(theirs / own), "their_peak_mib": peak_mib(case, opponent)}
        result["memory_ratio"] = result["their_peak_mib"] / result["peak_mib"]
    return result


def take_steps(case: Case, opponent: str | None) -> tuple[list[tuple[float, float]], list, list[float]]:
    """Seconds of each step (theirs, ours), the rows of its pairs, and the machine's peak just before ours."""
    step, peaks = STEPS["ours"](case), []

    def seconds(step: Callable[[np.ndarray], float], batch: np.ndarray) -> float:
        started = now(case.device)
        step(batch)
        return now(case.device) - started

    def ours(batch: np.ndarray) -> float:
        # The peak is measured anew each time, because what else a machine does changes both.
        peaks.append(matmul_peak(case.device, case.config.run.dtype))
        return seconds(step, batch)

    batches = [case.batches()[0], *case.batches()]
    if opponent in NAMES:
        times, batches = train_trl(case, len(batches), ours)
    else:
        theirs = STEPS[opponent](case) if opponent else None
        times = [(seconds(theirs, batch) if theirs else 0.0, ours(batch)) for batch in batches]
    return times, batches, peaks


def spread(values: np.ndarray) -> dict[str, float]:
    return dict(zip(("q25", "median", "q75"), np.quantile(values, (0.25, 0.5, 0.75)).tolist(), strict=True))


def peak_mib(case: Case, who: str) -> float:
    """Peak memory of up to four steps in a process of its own."""
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            return process.submit(_peak_mib, case, who).result()
    except BrokenProcessPool:
        raise UserError(
            f"the process of {who} was killed, most likely for its memory; lower --batch-size"
        ) from None


def _peak_mib(case: Case, who: str) -> float:
    """Allocated by PyTorch on CUDA, resident elsewhere."""
    run = case.config.run
    choose_device(run.device, run.threads, run.dtype, run.attention)
    batches = case.batches()[:4]
    if who in NAMES:
        train_trl(case, len(batches))
    else:
        step = STEPS[who](case)
        for batch in batches:
            step(batch)
    if case.device.type == "cuda":
        return torch.cuda.max_memory_allocated(case.device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # On Linux, ru_maxrss would begin with the peak of the process that started this one.
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) / 2**10
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS


def necessary_flops(case: Case, rows: np.ndarray) -> int:
    """FLOPs that the forward and backward pass over these pairs need.

    Counted are the matrix products of one forward pass, and backward as twice that. Attention counts as whole
    rectangles of queries and keys, although half of each is masked. What backward computes a second time
    (logits in chunks, activation checkpointing) does not count.
    """
    count = case.config.loss.responses
    batch = pack(case.pairs, rows, count, scored=0 if case.rewards else count)
    config = read_config(case.directory)
    with torch.device("meta"):  # shapes without memory
        layers = Transformer(config).model.layers
    # Every token meets every weight of the layers' matrices once: a product and a sum are 2 FLOPs.
    products = len(batch.tokens) * sum(p.numel() for p in layers.parameters() if p.ndim == 2)
    # Scored tokens meet the output matrix.
    products += len(batch.targets) * config.hidden_size * config.vocab_size
    # A query of a prompt meets the keys of the prompt, one of a response also its own. Each time E numbers
    # of each head are multiplied with a key's, and then a weight with E numbers of a value.
    sizes = np.diff(batch.bounds, axis=1)  # (P, K + 1): tokens of each prompt and of its responses
    prompts, responses = sizes[:, :1], sizes[:, 1:]
    meetings = (prompts**2).sum() + (responses * (prompts + responses)).sum()
    width = config.num_attention_heads * config.head_dim
    products += config.num_hidden_layers * 2 * width * int(meetings)
    return 3 * 2 * products
