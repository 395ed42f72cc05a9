"""A battery proves something only if it refutes what is wrong: the mistakes of wrong_losses.py."""

from dataclasses import replace

import pytest
from battery import check_points
from loss_table import CASES
from wrong_losses import OTHER_DEFAULTS, WRONG_LOSSES

MEANT = {str(case): case for case in CASES}


@pytest.mark.parametrize(
    ("case", "check", "method", "form"),
    [
        pytest.param(MEANT[case], check, method, form, id=f"{case}: {name}")
        for (case, check, method), forms in WRONG_LOSSES.items()
        for name, form in forms.items()
    ],
)
def test_the_battery_refutes(case, check, method, form):
    loss = type(case.loss)
    wrong = type("Wrong", (loss,), {method: form})  # a subclass with the mistake in place of one method
    with pytest.raises(AssertionError):
        check(replace(case, loss=wrong(**vars(case.loss))))


@pytest.mark.parametrize(
    ("case", "loss"), [(case, loss) for case, losses in OTHER_DEFAULTS.items() for loss in losses], ids=str
)
def test_the_points_refute_other_defaults(case, loss):
    with pytest.raises(AssertionError):
        check_points(replace(MEANT[case], loss=loss))
