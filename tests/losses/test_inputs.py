"""What a loss may read is checked once, where PairLogps and Rewards are made, in words that help."""

import pytest
import torch

from minidpo.losses import DPO, IPO, SFT, BradleyTerry, PairLogps, Rewards, SimPO

FOUR = torch.tensor([-1.0, -2.0, -3.0, -4.0])
PAIRS = {name: FOUR for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "margin", "z0")}
REWARDS = {name: FOUR for name in ("chosen", "rejected", "margin", "chosen_logps")}
FIELDS = [(PairLogps, PAIRS, name) for name in PAIRS] + [(Rewards, REWARDS, name) for name in REWARDS]
LENGTHS = [(PairLogps, PAIRS, "chosen_length"), (PairLogps, PAIRS, "rejected_length")]
LENGTHS += [(Rewards, REWARDS, "chosen_length")]


def refused(of: type, fields: dict, *says: str) -> None:
    with pytest.raises(ValueError) as caught:
        of(**fields)
    assert not [word for word in says if word not in str(caught.value)], str(caught.value)


@pytest.mark.parametrize(("of", "good", "name"), FIELDS)
@pytest.mark.parametrize("wrong", [FOUR[:, None], FOUR[:3], FOUR[0]], ids=["(4, 1)", "(3,)", "()"])
def test_one_value_per_pair_is_needed(of, good, name, wrong):
    # The chosen ones say how many pairs there are: if they alone are short, it is the others that do not fit.
    named = "rejected" if name == "chosen" and wrong.ndim == 1 else name
    refused(of, good | {name: wrong}, named, str(tuple(wrong.shape)), "(B,)")


@pytest.mark.parametrize(("of", "good", "name"), FIELDS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_integers_and_mixed_dtypes_are_refused(of, good, name, dtype):
    refused(of, good | {name: FOUR.to(dtype)}, str(dtype), "one floating dtype")


@pytest.mark.parametrize(("of", "good"), [(PairLogps, PAIRS), (Rewards, REWARDS)])
def test_agreeing_on_a_mistake_does_not_help(of, good):
    refused(of, {name: value[:, None] for name, value in good.items()}, "(4, 1)", "(B,)")
    refused(of, {name: value.long() for name, value in good.items()}, "int64", "floating dtype")


@pytest.mark.parametrize(("of", "good", "name"), LENGTHS)
def test_every_response_has_a_token(of, good, name):
    for bad in (0, -1):
        refused(of, good | {name: torch.tensor([3, 1, bad, 2])}, name, str(bad), "at least 1")
    refused(of, good | {name: torch.ones(3, dtype=torch.int64)}, name, "(3,)", "(4,)")
    assert getattr(of(**good, **{name: torch.tensor([1, 1, 1, 1])}), name).tolist() == [1] * 4


@pytest.mark.parametrize(("of", "good"), [(PairLogps, PAIRS), (Rewards, REWARDS)])
def test_half_precision_is_raised_and_float64_stays(of, good):
    for dtype, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64,) * 2,
    ):
        values = of(**{name: value.to(dtype) for name, value in good.items()})
        assert {values[i].dtype for i, name in enumerate(of._fields) if name in good} == {kept}


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
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_loss_reads_and_was_not_given_is_named(loss, given, missing):
    with pytest.raises(ValueError, match=f"{missing} is None, but this loss reads it"):
        loss(given)
