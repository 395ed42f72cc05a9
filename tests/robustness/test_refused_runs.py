"""Runs on data or models that cannot be used end with exit status 2 and one line on stderr, nothing written."""

import shutil

import pytest

import train_dpo
from minidpo.errors import exit_on_user_error
from minidpo.model import save_model, save_reward_model
from record_files import GOOD, write
from tiny import edit_config, tiny_model, tiny_reward_model


@pytest.fixture
def refused(config, tmp_path, capsys):
    """Runs train_dpo with overrides and returns the one line it ends with; nothing may be written."""

    def run(*overrides: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as exit:
            exit_on_user_error(lambda _: train_dpo.main([*arguments, *overrides]))
        *progress, said = capsys.readouterr().err.splitlines()
        assert exit.value.code == 2 and all(line.startswith("tokenizing ") for line in progress)
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return said.removeprefix("error: ")

    arguments = config()
    return run


def test_data(refused, tmp_path):
    """Numbers must fit the model and the data. File and line are named, also where only the second is bad."""
    for override, says in (
        ("--data.max_length=512", "texts of up to 512 tokens (max_length), but the model takes 256"),
        ("--optim.micro_tokens=20", "--optim.micro_tokens = 20, but one pair has "),
        ("--data.eval_pairs=40", "data.eval_pairs = 40 of 40 records, held out by prompt, leave none to t"),
    ):
        assert refused(override).startswith(says)
    bad, good = write(tmp_path / "bad.jsonl", GOOD, "{"), write(tmp_path / "good.jsonl", GOOD)
    for key in ("train", "eval"):
        assert refused(f"--data.{key}={bad}").startswith(f"{bad}:2: not JSON")
    assert refused(f"--data.eval={good}", f"--data.train={bad}").startswith(f"{bad}:2: not JSON")
    assert refused(f"--data.train={tmp_path}").startswith(f"{bad}:2: not JSON")  # the first file in it


def test_models(refused, tmp_path, world):
    """Models that cannot be used, or are none, are refused before any data is read."""
    for name in ("mute", "small", "short", "rm", "run/final"):
        shutil.copytree(world / "model", tmp_path / name)
    edit_config(tmp_path / "mute", lambda fields: fields.update(eos_token_id=None))
    (tmp_path / "mute" / "tokenizer_config.json").unlink()
    save_model(tiny_model(vocab_size=61), tmp_path / "small")
    save_reward_model(tiny_reward_model(vocab_size=300), tmp_path / "rm")
    edit_config(tmp_path / "short", lambda fields: fields.update(max_position_embeddings=32))
    for override, says in (
        (f"model.path={tmp_path / 'mute'}", "no eos_token; name the token that ends a text"),
        (f"model.path={tmp_path / 'small'}", "the model's embedding 61 rows"),
        (f"model.path={tmp_path / 'run'}", f"; {tmp_path / 'run' / 'final'} is one; see --model.path"),
        (f"reference.path={tmp_path / 'short'}", "up to 64 tokens (max_length), but the reference takes 32"),
        (f"model.path={tmp_path / 'rm'}", "a reward model (score.weight), where a language model is needed"),
        (f"reference.path={tmp_path / 'rm'}", "a reward model (score.weight), where a language model is"),
        (f"eval.reward_model={world / 'model'}", f"{world / 'model'}: no score.weight among its tensors"),
    ):
        assert says in refused(f"--{override}", "--eval.samples=2", "--data.train=missing.jsonl")


@pytest.mark.parametrize("key", "model.path reference.path data.train data.eval eval.reward_model".split())
def test_missing_path(refused, config, tmp_path, key):
    """It is named with its key, as it was typed, or with the file in which it was set."""
    samples = f"--eval.samples={int(key == 'eval.reward_model')}"  # Without samples it is not read.
    said = refused(samples, f"--{key}={tmp_path / 'nowhere'}")
    assert said.startswith(f"{tmp_path / 'nowhere'}") and "no such" in said.lower()
    assert said.endswith(f"; see --{key}")
    (file,) = config(**{key.replace(".", "__"): '["nowhere"]' if key.startswith("data") else '"nowhere"'})
    said = refused(samples)
    assert said.startswith("nowhere") and said.endswith(f"; see {key} in {file}")
