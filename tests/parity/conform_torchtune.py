"""torchtune's losses on given log-probs."""

from importlib.metadata import version

from conformance import Program
from torch import Tensor
from torchtune.rlhf import get_batch_log_probs
from torchtune.rlhf.loss import DPOLoss, RSOLoss


def logps(p: dict[str, Tensor]) -> list[Tensor]:
    return [p[name] for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")]


def dpo(s: dict, p: dict[str, Tensor]) -> tuple[str, Tensor]:
    if s["margin_from_data"] or s["length_normalize"] or s["sft_weight"]:
        raise NotImplementedError
    return "DPOLoss", DPOLoss(s["beta"], s["label_smoothing"])(*logps(p))[0]


def hinge(s: dict, p: dict[str, Tensor]) -> tuple[str, Tensor]:
    if s["sft_weight"]:
        raise NotImplementedError
    return "RSOLoss", RSOLoss(s["beta"])(*logps(p))[0]


def gather(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return get_batch_log_probs(logits, tokens.masked_fill(~mask, -100))


def program() -> Program:
    return Program(f"torchtune {version('torchtune')}", dict(dpo=dpo, hinge=hinge), gather, {})
