"""Token ids kept between starts: the cache gives what tokenizing gives, report included, or nothing."""

import json

import numpy as np
import pytest

import train_dpo
from minidpo.data import PairTokens, Tokenizer, TokenPair, dataset, load_pairs
from minidpo.errors import UserError
from minidpo.sections import DataSection
from record_files import record, write


@pytest.fixture
def files(world, tmp_path) -> list[str]:
    """Two files, one of them with margins."""
    second = write(tmp_path / "second.jsonl", *(record(f"cat {i}", margin=i) for i in range(5)))
    return [str(world / "pairs.jsonl.gz"), str(second)]


@pytest.fixture
def load(files, tokenizer, tmp_path, capsys):
    """Tokenizes `files` with a cache; returns the pairs, whether they came from it, and the report."""

    def load(
        tokenizer: Tokenizer = tokenizer, files: list[str] = files, cache: str = "deep/tokens", **settings
    ) -> tuple[PairTokens, bool, list[str]]:
        section = DataSection(train=files, eval_pairs=0, max_length=40, max_prompt_length=9, **settings)
        capsys.readouterr()
        pairs, _ = load_pairs(section, tokenizer, 0, tmp_path / cache if cache else None)
        lines = capsys.readouterr().out.splitlines()
        report = [line for line in lines if not line.startswith("token ids: ")]
        return pairs, any("token ids: mapped from" in line for line in lines), report

    return load


def equal(left: PairTokens, right: PairTokens) -> bool:
    ours, theirs = ({"ids": pairs.ids, **pairs.columns()} for pairs in (left, right))
    return left.files == right.files and all(
        np.array_equal(ours[name], theirs[name], equal_nan=name == "margin")
        and ours[name].dtype == theirs[name].dtype
        for name in ours.keys() | theirs.keys()
    )


def test_second_start(load, monkeypatch):
    """A second start reads what the first one made, and says the same."""
    first, was_read, said = load()
    monkeypatch.setattr(dataset, "_tokenize", None)  # whoever tokenizes now fails
    second, is_read, said_again = load()
    assert (was_read, is_read) == (False, True)
    assert said == said_again and any("45 pairs, 45 kept" in line for line in said)
    monkeypatch.undo()
    plain, _, _ = load(cache="")
    assert equal(first, second) and equal(second, plain) and len(plain) == 45
    assert isinstance(second.ids.base, np.memmap)


def test_other_pairs(load, files, world):
    """Pairs of other files, settings, tokenizers and templates are never taken for these."""
    load()
    other = Tokenizer.from_pretrained(world / "model")
    other.eos_id = 1
    for change in ({"skip_bad": True}, {"template": "hh"}, {"files": files[::-1]}, {"tokenizer": other}):
        assert not load(**change)[1]
    assert load()[1]
    with open(files[1], "a") as file:
        file.write(json.dumps(record("dog")) + "\n")
    pairs, was_read, _ = load()
    assert not was_read and len(pairs) == 46


@pytest.mark.parametrize("name", ["ids.npy", "columns.safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.9, None], ids=["empty", "cut", "gone"])
def test_torn_cache(load, tmp_path, name, keep):
    """A torn cache is made anew."""
    whole, _, _ = load()
    (file,) = tmp_path.glob(f"deep/tokens/train-*/{name}")
    content = file.read_bytes()
    file.unlink()  # a file that is mapped must stay as it is
    if keep is not None:
        file.write_bytes(content[: int(len(content) * keep)])
    again, was_read, _ = load()
    assert not was_read and equal(whole, again)
    assert load()[1]


def test_interrupted_start(load, tmp_path, monkeypatch):
    """A start that is interrupted leaves nothing behind."""

    def interrupted(*arguments):
        yield TokenPair([1], [2], [3], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "tokenize_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not (tmp_path / "deep").exists()


def test_refused_pairs(files, tokenizer, tmp_path):
    """Pairs that the caller refuses leave nothing behind; the caller sees both sides of the split."""

    def refuse(train: PairTokens, held_out: PairTokens) -> None:
        raise UserError(f"{len(train)} and {len(held_out)}")

    section = DataSection(train=files, eval_pairs=5, max_length=40, max_prompt_length=9)
    with pytest.raises(UserError, match="40 and 5"):
        load_pairs(section, tokenizer, 0, tmp_path / "deep" / "tokens", refuse)
    assert not (tmp_path / "deep").exists()


def test_cache_that_cannot_be_written(load, tmp_path):
    """A cache that cannot be written is one line."""
    (tmp_path / "deep").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"deep/tokens/train-\w+: cannot be written"):
        load()


def test_cache_of_a_run(config, tmp_path, capsys):
    """A run keeps its ids beside itself, or where it is told."""
    arguments = [*config(), "--optim.max_steps=1"]
    train_dpo.main(arguments)
    assert [path.parent for path in tmp_path.rglob("ids.npy")] == [*tmp_path.glob("out/tokens/train-*")]
    train_dpo.main([*arguments, f"--data.cache={tmp_path / 'shared'}", f"--run.out={tmp_path / 'a'}"])
    capsys.readouterr()
    train_dpo.main([*arguments, f"--data.cache={tmp_path / 'shared'}", f"--run.out={tmp_path / 'b'}"])
    assert f"token ids: mapped from {tmp_path / 'shared'}" in capsys.readouterr().out
    assert not (tmp_path / "b" / "tokens").exists()
