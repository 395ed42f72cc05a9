"""`python -m minidpo verify`: put losses to the proof, ours or another program's.

Without arguments all of ours. A function of your own is MODULE:NAME, and `--like dpo beta=0.2` holds it to
what is claimed of that loss; `minidpo.verify.verify` can be told more. The exit status is 1 if a claim is
refuted.
"""

import argparse
import importlib
import tomllib
from typing import Any

from minidpo.errors import UserError, one_line
from minidpo.settings import keys_of
from minidpo.verify import BY_NAME, every_loss, verify


def main(arguments: list[str]) -> None:
    about = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m minidpo verify", description=about)
    which = f"{', '.join(every_loss())}, or a function as MODULE:NAME (all of ours)"
    parser.add_argument("losses", metavar="LOSS", nargs="*", help=which)
    like = "the loss that a function claims to be, and its settings: --like dpo beta=0.2"
    parser.add_argument("--like", metavar=("LOSS", "KEY=VALUE"), nargs="+", help=like)
    checks = f"make only these: {', '.join(BY_NAME)}"
    parser.add_argument("--checks", metavar="CHECK", nargs="+", help=checks)
    options = parser.parse_args(arguments)

    model = None if options.like is None else _ours(options.like[0])(**_settings(*options.like))
    losses = [_loss(name, model) for name in options.losses or every_loss()]
    refuted = []
    for loss, like in losses:
        report = verify(loss, like, checks=options.checks)
        print(report, flush=True)
        refuted += [report.name] * bool(report.refuted)
    print(f"refuted: {', '.join(refuted)}" if refuted else "nothing is refuted")
    if refuted:
        raise SystemExit(1)


def _loss(name: str, model: Any) -> tuple[Any, Any]:
    """What is to be verified, and the loss that it claims to be."""
    module, colon, attribute = name.partition(":")
    if not colon:
        if model is not None:
            raise UserError(f"--like is for a function, MODULE:NAME; {name} has claims of its own")
        return _ours(name)(), None
    try:
        found = getattr(importlib.import_module(module), attribute)
    except AttributeError:
        raise UserError(f"{name}: the module {module} has no {attribute!r}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{name}: the module {module} cannot be imported ({reason})") from None
    if not callable(found):
        raise UserError(f"{name} is {type(found).__name__}; a function of tensors is needed")
    return found, model


def _ours(name: str) -> Any:
    if name not in every_loss():
        there = ", ".join(every_loss())
        raise UserError(f"no loss {name!r}; there are {there}; a function of yours is MODULE:NAME")
    return every_loss()[name]


def _settings(name: str, *assignments: str) -> dict[str, Any]:
    """KEY=VALUE, as in a configuration."""
    defaults: dict[str, Any] = {key: of.default for key, of in keys_of(_ours(name)).items()}
    values = {}
    for assignment in assignments:
        key, _, text = assignment.partition("=")
        if key not in defaults:
            there = ", ".join(defaults) or "none"
            raise UserError(f"--like {name} {assignment}: no key {key!r}; {name} has {there}")
        try:
            values[key] = type(defaults[key])(tomllib.loads(f"value = {text}")["value"])
        except (tomllib.TOMLDecodeError, ValueError, TypeError):
            raise UserError(f"--like {name} {assignment}: {text!r} is no value for {key}") from None
    try:
        _ours(name)(**values)
    except ValueError as error:
        raise UserError(f"--like {error}") from None
    return values
