"""`python -m minidpo bench`: its numbers are what their names say, and its steps are those that train."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minidpo.__main__ import main
from minidpo.data import PairTokens
from minidpo.errors import UserError
from minidpo.losses import DPO, SFT, BradleyTerry
from minidpo.model import save_model, save_reward_model
from minidpo.sections import DPOConfig, OptimSection, RewardConfig, RunSection
from minidpo.tools import bench, bench_trl
from minidpo.tools.bench_steps import Case, Step, TextbookStep, random_pairs
from tiny import random_pairs as tiny_pairs
from tiny import tiny_config, tiny_model, tiny_reward_model

OPTIM = OptimSection(lr=1e-2, grad_clip=0.0, batch_size=4, micro_tokens=40)
RUN = RunSection(dtype="fp32", device="cpu", threads=1)
SMALL = ["--batch-size", "2", "--dtype", "float32", "--threads", "1"]


def case_of(directory: Path, pairs: PairTokens, loss=None) -> Case:
    """A case for the tiny model, which is written to `directory`."""
    if isinstance(loss, BradleyTerry):
        save_reward_model(tiny_reward_model(pad_token_id=0), directory)
        config = RewardConfig(loss=loss, optim=OPTIM, run=RUN)
    else:
        save_model(tiny_model(pad_token_id=0), directory)
        config = DPOConfig(loss=loss or DPO(), optim=OPTIM, run=RUN)
    return Case(directory, pairs, config, torch.device("cpu"))


@pytest.fixture
def pairs() -> PairTokens:
    return PairTokens.from_pairs(tiny_pairs(np.random.default_rng(1), 12))


@pytest.mark.parametrize(
    ("loss", "responses", "scored"), [(DPO(), 2, 5), (SFT(), 1, 3), (BradleyTerry(), 2, 0)]
)
def test_flops_equal_a_hand_count(loss, responses, scored, tmp_path):
    """A prompt of 2 tokens, responses of 3 and 2, through 2 layers of width 32, MLP 48, 4 heads of 8."""
    pairs = PairTokens.from_responses([[5, 6]], [[[7, 8, 2], [9, 2]]])
    tokens = 2 + 3 + 2 * (responses == 2)
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48  # q and o, k and v (2 heads), MLP
    attention = (
        2 * 4 * 8 * (2 * 2 + 3 * 5 + (2 * 4) * (responses == 2))
    )  # scores and sums, queries times keys
    forward = 2 * (2 * (tokens * weights + attention) + scored * 32 * 61)
    assert bench.necessary_flops(case_of(tmp_path, pairs, loss), np.arange(1)) == 3 * forward


def test_textbook_steps_are_our_steps(tmp_path, pairs):
    """Over several steps both have the same losses, so the same gradients and updates."""
    case = case_of(tmp_path, pairs)
    ours, textbook = Step(case), TextbookStep(case)
    losses = [[step(batch) for batch in case.batches()] for step in (ours, textbook)]
    assert losses[0][0] == pytest.approx(np.log(2)) != losses[0][1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_last_line_is_json_with_consistent_numbers(tmp_path, monkeypatch, capsys):
    """Ratios are theirs / ours: above 1 where ours is faster. Utilisation is FLOPs over time and peak."""

    class SlowTextbook(TextbookStep):
        def __call__(self, batch):
            time.sleep(0.3)
            return super().__call__(batch)

    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9)
    monkeypatch.setattr(bench, "TextbookStep", SlowTextbook)
    save_model(tiny_model(), tmp_path)
    main(["bench", "--model", str(tmp_path), *SMALL, "--steps", "1", "--against", "textbook"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds, theirs = result["step_seconds"]["median"], result["their_step_seconds"]["median"]
    assert theirs > 0.3 > seconds > 0
    assert result["time_ratio"]["median"] == pytest.approx(theirs / seconds)
    assert result["pairs_per_s"] == pytest.approx(2 / seconds)
    assert result["utilisation"]["median"] == pytest.approx(1e12 * result["tflop_per_step"] / seconds / 1e9)
    assert result["peak_mib"] > 20 and result["their_peak_mib"] > 20  # PyTorch alone takes more
    assert result["memory_ratio"] == pytest.approx(result["their_peak_mib"] / result["peak_mib"])


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path, pairs):
    """What this process holds does not count."""
    block = np.ones(2**27)  # 1 GiB, more than a process that has imported PyTorch's CUDA build
    peak = bench.peak_mib(case_of(tmp_path, pairs), "ours")
    assert 20 < peak < block.nbytes / 2**20


def test_random_pairs_have_lengths_like_hhs():
    pairs = random_pairs(tiny_config(max_position_embeddings=2048), 200)
    prompt, chosen, rejected = pairs.lengths.T
    assert abs(prompt.mean() - 130) < 15 and abs(chosen.mean() - 80) < 12
    assert (prompt + np.maximum(chosen, rejected)).max() <= 512


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "mode"), [(DPO(), "trl:fused"), (BradleyTerry(lm_weight=0.0), "trl:best")])
def test_trls_trainer_takes_the_same_pairs_in_turn(loss, mode, tmp_path, pairs, monkeypatch):
    """An epoch of TRL's trainer sees the ids of every pair, and ours is told which pairs each step took."""
    pytest.importorskip("trl", reason="needs the extra `peers`")
    batches: list[dict] = []

    def spied(*arguments):
        trainer = make_trainer(*arguments)
        collate = trainer.data_collator
        trainer.data_collator = lambda examples: batches.append(collate(examples)) or batches[-1]
        return trainer

    make_trainer = bench_trl.make_trainer
    monkeypatch.setattr(bench_trl, "make_trainer", spied)
    case = case_of(tmp_path, pairs, loss)
    times, rows = bench_trl.train_trl(mode, case, 3, lambda batch: float(batch[0]))
    assert [ours for _, ours in times] == [batch[0] for batch in rows] and min(times)[0] > 0
    assert sorted(np.concatenate(rows)) == list(range(12))
    for row, ids in zip(rows[0], batches[0]["input_ids"], strict=False):
        begin, _, chosen_end, _ = pairs.bounds[row]
        assert ids[: chosen_end - begin].tolist() == pairs.ids[begin:chosen_end].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps 0; it must be >= 1"),
        (["--batch-size", "0"], "optim.batch_size = 0; it must be > 0"),
        (["--data", "pairs.jsonl"], "--data needs a tokenizer"),
        (["--against", "trl", "--loss", "sft"], "--loss sft has no counterpart"),
        (["--against", "textbook", "--loss", "ipo"], "plain DPO alone"),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        main(["bench", "--shape", "B", *arguments])


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="extra `peers`"):
        main(["bench", "--shape", "B", "--against", "trl"])


def test_a_configuration_gives_model_data_and_settings(config, monkeypatch, capsys):
    """The command line overrules it, and held-out pairs are not held out here."""
    monkeypatch.setattr(bench, "measure", lambda case, opponent: {"pairs": len(case.pairs)})
    main(["bench", "--config", *config(), "--loss", "simpo", "--steps", "20", "--batch-size", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"].startswith("SimPO") and result["micro_tokens"] == 256 and result["pairs"] == 40
