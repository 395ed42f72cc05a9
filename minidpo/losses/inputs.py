"""What the losses read: the log-probs of B pairs, or their rewards, with shapes and dtypes checked."""

from typing import NamedTuple

import torch
from torch import Tensor


class _PairFields(NamedTuple):
    # log pi(y|x), summed over the response's tokens, EOS included, in nats.
    chosen: Tensor
    rejected: Tensor | None = None  # None where a loss reads only the chosen response
    # The same under the frozen reference.
    ref_chosen: Tensor | None = None  # None where a loss needs no reference
    ref_rejected: Tensor | None = None
    # |y|: how many tokens were summed, integers >= 1.
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None
    # What only some losses read.
    # By how much the chosen response is better, according to the record. Two other numbers are called margin:
    # that of a loss, r(x, y_w) - r(x, y_l), and the target margin (gamma), a setting that it should exceed.
    margin: Tensor | None = None
    label: Tensor | None = None  # bool: whether a single response is desirable (KTO)
    z0: Tensor | None = None  # the reference point, nats: one number, given for every pair (KTO)


class PairLogps(_PairFields):
    """What a preference loss may read about B pairs; each field has shape (B,).

    Shapes and dtypes are checked here, once, and not in every loss. bf16 and fp16 log-probs become float32
    (beyond -1024, bf16 numbers are 8 nats apart); float64 stays.
    Raises ValueError for a shape other than (B,), for mixed or integer dtypes, and for a length below 1.
    """

    __slots__ = ()

    def __new__(cls, *args: Tensor | None, **kwargs: Tensor | None) -> "PairLogps":
        # A NamedTuple may not define __new__: the base class binds the arguments, this class checks them.
        fields = _PairFields(*args, **kwargs)  # type: ignore[arg-type]
        return tuple.__new__(cls, (_checked(fields.chosen, *field) for field in fields._asdict().items()))

    def log_ratios(self, per_token: bool = False) -> tuple[Tensor, Tensor]:
        """log pi(y|x)/pi_ref(y|x) of chosen and rejected, (B,) each, divided by |y| if per_token."""
        # The logarithm of a quotient is a difference of logarithms.
        chosen = self.chosen - given("ref_chosen", self.ref_chosen)
        rejected = given("rejected", self.rejected) - given("ref_rejected", self.ref_rejected)
        if per_token:
            chosen = chosen / given("chosen_length", self.chosen_length)
            rejected = rejected / given("rejected_length", self.rejected_length)
        return chosen, rejected

    def mean_logps(self) -> tuple[Tensor, Tensor]:
        """log pi(y|x) / |y| of chosen and rejected, (B,) each: the average log-prob of a token."""
        chosen = self.chosen / given("chosen_length", self.chosen_length)
        return chosen, given("rejected", self.rejected) / given("rejected_length", self.rejected_length)


class _RewardFields(NamedTuple):
    # r(x, y), one number per response.
    chosen: Tensor
    rejected: Tensor
    margin: Tensor | None = None  # the record's margin, as in `PairLogps`
    # log pi(y_w|x) and |y_w|, for the language-modelling loss; None without one.
    chosen_logps: Tensor | None = None
    chosen_length: Tensor | None = None


class Rewards(_RewardFields):
    """What the reward model's loss may read about B pairs, checked as in `PairLogps`; (B,) each."""

    __slots__ = ()

    def __new__(cls, *args: Tensor | None, **kwargs: Tensor | None) -> "Rewards":
        fields = _RewardFields(*args, **kwargs)  # type: ignore[arg-type]
        return tuple.__new__(cls, (_checked(fields.chosen, *field) for field in fields._asdict().items()))


def given(name: str, value: Tensor | None) -> Tensor:
    """`value`, which a loss needs. Raises ValueError if it was left out."""
    if value is None:
        raise ValueError(f"{name} is None, but this loss reads it")
    return value


def _checked(first: Tensor, name: str, value: Tensor | None) -> Tensor | None:
    """`value`, in float32 if it is bf16 or fp16. Raises ValueError unless its shape and dtype match `first`,
    the values of the chosen responses."""
    if value is None:
        return None
    # A wrong shape would broadcast: token log-probs (B, T) would give a loss, and a wrong one.
    if value.ndim != 1 or value.shape != first.shape:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; one value per pair is needed: (B,), like chosen of shape"
            f" {tuple(first.shape)} (token log-probs are summed over each response first)"
        )
    if name.endswith("_length"):
        # Not checked on a GPU, because reading a value there waits until the GPU has done all its work.
        if value.device.type == "cpu" and not (value >= 1).all():
            raise ValueError(f"{name} holds {value.min().item()}; every response has at least 1 scored token")
        return value
    if name == "label":
        if value.dtype != torch.bool:
            raise ValueError(f"label is {value.dtype}; it says whether a response is desirable: torch.bool")
        return value
    # Mixed dtypes would be promoted silently.
    if not value.is_floating_point() or value.dtype != first.dtype:
        raise ValueError(f"{name} is {value.dtype}, chosen {first.dtype}; all must be of one floating dtype")
    return value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
