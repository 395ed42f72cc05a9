"""The frozen reference: its log-probs of every pair that a run draws, computed once before training and kept beside the run.

It never changes, so nothing is gained by computing it again each step. The stored numbers carry a fingerprint
of all they depend on; another reference, other data or another precision, and they are computed anew.
"""

import gc
import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from minidpo.device import autocast, row_length
from minidpo.distributed import from_first, let_go, rank, ranks, shard, summed
from minidpo.files import fingerprint, replacing_file, writing
from minidpo.logprobs import response_logps
from minidpo.metrics import Progress, say
from minidpo.model import Transformer
from minidpo.packing import PackedRow, PairTokens, Wanted, micro_batches, pack_row
from minidpo.weights import load_model

BOTH_ENDINGS = Wanted(chosen_logps=True, rejected_logps=True)


class StoredReference:
    """Precomputed reference log-probs, addressed by where a pair stands in its set."""

    def __init__(self, logps: np.ndarray, device: torch.device) -> None:
        self._logps, self._device = logps, device  # (pairs, 2) float32: chosen, rejected

    def logps(self, rows: np.ndarray, packed: object) -> Tensor:
        return torch.from_numpy(self._logps[rows]).to(self._device)


class LiveReference:
    """The reference model run alongside the policy, on the same packed row."""

    def __init__(self, model: Transformer) -> None:
        self._model = model

    @torch.no_grad()
    def logps(self, rows: np.ndarray, packed) -> Tensor:
        logps = response_logps(self._model, packed)
        let_go(self._model)
        return logps


def load_reference(directory: str | Path, device: torch.device, dtype: str) -> Transformer:
    """The reference from its own directory, never from a resumed policy; frozen. dtype: "bf16" or "fp32"."""
    prepare = partial(shard, device=device, dtype=dtype)
    return load_model(directory, device=device, prepare=prepare).requires_grad_(False)


def stored_logps(
    file: Path,
    directory: str | Path,
    reference_fingerprint: str,
    sets: dict[str, tuple[PairTokens, np.ndarray]],
    micro_tokens: int,
    device: torch.device,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Reference log-probs (pairs, 2) of each set, NaN outside the rows asked for unless `file` has them.

    sets: name -> pairs, and which of them are wanted. Those that `file` holds for the same pairs, reference and dtype are
    read, the others computed and added to it. reference_fingerprint: of the model in `directory`, by `model_fingerprint`.
    """
    identities = {
        name: fingerprint(reference_fingerprint, dtype, pairs_fingerprint(pairs))
        for name, (pairs, _) in sets.items()
    }
    logps = from_first(_read(file, identities) if rank() == 0 and file.exists() else {})
    missing = {}
    for name, (pairs, rows) in sets.items():
        known = logps.setdefault(name, np.full((len(pairs), 2), np.nan, dtype=np.float32))
        missing[name] = rows[np.isnan(known[rows, 0])]
        if found := len(rows) - len(missing[name]):
            say(f"reference log-probs, {name}: {found} of {len(rows)} pairs read from {file}")
    if any(map(len, missing.values())):
        model = load_reference(directory, device, dtype)
        for name, rows in missing.items():
            if not len(rows):
                continue
            label = f"reference log-probs, {name}"
            pairs = sets[name][0].select(rows)
            logps[name][rows] = all_logps(model, pairs, micro_tokens, device, dtype, label)
        del model
        gc.collect()  # sharded modules refer to one another: their memory would stay taken while the policy trains
        if rank() == 0:
            with writing(file), replacing_file(file) as temporary:
                save_file(logps, temporary, metadata=identities)
    return logps


def _read(file: Path, identities: dict[str, str]) -> dict[str, np.ndarray]:
    """The sets in `file` that have these identities."""
    try:
        with safe_open(file, framework="numpy") as stored:
            known = stored.metadata() or {}
            return {
                name: stored.get_tensor(name) for name in identities if known.get(name) == identities[name]
            }
    except (SafetensorError, OSError):
        say(f"reference log-probs: {file} is torn and is computed again")
        return {}


def all_logps(
    model: Transformer, pairs: PairTokens, micro_tokens: int, device: torch.device, dtype: str, label: str
) -> np.ndarray:
    """Summed log-probs of both endings of every pair under `model`: (pairs, 2) float32, nats."""
    compute = partial(response_logps, model)
    return of_every_pair(compute, BOTH_ENDINGS, pairs, micro_tokens, device, dtype, label)


@torch.no_grad()
def of_every_pair(
    compute: Callable[[PackedRow], Tensor],
    wanted: Wanted,
    pairs: PairTokens,
    micro_tokens: int,
    device: torch.device,
    dtype: str,
    label: str = "",
) -> np.ndarray:
    """compute(row) -> (B, 2) over all pairs, without gradients: (pairs, 2) float32. A label makes a progress line.

    Each rank computes its share and all return the whole.
    """
    values = np.zeros((len(pairs), 2), dtype=np.float32)
    own = micro_batches(np.arange(len(pairs)), pairs.lengths.sum(axis=1), micro_tokens, rank(), ranks())
    progress = Progress(label, sum(map(len, own)), "pairs")
    for members in own:
        row = pack_row(pairs.select(members), wanted, row_length(device, micro_tokens)).to(device)
        with autocast(device, dtype):
            values[members] = compute(row).float().cpu().numpy()
        if label:
            progress.advance(len(members))
    if label:
        progress.close()
    return summed(torch.from_numpy(values)).numpy()


def pairs_fingerprint(pairs: PairTokens) -> str:
    """Of the token ids and margins themselves: whatever changes them (files, tokenizer, limits, split) changes it."""
    digest = hashlib.blake2b(digest_size=16)
    for start, end in pairs.bounds[:, [0, 3]]:  # one after the other: all at once would be a copy of the data
        digest.update(pairs.ids[start:end].data)
    margin = b"" if pairs.margin is None else pairs.margin.tobytes()
    return fingerprint(digest.digest(), pairs.lengths.tobytes(), margin)
