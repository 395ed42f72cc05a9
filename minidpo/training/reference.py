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
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minidpo.config import DPOConfig
from minidpo.data import PairTokens
from minidpo.distributed import broadcast, rank, shard
from minidpo.files import fingerprint, replacing_file, writing
from minidpo.log import print0
from minidpo.model import Transformer, load_model
from minidpo.training.run import Run
from minidpo.training.scoring import all_logps

Sets = dict[str, tuple[PairTokens, np.ndarray]]  # name -> pairs, and the rows of those that are needed


def load_reference(directory: str | Path, device: torch.device, dtype: str) -> Transformer:
    """The reference, frozen. It is read from its own directory, never taken from a resumed policy."""
    prepare = partial(shard, device=device, dtype=dtype)
    return load_model(directory, device=device, prepare=prepare).requires_grad_(False)


def with_reference_logps(
    config: DPOConfig, run: Run, train: PairTokens, drawn: np.ndarray, held_out: PairTokens
) -> tuple[PairTokens, PairTokens]:
    """Both sets with the reference's log-probs as their column `ref_logps` (n, 2), kept in
    OUT/reference.safetensors.

    drawn: the rows of `train` that the run draws; the others, which no step reads, are NaN.
    """
    file = run.out / "reference.safetensors"
    sets: Sets = {"train": (train, drawn), "held_out": (held_out, np.arange(len(held_out)))}
    names = {
        name: fingerprint(run.fingerprints["reference"], run.dtype, pairs.fingerprint())
        for name, (pairs, _) in sets.items()
    }
    logps = broadcast(_read(file, names, sets) if rank() == 0 else {})
    missing = [name for name in sets if name not in logps]
    if missing:
        reference = load_reference(config.reference_path, run.device, run.dtype)
        for name in missing:
            pairs, rows = sets[name]
            logps[name] = np.full((len(pairs), 2), np.nan, dtype=np.float32)
            micro_tokens, label = config.optim.micro_tokens, f"reference log-probs, {name}"
            if len(rows):
                selected = pairs.select(rows)
                logps[name][rows] = all_logps(reference, selected, micro_tokens, run.device, run.dtype, label)
        del reference
        gc.collect()  # Sharded modules refer to one another, so their memory would stay taken.
        if rank() == 0:
            with writing(file), replacing_file(file) as temporary:
                save_file(logps, temporary, metadata=names)
    return replace(train, ref_logps=logps["train"]), replace(held_out, ref_logps=logps["held_out"])


def _read(file: Path, names: dict[str, str], sets: Sets) -> dict[str, np.ndarray]:
    """The sets that `file` holds under these fingerprints, with all the rows that are needed."""
    found: dict[str, np.ndarray] = {}
    if not file.exists():
        return found
    try:
        with safe_open(file, framework="numpy") as stored:
            known = stored.metadata() or {}
            for name in (name for name in names if known.get(name) == names[name]):
                logps = stored.get_tensor(name)
                if not np.isnan(logps[sets[name][1]]).any():
                    found[name] = logps
    except (SafetensorError, OSError):
        print0(f"reference log-probs: {file} is torn and is computed again")
        return {}
    for name in found:
        print0(f"reference log-probs, {name}: read from {file}")
    return found
