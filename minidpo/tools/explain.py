"""`python -m minidpo explain`: one pair from tokens to loss, a table to check with a calculator.

Printed are every token (of long texts the ends) with its role and its log-prob under policy and reference,
the sums, the log-ratios, and what the loss and its gradient make of them; then the same pair under every
loss. The numbers are those of `score`, and of the first logged step of a run with batch_size 1. Nothing is
truncated; where training did, that is said.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidpo.config import data_of_model
from minidpo.data import (
    BadRecord,
    ChatTemplate,
    PairTokens,
    PreferencePair,
    Tokenizer,
    Unusable,
    pair_of,
    read_records,
    renamed,
    require_fit,
    require_messages,
    shape_of,
    stop_if_glued,
)
from minidpo.data.report import PARTS
from minidpo.errors import UserError
from minidpo.files import require_place
from minidpo.losses import DPO, LOSSES, PreferenceLoss
from minidpo.model import read_config
from minidpo.model.adapter_files import HELP, with_tokenizer
from minidpo.sections import TEMPLATES
from minidpo.settings import keys_of
from minidpo.tools.explain_text import render
from minidpo.tools.pair_numbers import explanations
from minidpo.tools.reading import (
    add_reading_options,
    add_settings,
    chosen_loss,
    cut_in_training,
    reading_section,
)
from minidpo.tools.report_page import token_pairs, write_page
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
    add("--loss", choices=LOSSES, metavar="NAME", help=f"{', '.join(LOSSES)} ({default} {DPO.name})")
    # Of all losses. Where several have a setting, the first one's text is shown.
    settings = {name: key for loss in reversed(LOSSES.values()) for name, key in keys_of(loss).items()}
    add_settings(add, settings, f"{default} the loss's own")
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
        require_place("--html", options.html, options.data)

    given = {name: value for name in settings if (value := getattr(options, name)) is not None}
    if options.loss and LOSSES[options.loss].needs_z0:
        why = "it compares with z0, a mean over a whole batch; one pair does not explain it"
        raise UserError(f"--loss {options.loss}: {why}")
    trained = Path(options.adapter or options.model)  # what the policy's run has left, if a run made it
    loss, settings_from = chosen_loss(trained, lambda loss: not loss.needs_z0, options.loss, given)
    explanation = explain(options, trained, loss) | {"settings_from": settings_from}
    if options.json:
        print(json.dumps(explanation))
    elif options.html:
        models = f"pi: {options.model}; pi_ref: {options.reference or 'the same'}"
        write_page(Path(options.html), "A pair, token by token", token_pairs([(models, explanation)]))
    else:
        print(render(explanation, options.every_token))


def explain(options: argparse.Namespace, trained: Path, loss: PreferenceLoss) -> dict[str, Any]:
    """All that is printed, unrounded."""
    device = choose_device(options.device, dtype=options.dtype)
    tokenizer = Tokenizer.from_pretrained(with_tokenizer(options.model, options.adapter))
    template = tokenizer.chat_template(options.template, data_of_model(trained).date)
    pair = _read_pair(options, template, tokenizer)
    config = read_config(Path(options.model))
    limit = config.max_length if options.max_length is None else options.max_length
    require_fit("model", config, tokenizer, limit)
    pairs = PairTokens.from_pairs(tokenizer.encode_pairs([pair]))
    if not pairs.lengths[0, 0]:
        raise UserError("the prompt has no token, so nothing predicts the first token of a response")
    if (longest := int(pairs.lengths[0, 0] + pairs.lengths[0, 1:].max())) > limit:
        remedy = "raise it" if longest <= config.max_length else "the model takes no longer one"
        raise UserError(f"the pair has {longest} tokens, more than max_length = {limit}; {remedy}")
    if options.reference:
        require_reference(Path(options.reference), tokenizer, longest)
    require_messages("--template", template, pairs, tokenizer)

    every = [kind() for kind in LOSSES.values() if kind.responses <= pairs.responses and not kind.needs_z0]
    if loss.responses > pairs.responses:
        what = f"{loss.name} compares {loss.responses} responses, and the record has {pairs.responses}"
        raise UserError(f"{what}; give --loss {' or '.join(each.name for each in every)}")
    if loss.margin_from_data and pair.margin is None:
        what = "reads the record's margin, and this pair has none"
        raise UserError(f"{loss.name} with margin_from_data {what}")
    models = (options.model, options.reference, device, options.dtype, options.adapter)
    losses = [loss, *(each for each in every if each != loss)]
    (numbers,) = explanations(pairs, tokenizer, losses, *models)
    given = {name: getattr(options, name) for name in ("model", "adapter", "reference", "data", "index")}
    cut, limits = cut_in_training(trained, pairs.lengths)
    given["cut_in_training"] = limits if cut else None
    return numbers | given | {name: getattr(pair, name) for name in PARTS}


def _read_pair(options: argparse.Namespace, template: ChatTemplate, tokenizer: Tokenizer) -> PreferencePair:
    """The pair that --data and --index name, or that --prompt, --chosen and --rejected spell out."""
    place, record = _record(options)
    try:
        if isinstance(record, BadRecord):
            raise record
        data = reading_section(options, options.adapter or options.model)
        record = renamed(record, data.columns)
        shape = shape_of(record, data.columns)
        pair = pair_of(record, shape, shape.readings(record)[0], template, data, drop_identical=False)
    except (BadRecord, Unusable) as reason:
        raise UserError(f"{place}: {reason}") from None
    if options.data is not None:
        list(stop_if_glued([pair], place, tokenizer, template, data.text))
    return replace(pair, index=options.index or 0)


def _record(options: argparse.Namespace) -> tuple[str, Any]:
    """Where the record stands, and what it is."""
    file, index = options.data, options.index
    texts = {
        name: text.replace("\\n", "\n") for name in PARTS if (text := getattr(options, name)) is not None
    }
    if file is None and index is None and len(texts) == len(PARTS):
        return "the pair as typed", texts
    if file is None or texts or index is None or index < 0:
        typed = "--prompt, --chosen and --rejected, all three and no --index"
        raise UserError(f"give a pair either as --data FILE and --index K, K from 0 on, or as {typed}")
    count = 0
    for count, (line, record) in enumerate(read_records(Path(file)), start=1):
        if count > index:
            return f"{file}:{line}", record
    raise UserError(f"--index {index}: {file} has {count} records; the last is {count - 1}")
