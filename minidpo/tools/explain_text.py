"""How `explain` prints a pair: the table of tokens, the calculation, every loss. At most 100 columns."""

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from textwrap import dedent, indent
from typing import Any
from unicodedata import combining, east_asian_width

from minidpo.data import Tokenizer
from minidpo.losses import LOSSES, PreferenceLoss
from minidpo.settings import keys_of

# Besides its defaults, every loss that has one of these settings is shown with this value of it.
VARIANTS = {"length_normalize": True, "label_smoothing": 0.1}
# Tokens shown at either end of a part that is clearly longer than both together.
SHOWN = {"prompt": 4, "chosen": 20, "rejected": 20}
# What the table of tokens has of each scored one.
NUMBERS = ("policy_logp", "reference_logp", "difference", "policy_sum", "reference_sum", "difference_sum")
TOKEN_WIDTH = 16
GREEN, RED, BOLD, RESET = "\033[32m", "\033[31m", "\033[1m", "\033[0m"
UNMOVED, MUCH = 0.01, 1.0  # nats: there is no colour below the first, and bold from the second on


def visible(tokenizer: Tokenizer, token: int) -> str:
    """The text that one id stands for, with its leading space; its piece if it is special or stands for a
    part of a character."""
    piece, text = tokenizer.piece(token), tokenizer.decode([token])
    if "▁" in piece:  # Decoders that write a space so strip it from the beginning of a text.
        return piece.replace("▁", " ")
    return piece if not text or "\ufffd" in text else text


def characters(tokenizer: Tokenizer, ids: list[int]) -> Iterator[str]:
    """The text of each token in its place. Where a character is several tokens, the last one has all of it,
    and those before have none."""
    waiting: list[int] = []
    for place, token in enumerate(ids, start=1):
        waiting.append(token)
        text = tokenizer.decode(waiting)
        if "\ufffd" in text and len(waiting) < 4 and place < len(ids):  # UTF-8: at most four bytes
            yield ""
        else:
            yield text if len(waiting) > 1 else visible(tokenizer, token)
            waiting = []


def render(explanation: dict[str, Any], colour: bool, every_token: bool = False) -> str:
    """The explanation that `explain` makes, as text; `colour`: with ANSI escapes."""
    lines = [*_heading(explanation, colour), *_tokens(explanation["tokens"], colour, every_token)]
    return "\n".join([*lines, *_calculation(explanation), *_every_loss(explanation["losses"])])


def _heading(e: dict[str, Any], colour: bool) -> Iterator[str]:
    itself = "the policy itself (no --reference): every log-ratio is 0, as when training starts"
    counts = Counter(token["response"] or "prompt" for token in e["tokens"])
    lengths = ", ".join(
        f"{count} {'tokens ' * (part == 'prompt')}of {part}" for part, count in counts.items()
    )
    if others := sum(token["role"] == "other" for token in e["tokens"]):
        lengths += f" ({others} by others, not scored)"
    yield f"policy     {e['model']}" + (f" with {e['adapter']}" if e["adapter"] else "")
    yield f"reference  {e['reference'] or itself}"
    if e["settings_from"]:
        yield f"loss       as {e['settings_from']} says; --loss, --beta, ... change it"
    yield "pair       " + ("as typed" if e["data"] is None else f"record {e['index']} of {e['data']}")
    yield f"           {lengths}; nothing is cut off"
    yield "Natural logarithms (nats). Each number is rounded by itself: a last digit may be off in a sum."
    if colour:
        yield (
            f"{GREEN}likelier{RESET} or {RED}less likely{RESET} under the policy than under the reference;"
            f" {BOLD}bold{RESET}: by a factor e or more"
        )


def _tokens(tokens: list[dict[str, Any]], colour: bool, every_token: bool) -> Iterator[str]:
    yield f"\n{'':47}{'log-prob under':^18}  {'':10}{'sum so far':^31}".rstrip()
    yield (
        f"{'pos':>4} {'role':<8} {'token':<{TOKEN_WIDTH}} {'scored':<6} {'policy':>9} {'reference':>9}"
        f" {'difference':>10} {'policy':>10} {'reference':>10} {'diff.':>9}"
    )
    for part, run in groupby(tokens, key=lambda token: token["response"] or "prompt"):
        of_part, ends = list(run), SHOWN[part]
        left_out = 0 if every_token else len(of_part) - 2 * ends
        if part != "prompt":
            yield ""
        for place, token in enumerate(of_part):
            if left_out <= 2 or not ends <= place < len(of_part) - ends:
                yield _token(token, colour)
            elif place == ends:
                yield f"{'...':>4} {part:<8} {left_out} tokens left out" + (
                    ", counted in the sums (--every-token prints them)" if part != "prompt" else ""
                )


def _token(token: dict[str, Any], colour: bool) -> str:
    text, difference = _fit(repr(token["text"])), token.get("difference", 0.0)
    if not token["scored"]:
        return f"{token['position']:>4} {token['role']:<8} {text} no"
    if colour and abs(difference) >= UNMOVED:
        text = (BOLD if abs(difference) >= MUCH else "") + (GREEN if difference > 0 else RED) + text + RESET
    return (
        f"{token['position']:>4} {token['role']:<8} {text} {'yes':<6} {token['policy_logp']:>z9.4f}"
        f" {token['reference_logp']:>z9.4f} {difference:>+z10.4f} {token['policy_sum']:>z10.4f}"
        f" {token['reference_sum']:>z10.4f} {token['difference_sum']:>+z9.4f}"
    )


def _fit(text: str) -> str:
    """`text` in exactly TOKEN_WIDTH columns of a terminal, where some characters take two and some none."""

    def width(text: str) -> int:
        return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)

    if width(text) > TOKEN_WIDTH:
        while width(text) > TOKEN_WIDTH - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (TOKEN_WIDTH - width(text))


def _calculation(e: dict[str, Any]) -> Iterator[str]:
    """The loss as its class states it, then from the sums to its value, each line from those above."""
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]

    def line(label: str, *numbers: float, form: str = "z14.4f") -> str:
        begin = f"  {label}\n{'':50}" if len(label) > 48 else f"  {label:<48}"  # A long one has its own line.
        return begin + "".join(f"{number:>{form}}" for number in numbers)

    def each(label: str, *values: float) -> str:
        return line(label, *values) + (f"{values[0] - values[1]:>z20.4f}" if len(values) == 2 else "")

    title, equation = (*(inspect.getdoc(kind) or "").split("\n\n"), "")[:2]
    yield f"\n{kind.name}: {title}"
    yield indent(dedent(equation), "    ")
    for name, key in keys_of(kind).items():
        yield f"  {_setting(name, loss[name])}: {key.metadata['about']}"

    names = responses_of(e)
    difference = f"{'chosen - rejected':>20}" if len(names) == 2 else ""
    yield f"{'':50}" + "".join(f"{name:>14}" for name in names) + difference
    if e["reference"] and not kind.needs_reference:
        yield f"  ({kind.name} has no reference: that of the table is not used)"
    yield line("|y|, scored tokens", *(e[f"{name}_length"] for name in names), form="14")
    for label, values in comparison(e):
        yield each(label, *values)

    over, more = " / |y|" if loss.get("length_normalize") else "", additions(loss)
    yield "\n" + line("z or h, what the loss is a function of", loss["argument"])
    if "sigmoid" in loss:
        yield line("sigma(z)", loss["sigmoid"])
    yield line(f"loss = {kind.equation}{more}", loss["loss"])
    weights = [loss[f"{name}_weight"] for name in names]
    yield line(f"gradient weight = {kind.gradient}{over}{more}", *weights, form="+z14.6f")
    yield "  (-d loss / d log pi(y|x): how hard the pair pulls on each response, + up and - down)"
    if loss.get("label_smoothing"):
        yield "  (smoothed, e = label_smoothing: (1-e) loss(z) + e loss(-z), (1-e) weight(z) - e weight(-z))"


def additions(loss: dict[str, Any]) -> str:
    """What settings that are off by default have added to the equation of a loss."""
    smoothed = ", smoothed" if loss.get("label_smoothing") else ""
    if loss.get("margin_from_data"):
        smoothed += ", z less the record's margin"
    if loss.get("sft_weight") and not keys_of(LOSSES[loss["name"]])["sft_weight"].default:
        smoothed += f", and {loss['sft_weight']:g} times the SFT loss"
    return smoothed


def responses_of(e: dict[str, Any]) -> list[str]:
    return [name for name in ("chosen", "rejected") if f"{name}_logps" in e]


def comparison(e: dict[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """What the loss compares, from the sums on: a quantity, and its value for each response."""
    loss, kind, names = e["loss"], LOSSES[e["loss"]["name"]], responses_of(e)
    values, quantity = [e[f"{name}_logps"] for name in names], "log pi(y|x)"
    yield quantity, values
    if kind.needs_reference:
        reference = [e[f"reference_{name}_logps"] for name in names]
        yield "log pi_ref(y|x)", reference
        values = [ours - theirs for ours, theirs in zip(values, reference, strict=True)]
        quantity = "log-ratio"
        yield "log-ratio = log pi - log pi_ref", values
    lengths = [e[f"{name}_length"] for name in names]
    yield f"{quantity} / |y|", [value / n for value, n in zip(values, lengths, strict=True)]
    if kind.responses == 2:
        yield "implicit reward r(x, y); their margin", [loss["chosen_reward"], loss["rejected_reward"]]


def every_loss() -> Iterator[PreferenceLoss]:
    """Each loss that one pair explains, at its defaults, and its variants."""
    for kind in (kind for kind in LOSSES.values() if not kind.needs_z0):
        default: Any = kind()
        yield default
        yield from (replace(default, **{name: VARIANTS[name]}) for name in keys_of(kind) if name in VARIANTS)


def _every_loss(losses: list[dict[str, Any]]) -> Iterator[str]:
    yield "\nThe same pair under every loss, each at the settings beside it:"
    yield f"{'':76}{'gradient weight':>24}"
    numbers = f"{'z or h':>11}{'sigma(z)':>9}{'loss':>11}{'chosen':>11}{'rejected':>12}"
    yield f"{'loss':<8} {'settings':<37}{numbers}"
    for loss in losses:
        sigmoid = f"{loss['sigmoid']:z.4f}" if "sigmoid" in loss else ""
        weights = f"{loss['chosen_weight']:>+z11.6f}{loss['rejected_weight']:>+z12.6f}"
        numbers = f"{loss['argument']:>z11.4f}{sigmoid:>9}{loss['loss']:>z11.4f}{weights}"
        yield f"{loss['name']:<8} {settings(LOSSES[loss['name']], loss) or 'no settings':<37}{numbers}"


def settings(kind: type, values: dict[str, Any]) -> str:
    """The settings of a loss in one line. What is off by default is shown only if it is on."""
    shown = (name for name, key in keys_of(kind).items() if values[name] or key.default)
    return ", ".join(_setting(name, values[name]) for name in shown)


def _setting(name: str, value: float | bool) -> str:
    return f"{name} {str(value).lower() if isinstance(value, bool) else f'{value:g}'}"
