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
from os import environ
from pathlib import Path
from typing import Any

from minidpo.config import config_of_run, date_of_model, loss_of_run
from minidpo.data import (
    ChatTemplate,
    PairTokens,
    PreferencePair,
    Tokenizer,
    TokenPair,
    renamed,
    require_fit,
    require_messages,
    shape_of,
    stop_if_glued,
    tokenize_pairs,
)
from minidpo.data.preferences import Unusable, pair_of
from minidpo.data.records import BadRecord, read_records
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import require_place
from minidpo.losses import DPO, LOSSES, PreferenceLoss
from minidpo.model import read_config
from minidpo.model.adapter_files import HELP, with_tokenizer
from minidpo.packing import pack
from minidpo.sections import TEMPLATES
from minidpo.settings import keys_of
from minidpo.tools.explain_text import every_loss, render
from minidpo.tools.pair_numbers import numbers_of, token_logps, under
from minidpo.tools.reading import add_reading_options, reading_section
from minidpo.tools.report_page import token_pairs, write_page
from minidpo.tools.sample import unescaped
from minidpo.training.device import choose_device
from minidpo.training.reference import require_reference


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo explain", description=__doc__)
    add = parser.add_argument
    add("--model", metavar="DIR", required=True, help="the policy")
    add("--adapter", metavar="DIR", help=HELP)
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
    add_reading_options(add)
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
        write_page(Path(options.html), "A pair, token by token", token_pairs([("", models, explanation)]))
    else:
        colour = sys.stdout.isatty() and not environ.get("NO_COLOR")
        print(render(explanation, colour, options.every_token))


def explain(options: argparse.Namespace, loss: PreferenceLoss) -> dict[str, Any]:
    """All that is printed, unrounded: float32 numbers as the model and the losses gave them."""
    device = choose_device(options.device, dtype=options.dtype)
    tokenizer = Tokenizer.from_pretrained(with_tokenizer(options.model, options.adapter))
    template = tokenizer.chat_template(options.template, date_of_model(_trained(options)))
    pair = _read_pair(options, template, tokenizer)
    ids = _token_ids(options, pair, tokenizer)

    # The log-prob of every token of both responses, then their sums log pi(y|x).
    pairs = PairTokens.from_pairs([ids])
    require_messages("--template", template, pairs, tokenizer)
    if loss.responses > pairs.responses:
        others = sorted({each.name for each in every_loss() if each.responses <= pairs.responses})
        what = f"{loss.name} compares {loss.responses} responses, and the record has {pairs.responses}"
        raise UserError(f"{what}; give --loss {' or '.join(others)}")
    batch = pack(pairs)
    of_policy = token_logps(options.model, [batch], device, options.dtype, options.adapter)
    (policy,) = (reference,) = of_policy  # (S,)
    if options.reference:
        (reference,) = token_logps(options.reference, [batch], device, options.dtype)
    if loss.margin_from_data and pair.margin is None:
        raise UserError(
            f"{loss.name} with margin_from_data reads the record's margin, and this pair has none"
        )
    numbers, logps = numbers_of(ids, tokenizer, batch, policy, reference)

    names = ("model", "adapter", "reference", "data", "index")
    explanation = {name: getattr(options, name) for name in names}
    explanation |= {name: getattr(pair, name) for name in PARTS} | numbers
    losses = [each for each in every_loss() if each.responses <= pairs.responses]
    explanation["loss"] = under(loss, logps)
    explanation["losses"] = [under(each, logps) for each in losses + [loss] * (loss not in losses)]
    return explanation


def _settings() -> dict[str, Field]:
    """The settings of all losses by name. Where several losses have a name, the first one's text is shown."""
    return {name: key for loss in reversed(LOSSES.values()) for name, key in keys_of(loss).items()}


def _option(setting: str) -> str:
    return "--" + setting.replace("_", "-")


def _chosen_loss(options: argparse.Namespace) -> tuple[PreferenceLoss, str | None]:
    """The loss that was asked for, and the configuration that its settings begin with, if there is one."""
    of_run = loss_of_run(_trained(options))
    of_run = None if of_run and of_run.needs_z0 else of_run  # It is shown under the default loss.
    name = options.loss or (of_run.name if of_run else DPO.name)
    if name not in LOSSES:
        raise UserError(f"--loss {name}: it must be one of {', '.join(LOSSES)}")
    if LOSSES[name].needs_z0:
        raise UserError(
            f"--loss {name}: it compares with z0, a mean over a whole batch; one pair does not explain it"
        )
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
    return loss, str(config_of_run(_trained(options))) if begin is of_run else None


def _trained(options: argparse.Namespace) -> Path:
    """The directory that the policy's run has left, if a run made it."""
    return Path(options.adapter or options.model)


def _read_pair(options: argparse.Namespace, template: ChatTemplate, tokenizer: Tokenizer) -> PreferencePair:
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
        data = reading_section(options, options.model)
        record = renamed(record, data.columns)
        pair = pair_of(record, shape_of(record, data.columns), template, drop_identical=False, data=data)
    except (BadRecord, Unusable) as reason:
        raise UserError(f"{place}: {reason}") from None
    if options.data is not None:
        list(stop_if_glued([pair], place, tokenizer, template, data.text))
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
