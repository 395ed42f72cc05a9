"""`python -m minidpo explain`: one pair from tokens to loss, a table to check with a calculator.

Printed are every token (of long texts the ends, unless --every-token is given) with its role and its
log-prob under policy and reference, the sums, the log-ratios, and what the loss and its gradient make of
them; then the same pair under every loss. The numbers are those of `score`, and of the first logged step of a
run with batch_size 1: nothing is truncated, and the same functions compute them. --html: as in `report`.
"""

import argparse
import json
import sys
from dataclasses import Field, replace
from itertools import chain
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.config import config_of_run, date_of_model, loss_of_run
from minidpo.data import (
    ChatTemplate,
    PairTokens,
    PreferencePair,
    Tokenizer,
    TokenPair,
    require_fit,
    require_messages,
    tokenize_pairs,
)
from minidpo.data.preferences import Unusable, pair_of, shape_of
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import PARTS
from minidpo.data.truncation import describe_pair
from minidpo.errors import UserError
from minidpo.files import require_place
from minidpo.logprobs import sum_by_response
from minidpo.losses import DPO, LOSSES, PairLogps, PreferenceLoss
from minidpo.model import load_model, read_config, response_token_logps
from minidpo.packing import PackedBatch, pack
from minidpo.sections import TEMPLATES
from minidpo.settings import keys_of
from minidpo.tools.explain_text import NUMBERS, characters, every_loss, render, visible
from minidpo.tools.report_page import pair_article, write_page
from minidpo.tools.sample import unescaped
from minidpo.training.device import autocast, choose_device
from minidpo.training.reference import require_reference
from minidpo.training.scoring import require_finite


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo explain", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="the policy")
    add("--reference", metavar="DIR", help="default: the policy itself, as when training starts")
    add("--data", metavar="FILE", help="preference file; --index says which record")
    add("--index", type=int, metavar="K", help="the record's place in the file, from 0")
    for name in PARTS:
        add(f"--{name}", metavar="TEXT", help="instead of --data (\\n is a line break)")
    default = "default: that of the run that made --model, else"
    add("--loss", metavar="NAME", help=f"{', '.join(LOSSES)} ({default} {DPO.name})")
    for name, key in _settings().items():
        kind: Any = {"action": "store_true"} if key.default is False else {"type": type(key.default)}
        add(_option(name), default=None, help=f"{key.metadata['about']} ({default} the loss's own)", **kind)
    add("--max-length", type=int, help="longest prompt + response (default: the model's)")
    add("--template", default="model", choices=TEMPLATES, help="how messages become text")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    add("--every-token", action="store_true", help="also those in the middle of long texts (--json has all)")
    instead = parser.add_mutually_exclusive_group().add_argument
    instead("--json", action="store_true", help="one JSON object with unrounded numbers")
    instead("--html", metavar="FILE", help="a page for a browser, with every token shaded by its log-ratio")
    options = parser.parse_args(arguments)
    if options.html:
        require_place("--html", options.html)

    loss, settings_from = _chosen_loss(options)
    explanation = explain(options, loss) | {"settings_from": settings_from}
    if options.json:
        print(json.dumps(explanation))
    elif options.html:
        models = f"pi: {options.model}; pi_ref: {options.reference or 'the same'}"
        write_page(Path(options.html), "A pair, token by token", [pair_article(explanation, why=models)])
    else:
        colour = sys.stdout.isatty() and not environ.get("NO_COLOR")
        print(render(explanation, colour, options.every_token))


def explain(options: argparse.Namespace, loss: PreferenceLoss) -> dict[str, Any]:
    """All that is printed, unrounded: float32 numbers as the model and the losses gave them."""
    device = choose_device(options.device)
    tokenizer = Tokenizer.from_pretrained(options.model)
    template = tokenizer.chat_template(options.template, date_of_model(Path(options.model)))
    pair = _read_pair(options, template)
    ids = _token_ids(options, pair, tokenizer)

    # The log-prob of every token of both responses, then their sums log pi(y|x).
    pairs = PairTokens.from_pairs([ids])
    require_messages("--template", template, pairs, tokenizer)
    if loss.responses > pairs.responses:
        others = [each.name for each in LOSSES.values() if each.responses <= pairs.responses]
        what = f"{loss.name} compares {loss.responses} responses, and the record has {pairs.responses}"
        raise UserError(f"{what}; give --loss {' or '.join(others)}")
    batch = pack(pairs)
    (policy,) = (reference,) = token_logps(options.model, [batch], device, options.dtype)  # (S,)
    if options.reference:
        (reference,) = token_logps(options.reference, [batch], device, options.dtype)
    numbers, logps = numbers_of(ids, tokenizer, batch, policy, reference)

    explanation = {name: getattr(options, name) for name in ("model", "reference", "data", "index")}
    explanation |= {name: getattr(pair, name) for name in PARTS} | numbers
    losses = [each for each in every_loss() if each.responses <= pairs.responses]
    explanation["loss"] = under(loss, logps)
    explanation["losses"] = [under(each, logps) for each in losses + [loss] * (loss not in losses)]
    return explanation


def numbers_of(
    ids: TokenPair, tokenizer: Tokenizer, batch: PackedBatch, policy: Tensor, reference: Tensor
) -> tuple[dict[str, Any], PairLogps]:
    """What the log-probs (S,) of a pair's scored tokens add up to; and the same for a loss (B = 1)."""
    lengths = batch.lengths[0]  # (K,)
    sums, reference_sums = (sum_by_response(logps, lengths) for logps in (policy, reference))
    numbers: dict[str, Any] = {"tokens": _token_table(ids, tokenizer, policy.numpy(), reference.numpy())}
    logps: dict[str, Tensor] = {}
    for k, name in enumerate(PARTS[1 : 1 + len(lengths)]):
        numbers[f"{name}_logps"] = sums[k].item()
        numbers[f"reference_{name}_logps"] = reference_sums[k].item()
        numbers[f"{name}_length"] = lengths[k].item()
        logps |= {name: sums[k : k + 1], f"ref_{name}": reference_sums[k : k + 1]}
        logps[f"{name}_length"] = lengths[k : k + 1]
    return numbers, PairLogps(**logps)


def under(loss: PreferenceLoss, pair: PairLogps) -> dict[str, Any]:
    """What `loss` makes of one pair (B = 1). Rewards and the loss are the run's own.

    argument: what the loss is a function of. sigmoid: of the argument, if it is the logit of a probability.
    """
    # In float64, because a weight of 1e-9 is still a weight.
    precise = PairLogps(*(v.double() if v is not None and v.is_floating_point() else v for v in pair))
    values: dict[str, Any] = {"name": loss.name} | {name: getattr(loss, name) for name in keys_of(loss)}
    values["argument"] = loss.z(precise).item()
    if loss.z_is_logit:
        values["sigmoid"] = loss.z(precise).sigmoid().item()
    if loss.responses == 2:
        chosen, rejected = loss.rewards(pair)
        values["chosen_reward"], values["rejected_reward"] = chosen.item(), rejected.item()
        values["margin"] = (chosen - rejected).item()
    values["loss"] = loss(pair).item()
    weights = [weight.item() for weight in loss.gradient_weights(precise)]
    values["chosen_weight"], values["rejected_weight"] = weights if loss.responses == 2 else (*weights, 0.0)
    return values


def _settings() -> dict[str, Field]:
    """The settings of all losses by name. Where several losses have a name, the first one's text is shown."""
    return {name: key for loss in reversed(LOSSES.values()) for name, key in keys_of(loss).items()}


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _chosen_loss(options: argparse.Namespace) -> tuple[PreferenceLoss, str | None]:
    """The loss that was asked for, and the configuration that its settings begin with, if there is one."""
    of_run = loss_of_run(Path(options.model))
    name = options.loss or (of_run.name if of_run else DPO.name)
    if name not in LOSSES:
        raise UserError(f"--loss {name}: it must be one of {', '.join(LOSSES)}")
    # A loss other than the run's begins at its own defaults.
    begin: Any = of_run if of_run and of_run.name == name else LOSSES[name]()
    given = {key: value for key in _settings() if (value := getattr(options, key)) is not None}
    if foreign := given.keys() - keys_of(begin).keys():
        has = ", ".join(map(_option, keys_of(begin))) or "no settings"
        raise UserError(f"{_option(foreign.pop())}: the loss {name} has no such setting; it has {has}")
    try:
        loss = replace(begin, **given)
    except ValueError as error:
        raise UserError(str(error)) from None
    return loss, str(config_of_run(Path(options.model))) if begin is of_run else None


def _read_pair(options: argparse.Namespace, template: ChatTemplate) -> PreferencePair:
    """The pair that --data and --index name, or that --prompt, --chosen and --rejected spell out."""
    texts = {name: getattr(options, name) for name in PARTS}
    if (options.data is None) == all(text is None for text in texts.values()):
        raise UserError("give a pair either as --data and --index, or as --prompt, --chosen and --rejected")
    if options.data is None:
        if options.index is not None or None in texts.values():
            raise UserError(
                "a pair in text needs --prompt, --chosen and --rejected, all three and no --index"
            )
        place, record = "the pair as typed", {name: unescaped(text) for name, text in texts.items()}
    else:
        place, record = _record(options.data, options.index)
    try:
        if isinstance(record, BadRecord):
            raise record
        pair = pair_of(record, shape_of(record), template, drop_identical=False)
    except (BadRecord, Unusable) as reason:
        raise UserError(f"{place}: {reason}") from None
    return replace(pair, index=options.index or 0)


def _record(file: str, index: int | None) -> tuple[str, Any]:
    """A record of a file by its number, and where it stands."""
    if index is None or index < 0:
        raise UserError(
            f"--index {'is missing' if index is None else index}; give the record's place, from 0"
        )
    place = -1
    for place, (line, record) in enumerate(read_records(Path(file))):
        if place == index:
            return f"{file}:{line}", record
    raise UserError(f"--index {index}: {file} has {place + 1} records; the last is {place}")


def _token_ids(options: argparse.Namespace, pair: PreferencePair, tokenizer: Tokenizer) -> TokenPair:
    """The ids of the whole pair. Raises UserError unless policy and reference can read them."""
    config = read_config(Path(options.model))
    limit = config.max_length if options.max_length is None else options.max_length
    require_fit("model", config, tokenizer, limit)
    (ids,) = tokenize_pairs([pair], tokenizer, limit, truncate=False, drop_identical=False)
    if options.reference:
        longest = len(ids.prompt) + max(map(len, ids.responses))
        require_reference(Path(options.reference), tokenizer, longest)
    return ids


@torch.no_grad()
def token_logps(model: str, batches: list[PackedBatch], device: torch.device, dtype: str) -> list[Tensor]:
    """Of each batch, the log-probs (S,) of its scored tokens under the model of a directory."""
    loaded = load_model(model, device=device)
    with autocast(device, dtype):
        logps = [response_token_logps(loaded, batch.to(device)).float().cpu() for batch in batches]
    require_finite(torch.cat(logps), model)
    return logps


def _token_table(
    ids: TokenPair, tokenizer: Tokenizer, policy: np.ndarray, reference: np.ndarray
) -> list[dict[str, Any]]:
    """One entry per token, in the order of the packed row. A response's last sums are those of `score`."""

    tokens = list(describe_pair(ids, tokenizer))
    of_chosen = sum(token["scored"] and token["response"] == "chosen" for token in tokens)

    def sums(logps: np.ndarray) -> np.ndarray:  # in float64, then rounded to float32, as sum_by_response does
        parts = np.split(logps, [of_chosen])
        return np.concatenate([part.cumsum(dtype=np.float64) for part in parts]).astype(np.float32)

    policy_sum, reference_sum = sums(policy), sums(reference)
    columns = (policy, reference, policy - reference, policy_sum, reference_sum, policy_sum - reference_sum)
    numbers = iter(np.stack(columns, axis=1).tolist())
    table = []
    spelled = chain.from_iterable(characters(tokenizer, getattr(ids, part) or []) for part in PARTS)
    for token in tokens:
        token["text"], token["characters"] = visible(tokenizer, token["id"]), next(spelled)
        table.append(token | (dict(zip(NUMBERS, next(numbers), strict=True)) if token["scored"] else {}))
    return table
