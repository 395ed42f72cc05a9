"""`python -m minidpo verify`: put losses to the proof, ours or another program's.

Without arguments all of ours. A function or class of your own is MODULE:NAME, and `--like dpo beta=0.2` holds
it to what is claimed of that loss, `--claims MODULE:NAME` to claims of your own; `minidpo.verify.verify` can
be told more. The exit status is 1 if a claim is refuted.
"""

import argparse
import importlib
import tomllib
from typing import Any

from minidpo.errors import UserError, one_line
from minidpo.settings import keys_of
from minidpo.verify import CHECKS, Claims, every_loss, verify


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo verify", description=about)
    which = f"{', '.join(every_loss())}, or a function or class as MODULE:NAME (all of ours)"
    parser.add_argument("losses", metavar="LOSS", nargs="*", help=which)
    like = "the loss that a function claims to be, and its settings: --like dpo beta=0.2"
    parser.add_argument("--like", metavar=("LOSS", "KEY=VALUE"), nargs="+", help=like)
    claims = "what is claimed of it otherwise, an object of minidpo.verify.Claims"
    parser.add_argument("--claims", metavar="MODULE:NAME", help=claims)
    checks = f"make only these: {', '.join(CHECKS)}"
    parser.add_argument("--checks", metavar="CHECK", nargs="+", help=checks)
    options = parser.parse_args(arguments)

    names = options.losses or every_loss()
    model = _ours(*options.like) if options.like else None
    if model and (ours := [name for name in names if ":" not in name]):
        raise UserError(f"--like is for a function, MODULE:NAME; {_ours(ours[0]).name} has claims of its own")
    own = _imported(options.claims) if options.claims else None
    if own is not None and not isinstance(own, Claims):
        raise UserError(f"--claims {options.claims} is {type(own).__name__}; minidpo.verify.Claims is needed")
    refuted = []
    for loss in [_imported(name) if ":" in name else _ours(name) for name in names]:
        report = verify(loss, model, own, checks=options.checks)
        print(report, flush=True)
        refuted += [report.name] * bool(report.refuted)
    print(f"refuted: {', '.join(refuted)}" if refuted else "nothing is refuted")
    if refuted:
        raise SystemExit(1)


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise UserError(f"{name} cannot be imported ({type(error).__name__}: {one_line(error)})") from None


def _ours(name: str, *assignments: str) -> Any:
    """The loss of this name. The assignments are KEY=VALUE, as in a configuration."""
    if name not in every_loss():
        there = ", ".join(every_loss())
        raise UserError(f"no loss {name!r}; there are {there}; a function of yours is MODULE:NAME")
    loss, values = every_loss()[name], {}
    defaults: dict[str, Any] = {key: of.default for key, of in keys_of(loss).items()}
    try:
        for key, _, text in (assignment.partition("=") for assignment in assignments):
            if key not in defaults:
                raise ValueError(f"no key {key!r}; {name} has {', '.join(defaults) or 'none'}")
            values[key] = type(defaults[key])(tomllib.loads(f"value = {text}")["value"])
        return loss(**values)
    except (ValueError, TypeError) as error:  # a TOMLDecodeError is a ValueError, too
        raise UserError(f"--like {name} {' '.join(assignments)}: {one_line(error)}") from None
