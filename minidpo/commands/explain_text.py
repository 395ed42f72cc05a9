"""How `explain` prints a pair: the table of tokens, the calculation, every loss. At most 100 columns."""

import unicodedata
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from minidpo.sections import NEEDS_REFERENCE
from minidpo.tokenizer import Tokenizer

# Tokens shown at either end of a part that is longer than both together, and a bit.
SHOWN = {"prompt": 4, "chosen": 20, "rejected": 20}
TOKEN_WIDTH = 16
GREEN, RED, BOLD, RESET = "\033[32m", "\033[31m", "\033[1m", "\033[0m"
UNMOVED, MUCH = 0.01, 1.0  # nats: below the first no colour, from the second on bold


def visible(tokenizer: Tokenizer, token: int) -> str:
    """The text that one id stands for, with its leading space; its piece where it stands for a part of a character
    or is special."""
    piece, text = tokenizer.piece(token), tokenizer.decode([token])
    if "▁" in piece:  # decoders that write a space so strip it from a text's beginning
        return piece.replace("▁", " ")
    return piece if not text or "\ufffd" in text else text


def render(explanation: dict[str, Any], colour: bool, every_token: bool = False) -> str:
    """The explanation that `explain` makes, as text; `colour`: with ANSI escapes."""
    return "\n".join([
        *_heading(explanation, colour),
        *_tokens(explanation["tokens"], colour, every_token),
        *_calculation(explanation),
        *_every_loss(explanation["losses"]),
    ])  # fmt: skip


def _heading(e: dict[str, Any], colour: bool) -> Iterator[str]:
    itself = "the policy itself (no --reference): every log-ratio is 0, as when training starts"
    prompt = sum(not token["scored"] for token in e["tokens"])
    yield f"policy     {e['model']}"
    yield f"reference  {e['reference'] or itself}"
    if e["settings_from"]:
        yield f"loss       as {e['settings_from']} says; --loss, --beta, ... change it"
    yield "pair       " + ("as typed" if e["data"] is None else f"record {e['index']} of {e['data']}")
    yield (
        f"           {prompt} tokens of prompt, {e['chosen_length']} of chosen, {e['rejected_length']} of rejected;"
        " nothing is cut off"
    )
    yield "Natural logarithms (nats). Each number is rounded by itself: a last digit may be off in a sum."
    if colour:
        yield (
            f"{GREEN}likelier{RESET} or {RED}less likely{RESET} under the policy than under the reference;"
            f" {BOLD}bold{RESET}: by a factor e or more"
        )


def _tokens(tokens: list[dict[str, Any]], colour: bool, every_token: bool) -> Iterator[str]:
    yield ""
    yield f"{'':47}{'log-prob under':^18}  {'':10}{'sum so far':^31}".rstrip()
    yield (
        f"{'pos':>4} {'role':<8} {'token':<{TOKEN_WIDTH}} {'scored':<6} {'policy':>9} {'reference':>9}"
        f" {'difference':>10} {'policy':>10} {'reference':>10} {'diff.':>9}"
    )
    for part, run in groupby(tokens, key=lambda token: token["ending"] or "prompt"):
        of_part, ends = list(run), SHOWN[part]
        left_out = 0 if every_token else len(of_part) - 2 * ends
        if part != "prompt":
            yield ""
        for place, token in enumerate(of_part):
            if left_out <= 2 or not ends <= place < len(of_part) - ends:
                yield _token(token, colour)
            elif place == ends:
                yield f"{'...':>4} {part:<8} {left_out} tokens left out" + (
                    ", counted in the sums (--every-token prints them)" if token["scored"] else ""
                )


def _token(token: dict[str, Any], colour: bool) -> str:
    text = _fit(repr(token["text"]))
    if not token["scored"]:
        return f"{token['position']:>4} {token['role']:<8} {text} no"
    if colour:
        text = _coloured(text, token["difference"])
    return (
        f"{token['position']:>4} {token['role']:<8} {text} {'yes':<6} {token['policy_logp']:>z9.4f}"
        f" {token['reference_logp']:>z9.4f} {token['difference']:>+z10.4f} {token['policy_sum']:>z10.4f}"
        f" {token['reference_sum']:>z10.4f} {token['difference_sum']:>+z9.4f}"
    )


def _coloured(text: str, difference: float) -> str:
    if abs(difference) < UNMOVED:
        return text
    return (BOLD if abs(difference) >= MUCH else "") + (GREEN if difference > 0 else RED) + text + RESET


def _fit(text: str) -> str:
    """`text` in exactly TOKEN_WIDTH columns of a terminal, where some characters take two and some none."""
    widths = [0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text]
    if sum(widths) <= TOKEN_WIDTH:
        return text + " " * (TOKEN_WIDTH - sum(widths))
    keep = len(text)
    while sum(widths[:keep]) > TOKEN_WIDTH - 1:
        keep -= 1
    return text[:keep] + "…" + " " * (TOKEN_WIDTH - 1 - sum(widths[:keep]))


def _calculation(e: dict[str, Any]) -> Iterator[str]:
    """From the sums to the loss, one line a step, each computed from the lines above it."""
    loss, name = e["loss"], e["loss"]["name"]

    def line(label: str, chosen: float, rejected: float) -> str:
        return f"  {label:<48}{chosen:>z14.4f}{rejected:>z14.4f}{chosen - rejected:>z20.4f}"

    yield ""
    yield f"{_title(loss) + ': ' + _settings(loss):<50}{'chosen':>14}{'rejected':>14}{'chosen - rejected':>20}"
    chosen, rejected = e["chosen_logps"], e["rejected_logps"]
    yield line("log pi(y|x)", chosen, rejected)
    if name in NEEDS_REFERENCE:
        yield line("log pi_ref(y|x)", e["reference_chosen_logps"], e["reference_rejected_logps"])
        chosen -= e["reference_chosen_logps"]
        rejected -= e["reference_rejected_logps"]
        yield line("log-ratio = log pi - log pi_ref", chosen, rejected)
    elif e["reference"]:
        yield f"  ({name} has no reference: that of the table is not used)"
    if name in ("simpo", "sft") or loss.get("length_normalize"):
        yield f"  {'|y|, scored tokens':<48}{e['chosen_length']:>14}{e['rejected_length']:>14}"
        chosen, rejected = chosen / e["chosen_length"], rejected / e["rejected_length"]
        yield line("the line before, over |y|", chosen, rejected)
    if name != "sft":
        known = name in ("dpo", "ipo", "simpo")
        yield line(
            "implicit reward" + " = beta * the line before" * known,
            loss["chosen_reward"],
            loss["rejected_reward"],
        )
    yield ""
    yield from (f"  {label:<48}{value:>z14.4f}" for label, value in _steps(loss))
    weights = "".join(f"{loss[f'{ending}_weight']:>+z14.6f}" for ending in ("chosen", "rejected"))
    yield f"  {'gradient weight = ' + _weight(loss):<48}{weights}"
    yield "  (-d loss / d log pi(y|x): how hard the pair pulls at each ending, + up and - down)"


def _steps(loss: dict[str, Any]) -> Iterator[tuple[str, float]]:
    if loss["name"] == "sft":
        yield "loss = -log pi(chosen) / |y|", loss["loss"]
        return
    yield "margin, of the rewards", loss["margin"]
    if loss["name"] == "ipo":
        yield "h, of the log-ratios" + " over |y|" * loss["length_normalize"], loss["argument"]
        yield "target = 1 / (2 beta)", 1 / (2 * loss["beta"])
        yield "loss = (h - target)^2", loss["loss"]
        return
    if "sigmoid" not in loss:  # a loss that has no lines here yet
        yield f"loss of {loss['name']}", loss["loss"]
        return
    yield "z = margin" + " - gamma" * (loss["name"] == "simpo"), loss["argument"]
    if loss["label_smoothing"]:
        yield "s(z) = sigmoid(z)", loss["sigmoid"]
        yield "loss = -(1-e) log s(z) - e log s(-z)", loss["loss"]
    else:
        yield "sigmoid(z)", loss["sigmoid"]
        yield "loss = -log sigmoid(z)", loss["loss"]


def _weight(loss: dict[str, Any]) -> str:
    if loss["name"] == "sft":
        return "1 / |y|"
    over = " / |y|" if loss["name"] == "simpo" or loss.get("length_normalize") else ""
    if loss["name"] == "ipo":
        return "2 (target - h)" + over
    if "sigmoid" not in loss:
        return "-d loss / d log pi(y|x)"
    if loss["label_smoothing"]:
        return f"beta ((1-e) s(-z) - e s(z)){over}"
    return "beta * sigmoid(-z)" + over


def _every_loss(losses: list[dict[str, Any]]) -> Iterator[str]:
    yield ""
    yield "The same pair under every loss, each at the settings beside it:"
    yield f"{'':78}{'gradient weight':>21}"
    yield f"  {'loss':<15}{'settings':<21}{'z or h':>12}{'sigmoid(z)':>12}{'loss':>13}{'chosen':>12}{'rejected':>12}"
    for loss in losses:
        argument = "" if loss["name"] == "sft" else f"{loss['argument']:z.4f}"
        sigmoid = f"{loss['sigmoid']:z.4f}" if "sigmoid" in loss else ""
        yield (
            f"  {_title(loss):<15}{_settings(loss):<21}{argument:>12}{sigmoid:>12}{loss['loss']:>z13.4f}"
            f"{loss['chosen_weight']:>+z12.6f}{loss['rejected_weight']:>+z12.6f}"
        )
    yield "z: the margin of the rewards, for simpo less gamma; h: ipo's, to be 1 / (2 beta); e: label_smoothing"


def _title(loss: dict[str, Any]) -> str:
    return loss["name"] + (", averages" if loss.get("length_normalize") else "")


def _settings(loss: dict[str, Any]) -> str:
    given = [f"{name} {loss[name]:g}" for name in ("beta", "gamma") if name in loss]
    if loss.get("label_smoothing"):
        given.append(f"e {loss['label_smoothing']:g}")
    return ", ".join(given) or "no settings"
