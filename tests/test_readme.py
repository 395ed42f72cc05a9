"""The README and docs/: every command is run, small; every equation, path, key and printed number is held against the code."""

import dataclasses
import gzip
import importlib
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import train_dpo
import train_rm
from minidpo import losses
from minidpo.__main__ import COMMANDS
from minidpo.__main__ import main as minidpo
from minidpo.losses import LOSSES
from minidpo.sections import DPOConfig, RewardConfig
from minidpo.tools.exact import claims
from minidpo.verify.exact_world import make_world

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
    "torchrun": "tests/robustness/test_distributed.py",
    "python -m minidpo demo": "tests/tools/test_world.py",
    "python -m minidpo exact": "tests/verify/test_exact.py",
    "python -m minidpo frontier": "tests/tools/test_frontier.py",
    "python -m minidpo bench": "tests/tools/test_bench.py",
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
    found = re.findall(r"^\| .* \| `(.*)` \| `(\w+\(.*\))` \|$", README, re.MULTILINE)
    assert len(found) >= 6
    return found


@pytest.mark.parametrize(("equation", "code"), rows(), ids=lambda text: text[:20])
def test_an_equation_and_the_code_beside_it_are_equal(equation, code):
    torch.manual_seed(0)
    names = {name: torch.randn(5, dtype=torch.float64) for name in "pi_c pi_r ref_c ref_r r_c r_r".split()}
    names |= {"n_c": torch.arange(3, 8), "n_r": torch.arange(9, 4, -1), "beta": 0.3, "gamma": 0.7, "e": 0.1}
    z = names["beta"] * ((names["pi_c"] - names["ref_c"]) - (names["pi_r"] - names["ref_r"]))
    values = [names[name] for name in ("pi_c", "pi_r", "ref_c", "ref_r", "n_c", "n_r")]
    names["pairs"] = losses.PairLogps(*values)
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


def test_the_textbook_of_the_readme_is_the_file():
    """The README shows minidpo/textbook.py as it is; tests/model/test_textbook.py holds it against the fast path."""
    (block,) = blocks(README, "python")
    assert block == (ROOT / "minidpo/textbook.py").read_text(encoding="utf-8")


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


def test_the_map_is_true():
    """Every room of the package and every command is on the map, which fits on a screen."""
    start = README.index("## The map")
    the_map = README[start : README.index("\n## ", start)]
    rooms = [p.name for p in (ROOT / "minidpo").iterdir() if not p.name.startswith("__")]
    assert [name for name in rooms if name not in the_map] == []
    assert [name for name in COMMANDS if name not in the_map] == []
    assert len(the_map.splitlines()) <= 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_config_key_that_a_page_names_exists(page):
    keys = {"loss.name"} | {
        f"loss.{key.name}" for loss in LOSSES.values() for key in dataclasses.fields(loss)
    }
    for kind in (DPOConfig(), RewardConfig()):
        for section, values in vars(kind).items():
            keys |= {f"{section}.{key.name}" for key in dataclasses.fields(values)}
    sections = {key.partition(".")[0] for key in keys}
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"(?:`|--)((?:{'|'.join(sections)})\.[a-z_]+)(?=[`= ])", text))
    assert named or page.name != "README.md"
    assert sorted(named - keys) == []


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_that_the_readme_may_point_to(command, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"minidpo.tools.{command}").main(["--help"])
    assert end.value.code == 0 and command in capsys.readouterr().out


# --- numbers --------------------------------------------------------------------------------------------------


def test_the_analytic_optima_of_the_pages_are_those_of_the_exact_world():
    found = {claim.name: f"{claim.minimum:.10f}" for claim in claims(make_world())}
    for page, all_of_them in (("README.md", False), ("docs/derivation.md", True)):
        text = (ROOT / page).read_text(encoding="utf-8")
        shown = re.findall(r"^ +(\w.*?)  +-?\d+\.\d{10}  +(-?\d+\.\d{10})  +\d\.\de-\d+$", text, re.M)
        assert shown and dict(shown).items() <= found.items()
        assert dict(shown) == found or not all_of_them
