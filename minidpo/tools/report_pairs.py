"""What `report` shows of held-out pairs: a few token by token, or how sure a reward model is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from minidpo.data import PairTokens, Tokenizer, load_pairs
from minidpo.errors import UserError
from minidpo.model import load_reward_model
from minidpo.model.adapter_files import with_tokenizer
from minidpo.packing import pack
from minidpo.sections import RewardConfig
from minidpo.tools.explain_text import responses_of
from minidpo.tools.pair_numbers import numbers_of, token_logps, under
from minidpo.tools.plot import Run
from minidpo.tools.report_page import Line, Markup, chart, side_by_side, tag, text, token_pairs
from minidpo.tools.score_summary import calibration
from minidpo.training.reward_scorer import with_error
from minidpo.training.scoring import MICRO_TOKENS, all_rewards, require_finite

PAIRS = 100  # computed at most, evenly out of all that a run holds out
BINS, GROUPS = 20, 5  # of margins, and of pairs by length
ENDS = 2  # pairs shown of which a reward model is most sure, and the same of those most wrong


class Finished(NamedTuple):
    """A run, as far as it got."""

    path: Path
    config: Any  # DPOConfig or RewardConfig
    lines: list[dict[str, float]]  # of metrics.jsonl
    curves: Run
    model: Path | None  # final/, the newest checkpoint, or the base of its adapters
    adapter: Path | None


def of_pairs(run: Finished, device: torch.device) -> list[Markup]:
    """Raises UserError where there is no model, or there are no pairs."""
    if run.model is None:
        raise UserError("there is no model yet, neither final/ nor a checkpoint")
    config, kept, rewards = run.config, run.path / "tokens", isinstance(run.config, RewardConfig)
    tokenizer = Tokenizer.from_pretrained(with_tokenizer(run.model, run.adapter), rewards=rewards)
    _, pairs = load_pairs(config.data, tokenizer, config.run.seed, kept if kept.is_dir() else None)
    if not len(pairs):
        raise UserError("the run holds out none (data.eval, data.eval_pairs)")
    if not rewards and config.loss.unpaired and pairs.label is None:
        pairs = pairs.unpaired()
    most = 10 * PAIRS if rewards else PAIRS  # A reward model reads many in a row, for its distributions.
    pairs = pairs.select(np.arange(0, len(pairs), -(-len(pairs) // most)))
    parts = of_reward_model if isinstance(config, RewardConfig) else of_policy
    about = f"Of {len(pairs)} pairs that the run does not train on. Model: {run.adapter or run.model}."
    return [tag("p", about), *parts(run, pairs, tokenizer, device)]


def of_policy(
    run: Finished, pairs: PairTokens, tokenizer: Tokenizer, device: torch.device
) -> Iterator[Markup]:
    """Each pair is computed by itself, so that its figures are those of `explain` to the last digit."""
    ids = [pairs.pair(row) for row in range(len(pairs))]
    batches = [pack(PairTokens.from_pairs([pair])) for pair in ids]
    loss, reference_path = run.config.loss, run.config.reference_path
    policy = token_logps(str(run.model), batches, device, "fp32", run.adapter)
    reference = token_logps(str(reference_path), batches, device, "fp32")
    z0 = [0.0, *(line["eval/z0"] for line in run.lines if "eval/z0" in line)][-1]
    explained = []
    for pair, batch, ours, theirs in zip(ids, batches, policy, reference, strict=True):
        numbers, logps = numbers_of(pair, tokenizer, batch, ours, theirs)
        about = {"data": pairs.files[pair.file], "index": pair.index, "label": pair.label}
        values = under(loss, logps._replace(z0=torch.tensor([z0])))
        explained.append(about | numbers | {"loss": values | {"z0": z0}})

    def of_each(key: str) -> np.ndarray:  # (n, K)
        return np.array([[e[key.format(name)] for name in responses_of(e)] for e in explained])

    references = of_each("reference_{}_logps")
    ratios, per_token = of_each("{}_logps") - references, references / of_each("{}_length")
    gain = ratios[:, 0] - ratios[:, 1:].sum(axis=1)
    if pairs.label is not None:
        gain = np.where(pairs.label, gain, -gain)
    picked = to_teach(gain, per_token[:, 0] - per_token[:, -1])
    only = "" if loss.needs_reference else f", which the loss {loss.name} does not read"
    yield tag("p", f"pi_ref is {reference_path}{only}.")
    yield from token_pairs([(*words, explained[row]) for words, row in picked.items()])


def to_teach(gain: np.ndarray, preferred: np.ndarray) -> dict[tuple[str, str], int]:
    """Title and reason -> row of a pair that teaches something; each row once.

    gain (n,): by how many nats training favours the chosen response more than the reference does; preferred
    (n,): by how many nats per token the reference does.
    """
    order = np.argsort(gain, kind="stable").tolist()
    rows = {
        order[-1]: ("Largest gain", "Of these pairs, training improved this one most."),
        order[0]: ("Largest loss", "Training improved this one least, or made it worse."),
        order[len(order) // 2]: ("Typical", "Half of the pairs gained less than this one, half gained more."),
    }
    doubtful = [row for row in order if gain[row] < 0 and preferred[row] < 0 and row not in rows]
    if doubtful:
        why = "The reference finds the rejected response likelier per token, and training made it more so."
        rows[min(doubtful, key=lambda row: preferred[row])] = ("Looks mislabelled", why)
    return {words: row for row, words in rows.items()}


def of_reward_model(
    run: Finished, pairs: PairTokens, tokenizer: Tokenizer, device: torch.device
) -> Iterator[Markup]:
    model = load_reward_model(str(run.model), device, run.adapter)
    rewards = all_rewards(model, pairs, MICRO_TOKENS, device, "fp32")  # (n, 2)
    require_finite(rewards, str(run.model))
    margins = rewards[:, 0] - rewards[:, 1]
    yield tag("div", *how_sure(margins, pairs.scored_lengths), class_="charts")
    order = np.argsort(margins, kind="stable").tolist()
    for title, rows in (("Most sure", order[: -1 - ENDS : -1]), ("Most wrong", order[:ENDS])):
        for row in rows:
            ids = pairs.pair(row)
            prompt, *responses = map(tokenizer.decode, (ids.prompt, *ids.responses))
            about = f"{title}: margin {margins[row]:.4f}, record {ids.index} of {pairs.files[ids.file]}"
            sides = zip(("chosen", "rejected"), rewards[row], map(text, responses), strict=True)
            columns = ((f"{name}, reward {reward:.4f}", said) for name, reward, said in sides)
            yield tag("article", tag("h3", about), side_by_side(prompt, *columns))


def how_sure(margins: np.ndarray, lengths: np.ndarray) -> list[Markup]:
    """Charts of the margins (n,): how they are distributed, calibration, accuracy by lengths (n, 2)."""
    limit = float(np.abs(margins).max()) or 1.0
    counts, edges = np.histogram(margins, BINS, (-limit, limit))
    bars = list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), counts.tolist(), strict=True))
    about = [f"margin about {x:.3g}: {n} pairs" for x, n in bars]
    good = f"what is right of 0 is right: accuracy {with_error(margins > 0, '.3f')}"
    charts = [chart("Margins, pairs", good, [Line(bars, about)])]

    rows, error = calibration(margins)
    about = [f"{n} pairs: predicted {p:.3f}, observed {o:.3f}" for _, n, p, o in rows]
    good = f"share predicted right, and observed; best on the dotted line; mean error {error:.3f}"
    lines = [Line([(0.5, 0.5), (1, 1)], look="level"), Line([(p, o) for _, _, p, o in rows], about)]
    charts.append(chart("Calibration, share of pairs", good, lines))

    longer = lengths[:, 0] - lengths[:, 1]
    points, about = [], []
    for group in np.array_split(np.argsort(longer, kind="stable"), min(GROUPS, len(longer))):
        points.append((float(longer[group].mean()), float((margins[group] > 0).mean())))
        accuracy = with_error(margins[group] > 0, ".3f")
        ends = f"{longer[group].min()} to {longer[group].max()}"
        about.append(f"{len(group)} pairs, chosen longer by {ends} tokens: accuracy {accuracy}")
    good = "by how many tokens chosen is longer; flat is best, rising: longer counts as better"
    return [*charts, chart("Accuracy by length", good, [Line(points, about)], 0.5)]
