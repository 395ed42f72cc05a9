"""TRL's losses on given log-probs: its trainers' own methods, on a trainer that was not built and a model
that returns the log-probs it is given."""

from collections import defaultdict
from types import SimpleNamespace as Record
from typing import Any

import torch
import trl
from conformance import Pair, Program, averages
from torch import Tensor
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

ACCELERATOR = Record(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)


def trainer(kind: type, **fields: Any) -> Any:
    """A trainer without a model, a dataset and a configuration, but with what its loss reads."""
    made = object.__new__(kind)
    common = dict(
        accelerator=ACCELERATOR,
        model=Record(training=False),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        label_smoothing=0.0,
    )
    vars(made).update(common | fields)
    return made


def texts(logps: list[Tensor], lengths: list[int]) -> tuple[dict[str, Tensor], Any]:
    """Inputs of texts with a prompt of one token, and a model that gives each response's tokens equal shares
    of its log-prob."""
    mask = torch.zeros(len(lengths), 1 + max(lengths), dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, 1 : 1 + length] = 1
    shares = torch.stack([logp[0] / length for logp, length in zip(logps, lengths, strict=True)])
    per_token = torch.where(mask[:, 1:] == 1, shares[:, None], 0.0)
    nothing = torch.zeros_like(per_token).detach()
    output = Record(log_probs=per_token, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    inputs = dict(input_ids=mask, attention_mask=torch.ones_like(mask), completion_mask=mask)
    return inputs, lambda **_: output


def dpo_trainer(s: dict, p: Pair, kind: str, smoothing: float = 0.0) -> tuple[str, Tensor]:
    if s.get("margin_from_data"):
        raise NotImplementedError
    weight = s.get("sft_weight", 0.0)
    made = trainer(
        trl.DPOTrainer,
        beta=s.get("beta", 0.1),
        label_smoothing=smoothing,
        loss_types=[kind, "sft"] if weight else [kind],
        loss_weights=[1.0, weight] if weight else [1.0],
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        use_weighting=False,
    )
    one = p["chosen"].detach() * 0  # what its "sft" does not read
    responses = [p["chosen"], p.get("rejected", one)]
    lengths = [int(p.get(name, torch.tensor([4]))) for name in ("chosen_length", "rejected_length")]
    inputs, model = texts(responses, lengths)
    inputs |= {f"{name}_logps": p.get(name, one) for name in ("ref_chosen", "ref_rejected")}
    name = f"{kind}{' + sft' if weight else ''}{f', label_smoothing {smoothing}' if smoothing else ''}"
    return name, made._compute_loss(model, inputs, False)


def dpo(s: dict, p: Pair) -> tuple[str, Tensor]:
    return dpo_trainer(s, p, "sigmoid_norm" if s["length_normalize"] else "sigmoid", s["label_smoothing"])


def simpo(s: dict, p: Pair) -> tuple[str, Tensor]:
    fields = dict(beta=s["beta"], simpo_gamma=s["gamma"], label_smoothing=s["label_smoothing"])
    made = trainer(CPOTrainer, loss_type="simpo", alpha=0.0, **fields)
    losses = made.cpo_loss(*averages(p))[0]
    return "CPO simpo", losses + s["sft_weight"] * -averages(p)[0]  # cpo_alpha * its NLL


def orpo(s: dict, p: Pair) -> tuple[str, Tensor]:
    ratio = trainer(ORPOTrainer, beta=s["lambda_or"]).odds_ratio_loss(*averages(p))[0]
    return "ORPO", -s["sft_weight"] * averages(p)[0] - ratio  # its NLL less its ratio


def kto(s: dict, p: Pair) -> tuple[str, Tensor]:
    made = trainer(
        trl.KTOTrainer,
        beta=s["beta"],
        loss_type="kto",
        desirable_weight=s["lambda_d"],
        undesirable_weight=s["lambda_u"],
        calculate_KL=True,
    )
    length = int(p.get("chosen_length", torch.tensor([4])))
    inputs, model = texts([p["chosen"]], [length])
    made._compute_kl_logps = lambda *_: p["z0"]  # of a mismatched response whose log-ratio is z0
    inputs |= dict(label=p["label"], ref_logps=p["ref_chosen"], ref_KL_logps=torch.zeros(1))
    return "KTO", made._compute_loss(model, inputs, False)


def reward_model(s: dict, p: Pair) -> tuple[str, Tensor]:
    if s["lm_weight"] or s["label_smoothing"]:
        raise NotImplementedError
    center = s["center_weight"] or None
    made = trainer(trl.RewardTrainer, args=Record(center_rewards_coefficient=center))
    logits = torch.stack([p["chosen"], p["rejected"]])
    inputs = dict(attention_mask=torch.ones(2, 1))
    if s["margin"] or s["margin_from_data"]:
        inputs["margin"] = s["margin"] + (p["margin"] if s["margin_from_data"] else 0.0)
    return "Reward", made.compute_loss(lambda **_: Record(logits=logits), inputs)


def gather(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    return CPOTrainer.get_batch_logps(logits, tokens.masked_fill(~mask, -100))


def program() -> Program:
    losses = dict(
        dpo=dpo,
        ipo=lambda s, p: dpo_trainer(s, p, "ipo"),
        robust=lambda s, p: dpo_trainer(s, p, "robust", s["flip_rate"]),
        hinge=lambda s, p: dpo_trainer(s, p, "hinge"),
        apo_zero=lambda s, p: dpo_trainer(s, p, "apo_zero"),
        sft=lambda s, p: dpo_trainer(s, p, "sft"),
        simpo=simpo,
        orpo=orpo,
        kto=kto,
        reward_model=reward_model,
    )
    reasons = {
        ("dpo", "label_smoothing"): "fault: `sigmoid` does not read `label_smoothing`",
        ("ipo", ""): "convention: log-ratios per token, as with `length_normalize`",
        ("orpo", ""): "fault: where P rounds to 1, `torch.where` multiplies an infinite derivative by 0",
    }
    return Program(f"TRL {trl.__version__}", losses, gather, reasons)
