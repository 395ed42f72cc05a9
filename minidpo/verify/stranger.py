"""A loss of another program, made an object like ours, so that the same checks can be asked of it.

`adapt` reads the signature. Parameters without a default are tensors, one value per pair, and their names say
which: those of TRL, the original DPO code, torchtune and OpenRLHF are known (KNOWN). So are those that are
None by default, if what is claimed reads them. Parameters called like a setting of the loss that it claims to
be (beta, label_smoothing, ...) are settings, and called with the values that this loss has; others keep their
defaults, and the report names them. A function with other names is called by one of yours that has these.
It may return B losses, a tuple that begins with them, or their mean.
"""

from collections.abc import Callable
from dataclasses import field, make_dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from minidpo.errors import UserError
from minidpo.verify.claims import LOGPS, Claims
from minidpo.verify.draws import Refuted

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


class Stranger:
    """The base class of what `adapt` makes: a dataclass whose fields are the settings that it takes."""

    function: Callable
    about: str  # what it is taken for
    arguments: dict[str, str]  # parameter -> which number of a pair

    def returned(self, pairs: Any) -> Tensor:
        """What it returns of these pairs, or the first of what it returns."""
        given = {parameter: getattr(pairs, name) for parameter, name in self.arguments.items()}
        values = type(self).function(**given, **vars(self))
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


def adapt(function: Callable, like: Any, claims: Claims, claim: str) -> Stranger:
    """The function as a loss object; `claim` is what the report says of it. Raises UserError where its
    signature says too little."""
    name = getattr(function, "__name__", type(function).__name__)
    parameters = signature(function.forward if isinstance(function, nn.Module) else function).parameters
    own, numbers = vars(like) if like else {}, claims.fields._fields
    read_by_claims = {number for _, pair, _ in claims.points for number in pair} or set(LOGPS)
    if like and not getattr(like, "margin_from_data", False):
        read_by_claims -= {"margin"}
    tensors: dict[str, str] = {}
    settings: list[str] = []
    for parameter, about in parameters.items():
        known = next((n for n in numbers if parameter in (n, *KNOWN.get(n, "").split())), "")
        needed = about.default is about.empty and about.kind not in (about.VAR_POSITIONAL, about.VAR_KEYWORD)
        number = type(about.default) in (int, float, bool)
        if number and not like or parameter in own and about.default is not None:
            settings.append(parameter)
        elif known and (needed or about.default is None and known in read_by_claims):
            tensors[parameter] = known
        elif needed:
            raise UserError(
                f"{name}: what is its argument {parameter!r}? A setting needs a default; a tensor is called"
                f" like one of {', '.join(numbers)}. Write a function with these names that calls {name}"
            )
    if not tensors:
        raise UserError(f"{name}: none of its arguments is a log-prob or a reward of each pair")

    about_it = f"{name}{claim}\n  arguments: {', '.join(f'{n} = {what}' for n, what in tensors.items())}"
    varied = {key for of_point, _, _ in claims.points for key in of_point if key in settings}
    left = [n for n, x in parameters.items() if x.default is not x.empty and n not in {*tensors, *varied}]
    if left:
        about_it += f"\n  left at the default, not tested: {', '.join(left)}"
    # The defaults are those of our loss, to which its points refer.
    defaults = vars(type(like)()) if like else {key: parameters[key].default for key in settings}
    keys = [(key, Any, field(default=x)) for key, x in defaults.items() if key in settings]
    namespace = own | dict(function=staticmethod(function), arguments=tensors, about=about_it, like=like)
    kind = make_dataclass(name, keys, bases=(Stranger,), frozen=True, namespace=namespace)
    return kind(**{key: value for key, value in own.items() if key in settings})
