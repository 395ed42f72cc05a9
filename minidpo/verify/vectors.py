"""Test vectors: inputs, losses and gradients in float64, for implementations in any language.

docs/vectors/README.md documents the format. Every loss is asked at the settings of its points; the numbers
are those of minidpo/losses/, which `verify` holds to the claims.
"""

import json
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.logprobs import sequence_logps
from minidpo.verify.claims import Claims, claims_of, every_loss
from minidpo.verify.draws import draw, evaluate, tensors

VERSION = 1


def make_vectors() -> dict[str, Any]:
    """Everything that the file holds; the same at every call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        losses = [case for name, loss in every_loss().items() for case in _cases(name, loss)]
        return {
            "format": "minidpo test vectors",
            "version": VERSION,
            "losses": losses,
            "gatherer": _gatherer(),
        }
    finally:
        torch.set_num_threads(threads)


def to_json(vectors: dict[str, Any]) -> str:
    """One case per line. A float is written as the shortest text that reads back to the same float64."""
    parts = []
    for key, value in vectors.items():
        if isinstance(value, list):
            lines = ",\n".join(json.dumps(case, allow_nan=False) for case in value)
            parts.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


# --- losses -------------------------------------------------------------------------------------------------


def _cases(name: str, loss: Any) -> list[dict[str, Any]]:
    claims, cases = claims_of(loss), []
    for settings in unique([settings for settings, _, _ in claims.points]):
        by_hand = [pair for of, pair, _ in claims.points if of == settings]
        names = [name for name in claims.names if name in by_hand[0]]
        kinds = {"hand": Pairs(**{n: np.array([pair[n] for pair in by_hand]) for n in names})} | _kinds(
            claims
        )
        for kind, p in kinds.items():
            p = Pairs(**{n: x if x.dtype == bool else x * 1.0 for n, x in vars(p).items() if n in names})
            cases.append(
                {"loss": name, "settings": vars(loss(**settings)), "kind": kind}
                | _outputs(loss(**settings), claims, p)
            )
    return cases


def _kinds(claims: Claims) -> dict[str, Pairs]:
    """The pairs that are not computed by hand, every field of them."""

    def drawn(pairs: int, seed: int, scale: float, digits: int) -> Pairs:
        p = draw(claims, pairs, seed, scale)
        return Pairs(**{n: np.round(x, digits) if x.dtype == float else x for n, x in vars(p).items()})

    far, tie, short = drawn(5, 11, 1e5, -4), drawn(3, 12, 40.0, 3), drawn(2, 13, 40.0, 3)
    far.chosen[0] = far.rejected[1] = 0.0  # a certain response
    for name, values in vars(tie).items():
        if "rejected" in name:  # the responses of pair 0 are alike
            values[0] = getattr(tie, name.replace("rejected", "chosen"))[0]
        if name.startswith("ref_"):  # the policy of pair 1 is the reference
            values[1] = getattr(tie, name.removeprefix("ref_"))[1]
    for name in ("chosen", "rejected"):
        if hasattr(short, f"{name}_length"):
            getattr(short, f"{name}_length")[:] = 1
    return {"draw": drawn(5, 10, 40.0, 3), "extreme": far, "tie": tie, "length 1": short}


def _outputs(loss: Any, claims: Claims, p: Pairs) -> dict[str, Any]:
    whole = [name for name in vars(p) if name.endswith("_length")]
    p = Pairs(**vars(p) | {name: getattr(p, name).astype(int) for name in whole})
    losses, gradients = evaluate(loss, tensors(claims, p))
    return {
        "inputs": {name: values.tolist() for name, values in vars(p).items()},
        "losses": (losses + 0.0).tolist(),  # -0.0 becomes 0.0
        "gradients": {name: (gradient + 0.0).tolist() for name, gradient in gradients.items()},
    }


def unique(settings: list[dict]) -> list[dict]:
    return [one for i, one in enumerate(settings) if one not in settings[:i]]


# --- the gatherer -------------------------------------------------------------------------------------------


def _gatherer() -> list[dict[str, Any]]:
    """Cases of `sequence_logps`: logits, tokens and mask to sums and counts."""
    rng = np.random.default_rng(14)
    # By hand: the logits are logarithms of 1/2, 1/4, 1/4, in another order at each position.
    half, quarter = float(np.log(0.5)), float(np.log(0.25))
    rows = [[[half, quarter, quarter], [quarter, half, quarter], [quarter, quarter, half]]]
    by_hand = (np.array(rows), np.array([[0, 0, 2]]), np.array([[0, 1, 1]]))  # ln 1/2 + ln 1/4
    logits, tokens = np.round(rng.normal(0, 3, (3, 6, 5)), 3), rng.integers(0, 5, (3, 6))
    # A prompt of 1, 2 or 3 tokens, then a response, then padding, whose id is that of a real token.
    mask = np.array([[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0]])
    far = np.array([[[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]]])
    return [
        _gathered("hand", *by_hand),
        _gathered("draw", logits, tokens, mask),
        _gathered("extreme", far, np.array([[0, 0, 0]]), np.array([[0, 1, 1]])),  # 0 and -20,000 nats
        _gathered("length 1", logits[:1], tokens[:1], np.array([[0, 0, 1, 0, 0, 0]])),
    ]


def _gathered(kind: str, logits: np.ndarray, tokens: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    leaf: Tensor = torch.tensor(logits).requires_grad_()
    sums, counts = sequence_logps(leaf, torch.tensor(tokens), torch.tensor(mask, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(sums.sum(), leaf)
    inputs = {"logits": logits.tolist(), "tokens": tokens.tolist(), "response_mask": mask.tolist()}
    outputs = {"sums": sums.tolist(), "counts": counts.tolist(), "gradients": {"logits": gradient.tolist()}}
    return {"kind": kind, "inputs": inputs} | outputs
