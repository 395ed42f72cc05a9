"""From what a user names to data files: files, patterns and directories, and what is said of others."""

from pathlib import Path

import pytest

from minidpo.data import read_records
from minidpo.data.paths import data_files
from minidpo.errors import UserError
from record_files import GOOD, write


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


SHARDS = [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]  # as the package `datasets` saves a split
ABOUT = ["README.md", ".gitattributes", "dataset_info.json", "state.json", ".cache/a.jsonl", "LICENSE"]


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["b.JSONL", "a.jsonl", *ABOUT], ["a.jsonl", "b.JSONL"]),
        (["a.json"], ["a.json"]),
        (["harmless.csv.gz", "latest.csv.gz"], ["harmless.csv.gz", "latest.csv.gz"]),
        (["test.jsonl.zst"], ["test.jsonl.zst"]),
        (["0001.parquet", "0000.parquet"], ["0000.parquet", "0001.parquet"]),
        (["data/default/a.parquet", *ABOUT], ["data/default/a.parquet"]),
        ([*SHARDS[::-1], *ABOUT], SHARDS),
        (["a.jsonl", "old/b.jsonl"], ["a.jsonl"]),
    ],
)
def test_directory(tmp_path, names, files):
    """Of a directory its data files are read, by name; what is about the data is none of it."""
    assert data_files([make(tmp_path, *names)]) == [str(tmp_path / file) for file in files]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["a.jsonl", "b.parquet"], "name one of 'D/a.jsonl', 'D/b.parquet'"),
        (["train.jsonl", "test.jsonl"], "several splits or kinds of files; name one of 'D/test.jsonl', 'D/t"),
        (["a.jsonl", "a_EVAL.jsonl"], "several splits or kinds of files; name one of 'D/a.jsonl', 'D/a_EVAL"),
        (["a-00000-of-00001.arrow", "b-00000-of-00002.arrow"], "name one of 'D/a-*.arrow', 'D/b-*.arrow'"),
        (["train/a.arrow", "test/a.arrow"], "has its data in several directories; name one of 'D/test', 'D"),
        ([f"{i}/a.csv" for i in range(6)], "name one of 'D/0', 'D/1', 'D/2', 'D/3', 'D/4', ..."),
        (["README.md", "state.json", "a.txt"], "a directory without a data file; .jsonl, .json or .csv, pl"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter, where preferences are needed; n"),
        (["config.json", "tokenizer.json", "model.safetensors"], "a model, where preferences are needed; na"),
        (["config.toml", "metrics.jsonl"], "the directory of a run, where preferences are needed; name"),
    ],
)
def test_choice(tmp_path, names, said):
    """What only the user can choose is asked for, and what holds no data is called what it is."""
    with pytest.raises(UserError) as caught:
        data_files([make(tmp_path, *names)])
    assert said in str(caught.value).replace(str(tmp_path), "D")
    assert str(caught.value).startswith(str(tmp_path))


def test_pattern(tmp_path):
    """A pattern stands for the files that match, in the order of their names; names keep their order."""
    make(tmp_path, "train-1.jsonl", "train-0.jsonl", "test-0.jsonl", "d/x.csv", "a[1].jsonl")
    expected = ["test-0.jsonl", "train-0.jsonl", "train-1.jsonl", "d/x.csv", "a[1].jsonl"]
    named = ["test-0.jsonl", "train-*", "d", "a[1].jsonl"]
    assert data_files([tmp_path / name for name in named]) == [str(tmp_path / file) for file in expected]
    for name, why in (("eval-*", "No such file or directory"), ("a\0.jsonl", "embedded null byte")):
        with pytest.raises(UserError, match=f"{why}; name a file that can be read"):
            data_files([tmp_path / name])


def test_one_file(tmp_path):
    """A directory with one file may stand for it where records are counted through one file."""
    write(make(tmp_path, "README.md") / "a.jsonl", GOOD)
    assert [*read_records(tmp_path)] == [(1, GOOD)]
    make(tmp_path, "b.jsonl")
    with pytest.raises(UserError, match="stands for 2 files, and one is needed; name one of '.*/a.jsonl', '"):
        next(read_records(tmp_path))


def test_hub(tmp_path, monkeypatch):
    """A data set of the Hugging Face hub is refused with the command that downloads it."""
    monkeypatch.chdir(tmp_path)
    command = "hf download --repo-type dataset Anthropic/hh-rlhf --local-dir data/hh-rlhf"
    for begin in ("", "hf://datasets/", "https://huggingface.co/datasets/"):
        with pytest.raises(UserError, match=f"download it first: {command}$"):
            data_files([begin + "Anthropic/hh-rlhf"])
