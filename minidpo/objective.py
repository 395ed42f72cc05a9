"""The configured loss of each pair of a micro-batch, and what to watch while it is trained.

Below the two scripts and the commands, above losses.py: here a `[loss]` section chooses its equation.
"""

import torch
from torch import Tensor

from minidpo.losses import PreferenceLoss, dpo_loss, ipo_loss, sft_loss, simpo_loss
from minidpo.sections import PreferenceLossSection

# A logistic loss this small leaves under a thousandth of the gradient that a pair has at a margin of 0.
IDLE = 5e-4


def preference(
    loss: PreferenceLossSection, policy: Tensor, reference: Tensor | None, lengths: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The configured loss of each pair (B,), and what to watch. policy, reference, lengths: (B, 2), sft (B, 1)."""
    if loss.name == "sft":
        losses = sft_loss(policy[:, 0], lengths[:, 0])
        return losses, {"loss": losses, "logps/chosen": policy[:, 0], "response_length/chosen": lengths[:, 0]}
    policy_chosen_logps, policy_rejected_logps = policy.unbind(dim=1)
    chosen_lengths, rejected_lengths = lengths.unbind(dim=1)
    if loss.name == "simpo":
        result = simpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            chosen_lengths,
            rejected_lengths,
            loss.beta,
            loss.gamma,
            loss.label_smoothing,
        )
    else:
        reference_chosen_logps, reference_rejected_logps = _given(loss, reference).unbind(dim=1)
        logps = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
        per_token = (chosen_lengths, rejected_lengths) if loss.length_normalize else (None, None)
        if loss.name == "ipo":
            result = ipo_loss(*logps, loss.beta, *per_token)
        elif loss.name == "dpo":
            result = dpo_loss(*logps, loss.beta, loss.label_smoothing, *per_token)
        else:
            raise ValueError(f"no equation here for loss.name = {loss.name!r}")
    watched = watch(result)
    if loss.name != "ipo":
        watched["idle"] = result.losses < IDLE
    return result.losses, watched | {
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
        "response_length/chosen": chosen_lengths,
        "response_length/rejected": rejected_lengths,
    }


def _given(loss: PreferenceLossSection, reference: Tensor | None) -> Tensor:
    if reference is None:
        raise ValueError(f"reference is None; {loss.name} compares with a reference's log-probs")
    return reference


def watch(result: PreferenceLoss) -> dict[str, Tensor]:
    """What tells how training goes. Accuracy counts strict wins: 0 while policy and reference are equal."""
    return {
        "loss": result.losses,
        "rewards/chosen": result.chosen_rewards,
        "rewards/rejected": result.rejected_rewards,
        "rewards/accuracies": result.chosen_rewards > result.rejected_rewards,
        "rewards/margins": result.chosen_rewards - result.rejected_rewards,
    }


# --- the same losses on paper, for `explain`: training uses the functions above and autograd ------------------


def loss_argument(
    loss: PreferenceLossSection, policy: Tensor, reference: Tensor | None, lengths: Tensor
) -> Tensor:
    """The one number a pair's loss is a function of, (B,); policy, reference, lengths as `preference` takes them.

        dpo     z = beta * (log-ratio of chosen - log-ratio of rejected)              loss = -log sigma(z)
        simpo   z = beta * (mean log pi of chosen - mean log pi of rejected) - gamma  loss = -log sigma(z)
        ipo     h = log-ratio of chosen - log-ratio of rejected                       loss = (h - 1/(2 beta))^2
        sft     log pi(y_w) / |y_w|                                                   loss = -that

    With length_normalize each log-ratio is over its |y|.
    """
    if loss.name not in ("dpo", "ipo", "simpo", "sft"):
        raise ValueError(f"no closed form here for loss.name = {loss.name!r}")
    values = policy if loss.name in ("simpo", "sft") else policy - _given(loss, reference)
    if _averages(loss):
        values = values / lengths
    if loss.name == "sft":
        return values[:, 0]
    h = values[:, 0] - values[:, 1]
    if loss.name == "ipo":
        return h
    return loss.beta * h - (loss.gamma if loss.name == "simpo" else 0.0)


def gradient_weights(
    loss: PreferenceLossSection, policy: Tensor, reference: Tensor | None, lengths: Tensor
) -> Tensor:
    """How hard a pair pulls at each ending: -(d loss / d log pi(y|x)) in closed form, (B, 2), sft (B, 1).

        dpo, simpo   beta * ((1-e) sigma(-z) - e sigma(z))     (e: label_smoothing; for e = 0 beta * sigma(r_l - r_w))
        ipo          2 * (1/(2 beta) - h)
        sft          1

    times +1 for chosen and -1 for rejected, and over |y| where the loss averages. z and h: `loss_argument`.
    """
    z = loss_argument(loss, policy, reference, lengths)
    if loss.name == "sft":
        pull = torch.ones_like(z)
    elif loss.name == "ipo":
        pull = 2 * (1 / (2 * loss.beta) - z)
    else:
        smoothing = loss.label_smoothing
        pull = loss.beta * ((1 - smoothing) * torch.sigmoid(-z) - smoothing * torch.sigmoid(z))
    weights = pull[:, None] * torch.tensor([1.0, -1.0])[: policy.shape[1]].to(policy)
    return weights / lengths if _averages(loss) else weights


def _averages(loss: PreferenceLossSection) -> bool:
    return loss.length_normalize or loss.name in ("simpo", "sft")
