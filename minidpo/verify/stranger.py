"""A loss of another program, made an object like ours, so that the same checks can be asked of it.

`adapt` reads the signature. Parameters without a default are tensors, one value per pair, and their names say
which: those of TRL, the original DPO code, torchtune and OpenRLHF are known (KNOWN). Parameters called like a
setting of the loss that it claims to be (beta, label_smoothing, ...) are settings, and called with the values
that this loss has; others keep their defaults, and the report names them. What the names do not tell is told
in `arguments` (parameter -> a field of the pairs, or a function of them) and `settings` (parameter -> a
setting's name). It may return B losses, a tuple that begins with them, or their mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from minidpo.errors import UserError
from minidpo.verify.claims import Claims, claims_of
from minidpo.verify.draws import NotAsked, Refuted

# What a parameter is -> how it is called elsewhere. Of a reward model's loss, chosen and rejected are
# rewards.
KNOWN = {
    "chosen": "policy_chosen_logps chosen_logps policy_chosen_logp pi_chosen pi_w policy_logps"
    " chosen_reward chosen_rewards rewards_chosen r_w",
    "rejected": "policy_rejected_logps rejected_logps policy_rejected_logp pi_rejected pi_l"
    " rejected_reward rejected_rewards rewards_rejected reject_reward r_l",
    "ref_chosen": "reference_chosen_logps ref_chosen_logps reference_chosen_logp ref_w reference_logps",
    "ref_rejected": "reference_rejected_logps ref_rejected_logps reference_rejected_logp ref_l",
    "chosen_length": "chosen_lengths chosen_len chosen_num_tokens n_w",
    "rejected_length": "rejected_lengths rejected_len rejected_num_tokens n_l",
    "margin": "margins",
    "label": "labels",
    "z0": "kl",
}
Argument = str | Callable[[Any], Tensor]  # a field's name, or a function of the fields


class Stranger:
    """The base class of what `adapt` makes: a dataclass whose fields are the settings."""

    function: Callable
    about: str  # what it is taken for
    arguments: dict[str, Argument]  # parameter -> what is passed
    parameters: dict[str, str]  # setting -> parameter
    own: dict[str, Any]  # its settings, of which those that are no parameters cannot be changed

    def __post_init__(self) -> None:
        if any(value != self.own[name] for name, value in vars(self).items() if name not in self.parameters):
            raise NotAsked  # It cannot be set so.

    def returned(self, pairs: Any) -> Tensor:
        """What it returns of these pairs, or the first of what it returns."""
        given = {n: getattr(pairs, x) if isinstance(x, str) else x(pairs) for n, x in self.arguments.items()}
        dtype = pairs.chosen.dtype  # In bf16 all floats are, those made of integer lengths too.
        values = type(self).function(
            **{n: x.to(dtype) if x.is_floating_point() else x for n, x in given.items()},
            **{parameter: getattr(self, name) for name, parameter in self.parameters.items()},
        )
        if isinstance(values, tuple | list):
            values = values[0]
        if not isinstance(values, Tensor):
            what = type(values).__name__
            raise Refuted(self, f"it returns {what}; a tensor of losses is needed, alone or in a tuple")
        return values

    def __call__(self, pairs: Any) -> Tensor:
        losses = self.returned(pairs)
        if losses.ndim:
            return losses
        # From a mean the losses are had one by one; `check_alone` asks whether it is their mean.
        columns = [[None] * len(pairs.chosen) if x is None else x.split(1) for x in pairs]
        return torch.stack([self.returned(pairs._make(one)) for one in zip(*columns, strict=True)])


def adapt(
    function: Callable,
    like: Any,
    claims: Claims | None,
    arguments: Mapping[str, Argument],
    settings: Mapping[str, str],
) -> tuple[Stranger, Claims]:
    """The function as a loss object, and what is claimed of it. Raises UserError where its signature says too
    little."""
    name = getattr(function, "__name__", type(function).__name__)
    claim = ", of which nothing is claimed" if claims is None else ", held to the claims given"
    claims = claims or (claims_of(like) if like else Claims())
    claims = replace(claims, fields=type("Raw", (claims.fields,), {"__new__": _raw}))
    parameters = signature(function.forward if isinstance(function, nn.Module) else function).parameters
    for unknown in {*arguments, *settings} - set(parameters):
        raise UserError(f"{name} has no argument {unknown!r}; it has {', '.join(parameters)}")

    own = vars(like) if like else {}
    tensors: dict[str, Argument] = {}
    settable: dict[str, str] = {}  # the settings of `like` -> its parameters
    for parameter, about in parameters.items():
        setting = settings.get(parameter, parameter)
        if about.kind in (about.VAR_POSITIONAL, about.VAR_KEYWORD):
            continue
        if parameter in arguments:
            tensors[parameter] = arguments[parameter]
        elif setting in own and about.default is not None:
            settable[setting] = parameter
        elif not like and type(about.default) in (int, float, bool):
            settable[parameter], own[parameter] = parameter, about.default
        elif about.default is about.empty:
            tensors[parameter] = _known(name, parameter, claims)
    if not tensors:
        raise UserError(f"{name}: none of its arguments is a log-prob or a reward of each pair")
    for parameter, what in tensors.items():
        if isinstance(what, str) and what not in claims.fields._fields:
            there = ", ".join(claims.fields._fields)
            raise UserError(f"{name}: its argument {parameter!r} cannot be {what!r}; there are {there}")

    read = [
        f"{parameter} = {what if isinstance(what, str) else '...'}" for parameter, what in tensors.items()
    ]
    if like:
        used = [f"{key.name}={own[key.name]}" for key in fields(like) if own[key.name]]
        claim = f" claims to be {type(like).__name__}({', '.join(used)})"
    about_it = f"{name}{claim}\n  arguments: {', '.join(read)}"
    varied = {settable.get(key) for settings, _, _ in claims.points for key in settings}
    left = [n for n, x in parameters.items() if x.default is not x.empty and n not in {*tensors, *varied}]
    if left:
        about_it += f"\n  left at the default, not tested: {', '.join(left)}"
    # The defaults are those of our loss, to which its points refer.
    keys = [(key, Any, field(default=x)) for key, x in (vars(type(like)()) if like else own).items()]
    namespace = dict(arguments=tensors, parameters=settable, own=own, about=about_it)
    namespace["function"] = staticmethod(function)
    kind = make_dataclass(name, keys, bases=(Stranger,), frozen=True, namespace=namespace)
    return kind(**own), claims


def _raw(cls: Any, **values: Tensor) -> Any:
    """The pairs, with tensors as they are: another program's loss gets bf16 as bf16."""
    return tuple.__new__(cls, map(values.get, cls._fields))


def _known(function: str, parameter: str, claims: Claims) -> str:
    if parameter in claims.fields._fields:
        return parameter
    for what, names in KNOWN.items():
        if parameter in names.split():
            return what
    there = ", ".join(claims.fields._fields)
    raise UserError(
        f"{function}: what is its argument {parameter!r}? Say it with minidpo.verify.verify(..., arguments="
        f"{{{parameter!r}: NAME}}), NAME being one of {there}, or bind it with functools.partial"
    )
