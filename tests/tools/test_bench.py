"""`python -m minidpo bench`: its numbers are what their names say, and its steps are those that train."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minidpo.__main__ import main
from minidpo.data import PairTokens
from minidpo.losses import DPO, SFT, BradleyTerry
from minidpo.model import response_logps, save_model
from minidpo.packing import pack
from minidpo.sections import DPOConfig, OptimSection, RewardConfig, RunSection
from minidpo.tools import bench, bench_steps
from minidpo.tools.bench_steps import STEPS, Case, random_pairs
from minidpo.tools.bench_trl import train_trl
from tiny import random_pairs as tiny_pairs
from tiny import tiny_config, tiny_model, tiny_reward_model

PAIRS = PairTokens.from_pairs(tiny_pairs(np.random.default_rng(1), 12))


@pytest.fixture
def case(tmp_path):
    """A case for the tiny model."""

    def make(loss, pairs: PairTokens = PAIRS) -> Case:
        optim = OptimSection(lr=1e-2, grad_clip=0.0, batch_size=4, micro_tokens=40)
        rewards = isinstance(loss, BradleyTerry)
        kind = RewardConfig if rewards else DPOConfig
        save_model((tiny_reward_model if rewards else tiny_model)(pad_token_id=0), tmp_path, not rewards)
        config = kind(loss=loss, optim=optim, run=RunSection(dtype="fp32", device="cpu", threads=1))
        return Case(tmp_path, pairs, config, torch.device("cpu"))

    return make


@pytest.mark.parametrize(
    ("loss", "responses", "scored"), [(DPO(), 2, 2), (SFT(), 1, 1), (BradleyTerry(), 2, 0)]
)
def test_flops(loss, responses, scored, case):
    """What PyTorch counts in one forward pass, with attention written out; backward costs twice that."""
    pairs = PairTokens.from_responses([[5, 6]], [[[7, 8, 2], [9, 2]]])
    batch = pack(pairs, responses=responses, scored=scored)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        response_logps(tiny_model(), batch)
    assert bench.necessary_flops(case(loss, pairs), np.arange(1)) == 3 * counter.get_total_flops()


def test_textbook(case):
    """Over several steps both have the same losses, so the same gradients and updates."""
    its = case(DPO())
    ours, textbook = (list(map(STEPS[who](its), its.batches())) for who in ("ours", "textbook"))
    assert ours[0] == pytest.approx(np.log(2)) != ours[1]
    assert ours == pytest.approx(textbook, rel=1e-4)


def test_json(tmp_path, monkeypatch, capsys):
    """The last line's ratios are theirs / ours; utilisation is FLOPs over time and peak."""
    step = bench_steps.dpo_step
    monkeypatch.setattr(bench_steps, "dpo_step", lambda *given: time.sleep(0.3) or step(*given))
    monkeypatch.setattr(bench, "matmul_peak", lambda device, dtype: 1e9)
    block = np.ones(2**27)  # 1 GiB of this process, which does not count: peaks are those of processes alone
    save_model(tiny_model(), tmp_path)
    settings = ["--batch-size", "2", "--dtype", "fp32", "--threads", "1", "--steps", "1"]
    main(["bench", "--model", str(tmp_path), *settings, "--against", "textbook"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds, theirs = result["step_seconds"]["median"], result["their_step_seconds"]["median"]
    assert theirs > 0.3 and seconds > 0
    assert result["time_ratio"]["median"] == pytest.approx(theirs / seconds)
    assert result["pairs_per_s"] == pytest.approx(2 / seconds)
    assert result["utilisation"]["median"] == pytest.approx(1e12 * result["tflop_per_step"] / seconds / 1e9)
    assert 20 < min(result["peak_mib"], result["their_peak_mib"]) < block.nbytes / 2**20
    assert result["memory_ratio"] == pytest.approx(result["their_peak_mib"] / result["peak_mib"])


def test_random_pairs():
    """Their lengths are like HH's."""
    prompt, chosen, rejected = random_pairs(tiny_config(max_position_embeddings=2048), 200).lengths.T
    assert abs(prompt.mean() - 130) < 15 and abs(chosen.mean() - 80) < 12
    assert (prompt + np.maximum(chosen, rejected)).max() <= 512


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "passes"), [(DPO(), 1), (BradleyTerry(lm_weight=0.0), 2)])
def test_trl(loss, passes, case, monkeypatch):
    """An epoch of TRL's trainer sees the ids of every pair, in as many passes per step as asked for, and ours
    is told which pairs each step took."""
    trl = pytest.importorskip("trl", reason="needs the extra `peers`")
    base, batches = trl.RewardTrainer if passes > 1 else trl.DPOTrainer, []
    step = base.training_step
    monkeypatch.setattr(base, "training_step", lambda *given: batches.append(given[2]) or step(*given))
    in_passes = replace(case(loss), their_passes=passes)
    times, rows = train_trl(in_passes, 3, lambda batch: float(batch[0]))
    assert len(times) == 3 and len(batches) == 3 * passes
    assert [ours for _, ours in times] == [batch[0] for batch in rows] and min(times)[0] > 0
    assert sorted(np.concatenate(rows)) == list(range(12))
    for row, ids in zip(rows[0][: 4 // passes], batches[0]["input_ids"], strict=False):  # the first pass
        start, _, end, _ = PAIRS.bounds[row]  # prompt and chosen
        assert ids[: end - start].tolist() == PAIRS.ids[start:end].tolist()


def test_configuration(config, tmp_path, monkeypatch, capsys):
    """It gives model, data and settings; the command line overrules it, and no pairs are held out."""
    monkeypatch.setattr(bench, "measure", lambda case, opponent: {"pairs": len(case.pairs)})
    main(["bench", "--config", *config(), "--loss", "simpo", "--steps", "20", "--batch-size", "2"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"].startswith("SimPO") and result["micro_tokens"] == 256 and result["pairs"] == 40
    with_comma = bench.parse(["--model", "a", "--data", "b,c.jsonl", "--data", "d"])
    assert bench.config_of(with_comma, tmp_path).data.train == ["b,c.jsonl", "d"]
