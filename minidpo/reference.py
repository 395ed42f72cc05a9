"""The frozen reference: its log-probs of every pair, computed once before training and kept beside the run.

It never changes, so nothing is gained by computing it again each step. The stored numbers carry a fingerprint
of all they depend on; another reference, other data or another precision, and they are computed anew.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from minidpo.device import autocast, row_length
from minidpo.files import fingerprint, replacing_file, writing
from minidpo.logprobs import response_logps
from minidpo.metrics import Progress, say
from minidpo.model import Transformer
from minidpo.packing import PairTokens, Wanted, micro_batches, pack_row
from minidpo.weights import load_model, model_fingerprint

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
        return response_logps(self._model, packed)


def load_reference(directory: str | Path, device: torch.device) -> Transformer:
    """The reference from its own directory, never from a resumed policy; frozen."""
    return load_model(directory, device=device).requires_grad_(False)


def stored_logps(
    file: Path,
    directory: str | Path,
    sets: dict[str, PairTokens],
    micro_tokens: int,
    device: torch.device,
    dtype: str,
) -> dict[str, np.ndarray]:
    """Reference log-probs (pairs, 2) of each set: read from `file` if its fingerprint fits, else computed and stored."""
    identity = fingerprint(model_fingerprint(directory), dtype, *map(pairs_fingerprint, sets.values()))
    if file.exists():
        try:
            with safe_open(file, framework="numpy") as stored:
                if (stored.metadata() or {}).get("fingerprint") == identity:
                    say(f"reference log-probs: read from {file}")
                    return {name: stored.get_tensor(name) for name in sets}
        except (SafetensorError, OSError):
            say(f"reference log-probs: {file} is torn and is computed again")
    model = load_reference(directory, device)
    logps = {
        name: all_logps(model, pairs, micro_tokens, device, dtype, f"reference log-probs, {name}")
        for name, pairs in sets.items()
    }
    with writing(file), replacing_file(file) as temporary:
        save_file(logps, temporary, metadata={"fingerprint": identity})
    return logps


@torch.no_grad()
def all_logps(
    model: Transformer, pairs: PairTokens, micro_tokens: int, device: torch.device, dtype: str, label: str
) -> np.ndarray:
    """Summed log-probs of both endings of every pair under `model`: (pairs, 2) float32, nats."""
    logps = np.zeros((len(pairs), 2), dtype=np.float32)
    progress = Progress(label, len(pairs), "pairs")
    every = np.arange(len(pairs))
    for members in micro_batches(every, pairs.lengths.sum(axis=1), micro_tokens):
        row = pack_row(pairs.select(members), BOTH_ENDINGS, row_length(device, micro_tokens)).to(device)
        with autocast(device, dtype):
            logps[members] = response_logps(model, row).float().cpu().numpy()
        progress.advance(len(members))
    progress.close()
    return logps


def pairs_fingerprint(pairs: PairTokens) -> str:
    """Of the token ids and margins themselves: whatever changes them (files, tokenizer, limits, split) changes it."""
    digest = hashlib.blake2b(digest_size=16)
    for start, end in pairs.bounds[:, [0, 3]]:  # one after the other: all at once would be a copy of the data
        digest.update(pairs.ids[start:end])
    margin = b"" if pairs.margin is None else pairs.margin.tobytes()
    return fingerprint(digest.digest(), pairs.lengths.tobytes(), margin)
