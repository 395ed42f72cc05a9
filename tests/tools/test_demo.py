"""The demo's world: its rule judges right, its labels are what they claim to be, its test is unseen. Then the
demo as a whole, in its own world and steps but with few records, small batches and a tiny model."""

import inspect
import math
from pathlib import Path

import pytest

import train_dpo
import train_rm
from minidpo.config import DPOConfig, load_config
from minidpo.data import PreferencePair, Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.model import load_model
from minidpo.tools.demo import command, files, world
from minidpo.tools.demo.files import write_model, write_world
from minidpo.tools.demo.world import Question, ceiling_accuracy, judge, questions
from record_files import read
from tiny import tiny_config

SCRIPTS = {"train_dpo.py": train_dpo.main, "train_rm.py": train_rm.main}
SUM = "\n\nHuman: What is 2 + 3?\n\nAssistant:"
COLD = f"{SUM} It is 9.\n\nHuman: What is the opposite of cold?\n\nAssistant:"
COUNTS = {"sft": 600, "preferences.train": 2500, "preferences.test": 400}


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write_world(path, 1, *COUNTS.values(), test_prompts=100)
    write_model(path / "base", path)
    return path


@pytest.fixture(scope="module")
def pairs(directory) -> dict[str, list[PreferencePair]]:
    return {name: list(read_preferences(directory / f"{name}.jsonl.gz")) for name in COUNTS}


@pytest.mark.parametrize(
    ("prompt", "response", "correct", "courteous", "length"),
    [
        (SUM, " It is 5.", True, False, 3),
        # It names other numbers.
        (SUM, " Sure! 2 plus 3 is 5.", False, True, 6),
        (SUM, " It is 15.", False, False, 3),
        (SUM, " It is 5, 5.", False, False, 4),
        (SUM, " Happy to help! The answer is 5.", True, True, 7),
        (SUM, " Ugh. It is 5. Sure!", True, False, 5),
        (COLD, " The opposite of cold is hot.", True, False, 6),
        (COLD, " It is hot. It is small.", False, False, 6),
        (COLD, "", False, False, 0),
    ],
)
def test_judge(prompt, response, correct, courteous, length):
    """The judgement of hand-written responses is right."""
    reward = world.CORRECT * correct + world.COURTEOUS * courteous - world.WORD_COST * length
    assert judge(prompt, response) == (correct, courteous, length, reward)


@pytest.mark.parametrize("prompt", ["", "\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: What is 2 + 3?"])
def test_judge_other_world(prompt):
    """A prompt of another world is refused."""
    with pytest.raises(UserError, match="demo world"):
        judge(prompt, " It is 5.")


def test_phrases():
    """The phrases around an answer hold no word that counts as one."""
    around = world.POLITE + world.GRUMPY + world.RAMBLINGS + world.STATEMENTS
    for question in questions().values():
        response = " ".join(around).replace("{}", "") + " " + question.answer
        assert judge(f"\n\nHuman: {question.text}\n\nAssistant:", response).correct


def test_ceiling():
    """Of three pairs two agree with sigmoid(4), one is a coin; drawn are one right, one wrong and a tie."""
    texts = [(" It is 5.", " It is 4."), (" It is 4.", " It is 5."), (" It is 4.", " It is 6.")]
    sure = 1 / (1 + math.exp(-world.CORRECT))
    drawn = [PreferencePair(SUM, chosen, rejected) for chosen, rejected in texts]
    assert ceiling_accuracy(drawn) == pytest.approx(((2 * sure + 0.5) / 3, 0.5))


@pytest.mark.parametrize("name", ["preferences.train", "sft"])
def test_labels(pairs, name):
    """Drawn labels agree with r* as often as the ceiling says; the order of SFT records is a coin's."""
    assert len(pairs[name]) == COUNTS[name]  # Every record is usable.
    expected, realised = ceiling_accuracy(pairs[name])
    assert 0.8 < expected < 0.95
    p = 0.5 if name == "sft" else expected
    assert abs(realised - p) < 4 * math.sqrt(p * (1 - p) / len(pairs[name]))


def asked(prompts: list[str]) -> list[Question]:
    """The last question of each prompt."""
    return [questions()[prompt.removesuffix("\n\nAssistant:").rpartition("Human: ")[2]] for prompt in prompts]


def test_split(directory, pairs):
    """No question of the test is asked in training, but every fact is, in other words."""
    train = [pair.prompt for pair in pairs["sft"] + pairs["preferences.train"]]
    test = [pair.prompt for pair in pairs["preferences.test"]]
    test += [record["prompt"] for record in read(directory / "prompts.test.jsonl")]
    assert not any(f"Human: {question.text}\n" in "".join(train) for question in asked(test))
    trained, tested = ({(q.skill, *sorted(q.fact)) for q in asked(prompts)} for prompts in (train, test))
    assert tested <= trained


def test_bytes(tmp_path):
    """One seed writes the same bytes twice, and another seed writes others."""
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / name, seed, 50, 20, 20, 20)
        write_model(tmp_path / name, tmp_path / name, seed)
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert a == b
    assert len(a) == 8 and all(a[name] != c[name] for name in a if name.endswith((".gz", ".safetensors")))


def test_model_and_tokenizer(directory):
    """Digits stay single, every answer that is a word is one token, and any text survives a round trip."""
    tokenizer, model = Tokenizer.from_pretrained(directory / "base"), load_model(directory / "base")
    assert [tokenizer.piece(i) for i in tokenizer.encode("12")] == ["1", "2"]
    for question in questions().values():
        assert question.skill == "sum" or len(tokenizer.encode(" " + question.answer)) == 1, question
    text = "Grüße, 世界!\n\nHuman: 3 + 4?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert model.config.vocab_size > max(tokenizer.encode("zebra, 99"))


def test_demo(tmp_path, monkeypatch, capsys):
    """DPO has six held-out points or more, one KL is told, and the last line names the page. --judge has
    a column for every run that started from the demo's SFT."""
    dpo = load_config(DPOConfig, [str(command.REPOSITORY / "configs/demo_dpo.toml")])
    pairs = inspect.signature(files.write_world).parameters["train_pairs"].default
    assert pairs // dpo.optim.batch_size >= 5 * dpo.run.eval_every  # and one before the first step

    def run_script(script: str, config: str, settings: dict[str, str]) -> None:
        settings = settings | {"optim.max_steps": "2", "data.eval_pairs": "4"}
        overrides = [f"--{key}={value}" for key, value in settings.items()]
        SCRIPTS[script]([str(command.REPOSITORY / config), *overrides])

    def write_world(directory, seed):
        files.write_world(directory, seed, 60, 60, test_pairs=4, test_prompts=8)

    def small(vocab_size, eos_token_id, **larger):
        return tiny_config(vocab_size=vocab_size, eos_token_id=eos_token_id, initializer_range=0.02)

    monkeypatch.setattr(command, "run_script", run_script)
    monkeypatch.setattr(command, "write_world", write_world)
    monkeypatch.setattr(files, "ModelConfig", small)
    out = tmp_path / "demo"
    command.main(["--out", str(out)])

    lines = capsys.readouterr().out.splitlines()
    assert str(out / "report.html") in lines[-1] and (out / "report.html").exists()
    (kl,) = (line.split() for line in lines if "KL from" in line)
    assert float(kl[-2]) == 0.0 <= float(kl[-1])
    command.main(["--out", str(out), "--judge", str(out / "dpo"), str(out / "sft")])
    assert ["SFT", "DPO", "SFT"] in [line.split() for line in capsys.readouterr().out.splitlines()]


def test_interrupted(tmp_path, monkeypatch):
    """Ctrl-C ends the demo whatever status its script ends with, and not before that has saved."""
    interrupt = "time.sleep(0.5); os.kill(os.getppid(), signal.SIGINT); time.sleep(0.5)"
    save = f"import os, pathlib, signal, sys, time; {interrupt}; pathlib.Path(sys.argv[1]).touch()"
    (tmp_path / "script.py").write_text(save)
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        command.run_script("script.py", "saved", {})
    assert (tmp_path / "saved").exists()
