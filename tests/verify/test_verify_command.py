"""`python -m minidpo verify`: what it asks, prints and refuses."""

import pytest

from minidpo.errors import UserError
from minidpo.tools.verify import main as command
from minidpo.verify import every_loss


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A file of the user's with two losses."""
    (tmp_path / "mine.py").write_text(
        "def plain(chosen_logps, beta=1.0): return -chosen_logps / beta\n"
        "def wrong(chosen_logps): return (-chosen_logps).sum()\n"
        "number = 1\n"
        "from minidpo.verify import Claims\n"
        "claims = Claims([(dict(), dict(chosen=-10), 10.0)])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_command(module, capsys):
    """It prints a table for each loss, of ours if none is named; where one is refuted, the exit status is 1."""
    command(["sft", "mine:plain", "--checks", "gradcheck", "alone"])
    printed = capsys.readouterr().out
    for says in ("SFT()", "plain, of which nothing is claimed", "nothing is refuted"):
        assert says in printed
    assert printed.count("its equation is not tested") == 1
    command(["--checks", "mirror"])
    assert capsys.readouterr().out.count("mirror") == len(every_loss())
    command(["mine:plain", "--claims", "mine:claims", "--checks", "points"])
    assert "1 points" in (printed := capsys.readouterr().out) and "not tested" not in printed.splitlines()[0]
    with pytest.raises(SystemExit) as end:
        command(["mine:wrong", "mine:plain", "--like", "dpo", "beta=0.3", "--checks", "alone", "twin"])
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "wrong claims to be DPO(beta=0.3)" in printed
    assert printed.endswith("refuted: wrong, plain\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("dpi", "no loss 'dpi'; there are dpo, ipo"),
        ("dpo --like ipo", "dpo has claims of its own"),
        ("plain --like ipo", "no loss 'plain'; .*; a function of yours is MODULE:NAME"),
        ("mine:plain --like ipo gamma=1", "no key 'gamma'; ipo has beta, length_normalize"),
        ("mine:plain --like ipo beta=x", "--like ipo beta=x: Invalid value"),
        ("mine:plain --like ipo beta=-1", r"ipo: beta is -1.0; it must be > 0"),
        ("mine:other", "module 'mine' has no attribute 'other'"),
        ("mine:plain --claims mine:number", "mine:number is int; minidpo.verify.Claims is needed"),
        ("nowhere:loss", "nowhere:loss cannot be imported"),
    ],
)
def test_refused_command(module, arguments, says):
    """What cannot be asked is refused in one line that says what can."""
    with pytest.raises(UserError, match=says):
        command(arguments.split())
