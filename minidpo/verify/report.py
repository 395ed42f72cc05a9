"""`verify(loss)`: every check that the claims allow, as a table of verdicts."""

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import partial
from typing import Any

from minidpo.errors import UserError
from minidpo.verify.checks import CHECKS, OF_THEIR_OWN_SETTINGS
from minidpo.verify.claims import Claims, claims_of, with_sft
from minidpo.verify.draws import NotAsked, Refuted, one_thread, shown, with_settings
from minidpo.verify.stranger import adapt

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
        lines, said = [self.title], set()
        for v in self.verdicts:
            lines.append(f"  {v.check:<10} {v.verdict:<10} {v.figure:<18} {v.claim}")
            if v.counterexample:
                lines.append(f"  {'':<10} {'(as above)' if v.counterexample in said else v.counterexample}")
            said.add(v.counterexample)
        return "\n".join(lines)


@one_thread()
def verify(
    loss: Any,
    like: Any = None,
    claims: Claims | None = None,
    checks: Collection[str] | None = None,
) -> Report:
    """Put a loss to every check that its claims allow.

    loss: an object of minidpo.losses, a dataclass like them, a class of such, or any function over tensors,
        see stranger.py.
    like: the loss of ours that it claims to be, whose claims it is held to, such as DPO(beta=0.1).
    claims: what is claimed of it otherwise; with neither, only what holds for every loss is asked.
    checks: the names of those to make; by default all. `exact` takes seconds, the others less.
    Raises UserError for a function whose signature says too little, for a check that there is not, and for
    claims that raise an exception or name what the loss has not.
    """
    if unknown := set(checks or ()) - set(CHECKS):
        raise UserError(f"no check {', '.join(sorted(unknown))}; there are {', '.join(CHECKS)}")
    if not callable(loss):
        raise UserError(f"{loss!r} is {type(loss).__name__}; a function of tensors is needed")
    ours = is_dataclass(loss)
    for key in fields(loss) if ours else ():
        if key.default is MISSING:
            raise UserError(f"the loss's setting {key.name!r} has no default, to which its claims refer")
    if isinstance(loss, type):
        keys = {key.name for key in fields(loss)} if ours else set()
        loss = loss(**{name: x for name, x in vars(like).items() if name in keys} if like else {})

    settings = ", ".join(f"{name}={x}" for name, x in vars(like).items() if x) if like else ""
    model, given = f"{type(like).__name__}({settings})", claims
    claim = "" if ours else ", of which nothing is claimed: its equation is not tested"
    if given:
        claim = ", held to the claims given" + (f", with the settings of {model}" if like else "")
    elif like:
        claim = f" claims to be {model}"
    claims = given or (claims_of(like or loss) if like or ours else Claims())

    if not ours:
        loss = adapt(loss, like, claims, claim)
    elif like:
        # What the loss lacks of the settings of `like`, which the claims read, is fixed.
        lacking = {name: value for name, value in vars(like).items() if not hasattr(loss, name)}
        loss = type(type(loss).__name__, (type(loss),), lacking | dict(like=like))(**vars(loss))
    if given:
        require_known(loss, like, claims)
    if hasattr(loss, "sft_weight") and (ours or not given):
        claims = with_sft(claims)
    title = shown(loss) + claim if ours else loss.about
    verdicts = [judge(name, loss, claims) for name in CHECKS if not checks or name in checks]
    return Report(type(loss).__name__, title, verdicts)


def require_known(loss: Any, like: Any, claims: Claims) -> None:
    """UserError for a point with a setting that the loss lacks, or a number that no pair has."""
    known = {
        "setting": dict.fromkeys([*(vars(like) if like else ()), *(key.name for key in fields(loss))]),
        "number of a pair": claims.fields._fields,
    }
    for i, (settings, pair, _) in enumerate(claims.points, start=1):
        for (what, there), used in zip(known.items(), (settings, pair), strict=True):
            for name in used:
                if name not in there:
                    says = f"{shown(loss)} has no {what} {name!r}; there are {', '.join(there) or 'none'}"
                    raise UserError(f"point {i} of the claims: {says}")


def judge(name: str, loss: Any, claims: Claims) -> Verdict:
    """The verdict of one check, over all the settings at which it is asked."""
    check = CHECKS[name]
    verdict = partial(Verdict, name, check.__doc__ or "")
    if not getattr(claims, name, True):
        return verdict(NOT_ASKED)
    losses = [loss]
    for settings, _, _ in () if name in OF_THEIR_OWN_SETTINGS else claims.points:
        other = with_settings(loss, settings)
        losses += [other] * (other is not None and other not in losses)
    try:
        looked_at, errors = zip(*(check(s, claims) for s in losses), strict=True)
        return verdict(HOLDS, f"{looked_at[0]}, {max(errors):.0e}")
    except NotAsked as reason:
        return verdict(NOT_ASKED, counterexample=str(reason))
    except Refuted as counterexample:
        return verdict(REFUTED, counterexample=str(counterexample))
    except UserError:
        raise
    except Exception as error:  # A loss that fails on good input is no loss.
        return verdict(REFUTED, counterexample=f"it raises {type(error).__name__}: {error}")
