"""Runs on data or models that cannot be used end with exit status 2 and one line on stderr, nothing written."""

import gzip
import json

import pytest

import train_dpo
from minidpo.errors import exit_on_user_error
from minidpo.model import save_model
from record_files import GOOD, write
from tiny import tiny_model, write_tokenizer


@pytest.fixture
def refused(config, tmp_path, capsys):
    """Runs train_dpo with overrides and returns the one line it ends with; nothing may be written."""

    def run(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            exit_on_user_error(lambda _: train_dpo.main([*arguments, *overrides]))
        *progress, said = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and all(line.startswith("tokenizing eval") for line in progress)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return said.removeprefix("error: ")

    arguments = config()
    return run


def test_bad_data_stops_a_run_with_file_and_line_before_anything_is_written(refused, tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, "{")
    assert refused(f"--data.train={path}").startswith(f"{path}:2: not JSON")
    assert refused(f"--data.eval={path}").startswith(f"{path}:2: not JSON")
    good = f"--data.eval={write(tmp_path / 'b.jsonl', GOOD)}"
    assert refused(good, f"--data.train={path}").startswith(f"{path}:2: not JSON")
    assert refused(f"--data.train={tmp_path}").startswith(f"{tmp_path}: Is a directory")
    assert "No such file" in refused(f"--data.train={tmp_path / 'missing.jsonl'}")


def test_a_run_in_which_no_pair_is_left_is_refused(refused, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "chosen": " yes yes", "rejected": " yes no"})
    said = refused(f"--data.train={path}", "--data.max_length=2", "--data.max_prompt_length=1")
    assert said.startswith("no pair is left to use with max_length = 2 (dropped 1: responses identical")


def test_skip_bad_lets_the_run_go_on(config, tmp_path, capsys, world):
    lines = gzip.open(world / "pairs.jsonl.gz").read().splitlines()
    path = write(tmp_path / "a.jsonl", lines[0], b"{", *lines[1:])
    train_dpo.main([*config(), f"--data.train={path}", "--data.skip_bad=true", "--optim.max_steps=1"])
    assert "dropped 1: not JSON in UTF-8 (line 2)" in capsys.readouterr().out


def test_a_tokenizer_without_eos_is_refused(refused, tmp_path, world):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (model / name).write_bytes((world / "model" / name).read_bytes())
    content = json.loads((model / "config.json").read_text()) | {"eos_token_id": None}
    (model / "config.json").write_text(json.dumps(content))
    assert refused(f"--model.path={model}").endswith("no eos_token; name the token that ends a text")


def test_a_vocabulary_larger_than_the_embedding_is_refused(refused, tmp_path):
    write_tokenizer(tmp_path / "small", ["a b c"])
    save_model(tiny_model(vocab_size=61), tmp_path / "small")
    assert "the model's embedding 61 rows" in refused(f"--model.path={tmp_path / 'small'}")


def test_a_reward_model_that_is_none_is_refused_before_anything_is_read(refused, world, tmp_path):
    said = refused("--eval.samples=2", f"--eval.reward_model={world / 'model'}", "--data.train=missing.jsonl")
    assert said.startswith(f"{world / 'model'}: no score.weight among its tensors")
    assert "no such" in refused("--eval.samples=2", f"--eval.reward_model={tmp_path / 'nowhere'}").lower()


def test_the_directory_of_a_run_is_refused_with_the_model_in_it(refused, world, tmp_path):
    (tmp_path / "run" / "final").mkdir(parents=True)
    save_model(tiny_model(), tmp_path / "run" / "final")
    assert refused(f"--model.path={tmp_path / 'run'}").endswith(f"; {tmp_path / 'run' / 'final'} is one")
