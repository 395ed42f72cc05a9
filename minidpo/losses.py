"""The equations: Bradley-Terry, DPO, IPO, SimPO and maximum likelihood. Read this file first.

Glossary, paper symbol -> argument:
    x, y_w, y_l          a prompt, its preferred (chosen) and its other (rejected) response
    log pi(y|x)          policy_..._logps: nats, summed over the response's tokens, its EOS included
    log pi_ref(y|x)      reference_..._logps: the same under the frozen reference
    |y|                  ..._lengths: how many tokens were summed
    r(x, y)              ..._rewards
    beta                 strength of the pull towards the reference (scale of the reward in SimPO)
    sigma                the logistic function
Every function takes one value a pair, shape (B,), and returns one loss a pair, shape (B,), in nats where
it is a log-likelihood: the caller averages, so that micro-batches can divide by the whole batch's count.
Divisions by length happen here, not in logprobs.py, so what is summed and what is averaged shows on the line.
bf16 and float16 inputs are computed in float32; float32 and float64 keep their type.
Rewards in the returned tuples are detached: they are for looking at.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceLoss(NamedTuple):
    losses: Tensor  # (B,) differentiable
    chosen_rewards: Tensor  # (B,) implicit reward of the chosen response, detached
    rejected_rewards: Tensor  # (B,)


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Negative log-likelihood of a preference under rewards.

        loss = -(1-e) log sigma(z) - e log sigma(-z),   z = r(x, y_w) - r(x, y_l) - margin

    Source: Bradley & Terry 1952; Ouyang et al. 2022 (InstructGPT) Eq. 1; margin: Touvron et al. 2023 (Llama 2) Eq. 2.
    e is label_smoothing, the assumed share of labels that are swapped.
    Shapes: rewards (B,); margin (B,) or a number, >= 0 by custom. Returns (B,), nats.
    d loss / d r_w = -sigma(-z) when e = 0: negative, so learning raises the chosen reward.
    Raises ValueError on wrong shapes, rewards of mixed dtypes (a margin is cast) or a label_smoothing outside [0, 0.5).
    """
    chosen_rewards, rejected_rewards = _pair_values(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    logits = chosen_rewards - rejected_rewards
    if isinstance(margin, Tensor):
        if margin.shape != logits.shape:
            raise ValueError(
                f"margin has shape {tuple(margin.shape)}; it must be a number or shape {tuple(logits.shape)}"
            )
        logits = logits - margin.to(logits.dtype)
    elif margin is not None:
        logits = logits - margin
    return _logistic_loss(logits, label_smoothing)


def center_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Pull towards rewards that sum to zero within a pair, which Bradley-Terry leaves free.

        penalty = (r(x, y_w) + r(x, y_l))^2

    Source: Eisenstein et al. 2023 (Helping or Herding), section on centring. Shapes: (B,) -> (B,), reward units squared.
    On the sum, as published; a penalty on the mean would be a quarter of it.
    """
    chosen_rewards, rejected_rewards = _pair_values(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return (chosen_rewards + rejected_rewards).square()


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> PreferenceLoss:
    """Direct preference optimisation.

        r(x, y) = beta * log( pi(y|x) / pi_ref(y|x) )
        loss    = -(1-e) log sigma(z) - e log sigma(-z),   z = r(x, y_w) - r(x, y_l)

    Source: Rafailov et al. 2023 Eq. 7. e (label_smoothing) is conservative DPO (Mitchell 2023); the robust loss of
    Chowdhury et al. 2024, ( -(1-e) log sigma(z) + e log sigma(-z) ) / (1 - 2e), is another function.
    With both lengths given each log-ratio is divided by its |y| (length-normalised DPO).
    Shapes: all (B,); lengths are counts >= 1. Rewards come back in nats (nats a token when normalised).
    When policy equals reference: z = 0, loss = ln 2 = 0.6931.
    Raises ValueError on wrong shapes, mixed dtypes, beta <= 0, label_smoothing outside [0, 0.5), a length < 1.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        chosen_lengths,
        rejected_lengths,
    )
    chosen_rewards = beta * chosen_logratios
    rejected_rewards = beta * rejected_logratios
    losses = _logistic_loss(chosen_rewards - rejected_rewards, label_smoothing)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> PreferenceLoss:
    """Identity preference optimisation: regress the log-ratio margin onto a fixed target instead of pushing it on.

        h    = log( pi(y_w|x) / pi_ref(y_w|x) ) - log( pi(y_l|x) / pi_ref(y_l|x) )
        loss = (h - 1 / (2 beta))^2

    Source: Azar et al. 2023 Eq. 17; beta is the paper's tau. Sums of log-probs, as the equation reads. With both
    lengths given each log-ratio is a per-token mean, which is what the authors told maintainers of a library
    they had used; beta then means something else (the target is per token), so do not carry a value over.
    Shapes: all (B,); the loss is in nats squared. Rewards are beta * log-ratio, as in DPO, for one scale in the logs.
    When policy equals reference: loss = 1 / (4 beta^2), 25 at beta 0.1.
    Raises ValueError on wrong shapes, mixed dtypes, beta <= 0, a length < 1.
    """
    chosen_logratios, rejected_logratios = _logratios(
        policy_chosen_logps,
        policy_rejected_logps,
        reference_chosen_logps,
        reference_rejected_logps,
        beta,
        chosen_lengths,
        rejected_lengths,
    )
    margins = chosen_logratios - rejected_logratios
    losses = (margins - 1 / (2 * beta)).square()
    return PreferenceLoss(losses, (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach())


def simpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
    label_smoothing: float = 0.0,
) -> PreferenceLoss:
    """Simple preference optimisation: the average log-prob is the reward, there is no reference.

        r(x, y) = beta * log pi(y|x) / |y|
        loss    = -(1-e) log sigma(z) - e log sigma(-z),   z = r(x, y_w) - r(x, y_l) - gamma

    Source: Meng et al. 2024 Eq. 6. gamma stands outside beta, as in the paper; code that takes the ratio
    gamma_beta_ratio means gamma = beta * gamma_beta_ratio.
    Shapes: all (B,); lengths are counts >= 1. Rewards: beta * nats a token, gamma not subtracted.
    Raises ValueError on wrong shapes, mixed dtypes, beta <= 0, label_smoothing outside [0, 0.5), a length < 1.
    """
    _check_beta(beta)
    policy_chosen_logps, policy_rejected_logps = _pair_values(
        policy_chosen_logps=policy_chosen_logps, policy_rejected_logps=policy_rejected_logps
    )
    chosen_rewards = beta * _per_token("chosen_lengths", policy_chosen_logps, chosen_lengths)
    rejected_rewards = beta * _per_token("rejected_lengths", policy_rejected_logps, rejected_lengths)
    losses = _logistic_loss(chosen_rewards - rejected_rewards - gamma, label_smoothing)
    return PreferenceLoss(losses, chosen_rewards.detach(), rejected_rewards.detach())


def sft_loss(policy_chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Maximum likelihood of the chosen response (supervised fine-tuning; the reward model's LM regulariser).

        loss = - log pi(y_w|x) / |y_w|

    A mean per token within each response, so that long responses do not outvote short ones.
    Shapes: (B,), (B,) -> (B,), nats a token. Raises ValueError on wrong shapes or a length < 1.
    """
    (policy_chosen_logps,) = _pair_values(policy_chosen_logps=policy_chosen_logps)
    return -_per_token("chosen_lengths", policy_chosen_logps, chosen_lengths)


# --- shared pieces -------------------------------------------------------------------------------------------


def _logistic_loss(logits: Tensor, label_smoothing: float) -> Tensor:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    losses = -(1 - label_smoothing) * F.logsigmoid(logits)
    if label_smoothing > 0:
        losses = losses - label_smoothing * F.logsigmoid(-logits)
    return losses


def _logratios(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """log pi/pi_ref of both responses, over |y| when lengths are given; all arguments checked."""
    _check_beta(beta)
    policy_chosen, policy_rejected, reference_chosen, reference_rejected = _pair_values(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    chosen_logratios = policy_chosen - reference_chosen
    rejected_logratios = policy_rejected - reference_rejected
    if (chosen_lengths is None) != (rejected_lengths is None):
        raise ValueError("chosen_lengths and rejected_lengths go together: give both or neither")
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen_logratios = _per_token("chosen_lengths", chosen_logratios, chosen_lengths)
        rejected_logratios = _per_token("rejected_lengths", rejected_logratios, rejected_lengths)
    return chosen_logratios, rejected_logratios


def _per_token(name: str, sums: Tensor, lengths: Tensor) -> Tensor:
    if lengths.shape != sums.shape:
        raise ValueError(f"{name} has shape {tuple(lengths.shape)}; it must be {tuple(sums.shape)}")
    # Not on a GPU, where looking would wait for all that it was given to do.
    if lengths.device.type == "cpu" and not (lengths >= 1).all():
        raise ValueError(f"{name} holds {lengths.min().item()}; every response has at least 1 scored token")
    return sums / lengths.to(sums.dtype)


def _check_beta(beta: float) -> None:
    if not 0 < beta < float("inf"):
        raise ValueError(f"beta is {beta}; it must be > 0 and finite")


def _pair_values(**values: Tensor) -> list[Tensor]:
    """Check that all are (B,), of one floating dtype, and raise half precision to float32."""
    (first_name, first), *_ = values.items()
    for name, value in values.items():
        if value.ndim != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; one value a pair is meant: (B,), like {first_name}"
                f" of shape {tuple(first.shape)} (token log-probs are summed over each response first)"
            )
        if not value.is_floating_point() or value.dtype != first.dtype:
            raise ValueError(
                f"{name} is {value.dtype} and {first_name} is {first.dtype}; all must be one floating dtype"
            )
    half = first.dtype in (torch.bfloat16, torch.float16)
    return [value.float() if half else value for value in values.values()]
