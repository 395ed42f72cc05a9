"""Where a reward is read: at the end of the text that the chat template writes, as transformers reads it."""

import json
import re
from pathlib import Path

import pytest
import torch

from minidpo.data import PairTokens, Prompt, Tokenizer
from minidpo.model import load_reward_model, save_model, save_reward_model
from minidpo.packing import pack
from minidpo.tools.sample import main as sample
from minidpo.tools.score import main as score
from minidpo.training.reward_scorer import RewardScorer
from record_files import GOOD, read, write
from runs import run_dpo, run_rm
from tiny import tiny_model, tiny_reward_model, write_tokenizer

pytest.importorskip("jinja2")

TURNS = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' + m['content'] + '<|im_end|>@' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# What stands after EOS: a newline in ChatML, Qwen and SmolLM, nothing in Llama 3.
TEMPLATES = {"newline": TURNS.replace("@", "\n"), "nothing": TURNS.replace("@", ""), "none": None}
ANSWERS = ["Yes, it is.", "No", "Yes, so it is", "no, no"]
TEXT = [{**GOOD, "prompt": f"{n} "} for n in range(6)]
SIZES = dict(vocab_size=310, eos_token_id=300)


def talk(answer: str, question: str = "Is it 0?") -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write_chat_tokenizer(path: Path, after: str) -> None:
    """Its pad is EOS, its template ends a turn with EOS and `after`, and it writes no BOS, as Qwen's."""
    write_tokenizer(path, ANSWERS)
    core = json.loads((path / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(core | {"post_processor": None}))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATES[after]}
    about |= {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "extra_special_tokens": ["<|im_start|>"]}
    (path / "tokenizer_config.json").write_text(json.dumps(about))


@pytest.fixture
def messages(tmp_path) -> Path:
    pairs = [(f"Is it {n}?", *both) for n in range(6) for both in (ANSWERS[:2], ANSWERS[2:])]
    records = ({"chosen": talk(yes, question), "rejected": talk(no, question)} for question, yes, no in pairs)
    return write(tmp_path / "messages.jsonl", *records)


@pytest.fixture
def chat(tmp_path, config, messages):
    """Writes a base model with such a tokenizer and returns the arguments of a run on the messages."""

    def write_base(after: str) -> list[str]:
        write_chat_tokenizer(tmp_path / "base", after)
        save_model(tiny_model(**SIZES), tmp_path / "base")
        return config(model__path=f'"{tmp_path / "base"}"', data__train=f'["{messages}"]', data__eval_pairs=2)

    return write_base


@pytest.fixture
def scored(tmp_path, messages):
    """The rewards that `score` gives to chosen and rejected."""

    def run(directory: Path) -> list[list[float]]:
        out = tmp_path / "scores.jsonl"
        score(["--reward-model", str(directory), "--data", str(messages), "--out", str(out)])
        return [[row["chosen_reward"], row["rejected_reward"]] for row in read(out)]

    return run


@pytest.mark.parametrize(("after", "last"), [("newline", "Ċ"), ("nothing", "<|im_end|>")])
def test_end(chat, scored, tmp_path, after, last):
    """A reward is read at the last token of the template's text; of a text without a template at EOS."""
    run_rm(chat(after))
    final = tmp_path / "out" / "final"
    tokenizer = Tokenizer.from_pretrained(final)
    template = tokenizer.chat_template()
    ids = tokenizer.encode(template.render(talk(ANSWERS[0]), False), False)
    assert tokenizer.piece(ids[-1]) == last
    batch = pack(PairTokens.from_responses([ids[:1]], [[ids[1:]]]), scored=0)
    reward = load_reward_model(final).forward_packed(batch)[0].item()
    assert scored(final)[0][0] == pytest.approx(reward, abs=1e-6)
    scorer = RewardScorer(str(final), torch.device("cpu"))
    prompt = Prompt(template.render(talk("")[:1], True), add_special_tokens=False, tail=template.tail)
    assert scorer.rewards([prompt], [ANSWERS[0]])[0] == pytest.approx(reward, abs=1e-6)
    (text,) = scorer.tokenizer.encode_responses([Prompt("a")], [[ANSWERS[0]]])[1][0]
    assert text[-1] == tokenizer.eos_id


@pytest.mark.parametrize("template", ["newline", "nothing", "chatml", "hh"])
def test_transformers(chat, scored, tmp_path, capsys, template):
    """transformers reads the same rewards of the messages, alone and in padded batches; the margin is theirs."""
    transformers = pytest.importorskip("transformers")
    own = template in TEMPLATES
    run_rm(chat(template if own else "newline"), f"--data.template={'model' if own else template}")
    final = tmp_path / "out" / "final"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(final).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    texts = [tokenizer.apply_chat_template(talk(answer), tokenize=False) for answer in ANSWERS[:2]]
    with torch.no_grad():
        padded = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0].tolist()
        alone = [theirs(**tokenizer(text, return_tensors="pt")).logits.item() for text in texts]
    assert alone == pytest.approx(padded, abs=1e-5)
    capsys.readouterr()
    rewards = scored(final)
    assert rewards[0] == pytest.approx(padded, abs=1e-5)
    printed = re.search(r"^  all .* (-?\d+\.\d{4}) ±", capsys.readouterr().out, re.M)[1]
    margins = [chosen - rejected for chosen, rejected in rewards]
    assert float(printed) == pytest.approx(sum(margins) / len(margins), abs=1e-4)


@pytest.mark.parametrize("data", ["messages", "text"])
def test_trained_on_text(chat, scored, tmp_path, capsys, data):
    """A reward model that has a chat template but was trained on text is told where messages are read."""
    arguments = chat("nothing")
    if data == "text":
        arguments.append(f"--data.train={write(tmp_path / 'text.jsonl', *TEXT)}")
    run_rm(arguments, "--optim.max_steps=1")
    for directory in ("final", "checkpoints/step-1"):
        scored(tmp_path / "out" / directory)
        assert ("the reward model was trained on text" in capsys.readouterr().out) == (data == "text")


@pytest.mark.parametrize("command", ["score", "sample", "train_dpo"])
@pytest.mark.parametrize(
    ("own", "template", "told"),
    [
        ("nothing", "model", ()),
        ("newline", "model", ("sample", "train_dpo")),  # score writes messages by the reward model's own
        ("none", "hh", ()),  # a reward model of text, and messages written like text
        ("none", "chatml", ("score", "sample", "train_dpo")),
        ("newline", "text", ()),  # no messages
    ],
)
def test_other_template(chat, messages, tmp_path, capsys, command, own, template, told):
    """A reward model with another template than that of the messages is told wherever it is used."""
    arguments, base, scorer = chat("nothing"), str(tmp_path / "base"), str(tmp_path / "scorer")
    write_chat_tokenizer(tmp_path / "scorer", own)
    save_reward_model(tiny_reward_model(**SIZES), tmp_path / "scorer")
    option = ["--template", template]
    if template == "text":
        messages, option = write(tmp_path / "text.jsonl", *TEXT), []
    given = ["--reward-model", scorer, "--data", str(messages), "--out", str(tmp_path / "o.jsonl"), *option]
    if command == "score":
        score(given)
    elif command == "sample":
        sample(["--model", base, "--n", "2", "--max-new-tokens", "3", *given])
    else:
        sampled = ["--eval.samples=2", "--eval.max_new_tokens=3", f"--eval.reward_model={scorer}"]
        of_data = [f"--data.train={messages}", *(f"--data.template={name}" for name in option[1:])]
        run_dpo(arguments, *sampled, *of_data, "--optim.max_steps=1")
    assert ("the reward model has another chat template" in capsys.readouterr().out) == (command in told)
