"""A small world whose true reward is known: questions, responses of mixed quality, and noisy preferences.

Real preference data does not tell the best reachable accuracy. Here it is known, because labels are drawn:

    r*(x, y)    = CORRECT [y is correct] + COURTEOUS [y is courteous] - WORD_COST * words(y)       in nats
    P(a over b) = sigmoid(r*(x, a) - r*(x, b))                                                 Bradley-Terry

r* is a rule over the text of prompt and response, so it judges what a trained model writes as well as what is
drawn here.
"""

import functools
import itertools
import math
import random
import re
from collections.abc import Iterable
from typing import NamedTuple

from minidpo.data.preferences import ASSISTANT, PreferencePair
from minidpo.errors import UserError

HUMAN = "\n\nHuman: "
CORRECT, COURTEOUS, WORD_COST = 4.0, 4.0, 0.3  # nats; a needless sentence undoes most of a polite one

POLITE = ("Sure!", "Of course!", "Happy to help!", "Good question!")
GRUMPY = ("Ugh.", "Whatever.", "Not again.", "Who cares?")
STATEMENTS = ("It is {}.", "The answer is {}.")
RAMBLINGS = (
    "People have asked this for ages.",
    "This reminds me of my dear uncle.",
    "Such things are never quite simple.",
)

LARGEST_ADDEND = 3
OPPOSITES = {"hot": "cold", "big": "small", "fast": "slow", "up": "down"}
FACTS = {
    "opposite": OPPOSITES | {answer: asked for asked, answer in OPPOSITES.items()},
    "colour": {"the sky": "blue", "grass": "green", "snow": "white", "coal": "black"},
    "city": {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo"},
    "pup": {"dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal"},
}
ASKING = ("What is {}?", "Tell me {}.", "Please name {}.", "Do you know {}?", "I forgot {}.")
ASKED = {
    "sum": ("{} + {}", "the sum of {} and {}"),
    "opposite": ("the opposite of {}", "the reverse of {}"),
    "colour": ("the colour of {}", "the usual colour of {}"),
    "city": ("the capital of {}", "the main city of {}"),
    "pup": ("the young of a {}", "the name of a young {}"),
}
# How often each kind of question is asked.
WEIGHTS = {"sum": 3, "opposite": 3, "colour": 2, "city": 2, "pup": 2}


class Question(NamedTuple):
    text: str
    skill: str
    fact: tuple[str, ...]  # what is asked, in whatever phrasing
    answer: str
    candidates: tuple[str, ...]  # the words that count as an answer; numbers always do


class Judgement(NamedTuple):
    correct: bool
    courteous: bool
    length: int  # words
    reward: float  # r*, nats


# --- the rule -----------------------------------------------------------------------------------------------


def judge(prompt: str, response: str) -> Judgement:
    """Judge a response by rule. `prompt` ends with "Assistant:" and asks one of this world's questions.

    Correct: the response names the right word or number, once, and no other candidate and no other number.
    Courteous: it has a polite phrase and no grumpy one.
    Raises `UserError` for a question that is not in this world.
    """
    question = questions().get(prompt.removesuffix(ASSISTANT).rpartition(HUMAN)[2])
    if question is None or not prompt.endswith(ASSISTANT):
        raise UserError(f"prompt {prompt!r}: its last question must be one of the demo world's")
    words = re.findall(r"\w+", response)
    correct = [word for word in words if word in question.candidates or word.isdigit()] == [question.answer]
    polite, grumpy = (any(phrase in response for phrase in phrases) for phrases in (POLITE, GRUMPY))
    courteous = polite and not grumpy
    length = len(response.split())
    reward = CORRECT * correct + COURTEOUS * courteous - WORD_COST * length
    return Judgement(correct, courteous, length, reward)


def reward_gap(prompt: str, first: str, second: str) -> float:
    """r*(x, first) - r*(x, second), in nats."""
    return judge(prompt, first).reward - judge(prompt, second).reward


def ceiling_accuracy(pairs: Iterable[PreferencePair]) -> tuple[float, float]:
    """The accuracy of r* itself, which no reward model beats but by luck: expected, and on the drawn labels.

    A label agrees with the sign of the difference in r* with probability sigmoid(|difference|). Where r* is
    equal, it counts as half right.
    """
    gaps = [reward_gap(pair.prompt, *pair.responses) for pair in pairs]
    expected = sum(sigmoid(abs(gap)) for gap in gaps) / len(gaps)
    # Responses of equal merit may differ by rounding.
    realised = sum(0.5 if abs(gap) < 1e-9 else float(gap > 0) for gap in gaps) / len(gaps)
    return expected, realised


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- questions ----------------------------------------------------------------------------------------------


@functools.cache
def questions() -> dict[str, Question]:
    """Every question of this world, by its text."""
    numbers = range(1, LARGEST_ADDEND + 1)
    asked: list[tuple[str, tuple[str, ...], str, tuple[str, ...]]] = [
        ("sum", (str(a), str(b)), str(a + b), ()) for a, b in itertools.product(numbers, repeat=2)
    ]
    for skill, facts in FACTS.items():
        for fact, answer in facts.items():
            # "The opposite of hot is cold" names one answer, so the word asked about is no candidate.
            asked.append((skill, (fact,), answer, tuple(word for word in facts.values() if word != fact)))
    all_questions = [
        Question(asking.format(what.format(*fact)), skill, fact, answer, candidates)
        for skill, fact, answer, candidates in asked
        for asking, what in itertools.product(ASKING, ASKED[skill])
    ]
    return {question.text: question for question in all_questions}


def split_questions(rng: random.Random) -> tuple[list[Question], list[Question]]:
    """Questions for training and for the test; no text is in both.

    A fact is asked in ten phrasings (2 + 3 also as 3 + 2); a third of them, drawn by chance, is for the test.
    """
    by_fact: dict[tuple[str, ...], list[Question]] = {}
    for question in questions().values():
        by_fact.setdefault((question.skill, *sorted(question.fact)), []).append(question)
    test = {q for same_fact in by_fact.values() for q in rng.sample(same_fact, len(same_fact) // 3)}
    return [q for q in questions().values() if q not in test], [q for q in questions().values() if q in test]


# --- drawing ------------------------------------------------------------------------------------------------


def sample_response(rng: random.Random, question: Question) -> str:
    """A response of mixed quality; each merit or fault is drawn independently."""
    sums = [str(n) for n in range(2, 2 * LARGEST_ADDEND + 1)]
    wrong = [word for word in question.candidates or sums if word != question.answer]
    named = question.answer if rng.random() < 0.7 else rng.choice(wrong)
    opening = rng.choice(rng.choices((POLITE, GRUMPY, ("",)), (4, 3, 3))[0])
    ramble = rng.choice(RAMBLINGS) if rng.random() < 0.4 else ""
    sentences = (opening, rng.choice(STATEMENTS).format(named), ramble)
    return "".join(" " + sentence for sentence in sentences if sentence)


def sample_prompt(rng: random.Random, pool: list[Question], earlier: list[Question]) -> tuple[str, Question]:
    """A prompt that asks a question of `pool`; one in five has an exchange on one of `earlier` before."""
    skill = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    question = rng.choice([q for q in pool if q.skill == skill])
    before = ""
    if rng.random() < 0.2:
        first = rng.choice(earlier)
        before = f"{HUMAN}{first.text}{ASSISTANT}{sample_response(rng, first)}"
    return f"{before}{HUMAN}{question.text}{ASSISTANT}", question


def sample_record(
    rng: random.Random, pool: list[Question], earlier: list[Question], labelled: bool
) -> dict[str, str]:
    """An HH-RLHF record: two different responses, in the order of a Bradley-Terry label or of chance."""
    prompt, question = sample_prompt(rng, pool, earlier)
    first = second = sample_response(rng, question)
    while second == first:
        second = sample_response(rng, question)
    gap = reward_gap(prompt, first, second) if labelled else 0.0
    chosen, rejected = (first, second) if rng.random() < sigmoid(gap) else (second, first)
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}
