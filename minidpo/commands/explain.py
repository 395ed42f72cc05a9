"""`python -m minidpo explain`: one pair from tokens to loss, a table to check with a calculator.

Every token (of long texts the ends, unless --every-token is given) with its role and its log-prob under policy and
reference, the sums, the log-ratios, and what the loss and its gradient make of them; then the same pair under every
loss. The numbers are those of `score`, and of the first logged step of a run with batch_size 1: nothing is
truncated, and the same functions compute them.
"""

import argparse
import json
import sys
from dataclasses import asdict, fields, replace
from itertools import islice
from math import exp
from os import environ
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpo.chat import TEMPLATES
from minidpo.commands.explain_text import render, visible
from minidpo.commands.sample import unescaped
from minidpo.config import check_section, loss_of_run
from minidpo.dataset import require_fit
from minidpo.device import autocast, choose_device, row_length
from minidpo.errors import UserError
from minidpo.formats import EMPTY_ENDING, BadRecord, PreferencePair, Unusable, pair_of, shape_of
from minidpo.hf_config import read_config
from minidpo.logprobs import scored_logps, sum_by_ending
from minidpo.objective import gradient_weights, preference
from minidpo.packing import PackedRow, PairTokens, pack_row
from minidpo.records import read_records
from minidpo.reference import BOTH_ENDINGS
from minidpo.sections import LOSS_READS, PreferenceLossSection
from minidpo.tokenizer import Tokenizer, TokenPair, describe_pair
from minidpo.weights import load_model

# The losses at the settings their configs begin with; each row of the table states its own.
EVERY_LOSS = (
    PreferenceLossSection("dpo"),
    PreferenceLossSection("dpo", length_normalize=True),
    PreferenceLossSection("dpo", label_smoothing=0.1),
    PreferenceLossSection("ipo"),
    PreferenceLossSection("ipo", beta=1.0, length_normalize=True),
    PreferenceLossSection("simpo", beta=2.0),
    PreferenceLossSection("sft"),
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo explain", description=__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="the policy")
    parser.add_argument(
        "--reference", metavar="DIR", help="default: the policy itself, as when training starts"
    )
    parser.add_argument("--data", metavar="FILE", help="preference file; --index says which record")
    parser.add_argument("--index", type=int, metavar="K", help="the record's place in the file, from 0")
    for name in ("prompt", "chosen", "rejected"):
        parser.add_argument(f"--{name}", metavar="TEXT", help="instead of --data (\\n is a line break)")
    for f in fields(PreferenceLossSection):
        option = "--loss" if f.name == "name" else "--" + f.name.replace("_", "-")
        kind: Any = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        about = f"{f.metadata['about']} (default: the run's whose final/ --model is, else {f.default})"
        parser.add_argument(option, dest=f"loss_{f.name}", default=None, help=about, **kind)
    parser.add_argument("--max-length", type=int, help="longest prompt + ending (default: the model's)")
    parser.add_argument("--template", default="model", choices=TEMPLATES, help="how messages become text")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument(
        "--every-token", action="store_true", help="also those in the middle of long texts (--json has all)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object with unrounded numbers")
    options = parser.parse_args(arguments)

    typed = {f.name: getattr(options, f"loss_{f.name}") for f in fields(PreferenceLossSection)}
    typed = {name: value for name, value in typed.items() if value is not None}
    of_run = loss_of_run(Path(options.model))
    # Another loss than the run's begins at its own defaults.
    begin = of_run if of_run and typed.get("name", of_run.name) == of_run.name else PreferenceLossSection()
    loss = replace(begin, **typed)
    check_section("loss", loss)
    settings_from = str(Path(options.model).parent / "config.toml") if begin is of_run else None
    explanation = explain(options, loss) | {"settings_from": settings_from}
    if options.json:
        print(json.dumps(explanation))
    else:
        colour = sys.stdout.isatty() and not environ.get("NO_COLOR")
        print(render(explanation, colour, options.every_token))


def explain(options: argparse.Namespace, loss: PreferenceLossSection) -> dict[str, Any]:
    """All that is printed, unrounded: float32 numbers as the model and the losses gave them."""
    device = choose_device(options.device)
    config = read_config(Path(options.model))
    limit = config.max_length if options.max_length is None else options.max_length
    tokenizer = Tokenizer.from_directory(options.model)
    require_fit("model", config, tokenizer, limit)
    pair = _read_pair(options, tokenizer)
    try:
        ids = tokenizer.encode_pair(pair)
    except ValueError as error:
        raise UserError(str(error)) from None
    longest = len(ids.prompt) + max(len(ids.chosen), len(ids.rejected))
    if longest > limit:
        raise UserError(
            f"the pair has {longest} tokens (prompt and longer ending), max_length is {limit}; it is explained"
            " whole or not at all"
        )
    if options.reference:
        require_fit("reference", read_config(Path(options.reference)), tokenizer, longest)
        _require_same_ids(pair, tokenizer, Path(options.reference))
    tokens = -(-sum(map(len, ids[:3])) // 128) * 128  # CUDA wants whole blocks
    row = pack_row(PairTokens.from_pairs([ids]), BOTH_ENDINGS, row_length(device, tokens)).to(device)
    policy = _token_logps(options.model, row, device, options.dtype)  # (S,)
    reference = policy
    if options.reference:
        reference = _token_logps(options.reference, row, device, options.dtype)
    lengths = row.scored_lengths.cpu().view(1, 2)
    sums, reference_sums = (sum_by_ending(logps, lengths[0]).view(1, 2) for logps in (policy, reference))
    every = EVERY_LOSS if loss in EVERY_LOSS else (*EVERY_LOSS, loss)
    return {
        "model": options.model,
        "reference": options.reference,
        "data": options.data,
        "index": options.index,
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "tokens": _token_table(ids, tokenizer, policy.numpy(), reference.numpy()),
        **dict(zip(("chosen_logps", "rejected_logps"), sums[0].tolist(), strict=True)),
        **dict(
            zip(
                ("reference_chosen_logps", "reference_rejected_logps"),
                reference_sums[0].tolist(),
                strict=True,
            )
        ),
        **dict(zip(("chosen_length", "rejected_length"), lengths[0].tolist(), strict=True)),
        "loss": under(loss, sums, reference_sums, lengths),
        "losses": [under(each, sums, reference_sums, lengths) for each in every],
    }


def _read_pair(options: argparse.Namespace, tokenizer: Tokenizer) -> PreferencePair:
    """The pair that --data and --index name, or that --prompt, --chosen and --rejected spell out."""
    texts = [options.prompt, options.chosen, options.rejected]
    if (options.data is None) == all(text is None for text in texts):
        raise UserError("give a pair either as --data and --index, or as --prompt, --chosen and --rejected")
    if options.data is None:
        if options.index is not None or None in texts:
            raise UserError(
                "a pair in text needs --prompt, --chosen and --rejected, all three and no --index"
            )
        prompt, chosen, rejected = map(unescaped, texts)
        if not (chosen.strip() and rejected.strip()):
            raise UserError(f"{EMPTY_ENDING}: --chosen {chosen!r}, --rejected {rejected!r}; give both a text")
        return PreferencePair(prompt, chosen, rejected)
    path, index = Path(options.data), options.index
    if index is None or index < 0:
        raise UserError(
            f"--index {'is missing' if index is None else index}; give the record's place, from 0"
        )
    found = next(islice(read_records(path), index, None), None)
    if found is None:
        records = sum(1 for _ in read_records(path))
        raise UserError(f"--index {index}: {path} has {records} records; the last is {records - 1}")
    line, record = found
    try:
        if isinstance(record, BadRecord):
            raise record
        template = tokenizer.chat_template(options.template)
        prompt, chosen, rejected, special = pair_of(record, shape_of(record), template, drop_identical=False)
    except (BadRecord, Unusable) as reason:
        raise UserError(f"{path}:{line}: {reason}") from None
    return PreferencePair(prompt, chosen, rejected, index, add_special_tokens=special)


def _require_same_ids(pair: PreferencePair, tokenizer: Tokenizer, reference: Path) -> None:
    """An embedding that is large enough may still be of other tokens. Which EOS a directory names does not matter:
    a base model and its chat model name two. A reference saved without a tokenizer is taken at its word."""
    if (reference / "tokenizer.json").is_file():
        text = pair.prompt + pair.chosen
        if Tokenizer.from_directory(reference).encode(text) != tokenizer.encode(text):
            raise UserError(
                f"{reference}: its tokenizer gives this pair other ids than the model's; give a reference of the same family"
            )


@torch.no_grad()
def _token_logps(directory: str, row: PackedRow, device: torch.device, dtype: str) -> Tensor:
    with autocast(device, dtype):
        return scored_logps(load_model(directory, device=device), row).float().cpu()


def _token_table(
    ids: TokenPair, tokenizer: Tokenizer, policy: np.ndarray, reference: np.ndarray
) -> list[dict[str, Any]]:
    """One entry a token, in the order they are laid out. The last sums of an ending are those of `score`."""
    table, s = [], 0
    endings = [None] * len(ids.prompt) + ["chosen"] * len(ids.chosen) + ["rejected"] * len(ids.rejected)
    for token, ending in zip(describe_pair(ids, tokenizer), endings, strict=True):
        entry = token._asdict() | {"text": visible(tokenizer, token.id), "ending": ending}
        if token.scored:
            first = s - (token.position - len(ids.prompt))  # of this ending's scored tokens
            # Added up in float64 and rounded to float32, as sum_by_ending does.
            sums = [np.float32(logps[first : s + 1].sum(dtype=np.float64)) for logps in (policy, reference)]
            entry |= {
                "policy_logp": policy[s].item(),
                "reference_logp": reference[s].item(),
                "difference": (policy[s] - reference[s]).item(),
                "policy_sum": sums[0].item(),
                "reference_sum": sums[1].item(),
                "difference_sum": (sums[0] - sums[1]).item(),
            }
            s += 1
        table.append(entry)
    return table


def under(loss: PreferenceLossSection, policy: Tensor, reference: Tensor, lengths: Tensor) -> dict[str, Any]:
    """What `loss` makes of the pair: policy, reference, lengths (1, 2). Rewards and the loss are the run's own.

    The argument is what the loss is a function of: z of a logistic loss, ipo's h, for sft the mean log-prob.
    """
    endings = 1 if loss.name == "sft" else 2
    policy, reference, lengths = (values[:, :endings] for values in (policy, reference, lengths))
    losses, watched = preference(loss, policy, reference, lengths)
    settings = {name: value for name, value in asdict(loss).items() if name in LOSS_READS[loss.name]}
    values: dict[str, Any] = {"name": loss.name} | settings
    precise = (policy.double(), reference.double(), lengths)  # a weight of 1e-9 is still a weight
    weights = gradient_weights(loss, *precise)[0].tolist()
    if loss.name == "sft":
        values["argument"] = (precise[0] / lengths).item()
    else:
        values["chosen_reward"] = watched["rewards/chosen"].item()
        values["rejected_reward"] = watched["rewards/rejected"].item()
        values["margin"] = watched["rewards/margins"].item()
        margin = preference(loss, *precise)[1]["rewards/margins"].item()
        by_name = {"simpo": margin - loss.gamma, "ipo": margin / loss.beta}
        argument = values["argument"] = by_name.get(loss.name, margin)
        if loss.name in ("dpo", "simpo"):
            values["sigmoid"] = 1 / (1 + exp(-argument)) if argument > -700 else 0.0
    return values | {
        "loss": losses.item(),
        "chosen_weight": weights[0],
        "rejected_weight": weights[1] if endings == 2 else 0.0,
    }
