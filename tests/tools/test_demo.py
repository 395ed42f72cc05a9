"""The demo as a whole, in its own world and steps but with few records, small batches and a tiny model."""

import inspect

import train_dpo
import train_rm
from minidpo.config import DPOConfig, load_config
from minidpo.log import read_metrics
from minidpo.tools.demo import command, files
from tiny import tiny_config

SCRIPTS = {"train_dpo.py": train_dpo.main, "train_rm.py": train_rm.main}


def test_demo(tmp_path, monkeypatch, capsys):
    """DPO's curve has six held-out points or more, one KL is told, and the last line names the page."""
    config = str(command.REPOSITORY / "configs/demo_dpo.toml")
    batch_size = load_config(DPOConfig, [config]).optim.batch_size
    # As many steps of DPO as the demo makes, but of one pair each.
    steps = inspect.signature(files.write_world).parameters["train_pairs"].default // batch_size
    sizes = {"sft_records": 60, "train_pairs": steps, "test_pairs": 4, "test_prompts": 8}

    def run_script(script: str, config: str, settings: dict[str, str]) -> None:
        short = (
            {"optim.batch_size": "1"}
            if "dpo.toml" in config
            else {"optim.max_steps": "2", "data.eval_pairs": "4"}
        )
        overrides = [f"--{key}={value}" for key, value in (settings | short).items()]
        SCRIPTS[script]([str(command.REPOSITORY / config), *overrides])

    def write_world(directory, seed):
        files.write_world(directory, seed, **sizes)

    def small(vocab_size, eos_token_id, **larger):
        return tiny_config(vocab_size=vocab_size, eos_token_id=eos_token_id, initializer_range=0.02)

    monkeypatch.setattr(command, "run_script", run_script)
    monkeypatch.setattr(command, "write_world", write_world)
    monkeypatch.setattr(files, "ModelConfig", small)
    command.main(["--out", str(tmp_path / "demo")])

    evaluations = [line for line in read_metrics(tmp_path / "demo/dpo/metrics.jsonl") if "eval/loss" in line]
    assert len(evaluations) >= 6 and evaluations[-1]["step"] == steps
    lines = capsys.readouterr().out.splitlines()
    assert str(tmp_path / "demo/report.html") in lines[-1] and (tmp_path / "demo/report.html").exists()
    (kl,) = (line.split() for line in lines if "KL from" in line)
    assert float(kl[-2]) == 0.0 <= float(kl[-1])
