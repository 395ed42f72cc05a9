"""`python -m minidpo data` says what a run would say of its data, and writes the records that it would hold out."""

import gzip
import json

import pytest

import train_dpo
from minidpo.config import DPOConfig, load_config
from minidpo.data import load_pairs
from minidpo.errors import UserError
from minidpo.tools.data import main as data_command
from record_files import record, write


def test_report_of_files(world, tmp_path, capsys):
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


def test_report_of_a_run(config, capsys):
    """Given a run's configuration, it says what the run says."""
    arguments = [*config(optim__max_steps=1), "--data.max_length=40", "--data.max_prompt_length=9"]
    train_dpo.main(arguments)
    said = capsys.readouterr().out
    data_command(arguments)
    report = capsys.readouterr().out
    assert "(max_length 40, max_prompt_length 9)" in report and report in said


def test_reward_models_configuration(config):
    """It takes a reward model's configuration too."""
    arguments = config(loss__lm_weight=0.5, data__max_length=40, data__max_prompt_length=9)
    data_command(arguments)
    with pytest.raises(UserError, match=r"no key loss.margn; \[loss\] .*has lm_weight"):
        data_command([*arguments, "--loss.margn=1"])
    with pytest.raises(UserError, match="texts of up to 4000 tokens .*, but the model takes"):
        data_command([*arguments, "--data.max_length=4000"])


def test_held_out_records(config, world, tokenizer, tmp_path):
    """--held-out writes the records that a run holds out, and overwrites no file of the data."""
    records = [json.loads(line) for line in gzip.open(world / "pairs.jsonl.gz", "rt")]
    noted = [record | {"note": i} for i, record in enumerate(records[::-1])]
    other, out = write(tmp_path / "other.jsonl", *noted), tmp_path / "held_out.jsonl"
    arguments = config(data__train=f'["{world / "pairs.jsonl.gz"}", "{other}"]', data__eval_pairs=16)
    data_command([*arguments, "--held-out", str(out)])
    settings = load_config(DPOConfig, arguments)
    _, held_out = load_pairs(settings.data, tokenizer, settings.run.seed)
    expected = [(records, noted)[f][i] for f, i in zip(held_out.file, held_out.index, strict=True)]
    assert [json.loads(line) for line in out.read_text().splitlines()] == expected
    assert len(expected) == 16 and len(set(held_out.file)) == 2
    before = other.read_bytes()
    with pytest.raises(UserError, match=r"--held-out .*: a file in a directory that exists is needed"):
        data_command([*arguments, f"--held-out={tmp_path}/nowhere/a.jsonl"])
    with pytest.raises(UserError, match=r"--held-out .*other.jsonl: is a file of the data"):
        data_command([*arguments, f"--held-out={tmp_path}/./other.jsonl"])
    assert other.read_bytes() == before


def test_held_out_of_two_shapes(config, world, tmp_path):
    """Records of two shapes are not written to one file."""
    texts = write(tmp_path / "texts.jsonl", *(record(f"a dog {i}") for i in range(30)))
    out = tmp_path / "held_out.jsonl"
    arguments = config(data__train=f'["{world / "pairs.jsonl.gz"}", "{texts}"]', data__eval_pairs=20)
    both = "records of HH dialogues .* and prompt, chosen, rejected; a file keeps"
    with pytest.raises(UserError, match=both):
        data_command([*arguments, f"--held-out={out}"])
    assert not out.exists()


def test_skip_bad(world, tmp_path, capsys):
    """It skips and counts what cannot be read, when asked."""
    path = write(tmp_path / "a.jsonl", record("cat"), {"prompt": "dog"})
    with pytest.raises(UserError, match="a.jsonl:2: no key 'chosen'"):
        data_command([str(path), "--model", str(world / "model")])
    data_command([str(path), "--model", str(world / "model"), "--skip-bad"])
    assert "dropped 1: no key 'chosen' (line 2)" in capsys.readouterr().out
