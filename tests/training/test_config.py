"""Configuration: defaults, then file, then command line; whatever is not understood is refused in one line."""

import dataclasses
import re
from pathlib import Path

import pytest

from minidpo.config import describe, load_config, to_toml
from minidpo.errors import UserError
from minidpo.losses import LOSSES, SimPO
from minidpo.sections import DPOConfig, RewardConfig

ROOT = Path(__file__).parents[2]
MINIMAL = 'model.path = "m"\ndata.train = ["t.jsonl"]\nrun.out = "o"\n'


def load(tmp_path: Path, text: str, *overrides: str, kind: type = DPOConfig):
    file = tmp_path / "c.toml"
    file.write_text(text)
    return load_config(kind, [str(file), *overrides])


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("data.train=a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ('data.train=["a, b.jsonl"]', ["a, b.jsonl"]),
        ("run.compile=true", True),
        ("run.compile=auto", "auto"),
        ("optim.epochs=2", 2.0),
        ("run.out=with space", "with space"),
        ("data.columns.chosen=c d", {"prompt": "a", "chosen": "c d"}),
        (
            'data.columns={prompt = "question", system = ""}',
            {"prompt": "question", "chosen": "b", "system": ""},
        ),
    ],
)
def test_command_line(tmp_path, override, value):
    """A value is read by the type of its key; texts need no quotes. It wins over the file's, also as one entry of
    a table; what is written reads back."""
    section, name, *_ = override.partition("=")[0].split(".")
    config = load(tmp_path, MINIMAL + '[data.columns]\nprompt = "a"\nchosen = "b"', f"--{override}")
    assert getattr(getattr(config, section), name) == value
    assert load(tmp_path, to_toml(config)) == config


@pytest.mark.parametrize(
    ("in_file", "override", "says"),
    [
        ("", "--loss.betta=1", "no key loss.betta; [loss] of dpo has name, beta, label_smoothing"),
        ('loss.name = "ipo"\nloss.gamma = 1.0', "", "FILE: no key loss.gamma; [loss] of ipo has name, beta"),
        ("", "--loss.lm_weight=1", " (it belongs to train_rm.py, bench --loss rm)"),
        ("", "--los.beta=1", "no section [los]; there are model, reference"),
        ("", "--optim.lr=fast", "--optim.lr = 'fast'; a number is needed"),
        ("optim.lr = [1]", "", "optim.lr in FILE = [1]; a number is needed"),
        ("", "--optim.lr=true", "a number is needed"),
        ("", "--optim.batch_size=1.5", "--optim.batch_size = 1.5; a whole number is needed"),
        ("", "--run.activation_checkpointing=1", "true or false is needed"),
        ("", "--run.compile=1", 'true, false or "auto" is needed'),
        ('run.compile = "yes"', "", 'run.compile in FILE = "yes"; it must be true, false or "auto"'),
        ("loss.beta = 0", "", "loss.beta in FILE = 0.0; it must be > 0"),
        ("", "--loss.beta=inf", "--loss.beta = inf; it must be > 0"),
        ("", "--loss.label_smoothing=0.5", "it must be in [0, 0.5)"),
        ('loss.name = "cpo"', "", 'loss.name in FILE = "cpo"; it must be one of ' + ", ".join(LOSSES)),
        ("loss.beta = 0.3", "--loss.name=ppo", '--loss.name = "ppo"; it must be one of '),
        ("", "--optim.schedule=step", "one of cosine, linear, constant"),
        ("", "--run.seed=9223372036854775808", "--run.seed = 9223372036854775808; it must be from 0"),
        ("data.max_length = 384", "", "leaves no room for a response; it must be below data.max_length"),
        ("", "--data.max_prompt_length=512", "--data.max_prompt_length = 512 leaves no room for a response"),
        ("", "--run.out=", '--run.out = ""; it must be'),
        ("", "--data.columns.question=prompt", "; it must be a table with keys of prompt, system, chosen,"),
        ("data.columns = {prompt = 1}", "", "data.columns in FILE = {'prompt': 1}; a table of texts is"),
        ("", "--optim.lr.peak=1", "--optim.lr = {'peak': '1'}; a number is needed"),
        ("", "--data.columns={} --data.columns.prompt=q", "--data.columns is given as a whole, too; give"),
        ("", "--data.text=chat", '--data.text = "chat"; it must be template, raw or empty'),
        ("optim.warmup_steps = 9", "--optim.warmup_ratio=0.1", "9 and --optim.warmup_ratio = 0.1; give"),
        ("", "--run.out=TMP", "holds a model (config.json); a run needs a directory of its own"),
        ("", "--optim.lr", "--section.key=value"),
        ("", "--lr=1", "--section.key=value"),
        ("lr = 1", "", "FILE: 'lr' stands outside any [section]"),
        ("[optim\n", "", "FILE: cannot be read as TOML"),
        ("", "again.toml", "one configuration file is needed, 2 given"),
    ],
)
def test_refused(tmp_path, in_file, override, says):
    """One line names the key where it was set, in the file or as it was typed, the value and what is right."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(says.replace("FILE", str(tmp_path / "c.toml")))) as error:
        load(tmp_path, MINIMAL + in_file, *override.replace("TMP", str(tmp_path)).split())
    assert "\n" not in str(error.value)


def test_other_script(tmp_path):
    """What the other script reads is told as such."""
    with pytest.raises(UserError, match=r"no section .*\(it belongs to train_dpo.py\)"):
        load(tmp_path, MINIMAL, "--reference.path=m", kind=RewardConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_resolved(path, tmp_path):
    """Every file of configs/ loads, and what a run writes down of it reads back to the same values."""
    kind = RewardConfig if "_rm" in path.stem else DPOConfig
    config = load_config(kind, [str(path), '--run.out=a "quoted" \\ path'])
    assert load(tmp_path, to_toml(config), kind=kind) == config


@pytest.mark.parametrize("kind", [DPOConfig, RewardConfig])
def test_every_key(kind):
    """Each is read somewhere, and --help names it."""
    modules = [p for p in (ROOT / "minidpo").rglob("*.py") if p.name not in ("config.py", "sections.py")]
    code = "\n".join(file.read_text() for file in [*ROOT.glob("train_*.py"), *modules])
    for section, values in vars(kind()).items():
        for field in dataclasses.fields(values):
            assert re.search(rf"\b({section}|settings|self)\.{field.name}\b", code), (section, field.name)
            assert f"{field.name} = " in describe(kind)


@pytest.mark.parametrize("name", LOSSES)
def test_loss(tmp_path, name):
    """loss.name chooses the loss, with its own defaults; --help lists the choices."""
    assert load(tmp_path, MINIMAL, f"--loss.name={name}").loss == LOSSES[name]()
    assert f"(one of {', '.join(LOSSES)})" in describe(DPOConfig) and "gamma = " in describe(DPOConfig)


def test_another_loss(tmp_path, capsys):
    """If the command line changes the loss, the file's keys of its own loss are dropped, and one line says
    so, and what the new loss has for them."""
    in_file = MINIMAL + 'loss.name = "dpo"\nloss.beta = 0.3\nloss.length_normalize = true\n'
    assert load(tmp_path, in_file, "--loss.name=simpo", "--loss.gamma=0.5").loss == SimPO(gamma=0.5)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("loss.name = simpo: beta, length_normalize in ") and "dpo" in line
    assert line.endswith("; simpo takes beta = 2.0 by default")
    load(tmp_path, in_file, "--loss.name=simpo", "--loss.beta=1")
    assert capsys.readouterr().out.endswith("belong to dpo and are not read\n")
    assert load(tmp_path, in_file, "--loss.name=dpo").loss.beta == 0.3 and not capsys.readouterr().out
