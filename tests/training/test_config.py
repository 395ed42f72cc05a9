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
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))
MINIMAL = '[model]\npath = "m"\n[data]\ntrain = ["t.jsonl"]\n[run]\nout = "o"\n'


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str, kind: type = DPOConfig):
    file = tmp_path / "c.toml"
    file.write_text(text)
    return load_config(kind, [str(file), *overrides])


def kind_of(path: Path) -> type:
    return RewardConfig if path.stem.endswith("_rm") else DPOConfig


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    assert load(tmp_path).optim.lr == 1e-6
    in_file = MINIMAL + "[optim]\nlr = 2e-6\n"
    assert load(tmp_path, in_file).optim.lr == 2e-6
    assert load(tmp_path, in_file, "--optim.lr=3e-6").optim.lr == 3e-6


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("--loss.name=ipo", "ipo"),
        ("--data.train=a.jsonl,b.jsonl", ["a.jsonl", "b.jsonl"]),
        ('--data.train=["a, b.jsonl"]', ["a, b.jsonl"]),
        ("--run.compile=true", True),
        ("--optim.batch_size=7", 7),
        ("--optim.epochs=2", 2.0),
        ("--run.out=with space", "with space"),
    ],
)
def test_a_command_line_value_is_read_by_the_type_of_its_key(tmp_path, override, value):
    config = load(tmp_path, MINIMAL, override)
    section, name = override[2:].partition("=")[0].split(".")
    assert getattr(getattr(config, section), name) == value


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "--loss.betta=1",
            "no key loss.betta; [loss] of dpo has name, beta, label_smoothing, length_normalize",
        ),
        ("--los.beta=1", "no section [los]; there are model, reference"),
        ("--optim.lr=fast", "optim.lr = 'fast'; a number is needed"),
        ("--optim.lr=true", "a number is needed"),
        ("--optim.batch_size=1.5", "optim.batch_size = 1.5; a whole number is needed"),
        ("--run.compile=1", "true or false is needed"),
        ("--loss.beta=0", "loss.beta = 0.0; it must be > 0"),
        ("--loss.label_smoothing=0.5", "it must be in [0, 0.5)"),
        ("--loss.name=kto", "it must be one of " + ", ".join(LOSSES)),
        ("--optim.schedule=step", "one of cosine, linear, constant"),
        ("--loss.gamma=2", "no key loss.gamma; [loss] of dpo has name, beta"),
        ("--loss.beta=inf", "loss.beta = inf; it must be > 0"),
        ("--run.seed=9223372036854775808", "run.seed = 9223372036854775808; it must be from 0"),
        ("--data.max_prompt_length=512", "leaves no room for a response"),
        ("--run.out=", 'run.out = ""; it must be'),
        ("--optim.lr", "--section.key=value"),
        ("--lr=1", "--section.key=value"),
    ],
)
def test_what_is_not_understood_is_refused_with_key_value_and_what_is_right(tmp_path, override, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        load(tmp_path, MINIMAL, override)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr = 1", "'lr' stands outside any [section]"),
        ("[optim\n", "cannot be read as TOML"),
        (MINIMAL + "[optim]\nlr = [1]\n", "c.toml: optim.lr = [1]"),
    ],
)
def test_a_bad_file_is_refused_with_its_name(tmp_path, text, says):
    with pytest.raises(UserError, match=re.escape(says)):
        load(tmp_path, text)


def test_a_missing_file_and_a_missing_argument_are_refused():
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(DPOConfig, ["nowhere.toml"])
    with pytest.raises(UserError, match="one configuration file is needed, 0 given"):
        load_config(DPOConfig, [])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_in_the_repository_loads(path):
    load_config(kind_of(path), [str(path)])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_resolved_config_reads_back_to_the_same_values(path, tmp_path):
    config = load_config(kind_of(path), [str(path), '--run.out=a "quoted" \\ path'])
    assert load(tmp_path, to_toml(config), kind=kind_of(path)) == config


@pytest.mark.parametrize(("kind", "script"), [(DPOConfig, "train_dpo.py"), (RewardConfig, "train_rm.py")])
def test_every_key_is_read_somewhere(kind, script):
    modules = [p for p in (ROOT / "minidpo").rglob("*.py") if p.name not in ("config.py", "sections.py")]
    code = "\n".join(p.read_text() for p in [ROOT / script, *modules])
    for section, values in vars(kind()).items():
        for field in dataclasses.fields(values):
            reads = rf"\b({section}|settings|self)\.{field.name}\b"
            assert re.search(reads, code), f"{section}.{field.name} is read nowhere"


def test_help_names_every_key():
    text = describe(DPOConfig)
    assert all(field in text for field in ("micro_tokens", "label_smoothing", "gamma", "keep_checkpoints"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_its_own_defaults(tmp_path, name):
    """loss.name chooses the loss, and the keys that are not set have that loss's defaults."""
    assert load(tmp_path, MINIMAL, f"--loss.name={name}").loss == LOSSES[name]()


def test_another_loss_on_the_command_line(tmp_path, capsys):
    """The file's keys belong to its own loss; they are dropped, and one line says so."""
    in_file = MINIMAL + '[loss]\nname = "dpo"\nbeta = 0.3\nlength_normalize = true\n'
    assert load(tmp_path, in_file, "--loss.name=simpo", "--loss.gamma=0.5").loss == SimPO(gamma=0.5)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("loss.name = simpo: beta, length_normalize in ") and "dpo" in line
    assert load(tmp_path, in_file, "--loss.name=dpo").loss.beta == 0.3 and not capsys.readouterr().out


def test_a_key_of_another_loss_in_the_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=re.escape("no key loss.gamma; [loss] of ipo has name, beta")):
        load(tmp_path, MINIMAL + '[loss]\nname = "ipo"\ngamma = 1.0\n')


@pytest.mark.parametrize(
    ("kind", "file", "says"),
    [
        (RewardConfig, "demo_dpo.toml", r"no section \[reference\]; .* \(it belongs to train_dpo.py\)"),
        (DPOConfig, "demo_rm.toml", r"no key loss.lm_weight; .* \(it belongs to train_rm.py\)"),
    ],
)
def test_a_configuration_of_the_other_script_is_told_as_such(kind, file, says):
    with pytest.raises(UserError, match=says):
        load_config(kind, [str(ROOT / "configs" / file)])


def test_a_run_into_a_models_directory_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a model .*; a run needs a directory of its own"):
        load_config(
            DPOConfig,
            [str(ROOT / "configs/demo_dpo.toml"), f"--run.out={tmp_path}"],
        )


def test_help_names_the_choices():
    assert f"(one of {', '.join(LOSSES)})" in describe(DPOConfig)
