"""`verify(loss)`: every check that the claims allow, as a table of verdicts."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

from minidpo.errors import UserError, one_line
from minidpo.verify.checks import CHECKS, OF_THEIR_OWN_SETTINGS, Check
from minidpo.verify.claims import Claims, claims_of, with_sft
from minidpo.verify.draws import NotAsked, Refuted, one_thread, shown, with_settings
from minidpo.verify.stranger import Argument, Stranger, adapt

BY_NAME = {check.__name__.removeprefix("check_"): check for check in CHECKS}
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
    equation: bool = True  # whether anything is claimed of the equation itself

    @property
    def refuted(self) -> list[str]:
        """The names of the checks that refuted the loss; empty if everything asked of it holds."""
        return [verdict.check for verdict in self.verdicts if verdict.verdict == REFUTED]

    def __str__(self) -> str:
        lines, said = [self.title], set()
        for v in self.verdicts:
            lines.append(f"  {v.check:<10} {v.verdict:<10} {v.figure:<18} {v.claim}")
            if v.counterexample:
                lines.append(f"  {'':<10} {'(as above)' if v.counterexample in said else v.counterexample}")
            said.add(v.counterexample)
        if not self.equation:
            asked = sum(v.verdict != NOT_ASKED for v in self.verdicts)
            lines.append(
                f"  {asked} of {len(BY_NAME)} checks asked; without claims the equation is not tested"
            )
        return "\n".join(lines)


@one_thread()
def verify(
    loss: Any,
    like: Any = None,
    claims: Claims | None = None,
    arguments: Mapping[str, Argument] | None = None,
    settings: Mapping[str, str] | None = None,
    checks: Collection[str] | None = None,
) -> Report:
    """Put a loss to every check that its claims allow.

    loss: an object of minidpo.losses, a dataclass like them, a class of such, or any function over tensors,
        see stranger.py.
    like: the loss of ours that it claims to be, whose claims it is held to, such as DPO(beta=0.1).
    claims: what is claimed of it otherwise; with neither, only what holds for every loss is asked.
    arguments, settings: what the parameters of a function are, where their names do not tell (`adapt`).
    checks: the names of those to make; by default all. `exact` takes seconds, the others less.
    Raises UserError for a function whose signature says too little, for a check that there is not, and for
    claims that raise an exception or name what the loss has not.
    """
    given = claims is not None
    if isinstance(loss, type):
        keys = {key.name for key in fields(loss)} if is_dataclass(loss) else set()
        loss = loss(**{name: x for name, x in vars(like).items() if name in keys} if like else {})
    if unknown := set(checks or ()) - set(BY_NAME):
        raise UserError(f"no check {', '.join(sorted(unknown))}; there are {', '.join(BY_NAME)}")
    if not is_dataclass(loss):
        loss, claims = adapt(loss, like, claims, arguments or {}, settings or {})
    elif arguments or settings:
        raise UserError(f"{shown(loss)} is a loss object; arguments and settings are for a function's")
    else:
        loss = with_missing(loss, like) if like else loss
        claims = with_sft(claims, loss) if claims else claims_of(like or loss)
    if given:
        require_known(loss, claims)
    claims = answering(claims)
    title = loss.about if isinstance(loss, Stranger) else shown(loss)
    verdicts = [judge(name, loss, claims) for name in BY_NAME if not checks or name in checks]
    equation = bool(claims.points or claims.twin or claims.gradient)
    return Report(type(loss).__name__, title, verdicts, equation)


class ClaimsRaise(UserError):
    """What is wrong is the claims, and nothing is said of the loss."""


def answering(claims: Claims) -> Claims:
    """The claims; an exception of theirs is a `ClaimsRaise`, which refutes no loss."""

    def guarded(what: str, equation: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*given: Any) -> Any:
            try:
                return equation(*given)
            except Exception as error:
                says = f"the claims raise {type(error).__name__}: {one_line(error)} (in {what})"
                raise ClaimsRaise(says) from error

        return asked

    equations = {name: getattr(claims, name) for name in ("twin", "gradient", "mirror", "optimum")}
    named: dict[str, Any] = {
        name: guarded(name, equation) for name, equation in equations.items() if callable(equation)
    }
    unmoved = {says: guarded(f"unmoved, {says}", change) for says, change in claims.unmoved.items()}
    return replace(claims, unmoved=unmoved, **named)


def require_known(loss: Any, claims: Claims) -> None:
    """UserError for a point with a setting that the loss lacks, or a number that no pair has."""
    settings, numbers = [key.name for key in fields(loss)], claims.fields._fields
    for i, (of_point, pair, _) in enumerate(claims.points, start=1):
        for what, used, there in (("setting", of_point, settings), ("number of a pair", pair, numbers)):
            if unknown := [name for name in used if name not in there]:
                known = f"there are {', '.join(there)}" if there else "there are none"
                raise UserError(
                    f"point {i} of the claims: {shown(loss)} has no {what} {unknown[0]!r}; {known}"
                )


def with_missing(loss: Any, like: Any) -> Any:
    """The loss object, and as fixed values those settings of `like`, which the claims read, that it lacks."""
    missing = {name: value for name, value in vars(like).items() if not hasattr(loss, name)}
    return type(type(loss).__name__, (type(loss),), missing)(**vars(loss))


def judge(name: str, loss: Any, claims: Claims) -> Verdict:
    """The verdict of one check, over all the settings at which it is asked."""
    check = BY_NAME[name]
    verdict = partial(Verdict, name, " ".join((check.__doc__ or "").split()))
    if CHECKS[check] and not getattr(claims, CHECKS[check]):
        return verdict(NOT_ASKED)
    try:
        looked_at, errors = zip(*(check(s, claims) for s in at_points(check, loss, claims)), strict=True)
        return verdict(HOLDS, f"{looked_at[0]}, {max(errors):.0e}")
    except NotAsked as reason:
        return verdict(NOT_ASKED, counterexample=str(reason))
    except Refuted as counterexample:
        return verdict(REFUTED, counterexample=str(counterexample))
    except ClaimsRaise:
        raise
    except Exception as error:  # A loss that fails on good input is no loss.
        return verdict(REFUTED, counterexample=f"it raises {type(error).__name__}: {error}")


def at_points(check: Check, loss: Any, claims: Claims) -> list[Any]:
    """The loss as it is, and at the settings of each point; each once."""
    losses = [loss]
    for settings, _, _ in () if check in OF_THEIR_OWN_SETTINGS else claims.points:
        other = with_settings(loss, settings)
        losses += [other] * (other is not None and other not in losses)
    return losses
