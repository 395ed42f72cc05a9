"""From files to the pairs of a run: the cache gives what tokenizing gives, and no prompt is on both sides."""

import gzip
import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import train_dpo
import train_rm
from minidpo import dataset, token_store
from minidpo.commands.data import main as data_command
from minidpo.dataset import load_pairs, prompt_keys, require_margins, tokenized
from minidpo.errors import UserError
from minidpo.hf_config import read_config
from minidpo.reference import pairs_fingerprint
from minidpo.sections import DataSection, OptimSection
from minidpo.token_store import PairTokens
from minidpo.tokenizer import Tokenizer, TokenPair


def write(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def record(prompt: str, **more: object) -> dict:
    return {"prompt": prompt, "chosen": " yes", "rejected": " no and no", **more}


@pytest.fixture
def tokenizer(world) -> Tokenizer:
    return Tokenizer.from_directory(world / "model")


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


# The cache


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


# Train and eval


def sides(tokenizer: Tokenizer, world: Path, seed: int = 0, **settings: object):
    section = DataSection(max_length=40, max_prompt_length=20, **settings)
    return load_pairs(section, OptimSection(), tokenizer, read_config(world / "model"), seed)


def test_no_prompt_is_both_trained_on_and_evaluated_on_and_the_seed_decides(tokenizer, world, tmp_path):
    file = write(tmp_path / "a.jsonl", *(record(f"cat {i % 12}") for i in range(30)))
    train, held_out = sides(tokenizer, world, train=[str(file)], eval_pairs=7)
    assert len(held_out) == 7 and len(train) == 23
    assert not {*prompt_keys(train)} & {*prompt_keys(held_out)}
    again = sides(tokenizer, world, train=[str(file)], eval_pairs=7)[1]
    other = sides(tokenizer, world, seed=1, train=[str(file)], eval_pairs=7)[1]
    assert held_out.index.tolist() == again.index.tolist() != other.index.tolist()


def test_prompts_that_are_in_both_given_files_are_reported(tokenizer, world, tmp_path, capsys):
    train = write(tmp_path / "a.jsonl", *(record(f"cat {i}") for i in range(9)))
    held_out = write(tmp_path / "b.jsonl", *(record(f"cat {i}") for i in range(7, 12)))
    sides(tokenizer, world, train=[str(train)], eval=[str(held_out)])
    assert "warning: 2 prompts are in both data.train and data.eval" in capsys.readouterr().out


# Records by name, and their margins


def test_records_are_named_with_their_file():
    pairs = [TokenPair([1], [2], [3], index, file=file) for file, index in ((0, 4), (1, 4), (0, 7))]
    rows = np.array([0, 1, 2])
    assert PairTokens.from_pairs(pairs, ("a", "b")).records(rows) == "records [4, 7] of a, records [4] of b"
    assert PairTokens.from_pairs(pairs).records(rows[1:]) == "records [4, 7]"


def test_margins_go_with_their_pairs_and_missing_ones_are_named():
    pairs = [TokenPair([1], [2], [3], index, margin) for index, margin in enumerate((0.5, None, 2.0))]
    tokens = PairTokens.from_pairs(pairs, ("a.jsonl",))
    assert tokens.select(np.array([2, 0])).margin.tolist() == [2.0, 0.5]
    with pytest.raises(UserError, match=r"1 of 3 pairs have no margin \(records \[1\] of a.jsonl\)"):
        require_margins(tokens)
    require_margins(tokens.select(np.array([2, 0])))
    assert PairTokens.from_pairs(pairs[1:2]).margin is None


def test_the_fingerprint_of_pairs_is_that_of_their_tokens_margins_and_order():
    def of(*pairs: TokenPair, rows: tuple[int, ...] = (0, 1)) -> str:
        return pairs_fingerprint(PairTokens.from_pairs(pairs).select(np.array(rows)))

    a, b = TokenPair([1], [2], [3], 0), TokenPair([4], [5, 6], [7], 1)
    different = [
        of(a, b),
        of(b, a),
        of(a, b._replace(chosen=[6, 5])),
        of(a, b._replace(chosen=[5], rejected=[6, 7])),
    ]
    different += [of(a, b._replace(margin=1.0)), of(a, b, rows=(1, 0, 1))]
    assert len(set(different)) == len(different)
    assert of(a, b) == of(b, a, rows=(1, 0)), "where in the flat array they lie is nothing to it"


def test_the_reward_model_adds_each_records_margin_to_the_common_one_when_asked(config, world, tmp_path):
    lines = gzip.open(world / "pairs.jsonl.gz", "rt").read().splitlines()
    scored = [json.loads(line) | {"score_chosen": i % 3, "score_rejected": 1} for i, line in enumerate(lines)]
    file = write(tmp_path / "scored.jsonl", *scored)

    def first_loss(name: str, *overrides: str) -> float:
        base = [*config(), f"--data.train={file}", "--loss.lm_weight=0", "--optim.max_steps=1"]
        train_rm.main([*base, f"--run.out={tmp_path / name}", *overrides])
        return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["eval/loss"]

    plain, asked = first_loss("plain"), first_loss("asked", "--loss.margin_from_data=true")
    assert asked != pytest.approx(plain, rel=1e-3)
    one_by_one = first_loss("one", "--loss.margin_from_data=true", "--optim.micro_tokens=100")
    assert one_by_one == pytest.approx(asked, rel=1e-5), "each pair has its own margin, whatever its row"
    same = [row | {"margin": 0.75} for row in scored]
    write(file, *same)
    both = first_loss("both", "--loss.margin_from_data=true", "--loss.margin=0.5")
    assert both == pytest.approx(first_loss("constant", "--loss.margin=1.25"), rel=1e-6)
    with pytest.raises(UserError, match="loss.margin_from_data: 32 of 32 pairs have no margin"):
        train_rm.main([*config(), "--loss.margin_from_data=true"])


# The report alone


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


def test_the_data_command_skips_and_counts_what_cannot_be_read_when_asked(world, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", record("cat"), {"prompt": "dog"})
    with pytest.raises(UserError, match="a.jsonl:2: no key 'chosen'"):
        data_command([str(path), "--model", str(world / "model")])
    data_command([str(path), "--model", str(world / "model"), "--skip-bad"])
    assert "dropped 1: no key 'chosen' (line 2)" in capsys.readouterr().out
