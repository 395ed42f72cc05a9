"""Records of one response, and responses of several turns, from the file to the loss."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import train_dpo
import train_rm
from minidpo.config import DPOConfig
from minidpo.data import PairTokens, Tokenizer, TokenPair, read_preferences, truncation
from minidpo.errors import UserError
from minidpo.logprobs import sequence_logps
from minidpo.losses import DPO, SFT
from minidpo.model import load_model
from minidpo.textbook import pad
from minidpo.training.reference import with_reference_logps
from minidpo.training.scoring import all_logps
from minidpo.training.step import pair_logps
from record_files import record, write
from runs import metrics, run_dpo, run_rm, steps
from tiny import EOS, tiny_model

HERE = (torch.device("cpu"), "fp32")
SINGLE = [{"prompt": f"a cat {i}", "completion": " yes" * (1 + i % 3)} for i in range(20)]


@pytest.fixture
def single(config, tmp_path):
    """The arguments of a run on records of one response."""
    return config(data__train=f'["{write(tmp_path / "single.jsonl", *SINGLE)}"]', data__eval_pairs=4)


def test_sft(single, tmp_path, capsys):
    """SFT trains on them to the same numbers as on pairs with these responses for chosen."""
    train_dpo.main([*single, "--loss.name=sft"])
    assert "held out 4 responses by prompt" in capsys.readouterr().out
    pairs = write(tmp_path / "pairs.jsonl", *(record(r["prompt"], chosen=r["completion"]) for r in SINGLE))
    others = [f"--data.train={pairs}", f"--run.out={tmp_path / 'pairs'}"]
    train_dpo.main([*single, "--loss.name=sft", *others])
    losses = [[row["loss"] for row in steps(metrics(tmp_path / out))] for out in ("out", "pairs")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize(
    ("script", "more", "label", "says"),
    [
        (train_dpo, ["--loss.name=dpo"], {}, 'loss dpo reads two responses; the loss for that is "sft"'),
        (train_rm, [], {}, "loss reward model reads two responses; the loss for that is"),
        (train_dpo, ["--loss.name=sft"], {"label": 1}, "loss sft reads responses that are all desirable; "),
        (
            train_rm,
            [],
            {"label": 1},
            "one response per record and a label, but the loss reward model reads two",
        ),
    ],
)
def test_refused(single, tmp_path, script, more, label, says):
    """A loss that needs what the records do not have is told with the file, and nothing is left behind."""
    write(tmp_path / "single.jsonl", *(row | label for row in SINGLE))
    with pytest.raises(UserError, match=says) as caught:
        script.main([*single, *more])
    assert str(caught.value).startswith(f"{tmp_path}/single.jsonl: one response per record")
    assert not (tmp_path / "out").exists()


def test_told_first(single, monkeypatch):
    """What a loss cannot read is told at the first record, before all are tokenized."""
    monkeypatch.setattr(truncation, "_CHUNK", 1)
    monkeypatch.setattr(truncation.DataReport, "add", Mock(side_effect=[None]))  # A second pair is an error.
    with pytest.raises(UserError, match="/single.jsonl: one response per record, but the loss dpo reads two"):
        train_dpo.main([*single])


def test_kto(single, tmp_path):
    """KTO trains on labelled responses, with the log that pairs of the same responses give."""
    labelled = [
        {"prompt": f"a cat {i}", "completion": text, "label": good}
        for good, text in ((True, " yes"), (False, " no and no"))
        for i in range(8)
    ]
    files = {
        "labelled": write(tmp_path / "single.jsonl", *labelled),
        "pairs": write(tmp_path / "pairs.jsonl", *(record(f"a cat {i}") for i in range(8))),
    }
    logs = []
    for name, file in files.items():
        more = [f"--data.train={file}", "--data.eval_pairs=0", f"--run.out={tmp_path / name}"]
        train_dpo.main([*single, "--loss.name=kto", *more])
        logs.append([row["loss"] for row in steps(metrics(tmp_path / name))])
    assert logs[0] == logs[1] and len(logs[0]) == 4


def test_needs_two():
    """A loss that compares two responses is not computed from one."""
    pairs = PairTokens.from_pairs([TokenPair([3, 4], [5, EOS], None, 0)])
    model, every = tiny_model(), np.arange(1)
    assert pair_logps(model, pairs, every, SFT(), *HERE).rejected is None
    with pytest.raises(ValueError, match="2 responses of each prompt are needed, the data has 1"):
        pair_logps(model, pairs, every, DPO(), *HERE)


def test_reference(world, tmp_path):
    """The reference's log-probs of one response per record are a single column."""
    pairs = PairTokens.from_pairs([TokenPair([3, 4], [5, EOS], None, 0), TokenPair([6], [EOS], None, 1)])
    config = DPOConfig()
    config.reference.path = str(world / "other")
    run = SimpleNamespace(out=tmp_path, identity={"reference": "x"}, device=HERE[0], dtype=HERE[1])
    some, others = np.array([1]), pairs.select(np.array([0]))
    with_logps, _ = with_reference_logps(config, run, pairs, some, others, policy=None)
    expected = all_logps(load_model(world / "other"), pairs, 64, *HERE)
    assert np.isnan(with_logps.ref_logps[0]).all()
    assert with_logps.ref_logps.shape == (2, 1) and with_logps.ref_logps[1] == pytest.approx(expected[1])


# --- several turns -----------------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED, WELL, SLEEPS = (
    turn("user", "a cat?"),
    turn("assistant", "it runs well"),
    turn("assistant", "it sleeps"),
)
RECORDS = [
    {
        "prompt": [ASKED],
        "chosen": [WELL, turn("user", "and then?"), SLEEPS],
        "rejected": [turn("assistant", "no")],
    },
    {"prompt": [ASKED], "chosen": [SLEEPS], "rejected": [WELL, turn("tool", "yes"), SLEEPS]},
]


@pytest.mark.parametrize(("run", "metric"), [(run_dpo, "loss"), (run_rm, "lm_loss")], ids=["sft", "rm"])
def test_turns(config, world, tmp_path, run, metric):
    """The language-modelling loss of a run is the mean over the tokens that the assistant wrote."""
    data, rm = write(tmp_path / "turns.jsonl", *RECORDS), run is run_rm
    limits = dict(data__max_length=250, data__max_prompt_length=100, optim__micro_tokens=500)
    arguments = config(data__train=f'["{data}"]', data__eval_pairs=0, optim__max_steps=1, **limits)
    logged = run(arguments, "--data.template=chatml", *([] if rm else ["--loss.name=sft"]))[0][metric]

    tokenizer = Tokenizer.from_pretrained(world / "model", rewards=rm)
    texts = read_preferences(data, template=tokenizer.chat_template("chatml"))
    pairs = tokenizer.encode_pairs(list(texts))
    tokens, mask = pad([(pair.prompt, pair.chosen, pair.chosen) for pair in pairs])
    for row, pair in enumerate(pairs):
        for begin, end in pair.unscored[0] if pair.unscored else ():
            mask[row, len(pair.prompt) + begin : len(pair.prompt) + end] = False
    with torch.no_grad():
        sums, counts = sequence_logps(load_model(world / "model")(tokens[:2]), tokens[:2], mask[:2])
    assert pairs[0].unscored[0] and logged == pytest.approx((-sums / counts).mean().item(), rel=1e-5)
