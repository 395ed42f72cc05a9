"""Liger-Kernel's chunked losses on given log-probs: the functions that it fuses with the output layer."""

from importlib.metadata import version

import torch
from conformance import Pair, Program, averages
from liger_kernel.chunked_loss.dpo_loss import LigerFusedLinearDPOFunction
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
from liger_kernel.chunked_loss.kto_loss import LigerFusedLinearKTOFunction
from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction
from liger_kernel.chunked_loss.simpo_loss import LigerFusedLinearSimPOFunction
from torch import Tensor

PAIR = torch.zeros(2, 1)  # it reads the number of texts from the shape of their targets


def with_nll(s: dict, p: Pair, losses: tuple[Tensor, ...]) -> Tensor:
    """What it adds of the chosen response with compute_nll_loss."""
    return losses[0] - s["sft_weight"] * averages(p)[0] if s["sft_weight"] else losses[0]


def of_dpo(kind: str, smoothing: str = ""):
    def loss(s: dict, p: Pair) -> tuple[str, Tensor]:
        if s.get("margin_from_data") or s.get("length_normalize"):
            raise NotImplementedError
        logps = (p["chosen"], p["rejected"], PAIR, p["ref_chosen"], p["ref_rejected"])
        settings = dict(beta=s["beta"], loss_type=kind, label_smoothing=s.get(smoothing, 0.0))
        losses = LigerFusedLinearDPOFunction.preference_loss_fn(*logps, **settings)
        return f"DPO {kind}", with_nll(s, p, losses)

    return loss


def simpo(s: dict, p: Pair) -> tuple[str, Tensor]:
    settings = {name: s[name] for name in ("beta", "gamma", "label_smoothing")}
    losses = LigerFusedLinearSimPOFunction.preference_loss_fn(*averages(p), PAIR, **settings)
    return "SimPO", with_nll(s, p, losses)


def orpo(s: dict, p: Pair) -> tuple[str, Tensor]:
    losses = LigerFusedLinearORPOFunction.preference_loss_fn(*averages(p), PAIR, s["lambda_or"])
    return "ORPO", with_nll(s, p, losses)


def kto(s: dict, p: Pair) -> tuple[str, Tensor]:
    if s["lambda_d"] != 1 or s["lambda_u"] != 1:
        raise NotImplementedError
    inputs = (p["chosen"], p["label"], PAIR[:1], p["ref_chosen"], s["beta"], p["z0"])
    return "KTO", LigerFusedLinearKTOFunction.preference_loss_fn(*inputs)[0]


def gather(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """It scores what it is given, so the caller shifts; the output layer is here the identity."""
    labels = tokens.masked_fill(~mask, -100)[:, 1:]
    inputs = (logits[:, :-1], torch.eye(logits.shape[-1], dtype=logits.dtype), labels)
    return torch.cat(LigerFusedLinearPreferenceBase.chunk_forward(*inputs, average_log_prob=False)[:2])


def program() -> Program:
    losses = dict(
        dpo=of_dpo("sigmoid", "label_smoothing"),
        ipo=of_dpo("ipo"),
        robust=of_dpo("robust", "flip_rate"),
        hinge=of_dpo("hinge"),
        apo_zero=of_dpo("apo_zero"),
        simpo=simpo,
        orpo=orpo,
        kto=kto,
    )
    reasons = {
        ("dpo", "label_smoothing"): "fault: `sigmoid` does not read `label_smoothing`",
        ("orpo", ""): "fault: log(1 - P) as log1p(-exp(log P)), which is -inf where P rounds to 1",
    }
    return Program(f"Liger-Kernel {version('liger-kernel')}", losses, gather, reasons)
