"""`python -m minidpo data` says what a run would say of its data, and writes what it would hold out."""

import gzip
import json

import pytest

import train_dpo
from minidpo.config import DPOConfig, load_config
from minidpo.data import load_pairs
from minidpo.errors import UserError
from minidpo.tools.data import main as data_command
from record_files import read, record, write


def test_files(world, tmp_path, capsys):
    """Given files, it reports them and writes nothing but the cache it is told to."""
    files = [str(world / "pairs.jsonl.gz"), str(write(tmp_path / "a.jsonl", record("cat"), record("dog")))]
    arguments = [*files, "--model", str(world / "model"), "--max-length", "40", "--max-prompt-length", "9"]
    before = sorted(tmp_path.rglob("*"))
    data_command(arguments)
    said = capsys.readouterr().out
    assert "tokenized 42 pairs, 42 kept" in said and sorted(tmp_path.rglob("*")) == before
    for _ in range(2):
        data_command([*arguments, "--cache", str(tmp_path / "tokens")])
    assert capsys.readouterr().out.replace(said, "").startswith("token ids: mapped from ")


def test_of_a_run(config, capsys):
    """Given a run's configuration, it says what the run says."""
    arguments = [*config(optim__max_steps=1), "--data.max_length=40", "--data.max_prompt_length=9"]
    train_dpo.main(arguments)
    said = capsys.readouterr().out
    data_command(arguments)
    report, _, pair = capsys.readouterr().out.partition("the first pair, records [")
    assert "(max_length 40, max_prompt_length 9)" in report and report in said and "rejected, " in pair


def test_every_file(world, tmp_path, capsys):
    """It shows the first pair of each file as it was cut, with special tokens, or its one response."""
    long = record("dog", chosen=" yes\n", rejected=" no" + " and" * 20)
    files = [str(write(tmp_path / f"{i}.jsonl", it, long)) for i, it in enumerate([record("cat"), long])]
    data_command([*files, "--model", str(world / "model"), "--max-length", "9"])
    lines = capsys.readouterr().out.splitlines()
    shown = [line.partition(" tokens: ")[2] for line in lines if " tokens: " in line]
    assert shown[::3] == ["'<s>cat'", "'<s>dog'"]
    assert shown[4:] == [r"' yes\n</s>'", "' no and and and and and'"]
    data_command([str(write(tmp_path / "a.jsonl", SINGLE)), "--model", str(world / "model")])
    out = capsys.readouterr().out
    assert "tokenized 1 responses, 1 kept" in out and "the first response, records [0]" in out
    assert out.endswith(" tokens: ' yes</s>'\n")


def said(**turns: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in turns.items()]


SINGLE = {"prompt": "cat", "completion": " yes"}
HH = {"chosen": "\n\nHuman: cat?\n\nAssistant: yes", "rejected": "\n\nHuman: cat?\n\nAssistant: no"}
MINE = {"q": "cat", "good": "yes", "bad": "no", "by": 3}
COLUMNS = "--column prompt=q --column chosen=good --column rejected=bad --column margin=by"
BESIDE = {"system": "Be brief.", "tools": [{"name": "f"}]}
IN_MESSAGES = {"prompt": said(system="Be brief.", user="cat"), "chosen": said(assistant="yes")}
IN_MESSAGES |= {"rejected": said(assistant="no"), "margin": 3.0, "tools": [{"name": "f"}]}
RANKED = {"prompt": "cat", "answers": [{"answer": text, "rank": rank} for rank, text in enumerate("abc", 1)]}
BEST_WORST = record("cat", chosen="a", rejected="c", margin=2.0)


@pytest.mark.parametrize(
    ("written", "options", "expected"),
    [
        (record("cat", id=3), "--skip-bad --limit 1", [record("cat")]),
        (HH, "", [{"prompt": "\n\nHuman: cat?\n\nAssistant:", "chosen": " yes", "rejected": " no"}]),
        (SINGLE, "", [SINGLE]),
        (SINGLE | {"label": "false"}, "", [SINGLE | {"label": False}]),
        (MINE, COLUMNS, [record("cat", chosen="yes", rejected="no", margin=3.0)]),
        (MINE | BESIDE, f"{COLUMNS} --text template --template chatml", [IN_MESSAGES]),
        (RANKED, "--pairs-per-prompt all --min-margin 2", [BEST_WORST]),
    ],
)
def test_out(world, tmp_path, written, options, expected):
    """--out writes the usable pairs as prompt, chosen and rejected, and reads what it wrote as the same."""
    out, model = tmp_path / "out.jsonl", ["--model", str(world / "model")]
    arguments = [str(write(tmp_path / "a.jsonl", written)), *model, *options.split()]
    data_command([*arguments, "--out", str(out)])
    assert read(out) == expected
    template = ["--template", "chatml"] if "chatml" in options else []
    data_command([str(out), *model, *template, "--out", str(tmp_path / "again.jsonl")])
    assert read(tmp_path / "again.jsonl") == expected


def test_held_out(config, world, tokenizer, tmp_path):
    """--held-out writes the records that a run holds out, as they stand in their files."""
    records = [json.loads(line) for line in gzip.open(world / "pairs.jsonl.gz", "rt")]
    noted = [record | {"note": i} for i, record in enumerate(records[::-1])]
    files = f'["{world / "pairs.jsonl.gz"}", "{write(tmp_path / "other.jsonl", *noted)}"]'
    arguments = config(data__train=files, data__eval_pairs=16)
    data_command([*arguments, "--held-out", str(tmp_path / "held_out.jsonl")])
    settings = load_config(DPOConfig, arguments)
    _, held_out = load_pairs(settings.data, tokenizer, settings.run.seed)
    expected = [(records, noted)[f][i] for f, i in zip(held_out.file, held_out.index, strict=True)]
    assert read(tmp_path / "held_out.jsonl") == expected
    assert len(expected) == 16 and len(set(held_out.file)) == 2


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--held-out={tmp}/nowhere/a.jsonl", "--held-out .*: a file in a directory that exists is needed"),
        ("--held-out={tmp}/./texts.jsonl", "--held-out .*texts.jsonl: is read here"),
        ("--held-out={tmp}/a.jsonl", "--held-out: records of two shapes; train on what --out writes"),
        ("--loss.margn=1", r"no key loss.margn; \[loss\] .*has lm_weight"),  # a reward model's configuration
        ("--data.max_length=4000", "texts of up to 4000 tokens .*, but the model takes"),
    ],
)
def test_refused(config, world, tmp_path, option, says):
    """No file of the data is overwritten, and what a run would refuse is refused."""
    answers = {"chosen": " yes", "rejected": " no"}
    texts = write(tmp_path / "texts.jsonl", *(answers | {"question": f"a dog {i}"} for i in range(30)))
    files = f'["{world / "pairs.jsonl.gz"}", "{texts}"]'
    arguments = config(data__train=files, data__eval_pairs=20, loss__lm_weight=0.5)
    before = texts.read_bytes()
    with pytest.raises(UserError, match=says):
        data_command([*arguments, option.format(tmp=tmp_path)])
    assert texts.read_bytes() == before and not (tmp_path / "a.jsonl").exists()
