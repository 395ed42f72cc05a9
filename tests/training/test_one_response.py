"""Records of one response: SFT trains on them; what compares two responses refuses them in one line."""

import pytest

import train_dpo
import train_rm
from minidpo.data import dataset, load_pairs
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import record, write
from runs import metrics, steps

SINGLE = [{"prompt": f"a cat {i}", "completion": " yes" * (1 + i % 3)} for i in range(20)]


@pytest.fixture
def single(config, tmp_path):
    """The arguments of a run on records of one response."""
    return config(data__train=f'["{write(tmp_path / "single.jsonl", *SINGLE)}"]', data__eval_pairs=4)


def test_sft(single, tmp_path):
    """SFT trains on them to the same numbers as on pairs with these responses for chosen."""
    train_dpo.main([*single, "--loss.name=sft"])
    pairs = write(tmp_path / "pairs.jsonl", *(record(r["prompt"], chosen=r["completion"]) for r in SINGLE))
    others = [f"--data.train={pairs}", f"--run.out={tmp_path / 'pairs'}"]
    train_dpo.main([*single, "--loss.name=sft", *others])
    losses = [[row["loss"] for row in steps(metrics(tmp_path / out))] for out in ("out", "pairs")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_arrays(tokenizer, tmp_path):
    """K is 1: a prompt and its response per record, with the label if there is one."""
    file = write(tmp_path / "a.jsonl", *(row | {"label": i % 2 == 0} for i, row in enumerate(SINGLE[:3])))
    pairs, _ = load_pairs(DataSection(train=[str(file)], eval_pairs=0), tokenizer, seed=0)
    assert (
        pairs.bounds.shape == (3, 3) and pairs.responses == 1 and pairs.label.tolist() == [True, False, True]
    )
    assert pairs.token_counts().tolist() == pairs.lengths.sum(axis=1).tolist()
    again, _ = load_pairs(
        DataSection(train=[str(file)], eval_pairs=0, cache=str(tmp_path)), tokenizer, seed=0
    )
    mapped, _ = load_pairs(
        DataSection(train=[str(file)], eval_pairs=0, cache=str(tmp_path)), tokenizer, seed=0
    )
    assert mapped.label.tolist() == again.label.tolist() and mapped.fingerprint() == pairs.fingerprint()
    unlabelled = write(tmp_path / "a.jsonl", *SINGLE[:3])
    pairs, _ = load_pairs(DataSection(train=[str(unlabelled)], eval_pairs=0), tokenizer, seed=0)
    assert pairs.label is None and pairs.fingerprint() != mapped.fingerprint()


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


def test_told_first(single, tmp_path, monkeypatch):
    """What a loss cannot read is told at the first record of each file, before any is tokenized."""
    pairs = write(tmp_path / "pairs.jsonl", *(record(f"a dog {i}") for i in range(9)))
    monkeypatch.setattr(dataset, "tokenize_pairs", None)  # Whoever tokenizes now fails.
    with pytest.raises(UserError, match="/single.jsonl: one response per record, but the loss dpo reads two"):
        train_dpo.main([*single, f'--data.train=["{pairs}", "{tmp_path / "single.jsonl"}"]'])


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


def test_mixed(single, tmp_path):
    """Files of one response and of two are not one data set."""
    pairs = write(tmp_path / "pairs.jsonl", record("a dog"))
    train = f'--data.train=["{tmp_path / "single.jsonl"}", "{pairs}"]'
    with pytest.raises(
        UserError, match="record 0 of .*pairs.jsonl has two responses, and those before it one"
    ):
        train_dpo.main([*single, "--loss.name=sft", train])
