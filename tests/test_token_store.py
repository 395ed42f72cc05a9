"""Token ids kept between starts: the cache gives what tokenizing gives, whole or not at all, and the report too."""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import train_dpo
from minidpo import dataset, token_store
from minidpo.commands.data import main as data_command
from minidpo.config import load_config
from minidpo.dataset import load_pairs, tokenized
from minidpo.errors import UserError
from minidpo.hf_config import read_config
from minidpo.sections import DataSection, PreferenceConfig
from minidpo.token_store import PairTokens
from minidpo.tokenizer import Tokenizer, TokenPair
from record_files import record, write


@pytest.fixture
def files(world, tmp_path) -> list[str]:
    """Two files, one of them with margins."""
    second = write(tmp_path / "second.jsonl", *(record(f"cat {i}", margin=i) for i in range(5)))
    return [str(world / "pairs.jsonl.gz"), str(second)]


@pytest.fixture
def load(files, tokenizer, tmp_path):
    """Tokenizes `files` with a cache; returns the pairs and whether they came from it."""

    def load(tokenizer: Tokenizer = tokenizer, files: list[str] = files, **settings: object):
        read = []
        say = token_store.say
        token_store.say = read.append
        try:
            section = DataSection(max_length=40, max_prompt_length=9, **settings)
            with tokenized("train", files, section, tokenizer, tmp_path / "deep" / "tokens") as pairs:
                pass
        finally:
            token_store.say = say
        return pairs, any("mapped from" in line for line in read)

    return load


def equal(left: PairTokens, right: PairTokens) -> bool:
    names = ("ids", "bounds", "index", "margin", "file")
    return left.files == right.files and all(
        np.array_equal(getattr(left, name), getattr(right, name), equal_nan=name == "margin")
        and getattr(left, name).dtype == getattr(right, name).dtype
        for name in names
    )


def test_a_second_start_reads_what_the_first_one_made_and_says_the_same(
    load, files, tokenizer, capsys, monkeypatch
):
    monkeypatch.setattr(token_store, "_BUFFER", 50)  # so that the ids go to the file in many pieces
    first, was_read = load()
    said = capsys.readouterr().out
    monkeypatch.setattr(dataset, "stream_pairs", None)  # whoever tokenizes now fails
    second, is_read = load()
    assert (was_read, is_read) == (False, True)
    assert said == capsys.readouterr().out and "45 pairs, 45 kept" in said
    monkeypatch.undo()
    with tokenized("train", files, DataSection(max_length=40, max_prompt_length=9), tokenizer) as plain:
        pass
    assert equal(first, second) and equal(second, plain) and len(plain) == 45
    assert isinstance(second.ids.base, np.memmap) and not isinstance(plain.ids.base, np.memmap)


def test_other_files_settings_tokenizers_and_templates_are_never_taken_for_these(load, files, world):
    load()
    assert not load(skip_bad=True)[1] and not load(template="hh")[1] and not load(files=files[::-1])[1]
    other = Tokenizer.from_directory(world / "model")
    other.eos_id = 1
    assert not load(other)[1]
    assert load()[1]
    with open(files[1], "a") as file:
        file.write(json.dumps(record("dog")) + "\n")
    pairs, was_read = load()
    assert not was_read and len(pairs) == 46


@pytest.mark.parametrize("name", ["ids.bin", "bounds.npy", "margin.npy", "meta.json"])
@pytest.mark.parametrize("keep", [0.0, 0.9, None], ids=["empty", "cut", "gone"])
def test_a_torn_cache_is_made_anew(load, tmp_path, name, keep):
    whole, _ = load()
    (file,) = tmp_path.glob(f"deep/tokens/train-*/{name}")
    content = file.read_bytes()
    file.unlink()  # the mapped file itself must stay as it is
    if keep is not None:
        file.write_bytes(content[: int(len(content) * keep)])
    again, was_read = load()
    assert not was_read and equal(whole, again)
    assert load()[1]


def test_a_start_that_is_interrupted_leaves_nothing_behind(load, tmp_path, monkeypatch):
    def interrupted(*arguments):
        yield TokenPair([1], [2], [3], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset, "stream_pairs", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load()
    assert not (tmp_path / "deep").exists()


def test_a_cache_that_cannot_be_written_is_one_line(load, tmp_path):
    (tmp_path / "deep").write_text("a file where a directory should be")
    with pytest.raises(UserError, match="token ids cannot be written"):
        load()


def test_of_two_processes_that_make_the_same_cache_the_later_takes_what_is_there(load, monkeypatch):
    @contextmanager
    def too_late(place: Path):
        monkeypatch.undo()
        load()
        (place.parent / "spare").mkdir()
        yield place.parent / "spare"
        raise OSError("Directory not empty")

    monkeypatch.setattr(token_store, "replacing_directory", too_late)
    late, _ = load()
    assert equal(late, load()[0])


def test_a_run_keeps_its_ids_beside_itself_or_where_it_is_told(config, tmp_path, capsys):
    arguments = [*config(), "--optim.max_steps=1"]
    train_dpo.main(arguments)
    assert [path.parent for path in tmp_path.rglob("ids.bin")] == [*tmp_path.glob("out/tokens/train-*")]
    train_dpo.main([*arguments, f"--data.cache={tmp_path / 'shared'}", f"--run.out={tmp_path / 'a'}"])
    capsys.readouterr()
    train_dpo.main([*arguments, f"--data.cache={tmp_path / 'shared'}", f"--run.out={tmp_path / 'b'}"])
    assert f"token ids: mapped from {tmp_path / 'shared'}" in capsys.readouterr().out
    assert not (tmp_path / "b" / "tokens").exists()


def test_the_data_command_says_what_a_run_says_and_writes_nothing(world, files, tmp_path, capsys, load):
    load()
    said = capsys.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    arguments = [*files, "--model", str(world / "model"), "--max-length", "40", "--max-prompt-length", "9"]
    data_command(arguments)
    assert capsys.readouterr().out == said
    assert sorted(tmp_path.rglob("*")) == before
    data_command([*arguments, "--cache", str(tmp_path / "deep" / "tokens")])
    assert capsys.readouterr().out.partition("\n")[2] == said  # after the line that says where it was read


def test_the_data_command_takes_a_runs_configuration_and_says_what_the_run_says(config, capsys):
    arguments = [*config(optim__max_steps=1), "--data.max_length=40", "--data.max_prompt_length=9"]
    train_dpo.main(arguments)
    said = capsys.readouterr().out
    data_command(arguments)
    report = capsys.readouterr().out
    assert "(max_length 40, max_prompt_length 9)" in report and report in said


def test_the_data_command_takes_a_reward_models_configuration_too(config, world):
    arguments = config(loss__lm_weight=0.5, data__max_length=40, data__max_prompt_length=9)
    data_command(arguments)
    with pytest.raises(UserError, match=r"no key loss.margn; \[loss\] has lm_weight"):
        data_command([*arguments, "--loss.margn=1"])
    with pytest.raises(UserError, match="texts of up to 4000 tokens .*, but the model takes"):
        data_command([*arguments, "--data.max_length=4000"])


def test_the_data_command_writes_the_records_that_a_run_holds_out(config, world, tokenizer, tmp_path):
    records = [json.loads(line) for line in gzip.open(world / "pairs.jsonl.gz", "rt")]
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join(json.dumps(record | {"note": i}) for i, record in enumerate(records[::-1])))
    out = tmp_path / "held_out.jsonl"
    arguments = config(data__train=f'["{world / "pairs.jsonl.gz"}", "{other}"]', data__eval_pairs=16)
    data_command([*arguments, "--held-out", str(out)])
    settings = load_config(PreferenceConfig, arguments)
    model = read_config(world / "model")
    _, held_out = load_pairs(settings.data, settings.optim, tokenizer, model, settings.run.seed)
    sources = [records, [record | {"note": i} for i, record in enumerate(records[::-1])]]
    expected = [sources[f][i] for f, i in zip(held_out.file, held_out.index, strict=True)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len(expected) == 16 and len(set(held_out.file)) == 2
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"--held-out .*: a file in a directory that exists is needed"):
        data_command([*arguments, f"--held-out={tmp_path}/nowhere/a.jsonl"])
    with pytest.raises(UserError, match=r"--held-out .*other.jsonl: is a file of the data"):
        data_command([*arguments, f"--held-out={tmp_path}/./other.jsonl"])
    assert other.read_bytes() == before


def test_records_of_two_shapes_are_not_written_to_one_file(config, world, tmp_path):
    texts = write(tmp_path / "texts.jsonl", *(record(f"a dog {i}") for i in range(30)))
    out = tmp_path / "held_out.jsonl"
    arguments = config(data__train=f'["{world / "pairs.jsonl.gz"}", "{texts}"]', data__eval_pairs=20)
    with pytest.raises(
        UserError, match="records of HH dialogues .* and prompt, chosen, rejected; a file keeps"
    ):
        data_command([*arguments, f"--held-out={out}"])
    assert not out.exists()


def test_the_data_command_skips_and_counts_what_cannot_be_read_when_asked(world, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", record("cat"), {"prompt": "dog"})
    with pytest.raises(UserError, match="a.jsonl:2: no key 'chosen'"):
        data_command([str(path), "--model", str(world / "model")])
    data_command([str(path), "--model", str(world / "model"), "--skip-bad"])
    assert "dropped 1: no key 'chosen' (line 2)" in capsys.readouterr().out
