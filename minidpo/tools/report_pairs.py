"""What `report` shows of the pairs that a run holds out: a few token by token, and how sure the model is."""

from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minidpo.data import PairTokens, Tokenizer, load_pairs
from minidpo.errors import UserError
from minidpo.losses import PairLogps
from minidpo.model import load_model, load_reward_model
from minidpo.packing import pack
from minidpo.sections import DPOConfig, RewardConfig
from minidpo.tools.pair_numbers import numbers_of, token_logps, under
from minidpo.tools.plot import Run
from minidpo.tools.report_charts import Marks, chart
from minidpo.tools.report_page import Markup, article, full_colour, pair_article, tag, text
from minidpo.tools.score_summary import calibration
from minidpo.training.reward_scorer import with_error
from minidpo.training.scoring import MICRO_TOKENS, all_logps, all_rewards, require_finite

BINS, GROUPS = 20, 5  # of margins, and of pairs by length
ENDS = 2  # pairs shown of which a reward model is most sure, and the same of those most wrong


class Finished(NamedTuple):
    """A run, as far as it got."""

    path: Path
    config: DPOConfig | RewardConfig
    lines: list[dict[str, float]]  # of metrics.jsonl
    curves: Run
    model: Path | None  # final/, or the newest checkpoint


def parts_of_pairs(run: Finished, most: int, device: torch.device, tokens: int) -> list[Markup]:
    """most: how many pairs are computed; tokens: how many of a text are shown. Raises UserError where there
    is no model, or there are no pairs."""
    if run.model is None:
        raise UserError("there is no model yet, neither final/ nor a checkpoint")
    tokenizer = Tokenizer.from_pretrained(run.model, rewards=isinstance(run.config, RewardConfig))
    with redirect_stdout(StringIO()):  # The run has told what is in its data.
        pairs = held_out(run, tokenizer)
    pairs = pairs.select(np.arange(min(most, len(pairs))))
    note = f"Of the first {len(pairs)} pairs that the run holds out. Model: {run.model}"
    if isinstance(run.config, RewardConfig):
        parts = of_reward_model(run.model, pairs, tokenizer, device)
    else:
        parts = of_policy(run.model, run.config, pairs, tokenizer, device, tokens)
        use = "" if run.config.loss.needs_reference else ", which only the shades compare with"
        note += f" (pi); reference: {run.config.reference_path} (pi_ref{use})"
    return [tag("h3", "Held-out pairs"), tag("p", f"{note}.", class_="note"), *parts]


def held_out(run: Finished, tokenizer: Tokenizer) -> PairTokens:
    """The pairs that the run holds out, cut as it cuts them."""
    data, kept = run.config.data, run.path / "tokens"
    if data.eval:  # Then the training files, which may be long, need not be read.
        return load_pairs(replace(data, train=data.eval, eval=[], eval_pairs=0, cache=""), tokenizer, 0)[0]
    if not data.eval_pairs:
        raise UserError("the run holds out none (data.eval, data.eval_pairs)")
    return load_pairs(data, tokenizer, run.config.run.seed, kept if kept.is_dir() else None)[1]


def of_policy(
    model: Path,
    config: DPOConfig,
    pairs: PairTokens,
    tokenizer: Tokenizer,
    device: torch.device,
    tokens: int,
) -> list[Markup]:
    loss, both = config.loss, (str(model), str(config.reference_path))
    policy, reference = (_sums(directory, pairs, device) for directory in both)  # (n, 2) each
    ratios, lengths = policy - reference, pairs.scored_lengths
    gain = ratios[:, 0] - ratios[:, 1] if loss.responses == 2 else ratios[:, 0]
    per_token = reference / lengths
    picked = to_teach(gain, per_token[:, 0] - per_token[:, -1])

    # Each pair by itself, so that its figures are those of `explain` to the last digit.
    ids = [pairs.pair(row) for row in picked.values()]
    batches = [pack(PairTokens.from_pairs([pair])) for pair in ids]
    logps = zip(*(token_logps(directory, batches, device, "fp32") for directory in both), strict=True)
    explained: list[dict[str, Any]] = []
    for pair, batch, of_pair in zip(ids, batches, logps, strict=True):
        numbers, sums = numbers_of(pair, tokenizer, batch, *of_pair)
        where = {"data": pairs.files[pair.file], "index": pair.index}
        explained.append(where | numbers | {"loss": under(loss, sums)})
    most = full_colour(explained)
    words = zip(picked, explained, strict=True)
    parts = [pair_article(e, *title_and_why, most, tokens) for title_and_why, e in words]
    if loss.responses == 2:
        columns = (torch.from_numpy(values[:, k]) for values in (policy, reference, lengths) for k in (0, 1))
        chosen, rejected = loss.rewards(PairLogps(*columns))
        parts += how_sure((chosen - rejected).numpy(), lengths, loss.margin_is_logit)
    return parts


def to_teach(gain: np.ndarray, preferred: np.ndarray) -> dict[tuple[str, str], int]:
    """Title and reason -> row of a pair that teaches something; each row once.

    gain (n,): by how many nats training favours the chosen response more than the reference does; preferred
    (n,): by how many nats per token the reference does.
    """
    order = np.argsort(gain, kind="stable").tolist()
    rows = {
        order[-1]: ("Largest gain", "Of all pairs, training favours the chosen response most here."),
        order[0]: ("Largest loss", "Training favours it least here, or favours the rejected one."),
        order[len(order) // 2]: ("Typical", "Half of the pairs gained less than this one, half gained more."),
    }
    doubtful = [row for row in order if gain[row] < 0 and preferred[row] < 0 and row not in rows]
    if doubtful:
        why = "The reference finds the rejected response likelier per token, and training made it more so."
        rows[min(doubtful, key=lambda row: preferred[row])] = ("Looks mislabelled", why)
    return {words: row for row, words in rows.items()}


def of_reward_model(
    model: Path, pairs: PairTokens, tokenizer: Tokenizer, device: torch.device
) -> list[Markup]:
    rewards = all_rewards(load_reward_model(model, device), pairs, MICRO_TOKENS, device, "fp32")  # (n, 2)
    require_finite(rewards, model)
    margins = rewards[:, 0] - rewards[:, 1]
    parts = how_sure(margins, pairs.scored_lengths, True)
    order = np.argsort(margins, kind="stable").tolist()
    for title, rows in (("Most sure", order[: -1 - ENDS : -1]), ("Most wrong", order[:ENDS])):
        for row in rows:
            ids = pairs.pair(row)
            prompt, *responses = map(tokenizer.decode, (ids.prompt, *ids.responses))
            sides = zip(("chosen", "rejected"), responses, rewards[row], strict=True)
            columns = ((name, text(response), f"reward {reward:.4f}") for name, response, reward in sides)
            about = f"{title}: margin {margins[row]:.4f}, {pairs.records(np.array([row]))}"
            parts.append(article(about, prompt, *columns))
    return parts


def how_sure(margins: np.ndarray, lengths: np.ndarray, are_logits: bool) -> list[Markup]:
    """Charts of the margins (n,): how they are distributed, calibration, accuracy by lengths (n, 2)."""
    limit = float(np.abs(margins).max()) or 1.0
    counts, edges = np.histogram(margins, BINS, (-limit, limit))
    centres = ((edges[1:] + edges[:-1]) / 2).tolist()
    bars = [(x, float(n)) for x, n in zip(centres, counts, strict=True)]
    said = [f"margin about {x:.3g}: {n:.0f} pairs" for x, n in bars]
    half = BINS // 2
    wrong, right = (
        Marks("bars", bars[s], c, said[s]) for s, c in ((slice(half), "c1"), (slice(half, None), "c0"))
    )
    about = f"right of 0: accuracy {with_error(margins > 0, '.3f')}"
    charts = [chart("Margins, pairs", about, [wrong, right])]

    if are_logits:
        rows, error = calibration(margins)
        points = [(predicted, observed) for _, _, predicted, observed in rows]
        said = [f"{n} pairs: predicted {p:.3f}, observed {o:.3f}" for _, n, p, o in rows]
        about = f"predicted right, and observed; dots on the line are best; mean error {error:.3f}"
        line = Marks("line", [(0.5, 0.5), (1.0, 1.0)], "level")
        charts.append(chart("Calibration, share of pairs", about, [line, Marks("dots", points, "c0", said)]))

    longer = lengths[:, 0] - lengths[:, 1]
    points, said = [], []
    for group in np.array_split(np.argsort(longer, kind="stable"), min(GROUPS, len(longer))):
        points.append((float(longer[group].mean()), float((margins[group] > 0).mean())))
        least, most = longer[group].min(), longer[group].max()
        accuracy = with_error(margins[group] > 0, ".3f")
        said.append(f"{len(group)} pairs, chosen longer by {least} to {most} tokens: accuracy {accuracy}")
    about = "by how many tokens chosen is longer; flat is best, rising: longer counts as better"
    charts.append(chart("Accuracy by length", about, [Marks("dots", points, "c0", said)], 0.5))
    return [tag("div", *charts, class_="charts")]


def _sums(directory: str, pairs: PairTokens, device: torch.device) -> np.ndarray:
    sums = all_logps(load_model(directory, device=device), pairs, MICRO_TOKENS, device, "fp32")
    require_finite(sums, directory)
    return sums
