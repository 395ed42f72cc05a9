"""The demo's world: its rule judges right, its labels are what they claim to be, its test is unseen."""

import json
import math
from pathlib import Path

import pytest

from minidpo.data import DataReport, PreferencePair, Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.model import load_model
from minidpo.tools.demo import world
from minidpo.tools.demo.files import END_OF_TEXT, write_model, write_world
from minidpo.tools.demo.world import ceiling_accuracy, judge, questions

SUM = "\n\nHuman: What is 2 + 3?\n\nAssistant:"
SORT = "\n\nHuman: Sort drum and apple.\n\nAssistant:"
COLD = f"{SUM} It is 9.\n\nHuman: What is the opposite of cold?\n\nAssistant:"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    write_world(path, seed=1, sft_records=600, train_pairs=2500, test_pairs=400, test_prompts=100)
    write_model(path / "base", path)
    return path


def pairs(directory: Path, name: str) -> list[PreferencePair]:
    return list(read_preferences(directory / f"{name}.jsonl.gz"))


def last_question(prompt: str) -> str:
    return prompt.removesuffix("\n\nAssistant:").rpartition("\n\nHuman: ")[2]


@pytest.mark.parametrize(
    ("prompt", "response", "correct", "courteous", "length"),
    [
        (SUM, " It is 5.", True, False, 3),
        # It names other numbers, and a list of all numbers is no answer.
        (SUM, " Sure! 2 plus 3 is 5.", False, True, 6),
        (SUM, " 1. 2. 3. 4. 5.", False, False, 5),
        (SUM, " It is 15.", False, False, 3),
        (SUM, " Happy to help! The answer is 5. Have a nice day!", True, True, 11),
        (SUM, " Ugh. It is 5. I hope that helps!", True, False, 8),
        (SORT, " It is apple, drum.", True, False, 4),
        (SORT, " It is drum, apple.", False, False, 4),
        (SORT, " It is apple.", False, False, 3),
        (COLD, " The opposite of cold is hot.", True, False, 6),
        (COLD, " It is hot. It is small.", False, False, 6),
        (COLD, " It is 5.", False, False, 3),
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


def test_phrases_name_no_answer():
    """The phrases around an answer hold no word that counts as one."""
    phrases = " ".join(
        world.POLITE + world.POLITE_CLOSINGS + world.GRUMPY + world.RAMBLINGS + world.STATEMENTS
    )
    for question in questions().values():
        prompt = f"\n\nHuman: {question.text}\n\nAssistant:"
        assert judge(prompt, phrases.replace("{}", "") + " " + ", ".join(question.answer)).correct


def test_labels_agree_with_r_star(directory):
    """Drawn labels agree with r* as often as the ceiling says, within binomial error."""
    drawn = pairs(directory, "preferences.train")
    expected, realised = ceiling_accuracy(drawn)
    assert 0.8 < expected < 0.95
    assert abs(realised - expected) < 4 * math.sqrt(expected * (1 - expected) / len(drawn))


def test_ceiling_by_hand():
    better = PreferencePair(SUM, " It is 5.", " It is 4.")
    worse = PreferencePair(SUM, " It is 4.", " It is 5.")
    equal = PreferencePair(SUM, " It is 4.", " It is 6.")
    sure = 1 / (1 + math.exp(-world.CORRECT))
    assert ceiling_accuracy([better, worse, equal]) == pytest.approx(((2 * sure + 0.5) / 3, 0.5))
    with pytest.raises(UserError):
        ceiling_accuracy([])


def test_sft_records_carry_no_preference(directory):
    drawn = pairs(directory, "sft")
    _, realised = ceiling_accuracy(drawn)
    assert abs(realised - 0.5) < 4 * math.sqrt(0.25 / len(drawn))


def test_split_is_by_question(directory):
    """No prompt of the test split occurs in training."""
    trained = " ".join(p.prompt for name in ("sft", "preferences.train") for p in pairs(directory, name))
    asked = {p.prompt for p in pairs(directory, "preferences.test")}
    asked |= {json.loads(line)["prompt"] for line in (directory / "prompts.test.jsonl").open()}
    for prompt in asked:
        assert f"Human: {last_question(prompt)}\n" not in trained


def test_split_keeps_every_fact(directory):
    """Every fact of the test split is asked in other words in training."""

    def facts(name: str) -> set[tuple]:
        asked = (questions()[last_question(p.prompt)] for p in pairs(directory, name))
        return {(q.skill, *sorted(q.fact)) for q in asked}

    assert facts("preferences.test") <= facts("preferences.train")


def test_every_record_is_usable(directory):
    for name, count in (("sft", 600), ("preferences.train", 2500), ("preferences.test", 400)):
        report = DataReport()
        kept = list(read_preferences(directory / f"{name}.jsonl.gz", report))
        assert len(kept) == count and not report.files[0].dropped
        assert all(p.chosen.startswith(" ") and p.rejected.startswith(" ") for p in kept)


def test_seed_decides_the_bytes(tmp_path):
    """One seed writes the same bytes twice, and another seed writes others."""
    sizes = {"sft_records": 50, "train_pairs": 20, "test_pairs": 20, "test_prompts": 20}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / name, seed, **sizes)
        write_model(tmp_path / name, tmp_path / name, seed)
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert a == b
    assert len(a) == 8 and all(a[name] != c[name] for name in a if name.endswith((".gz", ".safetensors")))


def test_tokenizer(directory):
    """Digits stay single, every answer that is a word is one token, and any text survives a round trip."""
    tokenizer = Tokenizer.from_pretrained(directory / "base")
    assert [tokenizer.piece(i) for i in tokenizer.encode("12")] == ["1", "2"]
    for question in questions().values():
        assert question.skill == "sum" or len(tokenizer.encode(" " + question.answer[0])) == 1, question
    text = "Grüße, 世界!\n\nHuman: 3 + 4?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_id]) in ("", END_OF_TEXT)


def test_model_loads(directory):
    """The model directory loads, as a few million parameters that cover the vocabulary."""
    model = load_model(directory / "base")
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert model.config.vocab_size > max(Tokenizer.from_pretrained(directory / "base").encode("zebra, 99"))
