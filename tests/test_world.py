"""The demo's world: its rule judges right, its labels are what they claim to be, its test is unseen."""

import json
import math
from pathlib import Path

import pytest

from minidpo.commands import world
from minidpo.commands.world import ceiling_accuracy, judge, questions, true_reward
from minidpo.commands.world_files import END_OF_TEXT, write_model, write_world
from minidpo.data import DataReport, PreferencePair, read_preferences
from minidpo.errors import UserError
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model

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
        (
            SUM,
            " Sure! 2 plus 3 is 5.",
            False,
            True,
            6,
        ),  # names other numbers: a list of all of them is no answer
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
def test_judge_is_right_on_hand_written_answers(prompt, response, correct, courteous, length):
    judged = judge(prompt, response)
    assert judged[:3] == (correct, courteous, length)
    reward = world.CORRECT * correct + world.COURTEOUS * courteous - world.WORD_COST * length
    assert judged.reward == true_reward(prompt, response) == reward


@pytest.mark.parametrize("prompt", ["", "\n\nHuman: Why?\n\nAssistant:", "\n\nHuman: What is 2 + 3?"])
def test_judge_refuses_a_prompt_of_another_world(prompt):
    with pytest.raises(UserError, match="demo world"):
        judge(prompt, " It is 5.")


def test_phrases_around_an_answer_name_no_answer():
    phrases = " ".join(
        world.POLITE + world.POLITE_CLOSINGS + world.GRUMPY + world.RAMBLINGS + world.STATEMENTS
    )
    for question in questions().values():
        prompt = f"\n\nHuman: {question.text}\n\nAssistant:"
        assert judge(prompt, phrases.replace("{}", "") + " " + ", ".join(question.answer)).correct


def test_empirical_agreement_of_labels_with_r_star_is_the_ceiling_within_binomial_error(directory):
    drawn = pairs(directory, "preferences.train")
    ceiling = ceiling_accuracy(drawn)
    assert 0.8 < ceiling.expected < 0.95
    error = math.sqrt(ceiling.expected * (1 - ceiling.expected) / len(drawn))
    assert abs(ceiling.realised - ceiling.expected) < 4 * error


def test_ceiling_by_hand():
    better = PreferencePair(SUM, " It is 5.", " It is 4.")
    worse = PreferencePair(SUM, " It is 4.", " It is 5.")
    equal = PreferencePair(SUM, " It is 4.", " It is 6.")
    sure = 1 / (1 + math.exp(-world.CORRECT))
    assert ceiling_accuracy([better, worse, equal]) == pytest.approx(((2 * sure + 0.5) / 3, 0.5))
    with pytest.raises(UserError):
        ceiling_accuracy([])


def test_supervised_records_carry_no_preference(directory):
    drawn = pairs(directory, "sft")
    realised = ceiling_accuracy(drawn).realised
    assert abs(realised - 0.5) < 4 * math.sqrt(0.25 / len(drawn))


def test_no_prompt_of_the_test_split_occurs_in_training(directory):
    trained = " ".join(p.prompt for name in ("sft", "preferences.train") for p in pairs(directory, name))
    asked = {p.prompt for p in pairs(directory, "preferences.test")}
    asked |= {json.loads(line)["prompt"] for line in (directory / "prompts.test.jsonl").open()}
    for prompt in asked:
        assert f"Human: {last_question(prompt)}\n" not in trained


def test_every_fact_of_the_test_split_is_asked_otherwise_in_training(directory):
    def facts(name: str) -> set[tuple]:
        asked = (questions()[last_question(p.prompt)] for p in pairs(directory, name))
        return {(q.skill, *sorted(q.fact)) for q in asked}

    assert facts("preferences.test") <= facts("preferences.train")


def test_every_record_is_a_usable_pair(directory):
    for name, count in (("sft", 600), ("preferences.train", 2500), ("preferences.test", 400)):
        report = DataReport()
        kept = list(read_preferences(directory / f"{name}.jsonl.gz", report))
        assert len(kept) == count and not report.files[0].dropped
        assert all(p.chosen.startswith(" ") and p.rejected.startswith(" ") for p in kept)


def test_one_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    sizes = {"sft_records": 50, "train_pairs": 20, "test_pairs": 20, "test_prompts": 20}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_world(tmp_path / name, seed, **sizes)
        write_model(tmp_path / name, tmp_path / name, seed)
    a, b, c = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in "abc")
    assert a == b
    assert len(a) == 8 and all(a[name] != c[name] for name in a if name.endswith((".gz", ".safetensors")))


def test_tokenizer_splits_digits_gives_each_answer_word_one_token_and_decodes_any_text(directory):
    tokenizer = Tokenizer.from_directory(directory / "base")
    assert [tokenizer.piece(i) for i in tokenizer.encode("12")] == ["1", "2"]
    for question in questions().values():
        assert question.skill == "sum" or len(tokenizer.encode(" " + question.answer[0])) == 1, question
    text = "Grüße, 世界!\n\nHuman: 3 + 4?"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eos_id]) in ("", END_OF_TEXT)


def test_model_directory_loads_as_a_few_million_parameters(directory):
    model = load_model(directory / "base")
    assert 2e6 < sum(parameter.numel() for parameter in model.parameters()) < 5e6
    assert model.config.vocab_size > max(Tokenizer.from_directory(directory / "base").encode("zebra, 99"))
