"""Token ids kept between starts: the cache gives what tokenizing gives, report included, or nothing."""

import datetime
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from chat_model import DATED, RECORD, chat_model
from tokenizers.normalizers import Lowercase

import train_dpo
from minidpo.data import PairTokens, Tokenizer, chat_template, dataset, load_pairs
from minidpo.errors import UserError
from minidpo.model import save_model
from minidpo.sections import DataSection
from minidpo.tools.data import main as data_command
from minidpo.tools.explain import main as explain
from minidpo.tools.sample import main as sample
from minidpo.tools.score import main as score
from record_files import record, write
from tiny import tiny_model


@pytest.fixture
def files(world, tmp_path) -> list[str]:
    """Two files, one of them with margins."""
    second = write(tmp_path / "second.jsonl", *(record(f"cat {i}", margin=i) for i in range(5)))
    return [str(world / "pairs.jsonl.gz"), str(second)]


def load(tokenizer: Tokenizer, where: Path | None, files: list[str], **settings: object) -> PairTokens:
    data = DataSection(train=files, eval_pairs=0, **{"max_length": 40, "max_prompt_length": 9} | settings)
    return load_pairs(data, tokenizer, 0, where)[0]


def equal(left: PairTokens, right: PairTokens) -> bool:
    ours, theirs = ({"ids": pairs.ids, **pairs.columns()} for pairs in (left, right))
    same = [np.array_equal(ours[name], theirs[name], equal_nan=name == "margin") for name in ours]
    return left.files == right.files and ours.keys() == theirs.keys() and all(same)


def test_second_start(tokenizer, files, tmp_path, monkeypatch, capsys):
    """A second start maps what the first one made, and says the same."""
    plain = load(tokenizer, None, files)
    said = capsys.readouterr().out
    first = load(tokenizer, tmp_path / "deep" / "tokens", files)
    assert capsys.readouterr().out == said and "45 pairs, 45 kept" in said
    monkeypatch.setattr(dataset, "tokenize_pairs", None)  # Whoever tokenizes now fails.
    second = load(tokenizer, tmp_path / "deep" / "tokens", files)
    mapped, _, again = capsys.readouterr().out.partition("\n")
    assert mapped.startswith("token ids: mapped from") and again == said
    assert equal(first, second) and equal(second, plain) and isinstance(second.ids.base, np.memmap)


def test_other_pairs(tokenizer, world, files, tmp_path, capsys):
    """Pairs of other files, settings, tokenizers and templates are never taken for these."""
    load(tokenizer, tmp_path / "tokens", files)
    for settings in ({"skip_bad": True}, {"template": "hh"}, {"max_length": 41}, {"max_prompt_length": 8}):
        load(tokenizer, tmp_path / "tokens", files, **settings)
    for settings in ({"text": "raw"}, {"columns": {"tools": ""}}, {"pairs_per_prompt": "all"}, {"limit": 44}):
        load(tokenizer, tmp_path / "tokens", files, **settings)
    load(tokenizer, tmp_path / "tokens", files[1:])
    assert len(load(tokenizer, tmp_path / "tokens", files[1:], min_margin=2.0)) == 3
    load(tokenizer, tmp_path / "tokens", files[::-1])
    other = Tokenizer.from_pretrained(world / "model")
    other._core.normalizer = Lowercase()
    load(other, tmp_path / "tokens", files)
    write(Path(files[1]), *(record(f"dog {i}") for i in range(5)))
    assert equal(load(tokenizer, tmp_path / "tokens", files), load(tokenizer, None, files))
    assert "mapped from" not in capsys.readouterr().out
    load(tokenizer, None, files, cache=str(tmp_path / "tokens"))  # as data.cache
    assert "mapped from" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["ids.npy", "columns.safetensors"])
@pytest.mark.parametrize("torn", ["empty", "cut", "other", "gone"])
def test_torn(tokenizer, files, tmp_path, capsys, name, torn):
    """A torn cache is made anew."""
    whole = load(tokenizer, tmp_path / "tokens", files)
    (file,) = tmp_path.glob(f"tokens/train-*/{name}")
    content = file.read_bytes()
    file.unlink()  # A file that is mapped must stay as it is.
    if torn != "gone":
        file.write_bytes({"empty": b"", "cut": content[:-99], "other": content[:-1] + b"\1"}[torn])
    for mapped in (False, True):
        assert equal(load(tokenizer, tmp_path / "tokens", files), whole)
        assert ("mapped from" in capsys.readouterr().out) == mapped


def test_nothing_left(tokenizer, files, tmp_path, monkeypatch):
    """Pairs that the caller refuses, or a start that is interrupted, leave nothing behind."""
    refuse = Mock(side_effect=UserError("unfit"))
    data = DataSection(train=files, eval_pairs=5, max_length=40, max_prompt_length=9)
    with pytest.raises(UserError, match="unfit"):
        load_pairs(data, tokenizer, 0, tmp_path / "tokens", refuse)
    assert list(map(len, refuse.call_args.args)) == [40, 5]
    monkeypatch.setattr(dataset, "write_arrays", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        load(tokenizer, tmp_path / "tokens", files)
    assert not [*tmp_path.glob("tokens/*")]
    (tmp_path / "file").write_text("where a directory should be")
    with pytest.raises(UserError, match=r"file/train-\w+: cannot be written"):
        load(tokenizer, tmp_path / "file", files)


def test_date(tmp_path, capsys):
    """Ids with a date are kept apart from those of other days, and tell it when they are mapped. A text that
    the template did not write has none."""
    tokenizer, files = chat_model(tmp_path, DATED), [str(write(tmp_path / "a.jsonl", RECORD))]
    for date, written in (("2024-02-29", "29 Feb"), ("2024-02-29", "29 Feb"), ("2024-03-01", "01 Mar")):
        pairs = load(tokenizer, tmp_path / "tokens", files, date=date, max_prompt_length=40)
        assert tokenizer.decode(pairs.ids.tolist()).startswith(written) and pairs.date == date
    text = str(write(tmp_path / "b.jsonl", record("cat")))
    assert load(tokenizer, None, [text], date="2024-03-01", max_prompt_length=40).date == ""
    load(tokenizer, tmp_path / "tokens", files, date="2024-03-01", template="hh")
    said = capsys.readouterr().out
    assert said.count("the chat template writes the date, here 2024-02-29") == 2
    assert said.count("the chat template writes the date, here 2024-03-01") == 1
    assert said.count("mapped from") == 1
    assert len([*(tmp_path / "tokens").iterdir()]) == 3


def test_run(config, tmp_path, monkeypatch, capsys):
    """A run keeps its ids beside itself, and the date of its first day when it is resumed on another."""
    chat_model(tmp_path / "dated", DATED)
    save_model(tiny_model(vocab_size=400), tmp_path / "dated")
    keys = {"data__eval_pairs": 0, "optim__epochs": 2, "optim__schedule": '"constant"'}
    data = write(tmp_path / "a.jsonl", *[RECORD] * 4)
    run = [*config(**keys), f"--model.path={tmp_path / 'dated'}", f"--data.train={data}"]

    monkeypatch.setattr(chat_template, "date", Mock(today=lambda: datetime.date(2024, 2, 29)))
    train_dpo.main([*run, "--optim.max_steps=1"])
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "out" / "tokens")
    train_dpo.main(run)
    said = capsys.readouterr().out
    assert "resuming from" in said and said.count("writes the date, here 2024-02-29") == 2
    commands = {score: ["--out", f"{tmp_path / 'o'}"], explain: ["--index", "0"], sample: []}
    for command, options in commands.items():
        for model in (tmp_path / "out" / "final", *(tmp_path / "out" / "checkpoints").iterdir()):
            command(["--model", f"{model}", "--data", f"{data}", *options])
            assert capsys.readouterr().out.count("writes the date, here 2024-02-29") == 1
    data_command([*run, "--data.date=2024-02-29", "--out", f"{tmp_path / 'o'}"])
    said = capsys.readouterr().out
    assert said.count("writes the date, here 2024-02-29") == said.count("writes the date") == 2
    with pytest.raises(UserError, match="made with data.date = '2024-02-29', now it is '2024-03-01'"):
        train_dpo.main([*run, "--data.date=2024-03-01"])
    with pytest.raises(UserError, match="data.date = .*; it must be a date as 2026-11-26, or empty"):
        train_dpo.main([*run, "--data.date=tomorrow"])


def test_turns_and_labels(tokenizer, tmp_path):
    """Labels, and which tokens are scored, are kept with the ids."""
    asked, said = RECORD["prompt"], RECORD["chosen"]
    turns = {"prompt": asked, "completion": [*said, *asked, *said]}
    files = [str(write(tmp_path / "a.jsonl", *(turns | {"label": i < 2} for i in range(3))))]
    settings = {"template": "chatml", "max_length": 400}
    first, second = (load(tokenizer, tmp_path / "tokens", files, **settings) for _ in range(2))
    assert isinstance(second.ids.base, np.memmap) and equal(first, second)
    assert second.unscored.sum() > 0 and np.array_equal(first.unscored, second.unscored)
    assert second.label.tolist() == [True, True, False] and second.responses == 1
