"""The frozen reference: its log-probs of every pair that a run draws, computed once and kept beside the run.

The stored numbers carry a fingerprint of all they depend on: the reference, the data and the precision.
"""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer, require_fit
from minidpo.distributed import all_gather, rank, shard
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, read_arrays, replacing_file, write_arrays, writing
from minidpo.log import print0
from minidpo.model import Transformer, load_model, read_config, require_language_model
from minidpo.model.lora import adapters_off
from minidpo.training.run import Run
from minidpo.training.scoring import all_logps, require_finite

Sets = dict[str, tuple[PairTokens, np.ndarray]]  # name -> pairs, and the rows of those that are needed


def require_reference(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError unless the reference takes such texts and its tokenizer, if any, has our ids."""
    require_fit("reference", read_config(directory), tokenizer, max_length)
    require_language_model(directory)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    if has_tokenizer and (conflict := tokenizer.conflict(Tokenizer.from_pretrained(directory))):
        what = f"{directory}: its tokenizer has other ids than the model's ({conflict})"
        raise UserError(f"{what}; give a reference of the same family")


def load_reference(config: DPOConfig, policy: Transformer, device: torch.device, dtype: str) -> Transformer:
    """The frozen reference. Where it is the base of a policy with adapters, it is the policy, whose adapters
    are to be turned off, and no second model is in memory."""
    if config.base_is_reference:
        return policy
    prepare = partial(shard, device=device, dtype=dtype)
    return load_model(config.reference_path, device=device, prepare=prepare).requires_grad_(False)


def with_reference_logps(
    config: DPOConfig,
    run: Run,
    train: PairTokens,
    drawn: np.ndarray,
    held_out: PairTokens,
    policy: Transformer,
) -> tuple[PairTokens, PairTokens]:
    """Both sets with the reference's log-probs as their column `ref_logps` (n, K). In that of `train`, rows
    that are not `drawn`, which no step reads, are NaN."""
    sets: Sets = {"train": (train, drawn), "held_out": (held_out, np.arange(len(held_out)))}
    logps = reference_logps(config, run, sets, run.out / "reference.safetensors", policy)
    return replace(train, ref_logps=logps["train"]), replace(held_out, ref_logps=logps["held_out"])


def reference_logps(
    config: DPOConfig, run: Run, sets: Sets, file: Path, policy: Transformer
) -> dict[str, np.ndarray]:
    """The reference's log-probs (n, K) of the needed rows of each set, NaN elsewhere; kept in `file`."""
    micro_tokens = config.optim.micro_tokens
    over = config.lora.base_dtype if config.base_is_reference else ""
    data = (pairs.fingerprint() for pairs, _ in sets.values())
    about = {"made of": fingerprint(run.identity["reference"], run.dtype, over, *data)}
    logps, *_ = all_gather(_read(file, about, sets) if rank() == 0 else {})  # those of rank 0
    if logps:
        return logps
    reference = load_reference(config, policy, run.device, run.dtype)
    for name, (pairs, rows) in sets.items():
        logps[name] = np.full((len(pairs), pairs.responses), np.nan, dtype=np.float32)
        if len(rows):
            label = f"reference log-probs, {name}"
            with adapters_off(reference):
                of_rows = all_logps(reference, pairs.select(rows), micro_tokens, run.device, run.dtype, label)
            require_finite(of_rows, config.reference_path)
            logps[name][rows] = of_rows
    del reference
    gc.collect()  # Sharded modules refer to one another, so their memory would stay taken.
    if rank() == 0:
        with writing(file), replacing_file(file) as temporary:
            write_arrays(temporary, logps, about)
    return logps


def _read(file: Path, about: dict[str, str], sets: Sets) -> dict[str, np.ndarray]:
    """What `file` holds, if it is `about` these sets and has all the rows that are needed; else nothing."""
    try:
        logps, known = read_arrays(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print0(f"reference log-probs: {file} is spoilt ({one_line(error)}) and is computed again")
        return {}
    if known != about or any(np.isnan(logps[name][rows]).any() for name, (_, rows) in sets.items()):
        return {}
    print0(f"reference log-probs: read from {file}")
    return logps
