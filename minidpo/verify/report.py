"""`verify(loss)`: every check that the claims allow, as a table of verdicts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, is_dataclass, replace
from functools import partial
from typing import Any

import torch

from minidpo.errors import UserError
from minidpo.verify.checks import CHECKS, OF_THEIR_OWN_SETTINGS, Check
from minidpo.verify.claims import Claims, claims_of
from minidpo.verify.draws import NotAsked, Refuted, shown
from minidpo.verify.stranger import Argument, adapt, describe


def name_of(check: Check) -> str:
    return check.__name__.removeprefix("check_")


BY_NAME = {name_of(check): check for check in CHECKS}
HOLDS, REFUTED, NOT_ASKED = "holds", "refuted", "not asked"


@dataclass(frozen=True)
class Verdict:
    check: str  # its name: points, twin, gradient, ...
    claim: str
    verdict: str  # HOLDS, REFUTED or NOT_ASKED
    figure: str = ""
    counterexample: str = ""  # or why it is not asked, where that is said


@dataclass(frozen=True)
class Report:
    """What `verify` found. `print(report)` is the table."""

    name: str
    title: str  # the loss with its settings, and how a function is read
    verdicts: list[Verdict]

    @property
    def refuted(self) -> list[str]:
        """The names of the checks that refuted the loss; empty if everything asked of it holds."""
        return [verdict.check for verdict in self.verdicts if verdict.verdict == REFUTED]

    def __str__(self) -> str:
        lines, said = [self.title], {""}
        for v in self.verdicts:
            lines.append(f"  {v.check:<10} {v.verdict:<10} {v.figure:<18} {v.claim}")
            lines += [f"  {'':<10} {v.counterexample}"] * (v.counterexample not in said)
            said.add(v.counterexample)
        return "\n".join(lines)


def verify(
    loss: Any,
    like: Any = None,
    claims: Claims | None = None,
    arguments: Mapping[str, Argument] | None = None,
    settings: Mapping[str, Any] | None = None,
    checks: Collection[str] | None = None,
) -> Report:
    """Put a loss to every check that its claims allow.

    loss: an object of minidpo.losses, a dataclass like them, or any function over tensors, see stranger.py.
    like: the loss of ours that it claims to be, whose claims it is held to, such as DPO(beta=0.1).
    claims: what is claimed of it otherwise; with neither, only what holds for every loss is asked.
    arguments, settings: what the parameters of a function are, where their names do not tell (`adapt`).
    checks: the names of those to make; by default all. `exact` takes a second, the others less.
    Raises UserError for a function whose signature says too little, and for a check that there is not.
    """
    loss = loss() if isinstance(loss, type) else loss
    if unknown := set(checks or ()) - set(BY_NAME):
        raise UserError(f"no check {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    if is_dataclass(loss) and (arguments or settings):
        raise UserError(
            f"{shown(loss)}: a loss object is given arguments or settings, which are for a function's"
        )
    if is_dataclass(loss):
        claims, title = claims or claims_of(like or loss), shown(loss)
    else:
        loss, claims = adapt(loss, like, claims, arguments, settings)
        title = describe(loss, like)
    verdicts = [judge(check, loss, claims) for name, check in BY_NAME.items() if not checks or name in checks]
    return Report(type(loss).__name__, title, verdicts)


def judge(check: Check, loss: Any, claims: Claims) -> Verdict:
    """The verdict of one check, over all the settings at which it is asked."""
    verdict = partial(Verdict, name_of(check), " ".join((check.__doc__ or "").split()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are many times faster on one thread
    try:
        losses = [loss] if check in OF_THEIR_OWN_SETTINGS else at_points(loss, claims)
        looked_at, errors = zip(*(check(s, claims) for s in losses), strict=True)
        return verdict(HOLDS, f"{looked_at[0]}, {max(errors):.0e}")
    except NotAsked as reason:
        return verdict(NOT_ASKED, counterexample=str(reason))
    except Refuted as counterexample:
        return verdict(REFUTED, counterexample=told(counterexample, loss, claims))
    except Exception as error:  # A loss that fails on good input is no loss.
        return verdict(REFUTED, counterexample=f"it raises {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)


def told(counterexample: Refuted, loss: Any, claims: Claims) -> str:
    """The counterexample, with the numbers of the pair that the loss reads: a function's arguments, or what
    the points name."""
    read = set(getattr(loss, "arguments", {}).values())
    if not read or not all(isinstance(name, str) for name in read):
        read = {name for _, pair, _ in claims.points for name in pair} or set(counterexample.pair)
    at = [f"{name} {value:.6g}" for name, value in counterexample.pair.items() if name in read]
    return counterexample.says + (f", at {', '.join(at)}" if at else "")


def at_points(loss: Any, claims: Claims) -> list[Any]:
    """The loss as it is, and with the settings of each point in place of its own; each once."""
    losses = [loss]
    for settings, _, _ in claims.points:
        try:
            other = replace(loss, **settings)
        except NotAsked:
            continue
        losses += [other] * (other not in losses)
    return losses
