"""The frozen reference: its log-probs of every pair that a run draws, computed once and kept beside the run.

The reference never changes, so nothing is gained by computing it again in each step. The stored numbers carry
a fingerprint of all they depend on; with another reference, other data or another precision they are computed
anew.
"""

import gc
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer, require_fit
from minidpo.distributed import broadcast, rank, shard
from minidpo.errors import UserError, one_line
from minidpo.files import fingerprint, read_arrays, replacing_file, write_arrays, writing
from minidpo.log import print0
from minidpo.model import Transformer, load_model, read_config
from minidpo.model.lora import adapters_off
from minidpo.training.run import Run
from minidpo.training.scoring import all_logps, require_finite

Sets = dict[str, tuple[PairTokens, np.ndarray]]  # name -> pairs, and the rows of those that are needed


def require_reference(directory: Path, tokenizer: Tokenizer, max_length: int) -> None:
    """Raises UserError unless the reference takes texts of max_length, and reads the tokens that are meant.

    A directory without tokenizer.json is taken at its word.
    """
    require_fit("reference", read_config(directory), tokenizer, max_length)
    has_tokenizer = (directory / "tokenizer.json").is_file()
    if has_tokenizer and (conflict := tokenizer.conflict(Tokenizer.from_pretrained(directory))):
        what = f"{directory}: its tokenizer has other ids than the model's ({conflict})"
        raise UserError(f"{what}; give a reference of the same family")


def load_reference(directory: str | Path, device: torch.device, dtype: str) -> Transformer:
    """The reference, frozen. It is read from its own directory, never taken from a resumed policy."""
    prepare = partial(shard, device=device, dtype=dtype)
    return load_model(directory, device=device, prepare=prepare).requires_grad_(False)


def reference_or_policy(
    config: DPOConfig, policy: Transformer | None, device: torch.device, dtype: str
) -> Transformer:
    """The reference. Where it is the frozen base of a policy with adapters, it is the policy: whoever uses it
    turns its adapters off, and no second model is in memory."""
    if policy is not None and config.base_is_reference:
        return policy
    return load_reference(config.reference_path, device, dtype)


def with_reference_logps(
    config: DPOConfig,
    run: Run,
    train: PairTokens,
    drawn: np.ndarray,
    held_out: PairTokens,
    policy: Transformer | None = None,
) -> tuple[PairTokens, PairTokens]:
    """Both sets with the reference's log-probs as their column `ref_logps` (n, K), kept in
    OUT/reference.safetensors.

    drawn: the rows of `train` that the run draws; the others, which no step reads, are NaN. policy: it gives
    the numbers, with its adapters off, where the reference is what they were added to.
    """
    sets: Sets = {"train": (train, drawn), "held_out": (held_out, np.arange(len(held_out)))}
    logps = reference_logps(config, run, sets, "reference.safetensors", policy)
    return replace(train, ref_logps=logps["train"]), replace(held_out, ref_logps=logps["held_out"])


def reference_logps(
    config: DPOConfig, run: Run, sets: Sets, name: str, policy: Transformer | None = None
) -> dict[str, np.ndarray]:
    """The reference's log-probs (n, K) of the rows of each set that are needed, NaN elsewhere; they are kept
    in the file OUT/`name`. policy: see `with_reference_logps`."""
    file = run.out / name
    precision = run.dtype
    if policy is not None and config.base_is_reference:
        precision += f" over {config.lora.base_dtype}"
    names = {
        name: fingerprint(run.fingerprints["reference"], precision, pairs.fingerprint())
        for name, (pairs, _) in sets.items()
    }
    logps = broadcast(_read(file, names, sets) if rank() == 0 else {})
    missing = [name for name in sets if name not in logps]
    if missing:
        reference = reference_or_policy(config, policy, run.device, run.dtype)
        for name in missing:
            pairs, rows = sets[name]
            logps[name] = np.full((len(pairs), pairs.responses), np.nan, dtype=np.float32)
            micro_tokens, label = config.optim.micro_tokens, f"reference log-probs, {name}"
            if len(rows):
                selected = pairs.select(rows)
                with adapters_off(reference):
                    of_rows = all_logps(reference, selected, micro_tokens, run.device, run.dtype, label)
                logps[name][rows] = of_rows
                require_finite(logps[name][rows], config.reference_path)
        del reference
        gc.collect()  # Sharded modules refer to one another, so their memory would stay taken.
        if rank() == 0:
            with writing(file), replacing_file(file) as temporary:
                write_arrays(temporary, logps, names)
    return logps


def _read(file: Path, names: dict[str, str], sets: Sets) -> dict[str, np.ndarray]:
    """The sets that `file` holds under these fingerprints, with all the rows that are needed."""
    try:
        stored, known = read_arrays(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        print0(f"reference log-probs: {file} is spoilt ({one_line(error)}) and is computed again")
        return {}
    found = {name: stored[name] for name in names if known.get(name) == names[name]}
    found = {name: logps for name, logps in found.items() if not np.isnan(logps[sets[name][1]]).any()}
    for name in found:
        print0(f"reference log-probs, {name}: read from {file}")
    return found
