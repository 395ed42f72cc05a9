"""torchtune's losses on given log-probs."""

from importlib.metadata import version

from conformance import Pair, Program
from torch import Tensor
from torchtune.rlhf import get_batch_log_probs
from torchtune.rlhf.loss import DPOLoss, RSOLoss


def loss(s: dict, p: Pair) -> tuple[str, Tensor]:
    if s.get("margin_from_data") or s.get("length_normalize") or s["sft_weight"]:
        raise NotImplementedError
    made = DPOLoss(s["beta"], s["label_smoothing"]) if "label_smoothing" in s else RSOLoss(s["beta"])
    return type(made).__name__, made(*(p[x] for x in ("chosen", "rejected", "ref_chosen", "ref_rejected")))[0]


def gather(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return get_batch_log_probs(logits, tokens.masked_fill(~mask, -100))


def program() -> Program:
    return Program(f"torchtune {version('torchtune')}", dict(dpo=loss, hinge=loss), gather, {})
