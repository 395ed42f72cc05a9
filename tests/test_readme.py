"""The README and docs/: every command is run, small; every equation, path, key and printed number is held against the code."""

import copy
import dataclasses
import gzip
import importlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import train_dpo
import train_rm
from minidpo import logprobs, losses
from minidpo.__main__ import COMMANDS
from minidpo.__main__ import main as minidpo
from minidpo.commands import memory
from minidpo.commands.exact import claims
from minidpo.commands.exact_world import make_world
from minidpo.packing import PairTokens, Wanted, pack_row
from minidpo.sections import PreferenceConfig, RewardConfig
from tiny import padded_rows, random_pairs, tiny_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# --- commands -------------------------------------------------------------------------------------------------

# What is not run here, and why.
ELSEWHERE = {
    "pip install": "continuous integration installs",
    "pytest -n 2": "this is it",
    "hf download": "needs a network",
    "torchrun": "tests/test_distributed.py",
    "python -m minidpo demo": "tests/test_world.py",
    "python -m minidpo exact": "tests/test_exact.py",
    "python -m minidpo frontier": "tests/test_frontier.py",
    "python -m minidpo bench": "tests/test_bench.py",
}
SMALL = {
    "train_dpo.py": "--optim.max_steps=2 --optim.warmup_steps=0 --optim.micro_tokens=256 --data.max_length=64"
    " --data.max_prompt_length=40 --data.eval_pairs=8 --eval.samples=2 --eval.max_new_tokens=8 --run.device=cpu",
    "train_rm.py": "--optim.max_steps=2 --optim.warmup_steps=0 --optim.micro_tokens=256 --data.max_length=64"
    " --data.max_prompt_length=40 --run.device=cpu",
    "data": "--data.max_length=64 --data.max_prompt_length=40 --data.eval_pairs=8",
    "sample": "--max-new-tokens=8 --device=cpu",
    "score": "--max-length=200 --device=cpu",
    "explain": "--device=cpu",
}


@pytest.fixture(scope="module")
def sandbox(world, tmp_path_factory) -> Path:
    """A directory like the reader's after the downloads: small models and data under the README's names."""
    place = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "configs", place / "configs")
    for name in ("models/Qwen2.5-0.5B", "models/mine"):
        shutil.copytree(world / "model", place / name)
    lines = gzip.decompress((world / "pairs.jsonl.gz").read_bytes())
    (place / "pairs.jsonl").write_bytes(lines)
    (place / "runs/demo").mkdir(parents=True)  # what the demo leaves: a run, its reference, its pairs
    shutil.copytree(world / "model", place / "runs/demo/sft/final")
    shutil.copy(world / "pairs.jsonl.gz", place / "runs/demo/preferences.test.jsonl.gz")
    arguments = f"configs/demo_dpo.toml --model.path={world / 'model'} --data.train={place / 'pairs.jsonl'} --data.eval="
    train_dpo.main(
        [str(ROOT / p) if p.startswith("configs") else p for p in arguments.split()]
        + [*SMALL["train_dpo.py"].split(), f"--run.out={place / 'runs/demo/dpo'}"]
    )
    for subset in ("helpful-base", "harmless-base"):
        (place / "data/hh-rlhf" / subset).mkdir(parents=True)
        for split in ("train", "test"):
            (place / "data/hh-rlhf" / subset / f"{split}.jsonl.gz").write_bytes(gzip.compress(lines))
    return place


def commands() -> list[str]:
    return [line for block in blocks(README, "sh") for line in block.splitlines() if line]


def test_every_command_of_the_readme_runs(sandbox, monkeypatch, capsys):
    monkeypatch.chdir(sandbox)
    ran = 0
    for line in commands():
        if line.startswith(tuple(ELSEWHERE)):
            continue
        program, script, *arguments = shlex.split(line)
        assert program == "python", line
        if script == "-m":
            name, command, *arguments = arguments
            assert name == "minidpo", line
            if command == "plot":
                pytest.importorskip("matplotlib")
            minidpo([command, *arguments, *SMALL.get(command, "").split()])
        else:
            main = {"train_dpo.py": train_dpo.main, "train_rm.py": train_rm.main}[script]
            main([*arguments, *SMALL[script].split()])
        ran += 1
    assert ran > 8
    for left in ("final/model.safetensors", "config.toml", "metrics.jsonl", "samples/step-2.jsonl"):
        assert (sandbox / "runs/hh_dpo" / left).is_file(), left
    assert (sandbox / "best_of_8.jsonl").is_file() and (sandbox / "scores.jsonl").is_file()
    first = json.loads((sandbox / "runs/hh_dpo/metrics.jsonl").read_text().splitlines()[0])
    assert first["eval/loss"] == pytest.approx(math.log(2))  # 0.6931, as promised


def test_the_first_dpo_loss_that_the_readme_promises_is_ln_2():
    assert f"{math.log(2):.4f}" in README


# --- equations ------------------------------------------------------------------------------------------------


def rows() -> list[tuple[str, str]]:
    found = re.findall(r"^\| .* \| `(.*)` \| `(\w+_loss\(.*)` \|$", README, re.MULTILINE)
    assert len(found) >= 6
    return found


@pytest.mark.parametrize(("equation", "code"), rows(), ids=lambda text: text[:20])
def test_an_equation_and_the_code_beside_it_are_equal(equation, code):
    torch.manual_seed(0)
    names = {name: torch.randn(5, dtype=torch.float64) for name in "pi_c pi_r ref_c ref_r r_c r_r".split()}
    names |= {"n_c": torch.arange(3, 8), "n_r": torch.arange(9, 4, -1), "beta": 0.3, "gamma": 0.7, "e": 0.1}
    z = names["beta"] * ((names["pi_c"] - names["ref_c"]) - (names["pi_r"] - names["ref_r"]))
    by_hand = eval(equation, {"log": torch.log, "sigmoid": torch.sigmoid, "z": z}, names)
    torch.testing.assert_close(eval(code, vars(losses) | {}, names), by_hand)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page):
    names: dict = {}
    dtype = torch.get_default_dtype()
    try:
        for block in blocks(page.read_text(encoding="utf-8"), "python"):
            exec(block, names)
    finally:
        torch.set_default_dtype(dtype)


def test_the_plain_step_of_the_readme_is_minidpos():
    (block,) = blocks(README, "python")
    names: dict = {}
    exec(block, names)
    policy, reference = tiny_model(1), tiny_model(2)
    twin = copy.deepcopy(policy)
    pairs = random_pairs(np.random.default_rng(0), 4)
    tokens, mask = padded_rows(pairs)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    names["step"](policy, reference, optimizer, tokens, mask)
    row = pack_row(PairTokens.from_pairs(pairs), Wanted(chosen_logps=True, rejected_logps=True))
    with torch.no_grad():
        reference_logps = logprobs.response_logps(reference, row)
    policy_logps = logprobs.response_logps(twin, row)
    losses.dpo_loss(*policy_logps.unbind(1), *reference_logps.unbind(1)).losses.mean().backward()
    for ours, theirs in zip(twin.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(ours.detach() - ours.grad, theirs.detach(), rtol=1e-4, atol=1e-5)


# --- paths, keys, names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/])(?:minidpo|tests|configs|docs)/[\w./-]*\w", text))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text))
    assert named
    assert [
        path for path in sorted(named) if not any((base / path).exists() for base in (ROOT, page.parent))
    ] == []


def test_every_file_of_the_package_is_on_the_map():
    start = README.index("## The map")
    the_map = README[start : README.index("\n## ", start)]
    files = [path.name for path in (ROOT / "minidpo").glob("*.py") if not path.name.startswith("__")]
    assert [name for name in files if name not in the_map] == []
    assert [name for name in COMMANDS if name not in the_map] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_key_that_a_page_names_exists(page):
    sections = {**vars(RewardConfig()), **vars(PreferenceConfig())}
    keys = {f"{s}.{f.name}" for kind in (PreferenceConfig, RewardConfig) for s, values in vars(kind()).items()
            for f in dataclasses.fields(values)}  # fmt: skip
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:`|--)((?:{'|'.join(sections)})\.[a-z_]+)(?=[`= ])", text))
    assert named or page.name != "README.md"
    assert sorted(named - keys) == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_that_the_readme_may_point_to(command, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"minidpo.commands.{command}").main(["--help"])
    assert end.value.code == 0 and command in capsys.readouterr().out


# --- numbers --------------------------------------------------------------------------------------------------


def test_the_memory_table_is_what_the_command_prints(capsys):
    memory.main([])
    page = [row.split() for row in (ROOT / "docs/memory.md").read_text(encoding="utf-8").splitlines()]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert printed and all(line in page for line in printed)
    # "0.5B 12 to 32 GB, 1.5B 33 to 75", with activation checkpointing and without
    for name, size in (("0.49B", "0.5B"), ("1.54B", "1.5B")):
        (row,) = (line for line in printed if line[0] == name)
        assert f"{size} {row[2].strip('()')} to {row[1]}" in README


def test_the_analytic_optima_of_the_pages_are_those_of_the_exact_world():
    found = {claim.name: f"{claim.minimum:.10f}" for claim in claims(make_world())}
    for page, all_of_them in (("README.md", False), ("docs/derivation.md", True)):
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = re.findall(r"^ +(\w.*?)  +-?\d+\.\d{10}  +(-?\d+\.\d{10})  +\d\.\de-\d+$", text, re.M)
        assert shown and dict(shown).items() <= found.items()
        assert dict(shown) == found or not all_of_them
