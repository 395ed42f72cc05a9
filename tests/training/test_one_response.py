"""Records of one response, and responses of several turns, from the file to the loss."""

from unittest.mock import Mock

import pytest
import torch

import train_dpo
import train_rm
from minidpo.data import Tokenizer, read_preferences, truncation
from minidpo.errors import UserError
from minidpo.logprobs import sequence_logps
from minidpo.model import load_model
from minidpo.textbook import pad
from record_files import record, write
from runs import run_dpo, run_rm, steps

SINGLE = [{"prompt": f"a cat {i}", "completion": " yes" * (1 + i % 3)} for i in range(20)]


@pytest.fixture
def single(config, tmp_path):
    """The arguments of a run on records of one response."""
    return config(data__train=f'["{write(tmp_path / "single.jsonl", *SINGLE)}"]', data__eval_pairs=4)


LABELLED = [row | {"label": True} for row in SINGLE]
LABELLED += [{"prompt": row["prompt"], "completion": " no and no", "label": False} for row in SINGLE]


@pytest.mark.parametrize(("loss", "records", "held_out"), [("sft", SINGLE, 4), ("kto", LABELLED, 0)])
def test_same_as_pairs(single, tmp_path, capsys, loss, records, held_out):
    """SFT trains on them, and KTO with labels, to the same numbers as on pairs of the same responses."""
    pairs, losses = [record(row["prompt"], chosen=row["completion"]) for row in SINGLE], []
    keys = [f"--loss.name={loss}", f"--data.eval_pairs={held_out}"]
    for lines in (pairs, records):
        capsys.readouterr()
        write(tmp_path / "single.jsonl", *lines)
        log = run_dpo(single, *keys, f"--run.out={tmp_path / str(len(losses))}")
        losses.append([row["loss"] for row in steps(log)])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert ("held out 4 responses by prompt" in capsys.readouterr().out) == (loss == "sft")


@pytest.mark.parametrize(
    ("script", "more", "label", "says"),
    [
        (train_dpo, ["--loss.name=dpo"], {}, 'loss dpo reads two responses; the loss for that is "sft"'),
        (train_dpo, ["--loss.name=kto"], {}, "kto reads responses with a label; .* give each record `label`"),
        (train_rm, [], {}, "loss reward model reads two responses; the loss for that is"),
        (train_dpo, ["--loss.name=sft"], {"label": 1}, "loss sft reads responses that are all desirable; "),
        (train_rm, [], {"label": 1}, "and a label, but the loss reward model reads two"),
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


# --- several turns -----------------------------------------------------------------------------------------


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


ASKED, AGAIN = turn("user", "a cat?"), turn("user", "and then?")
NO, WELL, SLEEPS = (turn("assistant", text) for text in ("no", "it runs well", "it sleeps"))
RECORDS = [
    {"prompt": [ASKED], "chosen": [WELL, AGAIN, SLEEPS], "rejected": [NO]},
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
