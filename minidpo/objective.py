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


def gradient_weights(
    loss: PreferenceLossSection, policy: Tensor, reference: Tensor | None, lengths: Tensor
) -> Tensor:
    """How hard a pair pulls at each ending: -(d loss / d log pi(y|x)), (B, 2), sft (B, 1); as `preference` takes them."""
    policy = policy.detach().requires_grad_()
    losses, _ = preference(loss, policy, reference, lengths)
    return -torch.autograd.grad(losses.sum(), policy)[0]
