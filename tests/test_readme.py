"""README.md and docs/: commands run on small models; equations, paths, keys and numbers are those of the
code."""

import gzip
import importlib
import math
import re
import shlex
import shutil
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import MagicMock, call

import pytest
import torch

from minidpo import losses
from minidpo.__main__ import COMMANDS
from minidpo.__main__ import main as minidpo
from minidpo.sections import DPOConfig, RewardConfig
from minidpo.tools.exact import table
from minidpo.tools.verify import main as verify_command
from minidpo.training import advice
from minidpo.verify.exact_world import make_world
from runs import metrics

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {file.name: file.read_text(encoding="utf-8") for file in FILES}
README = PAGES["README.md"]
every_page = pytest.mark.parametrize("page", sorted(PAGES))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# --- commands -----------------------------------------------------------------------------------------------

# The pages whose commands are run, in the order in which a reader would.
GUIDES = ("README.md", "running.md", "lesson.md")
# Not run here: installing and downloading, and what has tests of its own.
ELSEWHERE = r"pip|hf download|pytest -n 2|torchrun|python -m minidpo (demo|exact|verify|frontier|bench)"
TEXTS = " --data.max_length=64 --data.max_prompt_length=40 --data.eval_pairs=8"
STEPS = " --optim.max_steps=2 --optim.warmup_steps=0 --optim.micro_tokens=256 --run.device=cpu"
# Added to a command so that it takes seconds. A later --section.key=value overrides an earlier one.
SMALL = {
    "train_dpo.py": TEXTS + STEPS + " --eval.samples=2 --eval.max_new_tokens=8",
    "train_rm.py": TEXTS + STEPS,
    "data": TEXTS,
    "sample": " --max-new-tokens=8 --device=cpu",
    "score": " --max-length=200 --device=cpu",
    "explain": " --device=cpu",
    "plot": "",
    "report": " --device=cpu",
}


def run(line: str) -> None:
    """Run `python SCRIPT ...` or `python -m minidpo COMMAND ...` in this process."""
    script, *arguments = shlex.split(line.removeprefix("python ").removeprefix("-m minidpo "))
    arguments += SMALL[script].split()
    if script.endswith(".py"):
        importlib.import_module(script.removesuffix(".py")).main(arguments)
    else:
        minidpo([script, *arguments])


def test_commands(world, tmp_path, monkeypatch):
    """Every command of the guides runs, in its order, and leaves the files that they promise."""
    # A directory like the reader's: what is downloaded, what the demo leaves, and a file of the reader's own.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    for model in ("models/Qwen2.5-0.5B", "models/mine", "runs/demo/sft/final"):
        shutil.copytree(world / "model", model)
    Path("pairs.jsonl").write_bytes(gzip.decompress((world / "pairs.jsonl.gz").read_bytes()))
    subsets = ("data/hh-rlhf/helpful-base/", "data/hh-rlhf/harmless-base/", "runs/demo/preferences.")
    for file in [f"{subset}{split}.jsonl.gz" for subset in subsets for split in ("train", "test")]:
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(world / "pairs.jsonl.gz", file)
    run("python train_rm.py configs/demo_rm.toml")
    run("python train_dpo.py configs/demo_dpo.toml")

    commands = "".join("".join(blocks(PAGES[page], "sh")) for page in GUIDES)
    for line in commands.splitlines():
        if line and not re.match(ELSEWHERE, line) and (find_spec("matplotlib") or " plot " not in line):
            run(line)
    promised = ("config.toml", "final/model.safetensors", "samples/step-2.jsonl")
    for file in ("best_of_8.jsonl", "scores.jsonl", *(f"runs/hh_dpo/{name}" for name in promised)):
        assert Path(file).is_file()
    # The first losses that README and lesson expect.
    first = {"hh_dpo": math.log(2), "lesson/one_step": math.log(2), "lesson/ipo": 25.0, "lesson/kto": 0.625}
    for name, loss in first.items():
        assert metrics(Path("runs", name))[0]["eval/loss"] == pytest.approx(loss, rel=1e-6)
    assert "loss is **0.6931** = ln 2" in README


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(command, capsys):
    """Every command has a --help."""
    with pytest.raises(SystemExit) as end:
        importlib.import_module(f"minidpo.tools.{command}").main(["--help"])
    assert end.value.code == 0 and command in capsys.readouterr().out


# --- equations and code -------------------------------------------------------------------------------------


EQUATIONS = re.findall(r"^\| .* \| `(.*)` \| `(\w+\(.*\))` \|$", PAGES["methods.md"], re.MULTILINE)
assert len(EQUATIONS) == 14


@pytest.mark.parametrize(("equation", "code"), EQUATIONS)
def test_equations(equation, code):
    """An equation of docs/methods.md and the code beside it have the same value."""
    torch.manual_seed(0)
    drawn = -9 * torch.rand(6, 5, dtype=torch.float64)
    names: dict = dict(zip("pi_w pi_l ref_w ref_l r_w r_l".split(), drawn, strict=True))
    names |= {"n_w": torch.arange(3, 8), "n_l": torch.arange(9, 4, -1), "beta": 0.3, "gamma": 0.7, "e": 0.1}
    names |= {"weight": 0.4, "z0": torch.full((5,), 0.2, dtype=torch.float64)}
    for y in "wl":
        p = (names[f"pi_{y}"] / names[f"n_{y}"]).exp()
        names[f"odds_{y}"] = torch.log(p / (1 - p))
    names["z"] = names["beta"] * ((names["pi_w"] - names["ref_w"]) - (names["pi_l"] - names["ref_l"]))
    names["logps"] = losses.PairLogps(*(names[n] for n in "pi_w pi_l ref_w ref_l n_w n_l".split()))
    for label, y in (("desirable", "w"), ("undesirable", "l")):
        its, z0 = torch.full((5,), y == "w"), names["z0"]
        names[label] = losses.PairLogps(names[f"pi_{y}"], ref_chosen=names[f"ref_{y}"], label=its, z0=z0)
    names |= {"margin": 0.5, "c": 0.01, "lambda_d": 1.2, "lambda_u": 1.5}
    names["rewards"] = losses.Rewards(
        names["r_w"], names["r_l"], chosen_logps=names["pi_w"], chosen_length=names["n_w"]
    )
    expected = eval(equation, {"log": torch.log, "sigmoid": torch.sigmoid, "relu": torch.relu}, names)
    torch.testing.assert_close(eval(code, dict(vars(losses)), names), expected)


@every_page
def test_python(page):
    """The Python of a page runs from top to bottom; its assertions are the page's claims."""
    dtype = torch.get_default_dtype()
    try:
        exec("".join(blocks(PAGES[page], "python")), {})
    finally:
        torch.set_default_dtype(dtype)


def test_textbook():
    """The README shows minidpo/textbook.py as it is."""
    assert blocks(README, "python")[0] == (ROOT / "minidpo/textbook.py").read_text(encoding="utf-8")


def test_report(capsys):
    """The report that docs/verify.md shows of another program's loss is printed by the code above it."""
    page = PAGES["verify.md"]
    exec(blocks(page, "python")[0], {})
    shown = page[page.index("    my_dpo claims") :].split("\n\n")[0].splitlines()

    def lines(text: list[str]) -> set[str]:  # without the rounding errors, which processors make differently
        return {re.sub(r"\de-\d+", "", line).strip() for line in text} - {"..."}

    assert len(shown) > 4 and lines(shown) <= lines(capsys.readouterr().out.splitlines())


def test_own_claims(tmp_path, monkeypatch, capsys):
    """Both blocks of docs/verify.md in a file are a module whose loss the command holds to its claims."""
    (tmp_path / "mymodule.py").write_text("\n".join(blocks(PAGES["verify.md"], "python")), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    verify_command("mymodule:dpop --claims mymodule:CLAIMS".split())
    assert "nothing is refuted" in capsys.readouterr().out


def test_recipes(tmp_path, monkeypatch):
    """The recipes for Weights & Biases and TensorBoard send every number of metrics.jsonl, at its step."""
    wandb, tensorboard = MagicMock(), MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 0.7}\n{"step": 1, "loss": 0.6}\n')
    names: dict = {}
    exec("".join(blocks(PAGES["final.md"], "python")), names)
    names["send"](str(tmp_path))
    logged = [call.log({"eval/loss": 0.7}, step=0), call.log({"loss": 0.6}, step=1)]
    assert wandb.mock_calls == [call.init(project="minidpo", name=str(tmp_path)), *logged, call.finish()]
    names["show"](str(tmp_path))
    writer = tensorboard.SummaryWriter(str(tmp_path)).__enter__()
    assert writer.add_scalar.mock_calls == [call("eval/loss", 0.7, 0), call("loss", 0.6, 1)]


# --- names and numbers --------------------------------------------------------------------------------------


@every_page
def test_paths(page):
    """Every path that a page names exists."""
    named = set(re.findall(r"(?<![\w/])(?:minidpo|tests|configs|docs)/[\w./-]*\w", PAGES[page]))
    named |= set(re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", PAGES[page]))
    missing = [path for path in named if not any((ROOT / folder / path).exists() for folder in ("", "docs"))]
    assert named and not missing


def test_runs():
    """The README lists the demo's configurations by the number of their run."""
    listed = re.findall(r"^\| `configs/(demo_\w+)\.toml` \| (\d+)\. ", README, re.MULTILINE)
    heads = [(file.read_text().split(":")[0], file.stem) for file in ROOT.glob("configs/demo_*")]
    runs = sorted((int(head.removeprefix("# Run ")), name) for head, name in heads)
    assert [(int(number), name) for name, number in listed] == runs


def test_map():
    """The map names everything in the package and every command, and fits on a screen."""
    the_map = README.split("## The map")[1].split("\n## ")[0]
    names = {path.name for path in ROOT.glob("minidpo/[!_]*")} | set(COMMANDS)
    assert {name for name in names if name not in the_map} == set() and the_map.count("\n") <= 30


@every_page
def test_config_keys(page):
    """Every configuration key that a page names exists."""
    sections = [*vars(DPOConfig()).items(), *vars(RewardConfig()).items()]
    sections += [("loss", loss) for loss in losses.LOSSES.values()]
    keys = {"loss.name"} | {f"{name}.{key.name}" for name, section in sections for key in fields(section)}
    pattern = "|".join({name for name, _ in sections})
    named = re.findall(rf"(?:`|--)((?:{pattern})\.[a-z_]+)(?=[`= ])", PAGES[page])
    assert (named or page != "README.md") and set(named) <= keys


def test_usual_rates():
    """The lesson's learning rates are those that a run compares optim.lr with; a loss need not be there."""
    rows = re.findall(r"^\| `([\w.]+)`[^|]*\| (\de-\d) to (\de-\d) \|", PAGES["lesson.md"], re.MULTILINE)
    every = {name: loss.usual_lr for name, loss in losses.LOSSES.items()}
    every["train_rm.py"] = losses.BradleyTerry.usual_lr
    assert len(rows) > 4 and {name for name, *_ in rows} <= every.keys()
    assert all((float(low), float(high)) == every[name] for name, low, high in rows)


def test_limits():
    """The lesson's table of what to watch has the thresholds of training/advice.py."""
    limits = re.findall(
        r"^\| `([\w/]+)` \* \|.* (?:above|more than) (\d+)(?![.\d])", PAGES["lesson.md"], re.M
    )
    assert {name: float(limit) for name, limit in limits} == {
        "eval/loss": round(100 * advice.RISEN - 100),  # in percent
        "eval/logps/chosen": advice.FALLEN,
        "eval/kl": advice.MOST_KL,
        "eval/kl_of_worst": advice.APART,
    }


def test_optima():
    """The exact optima in the pages are those that the exact world computes."""
    expected = {row.name: f"{row.minimum:.10f}" for row in table(make_world())}
    number = r"-?\d+\.\d{10}"
    pattern = re.compile(rf"^ +(\w.*?)  +{number}  +({number})  +\d\.\de-\d+$", re.MULTILINE)
    assert dict(pattern.findall(PAGES["derivation.md"])) == expected
    for page in ("verify.md", "lesson.md"):
        shown = dict(pattern.findall(PAGES[page]))
        assert shown and shown.items() <= expected.items()
