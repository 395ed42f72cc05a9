"""`python -m minidpo vectors`: test vectors of every loss, for programs in any language.

Inputs, losses and gradients in float64; docs/vectors/README.md documents the format. Every loss is asked at
the settings of its points; the numbers are those of minidpo/losses/, which `verify` holds to the claims.
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace as Pairs
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.files import require_place, write_file
from minidpo.logprobs import sequence_logps
from minidpo.verify.claims import Claims, claims_of, every_loss
from minidpo.verify.draws import draw, evaluate, one_thread, tensors, tied


@one_thread()
def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo vectors", description=about)
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the JSON file to write")
    out = parser.parse_args(arguments).out
    require_place("--out", out)
    cases = [case for name, loss in every_loss().items() for case in _cases(name, loss)]
    gathered = _gatherer()
    write_file(out, _json(cases, gathered))
    pairs = sum(len(case["losses"]) for case in cases)
    print(f"wrote {out}: {len(cases)} cases of {pairs} pairs, {len(gathered)} of the sums of log-probs")


def _json(cases: list[dict], gathered: list[dict]) -> str:
    """One case per line. A float is written as the shortest text that reads back to the same float64."""
    losses, sums = (",\n".join(json.dumps(x, allow_nan=False) for x in xs) for xs in (cases, gathered))
    about = '"format": "minidpo test vectors",\n"version": 1'
    return f'{{\n{about},\n"losses": [\n{losses}\n],\n"gatherer": [\n{sums}\n]\n}}\n'


# --- losses -------------------------------------------------------------------------------------------------


def _cases(name: str, loss_type: type) -> list[dict[str, Any]]:
    claims = claims_of(loss_type)
    drawn = _drawn(claims)
    dtypes = {n: x.dtype for n, x in vars(drawn["draw"]).items()}
    groups: dict[Any, list[dict]] = {}
    for settings, pair, _ in claims.points:
        groups.setdefault(loss_type(**settings), []).append(pair)
    cases = []
    for loss, by_hand in groups.items():
        hand = Pairs(**{n: np.array([pair[n] for pair in by_hand], dtypes[n]) for n in by_hand[0]})
        for kind, p in {"hand": hand, **drawn}.items():
            read = Pairs(**{n: getattr(p, n) for n in claims.fields._fields if n in by_hand[0]})
            about = {"loss": name, "settings": vars(loss), "kind": kind}
            cases.append(about | _outputs(loss, claims, read))
    return cases


def _drawn(claims: Claims) -> dict[str, Pairs]:
    """The pairs that are not computed by hand, every field of them."""

    def drawn(pairs: int, seed: int, scale: float, digits: int) -> Pairs:
        p = draw(claims, pairs, seed, scale)
        return Pairs(**{n: np.round(x, digits) if x.dtype == float else x for n, x in vars(p).items()})

    far, tie, short = drawn(5, 11, 1e5, -4), drawn(3, 12, 40.0, 3), drawn(2, 13, 40.0, 3)
    far.chosen[0] = far.rejected[1] = 0.0  # a certain response
    for name, values in vars(short).items():
        if name.endswith("_length"):
            values[:] = 1
    return {"draw": drawn(5, 10, 40.0, 3), "extreme": far, "tie": tied(tie, 0, 1), "length 1": short}


def _outputs(loss: Any, claims: Claims, p: Pairs) -> dict[str, Any]:
    losses, gradients = evaluate(loss, tensors(claims, p))
    return {
        "inputs": {name: values.tolist() for name, values in vars(p).items()},
        "losses": (losses + 0.0).tolist(),  # -0.0 becomes 0.0
        "gradients": {name: (gradient + 0.0).tolist() for name, gradient in gradients.items()},
    }


# --- the gatherer -------------------------------------------------------------------------------------------


def _gatherer() -> list[dict[str, Any]]:
    """Cases of `sequence_logps`: logits, tokens and mask to sums and counts."""
    rng = np.random.default_rng(14)
    # By hand: the logits are logarithms of 1/2, 1/4, 1/4, in another order at each position: ln 1/2 + ln 1/4.
    probabilities = [[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]]
    logits, tokens = np.round(rng.normal(0, 3, (3, 6, 5)), 3), rng.integers(0, 5, (3, 6))
    # A prompt of 1, 2 or 3 tokens, then a response, then padding, whose id is that of a real token.
    mask = [[0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 0, 0]]
    far = np.array([[[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]]])
    return [
        _gathered("hand", np.log(probabilities), np.array([[0, 0, 2]]), [[0, 1, 1]]),
        _gathered("draw", logits, tokens, mask),
        _gathered("extreme", far, np.array([[0, 0, 0]]), [[0, 1, 1]]),  # 0 and -20,000 nats
        _gathered("length 1", logits[:1], tokens[:1], [[0, 0, 1, 0, 0, 0]]),
    ]


def _gathered(kind: str, logits: np.ndarray, tokens: np.ndarray, mask: list[list[int]]) -> dict[str, Any]:
    leaf: Tensor = torch.tensor(logits).requires_grad_()
    sums, counts = sequence_logps(leaf, torch.tensor(tokens), torch.tensor(mask, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(sums.sum(), leaf)
    inputs = {"logits": logits.tolist(), "tokens": tokens.tolist(), "response_mask": mask}
    outputs = {"sums": sums.tolist(), "counts": counts.tolist(), "gradients": {"logits": gradient.tolist()}}
    return {"kind": kind, "inputs": inputs} | outputs
