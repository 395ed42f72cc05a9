"""A loss of another program, made an object like ours, so that the same checks can be asked of it.

`adapt` reads the signature. Parameters without a default are tensors, one value per pair, and their names say
which: those of TRL, the original DPO code, torchtune and OpenRLHF are known (KNOWN). Parameters called like a
setting of the loss that it claims to be (beta, label_smoothing, ...) are settings, and called with the values
that this loss has; others keep their defaults. What the names do not tell is told in `arguments` and
`settings`. It may return B losses, a tuple that begins with them, a dict that has them as `losses` or `loss`,
or their mean.
"""

from collections.abc import Callable, Mapping
from dataclasses import field, fields, make_dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from minidpo.errors import UserError
from minidpo.losses import PairLogps, Rewards
from minidpo.verify.claims import Claims, claims_of
from minidpo.verify.draws import NotAsked, Refuted

# What a parameter is -> how it is called elsewhere.
KNOWN = {
    "chosen": "policy_chosen_logps chosen_logps policy_chosen_logp pi_chosen pi_w policy_logps",
    "rejected": "policy_rejected_logps rejected_logps policy_rejected_logp pi_rejected pi_l",
    "ref_chosen": "reference_chosen_logps ref_chosen_logps reference_chosen_logp ref_w reference_logps",
    "ref_rejected": "reference_rejected_logps ref_rejected_logps reference_rejected_logp ref_l",
    "chosen_length": "chosen_lengths chosen_len chosen_num_tokens n_w",
    "rejected_length": "rejected_lengths rejected_len rejected_num_tokens n_l",
    "margin": "margins",
    "label": "labels",
    "z0": "kl",
}
KNOWN_REWARDS = {
    "chosen": "chosen_reward chosen_rewards rewards_chosen r_w",
    "rejected": "rejected_reward rejected_rewards rewards_rejected reject_reward r_l",
    "margin": "margins",
    "chosen_logps": "",
    "chosen_length": "chosen_lengths",
}
KNOWN_WORDS = set(" ".join((KNOWN_REWARDS["chosen"], KNOWN_REWARDS["rejected"])).split())
Argument = str | Callable[[Any], Tensor]  # a field's name, or a function of the fields


def _raw(cls: Any, **values: Tensor) -> Any:
    """Tensors stay as they are: another program's loss gets bf16 as bf16."""
    return tuple.__new__(cls, map(values.get, cls._fields))


class _RawPairs(PairLogps):
    __new__ = _raw  # type: ignore[assignment]


class _RawRewards(Rewards):
    __new__ = _raw  # type: ignore[assignment]


class Stranger:
    """The base class of what `adapt` makes: a dataclass whose fields are the settings."""

    function: Callable
    arguments: dict[str, Argument]  # parameter -> what is passed
    parameters: dict[str, str]  # setting -> parameter
    own: dict[str, Any]  # its settings, of which those that are no parameters cannot be changed

    def __post_init__(self) -> None:
        if any(value != self.own[name] for name, value in vars(self).items() if name not in self.parameters):
            raise NotAsked  # It cannot be set so.

    def returned(self, pairs: Any) -> Tensor:
        """What it returns of these pairs, or the first of what it returns."""
        tensors = {
            name: getattr(pairs, what) if isinstance(what, str) else what(pairs)
            for name, what in self.arguments.items()
        }
        settings = {parameter: getattr(self, name) for name, parameter in self.parameters.items()}
        values = type(self).function(**tensors, **settings)
        if isinstance(values, Mapping):
            values = values.get("losses", values.get("loss"))
        elif isinstance(values, tuple | list):
            values = values[0]
        if not isinstance(values, Tensor):
            what = type(values).__name__
            raise Refuted(f"it returns {what}; a tensor of losses is needed, alone or in a tuple or dict")
        return values

    def __call__(self, pairs: Any) -> Tensor:
        losses = self.returned(pairs)
        # From a mean the losses are had one by one; `check_alone` asks whether it is their mean.
        return losses if losses.ndim else self.one_by_one(pairs)

    def one_by_one(self, pairs: Any) -> Tensor:
        columns = [[None] * len(pairs.chosen) if x is None else x.split(1) for x in pairs]
        return torch.stack([self.returned(pairs._make(one)) for one in zip(*columns, strict=True)])


def adapt(
    function: Callable,
    like: Any = None,
    claims: Claims | None = None,
    arguments: Mapping[str, Argument] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Stranger, Claims]:
    """The function as a loss object, and what is claimed of it. Raises UserError where its signature says too
    little."""
    name = getattr(function, "__name__", type(function).__name__)
    claims = claims or (replace(claims_of(like), metrics=None) if like else Claims())
    parameters = signature(function.forward if isinstance(function, nn.Module) else function).parameters
    of_rewards = claims.fields is Rewards or not KNOWN_WORDS.isdisjoint(parameters)
    claims = replace(claims, fields=_RawRewards if of_rewards else _RawPairs)
    arguments, settings = arguments or {}, settings or {}

    own = {key.name: getattr(like, key.name) for key in fields(like)} if like else {}
    tensors: dict[str, Argument] = {}
    settable: dict[str, str] = {}  # the settings of `like` -> its parameters
    fixed: dict[str, Any] = {}
    for parameter, about in parameters.items():
        setting = settings.get(parameter, parameter)
        if about.kind in (about.VAR_POSITIONAL, about.VAR_KEYWORD):
            continue
        if parameter in arguments:
            tensors[parameter] = arguments[parameter]
        elif isinstance(setting, str) and setting in own and about.default is not None:
            settable[setting] = parameter
        elif parameter in settings:
            fixed[parameter] = settings[parameter]
        elif not like and isinstance(about.default, float):
            settable[parameter], own[parameter] = parameter, about.default
        elif about.default is about.empty:
            tensors[parameter] = _known(name, parameter, KNOWN_REWARDS if of_rewards else KNOWN)
    for unknown in {*arguments, *settings} - set(parameters):
        raise UserError(f"{name} has no argument {unknown!r}; it has {', '.join(parameters)}")
    _require(name, tensors, claims)

    def called(**given: Any) -> Any:
        return function(**fixed | given)

    defaults = [(key, Any, field(default=value)) for key, value in own.items()]
    if like:  # At the defaults of our loss, to which its points refer.
        defaults = [(k.name, Any, field(default=k.default, metadata=k.metadata)) for k in fields(like)]
    namespace = dict(function=staticmethod(called), arguments=tensors, parameters=settable, own=own)
    kind = make_dataclass(name, defaults, bases=(Stranger,), frozen=True, namespace=namespace)
    return kind(**own), claims


def describe(loss: Stranger, like: Any) -> str:
    """What it is taken for."""
    read = [f"{name} = {what if isinstance(what, str) else '...'}" for name, what in loss.arguments.items()]
    claim = ", of which nothing is claimed"
    if like:
        used = [f"{key.name}={value}" for key in fields(like) if (value := getattr(like, key.name))]
        claim = f" claims to be {type(like).__name__}({', '.join(used)})"
    return f"{type(loss).__name__}{claim}\n  arguments: {', '.join(read)}"


def _known(function: str, parameter: str, known: Mapping[str, str]) -> str:
    for what, names in known.items():
        if parameter == what or parameter in names.split():
            return what
    raise UserError(
        f"{function}: what is its argument {parameter!r}? Say it with arguments={{{parameter!r}: NAME}}, NAME"
        f" being one of {', '.join(known)}; or give it a value with settings={{{parameter!r}: ...}}"
    )


def _require(function: str, tensors: Mapping[str, Argument], claims: Claims) -> None:
    for parameter, what in tensors.items():
        if isinstance(what, str) and what not in claims.names:
            there = ", ".join(claims.names)
            raise UserError(f"{function}: its argument {parameter!r} cannot be {what!r}; there are {there}")
    if not tensors:
        raise UserError(f"{function}: none of its arguments is a log-prob or a reward of each pair")
