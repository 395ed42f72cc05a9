"""What `explain` prints of a pair, in at most 100 columns: its tokens, the calculation, every loss. The page
of `report` has the same equations and the same table."""

import inspect
import re
from collections.abc import Iterator
from itertools import groupby
from textwrap import dedent
from typing import Any

from minidpo.data.report import PARTS
from minidpo.log import aligned
from minidpo.losses import LOSSES
from minidpo.settings import keys_of
from minidpo.tools.pair_numbers import NUMBERS

# Tokens shown at either end of a part that is clearly longer than both together.
SHOWN = {"prompt": 4, "chosen": 20, "rejected": 20}


def render(e: dict[str, Any], every_token: bool = False) -> str:
    """e: the explanation that `explain` makes."""
    tables = aligned(list(_tokens(e["tokens"], every_token)), 9), aligned(calculation(e), 12)
    rows = [["", "z or h", "sigma(z)", "loss", "weight y_w", "weight y_l"]]
    for loss in e["losses"]:
        row = [f"{loss['name']:<8} {settings(LOSSES[loss['name']], loss) or 'no settings'}"]
        numbers = (loss.get(name) for name in ("argument", "sigmoid", "loss"))
        row += ("" if number is None else f"{number:z.4f}" for number in numbers)
        rows.append([*row, *(f"{loss[f'{name}_weight']:+z.6f}" for name in PARTS[1:])])
    losses = f"The same pair under every loss, each at the settings beside it:\n{aligned(rows)}"
    return "\n\n".join(["\n".join(_heading(e)), tables[0], equations(e), tables[1], losses])


def _heading(e: dict[str, Any]) -> Iterator[str]:
    itself = "the policy itself (no --reference): every log-ratio is 0, as when training starts"
    parts = [token["response"] or "prompt" for token in e["tokens"]]
    counts = ", ".join(f"{parts.count(part)} of {part}" for part in PARTS if part in parts)
    others = sum(token["role"] == "other" for token in e["tokens"])
    yield f"policy     {e['model']}" + (f" with {e['adapter']}" if e["adapter"] else "")
    yield f"reference  {e['reference'] or itself}"
    if e["settings_from"]:
        yield f"loss       as {e['settings_from']} says; --loss, --beta, ... change it"
    yield "pair       " + ("as typed" if e["data"] is None else f"record {e['index']} of {e['data']}")
    yield (
        f"tokens     {counts}" + f" ({others} by others, not scored)" * (others > 0) + "; nothing is cut off"
    )
    if e["cut_in_training"]:
        yield f"           (training cuts this pair: {e['cut_in_training']})"
    yield "Natural logarithms (nats). Each number is rounded by itself: a last digit may be off in a sum."


def _tokens(tokens: list[dict[str, Any]], every_token: bool) -> Iterator[list[str]]:
    """Rows of a table. Tokens that are not scored have no numbers."""
    policy, reference, difference = "policy", "reference", "difference"
    yield [f"{'':28}", "log-prob", "", "", "sum so far"]
    yield [" pos role     token", policy, reference, difference, policy, reference, difference]
    for part, run in groupby(tokens, key=lambda token: token["response"] or "prompt"):
        of_part, ends = list(run), SHOWN[part]
        left_out = 0 if every_token else len(of_part) - 2 * ends
        if part != "prompt":
            yield [""]
        for place, token in enumerate(of_part):
            if left_out <= 2 or not ends <= place < len(of_part) - ends:
                numbers = [
                    f"{token[name]:{'+' * name.startswith('d')}z.4f}" for name in NUMBERS if name in token
                ]
                yield [f"{token['position']:>4} {token['role']:<8} {repr(token['text'])[:14]}", *numbers]
            elif place == ends:
                yield [f" ... {part:<8} {left_out} left out"]


def equations(e: dict[str, Any]) -> str:
    """The loss and its settings; its equation, as its class states it and with the numbers of the pair."""
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]
    title, equation = (inspect.getdoc(kind) or "").split("\n\n")[:2]
    more = ", smoothed: (1-e) loss(z) + e loss(-z), e = label_smoothing" * bool(loss.get("label_smoothing"))
    more += ", z less the record's margin" * loss.get("margin_from_data", False)
    if loss.get("sft_weight") and not keys_of(kind)["sft_weight"].default:  # Else it is in the equation.
        more += f", with {loss['sft_weight']:g} times the SFT loss"
    lines = [f"{kind.name}: {title}", settings(kind, loss) or "no settings", dedent(equation)]
    lines += [_filled_in(dedent(equation), e), f"loss = {loss['loss']:.4f}{more}"]
    over = " / |y|" if loss.get("length_normalize") else ""
    return "\n".join([*lines, f"gradient weight = {kind.gradient}{over}{more}"])


def _filled_in(equation: str, e: dict[str, Any]) -> str:
    loss, kind = e["loss"], LOSSES[e["loss"]["name"]]
    values = {r"\b[zh]\b(?! =| as)": loss.get("argument"), r"\bz0\b": loss.get("z0")}
    values[r"(?<![a-z])e\b"] = loss.get("flip_rate")
    values |= {rf"\b{name}\b": loss[name] for name in keys_of(kind) if not isinstance(loss[name], bool)}
    for name, y in zip(responses_of(e), ("y" if kind.unpaired else "y_w", "y_l"), strict=False):
        policy, n = e[f"{name}_logps"], e[f"{name}_length"]
        ratio = (policy - e[f"reference_{name}_logps"]) / (n if loss.get("length_normalize") else 1)
        values[rf"log pi\({y}\|x\)/pi_ref\({y}\|x\)"] = ratio
        values |= {rf"log pi\({y}\|x\)": policy, rf"log P\({y}\|x\)": policy / n, rf"\|{y}\|": n}
        values[rf"log odds\({y}\)|\br{y[1:]}\b"] = loss.get(f"{name}_reward")
    for symbol, value in values.items():
        if value is not None:
            number = f"({value:.4g})" if value < 0 else f"{value:.4g}"
            equation = re.sub(symbol, f" {number} ", equation)
    # Numbers side by side are multiplied.
    equation = re.sub(r"(?<=[\d)]) +(?=[\d(])", " * ", re.sub(" +(?=[ )|])|(?<=[(]) +", "", equation))
    return re.sub(r"\((\(-[\d.e+-]+\))\)", r"\1", equation)


def calculation(e: dict[str, Any]) -> list[list[str]]:
    """Rows of a table from the sums to the gradient, each from those above: a quantity, its value of each
    response, and the difference."""
    loss, kind, names = e["loss"], LOSSES[e["loss"]["name"]], responses_of(e)
    lengths = [e[f"{name}_length"] for name in names]
    compared, quantity = [e[f"{name}_logps"] for name in names], "log pi(y|x)"
    rows = {quantity: compared}
    if kind.needs_reference:
        rows["log pi_ref(y|x)"] = reference = [e[f"reference_{name}_logps"] for name in names]
        compared = [ours - theirs for ours, theirs in zip(compared, reference, strict=True)]
        rows["log-ratio = log pi - log pi_ref"], quantity = compared, "log-ratio"
    rows[f"{quantity} / |y|"] = [value / n for value, n in zip(compared, lengths, strict=True)]
    if kind.responses == 2:
        rows["implicit reward r(x, y); their margin"] = [loss["chosen_reward"], loss["rejected_reward"]]

    table = [["nats", *names, *["chosen - rejected"] * (len(names) == 2)]]
    table.append(["|y|, scored tokens", *map(str, lengths)])
    for label, values in rows.items():
        differences = (values[0] - value for value in values[1:])
        table.append([label, *(f"{value:z.4f}" for value in (*values, *differences))])
    if "argument" in loss:
        table.append(["z or h of the equation", f"{loss['argument']:z.4f}"])
    if "sigmoid" in loss:
        table.append(["sigma(z)", f"{loss['sigmoid']:.4f}"])
    table.append(["loss", f"{loss['loss']:z.4f}"])
    weights = (f"{loss[f'{name}_weight']:+z.6f}" for name in names)
    return [*table, ["gradient weight, -d loss / d log pi(y|x)", *weights]]


def responses_of(e: dict[str, Any]) -> list[str]:
    return [name for name in PARTS[1:] if f"{name}_logps" in e]


def settings(kind: type, values: dict[str, Any]) -> str:
    """The settings of a loss in one line. What is off by default is shown only if it is on."""
    shown = {name: values[name] for name, key in keys_of(kind).items() if values[name] or key.default}
    return ", ".join(f"{name} {str(v).lower() if v is True else f'{v:g}'}" for name, v in shown.items())
