"""What `bench` counts and compares: operations by hand and by PyTorch's counter, the textbook step, and its output."""

import json
import sys

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minidpo.__main__ import main
from minidpo.commands.bench import parse, settings_of
from minidpo.commands.bench_cases import LOSSES, SHAPES, Settings, pairs_of_lengths, random_pairs
from minidpo.commands.bench_child import peak_rss
from minidpo.commands.bench_flops import necessary_flops, textbook_tokens
from minidpo.commands.bench_peers import interleaved, make_trainer
from minidpo.commands.bench_stages import Step, TextbookStep
from minidpo.errors import UserError
from minidpo.hf_config import format_config
from minidpo.packing import Wanted
from minidpo.shapes import named_shape
from minidpo.token_store import PairTokens
from minidpo.weights import save_model, save_reward_model
from peers import import_trl
from tiny import random_pairs as tiny_pairs
from tiny import relative_difference, tiny_config, tiny_model, tiny_reward_model

CPU = torch.device("cpu")
LOGPS, REWARDS = Wanted(chosen_logps=True, rejected_logps=True), Wanted(rewards=True)


def test_flops_of_one_pair_equal_a_hand_count():
    """Prompt 2, chosen 3, rejected 2. The last token of an ending predicts nothing: 2 + 2 + 1 tokens pass."""
    config = tiny_config(
        num_hidden_layers=2
    )  # width 32, MLP 48, 4 heads and 2 key/value heads of 8, 61 tokens
    flops = necessary_flops(config, np.array([[2, 3, 2]]), LOGPS)
    keys_values, row = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    rows = 4  # last of the prompt, two of chosen, one of rejected
    forward = 2 * (5 * (keys_values + row) + 5 * keys_values + rows * row)
    seen = (1 + 2) + (3 + 4) + 3
    last_seen = 2 + (3 + 4) + 3
    assert flops.layers == 3 * forward
    assert flops.attention == 3 * 4 * 32 * (seen + last_seen)
    assert flops.output == 3 * 2 * rows * 32 * 61


def test_flops_of_rewards_equal_a_hand_count():
    flops = necessary_flops(tiny_config(num_hidden_layers=1), np.array([[2, 3, 2]]), REWARDS)
    keys_values, row = 2 * 32 * 16, 2 * 32 * 32 + 3 * 32 * 48
    assert flops.layers == 3 * 2 * (7 * keys_values + 2 * row)
    assert flops.attention == 3 * 4 * 32 * (5 + 4)
    assert flops.output == 3 * 2 * 2 * 32


@pytest.mark.parametrize(("wanted", "ends"), [(LOGPS, 1), (REWARDS, 0), (Wanted(chosen_logps=True), 1)])
def test_products_equal_pytorchs_count(wanted, ends):
    """Weights' products of a forward and backward pass over just the tokens and rows that are needed."""
    model, (prompt, chosen, rejected) = tiny_model(), (5, 7, 4)
    endings = [chosen, rejected][: 1 + wanted.rejected]
    tokens = prompt + sum(e - ends for e in endings)
    rows = sum(e - 1 for e in endings) + 1 if wanted.chosen_logps else len(endings)
    head = model.output_weight if wanted.chosen_logps else torch.ones(1, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        hidden = model.hidden_states(
            torch.arange(tokens),
            torch.arange(tokens),
            [lambda q, k, v: q + (k.sum() + v.sum())] * 2,
            torch.arange(rows),
        )
        (hidden @ head.T).sum().backward()
    flops = necessary_flops(model.config, np.array([[prompt, chosen, rejected]]), wanted)
    assert flops.layers + flops.output == counter.get_total_flops()


def test_attention_equals_a_count_of_allowed_pairs_of_tokens():
    prompt, endings = 6, (5, 3)
    text = [(0, i) for i in range(prompt)] + [
        (w, prompt + i) for w in (1, 2) for i in range(endings[w - 1] - 1)
    ]
    sees = [[k <= q and key in (0, own) for key, k in text] for own, q in text]
    reads = [i for i, (own, _) in enumerate(text) if own or i == prompt - 1]
    seen, last_seen = np.sum(sees), np.sum(np.array(sees)[reads])
    config = tiny_config(num_hidden_layers=3)
    flops = necessary_flops(config, np.array([[prompt, *endings]]), LOGPS)
    assert flops.attention == 3 * 4 * 32 * (2 * seen + last_seen)


def test_flops_add_up_over_pairs():
    lengths = np.array([[2, 3, 2], [9, 1, 4], [1, 1, 1]])
    for wanted in (LOGPS, REWARDS, Wanted(chosen_logps=True)):
        parts = [necessary_flops(tiny_config(), row[None], wanted).total for row in lengths]
        assert necessary_flops(tiny_config(), lengths, wanted).total == sum(parts)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_textbook_step_has_our_loss_and_gradients(loss):
    pairs = PairTokens.from_pairs(tiny_pairs(np.random.default_rng(1), 5))
    settings = Settings(loss=loss, dtype="fp32", batch_size=5, micro_tokens=40, lr=1e-2)
    steps = [kind(tiny_model(), pairs, settings, CPU) for kind in (Step, TextbookStep)]
    for step in steps:
        step(np.arange(3))  # away from the reference
    losses, gradients = [], []
    for step in steps:
        losses.append(step.accumulate(np.arange(5)).mean("loss"))
        gradients.append({n: p.grad for n, p in step.model.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    assert relative_difference(*gradients) < 1e-4


@pytest.mark.parametrize("loss", ["dpo", "rm"])
def test_the_step_in_stages_is_the_step(loss):
    pairs = PairTokens.from_pairs(tiny_pairs(np.random.default_rng(1), 4))
    settings = Settings(loss=loss, dtype="fp32", batch_size=4, micro_tokens=40, lr=1e-3)
    whole, staged = (Step(tiny_model(), pairs, settings, CPU) for _ in range(2))
    whole(np.arange(4))
    stages = staged.in_stages(np.arange(4))
    assert min(stages.values()) > 0 and len(stages) == 5
    for ours, theirs in zip(whole.model.parameters(), staged.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_random_pairs_have_lengths_like_hhs_and_fit():
    pairs = random_pairs(named_shape("A"), 512, 200)
    prompt, chosen, rejected = pairs.lengths.T
    assert abs(prompt.mean() - 130) < 15 and abs(chosen.mean() - 80) < 12
    assert (prompt + np.maximum(chosen, rejected)).max() <= 512
    assert textbook_tokens(pairs.lengths, LOGPS) == (2 * prompt + chosen + rejected).sum()
    assert np.array_equal(pairs.ids, random_pairs(named_shape("A"), 512, 200).ids)


def test_named_shapes_are_models():
    for name in SHAPES:
        assert named_shape(name).head_dim % 2 == 0
    parameters = named_shape("C")
    assert (parameters.hidden_size, parameters.num_hidden_layers, parameters.vocab_size) == (576, 30, 49152)


@pytest.fixture
def config_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(format_config(tiny_config(vocab_size=300))))
    return str(path)


SMALL = ["--max-length", "32", "--batch-size", "2", "--steps", "2", "--dtype", "float32", "--threads", "1"]


def test_the_last_line_is_json_with_every_number(config_json, capsys, monkeypatch):
    monkeypatch.setattr("minidpo.commands.bench.matmul_peak", lambda device, dtype: 1e9)
    main(["bench", "--model", config_json, *SMALL, "--against", "naive"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["loss"] == "dpo" and result["dtype"] == "fp32" and result["batch_size"] == 2
    for key in ("pairs_per_s", "logical_tokens_per_s", "processed_tokens_per_s"):
        assert result[key] > 0, key
    assert 0 < result["utilisation"]["q25"] <= result["utilisation"]["median"]
    assert result["logical_tokens_per_s"] > result["processed_tokens_per_s"]
    assert result["stages"].keys() == {
        "data and packing", "forward", "output layer and loss", "backward", "optimizer"
    }  # fmt: skip
    assert result["ours"]["peak_bytes"] > 2**20 and result["ours"]["seconds_to_first_step"] > 0
    ratio = result["against"]["naive"]["time_ratio"]
    assert 0 < ratio["q25"] <= ratio["median"] <= ratio["q75"]


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "mode"), [("dpo", "default"), ("dpo", "fused"), ("rm", "best")])
def test_trls_trainer_takes_the_same_pairs_in_turn(loss, mode, tmp_path):
    import_trl()
    pairs = random_pairs(tiny_config(vocab_size=300), 32, 12)
    settings = Settings(loss=loss, dtype="fp32", batch_size=4, device="cpu")
    if loss == "rm":
        save_reward_model(tiny_reward_model(vocab_size=300, pad_token_id=0), tmp_path / "m")
    else:
        save_model(tiny_model(vocab_size=300), tmp_path / "m")
    taken = []

    def ours(batch):
        taken.append(batch)
        return 1.0

    trainer = make_trainer(tmp_path / "m", pairs, settings, mode, tmp_path / "out", steps=3)
    assert [mine for _, mine in interleaved(trainer, pairs, ours)] == [1.0] * 3
    assert sorted(np.concatenate(taken)) == list(range(12))  # an epoch: every pair, with its ids as they are


def test_growth_is_told_beside_its_prediction(config_json, capsys):
    main(["bench", "--model", config_json, *SMALL[2:], "--grow"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["grow"]
    assert [row["doubled"] for row in rows] == ["base", "prompt", "endings", "batch", "vocabulary", "depth"]
    predicted = {row["doubled"]: row["predicted"] for row in rows}
    assert predicted["base"] == 1 and predicted["batch"] == 2
    assert 1 < predicted["vocabulary"] < 2 and 1 < predicted["depth"] < 2.2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "0"], "--steps 0; it must be at least 1"),
        (["--data", "pairs.jsonl"], "--data needs a tokenizer"),
        (["--against", "trl", "--loss", "sft"], "--loss sft has no twin"),
        (["--against", "trl:fused", "--loss", "rm"], "use trl:best"),
        (["--max-length", "1"], "--max-length 1"),
    ],
)
def test_wrong_input_is_refused(config_json, arguments, says):
    with pytest.raises(UserError, match=says):
        main(["bench", "--model", config_json, *arguments])


def test_a_missing_extra_is_one_line(config_json, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match="extra `peers`"):
        main(["bench", "--model", config_json, "--against", "trl"])


def test_a_run_configuration_gives_model_data_and_settings_and_the_command_line_overrules_it(tmp_path):
    file = tmp_path / "run.toml"
    sections = {"model": 'path = "m"', "data": 'train = ["d.jsonl"]', "loss": 'name = "ipo"'}
    sections |= {"optim": "batch_size = 4\nmicro_tokens = 99", "run": f'out = "{tmp_path}"\ndtype = "fp32"'}
    file.write_text("".join(f"[{name}]\n{keys}\n" for name, keys in sections.items()))
    options = parse(["--config", str(file), "--micro-tokens", "55"])
    settings, data = settings_of(options)
    assert (options.model, data, settings.loss, settings.dtype) == ("m", ["d.jsonl"], "ipo", "fp32")
    assert (settings.batch_size, settings.micro_tokens) == (4, 55)


def test_peak_memory_is_that_of_the_process():
    before = peak_rss()
    block = np.ones(2**25)  # 256 MiB
    assert peak_rss() >= before and peak_rss() > block.nbytes


def test_pairs_of_given_lengths():
    lengths = np.array([[3, 2, 4], [1, 1, 1]])
    assert np.array_equal(pairs_of_lengths(tiny_config(), lengths).lengths, lengths)
