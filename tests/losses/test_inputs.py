"""What a loss may read is checked once, where PairLogps and Rewards are made, in words that help."""

import pytest
import torch

from minidpo.losses import DPO, IPO, SFT, BradleyTerry, PairLogps, Rewards, SimPO

FOUR = torch.tensor([-1.0, -2.0, -3.0, -4.0])
PAIRS = dict.fromkeys(["chosen", "rejected", "ref_chosen", "ref_rejected", "margin", "z0"], FOUR)
REWARDS = dict.fromkeys(["chosen", "rejected", "margin", "chosen_logps"], FOUR)
each_kind = pytest.mark.parametrize(("kind", "good"), [(PairLogps, PAIRS), (Rewards, REWARDS)])


def refused(kind: type, fields: dict, *says: str) -> None:
    with pytest.raises(ValueError) as caught:
        kind(**fields)
    assert all(word in str(caught.value) for word in says), str(caught.value)


@each_kind
def test_shapes(kind, good):
    """Each field has one number per pair, (B,), and chosen says how many pairs there are."""
    for name in good:
        for wrong in (FOUR[:, None], FOUR[:3], FOUR[0]):
            named = "rejected" if name == "chosen" and wrong.ndim == 1 else name
            refused(kind, good | {name: wrong}, named, str(tuple(wrong.shape)), "(B,)")
    refused(kind, dict.fromkeys(good, FOUR[:, None]), "(4, 1)", "(B,)")


@each_kind
def test_dtypes(kind, good):
    """All are of one floating dtype. Half precision is raised to float32, float64 stays."""
    for name in good:
        for dtype in (torch.int64, torch.float64):
            refused(kind, good | {name: FOUR.to(dtype)}, str(dtype), "one floating dtype")
    refused(kind, dict.fromkeys(good, FOUR.long()), "int64", "floating dtype")
    if kind is PairLogps:
        refused(kind, good | {"label": FOUR}, "label is torch.float32", "torch.bool")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        values = kind(**dict.fromkeys(good, FOUR.to(dtype)))
        raised = torch.float64 if dtype == torch.float64 else torch.float32
        assert {getattr(values, name).dtype for name in good} == {raised}


@each_kind
def test_lengths(kind, good):
    """Every response has a scored token."""
    for name in (name for name in kind._fields if name.endswith("_length")):
        for bad in (0, -1):
            refused(kind, good | {name: torch.tensor([3, 1, bad, 2])}, name, str(bad), "at least 1")
        refused(kind, good | {name: torch.ones(3, dtype=torch.int64)}, name, "(3,)", "(4,)")
        assert getattr(kind(**good, **{name: torch.tensor([1, 1, 1, 1])}), name).tolist() == [1] * 4


@pytest.mark.parametrize(
    ("loss", "given", "missing"),
    [
        (DPO(), PairLogps(FOUR, FOUR), "ref_chosen"),
        (DPO(), PairLogps(FOUR, FOUR, FOUR), "ref_rejected"),
        (IPO(), PairLogps(FOUR, ref_chosen=FOUR), "rejected"),
        (IPO(length_normalize=True), PairLogps(FOUR, FOUR, FOUR, FOUR), "chosen_length"),
        (SimPO(), PairLogps(FOUR, FOUR, chosen_length=torch.ones(4)), "rejected_length"),
        (SFT(), PairLogps(FOUR), "chosen_length"),
        (BradleyTerry(), Rewards(FOUR, FOUR), "chosen_logps"),
        (BradleyTerry(margin_from_data=True), Rewards(FOUR, FOUR), "margin"),
    ],
    ids=str,
)
def test_missing(loss, given, missing):
    """What a loss reads and was not given is named."""
    with pytest.raises(ValueError, match=f"{missing} is None, but this loss reads it"):
        loss(given)
