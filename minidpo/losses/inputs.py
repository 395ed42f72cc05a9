"""What the losses read: the log-probs of B pairs, or their rewards, with shapes and dtypes checked."""

from typing import NamedTuple

import torch
from torch import Tensor


class _PairFields(NamedTuple):
    chosen: Tensor
    rejected: Tensor | None = None  # None where a loss reads the chosen response alone
    ref_chosen: Tensor | None = None  # None where a loss needs no reference
    ref_rejected: Tensor | None = None
    chosen_length: Tensor | None = None  # integer counts >= 1
    rejected_length: Tensor | None = None
    # No loss here reads these, and train_dpo.py does not fill them. They are inputs like the rest, for losses
    # of your own: a record's margin, and KTO's label (desirable or not) and reference point.
    margin: Tensor | None = None
    label: Tensor | None = None
    z0: Tensor | None = None


class PairLogps(_PairFields):
    """What a preference loss may read of B pairs; each field has shape (B,).

    Shapes and dtypes are checked here, once, and not in every loss. bf16 and fp16 log-probs are raised to
    float32 (bf16 steps by 8 nats near -1000); float64 stays.
    Raises ValueError for a shape other than (B,), for mixed or integer dtypes, and for a length below 1
    (not on a GPU, where looking at values would wait for all its work).
    """

    __slots__ = ()

    def __new__(cls, *args: Tensor | None, **kwargs: Tensor | None) -> "PairLogps":
        given = _PairFields(*args, **kwargs)  # type: ignore[arg-type]
        return tuple.__new__(
            cls, (_checked(given.chosen, name, value) for name, value in given._asdict().items())
        )

    def log_ratios(self, per_token: bool = False) -> tuple[Tensor, Tensor]:
        """log pi(y|x) / pi_ref(y|x) of both responses, divided by |y| if per_token."""
        chosen = self.chosen - given("ref_chosen", self.ref_chosen)
        rejected = given("rejected", self.rejected) - given("ref_rejected", self.ref_rejected)
        if per_token:
            chosen = chosen / given("chosen_length", self.chosen_length)
            rejected = rejected / given("rejected_length", self.rejected_length)
        return chosen, rejected

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """log pi(y|x) / |y| of both responses: the average log-prob of a token."""
        chosen = self.chosen / given("chosen_length", self.chosen_length)
        return chosen, given("rejected", self.rejected) / given("rejected_length", self.rejected_length)


class _RewardFields(NamedTuple):
    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None  # by how much each record says that its chosen response is better
    chosen_logps: Tensor | None = None  # log pi(y_w|x), for the language-modelling loss
    chosen_length: Tensor | None = None


class Rewards(_RewardFields):
    """What the reward model's loss may read of B pairs, checked like `PairLogps`; each field has shape
    (B,)."""

    __slots__ = ()

    def __new__(cls, *args: Tensor | None, **kwargs: Tensor | None) -> "Rewards":
        values = _RewardFields(*args, **kwargs)  # type: ignore[arg-type]
        return tuple.__new__(
            cls, (_checked(values.chosen, name, value) for name, value in values._asdict().items())
        )


def given(name: str, value: Tensor | None) -> Tensor:
    """`value`, which the loss needs. Raises ValueError where it was left out."""
    if value is None:
        raise ValueError(f"{name} is None, but this loss reads it")
    return value


def _checked(first: Tensor, name: str, value: Tensor | None) -> Tensor | None:
    """`value` with half precision raised to float32. Raises ValueError unless it goes with `first`, the
    chosen ones."""
    if value is None:
        return None
    if value.ndim != 1 or value.shape != first.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; one value per pair is needed: (B,), like chosen of shape"
            f" {tuple(first.shape)} (token log-probs are summed over each response first)"
        )
    if name.endswith("_length"):
        # Not checked on a GPU, where looking at values would wait for all the work it was given.
        if value.device.type == "cpu" and not (value >= 1).all():
            raise ValueError(f"{name} holds {value.min().item()}; every response has at least 1 scored token")
        return value
    if name == "label":
        return value
    if not value.is_floating_point() or value.dtype != first.dtype:
        raise ValueError(f"{name} is {value.dtype}, chosen {first.dtype}; all must be of one floating dtype")
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
