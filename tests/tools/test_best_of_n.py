"""`python -m minidpo sample`, and best of n: a reward model's scores choose, and make a preference file."""

import re
import shutil

import pytest

from minidpo.data import Prompt, Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.model import Sampling, save_reward_model
from minidpo.tools import sample as command
from minidpo.tools.best_of_n import Sample, write_pairs
from minidpo.tools.score import main as score
from record_files import read, write
from tiny import edit_config, tiny_reward_model, write_tokenizer

# The question "a cat?" as each template puts it; the first two texts get a BOS.
HH = "<s>\n\nHuman: a cat?\n\nAssistant:"
CHATML = "<s><|im_start|>user\na cat?<|im_end|>\n<|im_start|>assistant\n"
OWN = "<user> a cat?<assistant> "
PROMPTS = ["\n\nHuman: a cat?\n\nAssistant:", "the dog", "\n\nHuman: yes\n\nAssistant:"]
ASKED = [{"role": "user", "content": "a cat?"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant> {% endif %}"


@pytest.fixture(scope="session")
def reward_model(world):
    """With a tokenizer of its own: rewards are of texts, not of the sampler's ids."""
    texts = [pair.prompt + pair.rejected for pair in read_preferences(world / "pairs.jsonl.gz")]
    write_tokenizer(world / "scorer", texts, vocabulary=280)
    save_reward_model(tiny_reward_model(5, vocab_size=280), world / "scorer")
    return world / "scorer"


@pytest.fixture
def prompts(tmp_path):
    """PROMPTS in the forms that --data reads, with a blank line."""
    records = {"prompt": PROMPTS[0]}, "", {"prompt": "the dog", "chosen": 3}, {"chosen": PROMPTS[2] + " no"}
    return write(tmp_path / "prompts.jsonl", *records)


@pytest.fixture
def sampled(world, capsys):
    """What `sample` prints."""

    def run(*arguments: object, model=world / "model") -> str:
        capsys.readouterr()  # What came before is not of this command.
        typed = ("--model", model, "--device", "cpu", "--max-new-tokens", 6, *arguments)
        command.main(list(map(str, typed)))
        return capsys.readouterr().out

    return run


@pytest.fixture
def best_of_n(sampled, reward_model, tmp_path):
    """The best of five: all samples, the pairs of best and worst, and what is printed."""

    def run(*arguments: object, **named) -> tuple[list[dict], list[dict], str]:
        files = tmp_path / "samples.jsonl", tmp_path / "best.jsonl"
        options = ("--reward-model", reward_model, "--n", 5, "--out", files[0], "--pairs-out", files[1])
        text = sampled(*options, *arguments, **named)
        return read(files[0]), read(files[1]), text

    return run


def test_best(best_of_n, prompts, reward_model, tmp_path):
    """All samples are written in order; of each prompt the best is printed, best and worst make a pair."""
    samples, pairs, text = best_of_n("--data", prompts)
    places = [(row["prompt"], row["prompt_index"], row["sample"]) for row in samples]
    assert places == [(prompt, p, k) for p, prompt in enumerate(PROMPTS) for k in range(5)]
    read_pairs, total = read_preferences(tmp_path / "best.jsonl"), 0.0
    for i, pair in enumerate(read_pairs):
        of_prompt = sorted(samples[5 * i : 5 * i + 5], key=lambda row: row["reward"])
        best = of_prompt[-1]
        assert [row["best"] for row in of_prompt] == [False, False, False, False, True]
        heading = f"--- prompt {i} ({PROMPTS[i]!r}), best of 5: reward {best['reward']:.4f}"
        assert heading in text and best["text"] in text
        worst, *_, best_spoken = (row for row in of_prompt if row["text"].strip())
        assert (pair.prompt, pair.chosen, pair.rejected) == (PROMPTS[i], best_spoken["text"], worst["text"])
        assert pair.margin == pytest.approx(best_spoken["reward"] - worst["reward"])
        total += best["reward"]
    assert len(pairs) == 3 and "3 pairs of best and worst" in text
    assert f"of the best of 5 {total / 3:.4f} ±" in text
    assert "log n - (n-1)/n = 0.8094" in text  # 1.6094 - 0.8
    cut = sum(not row["ended"] for row in samples)
    assert cut > 0 and re.search(rf"^{cut} of 15 samples were cut off", text, re.M)
    # The rewards are those of `score` for the same texts.
    spoken = [row for row in samples if row["text"].strip()]
    records = ({"prompt": row["prompt"], "chosen": row["text"], "rejected": " x"} for row in spoken)
    data, out = write(tmp_path / "all.jsonl", *records), tmp_path / "scores.jsonl"
    score(["--reward-model", str(reward_model), "--data", str(data), "--out", str(out), "--device", "cpu"])
    rewards = [row["chosen_reward"] for row in read(out)]
    assert [row["reward"] for row in spoken] == pytest.approx(rewards, abs=1e-5)
    assert len(set(rewards)) > 10


def test_without_a_reward_model(sampled, best_of_n, prompts, tmp_path):
    """Every sample is printed as it is, blanks included, and written without a reward."""
    (scored, _, _), out = best_of_n("--data", prompts, "--seed", 4), tmp_path / "plain.jsonl"
    text = sampled("--data", prompts, "--n", 5, "--out", out, "--seed", 4)
    assert read(out) == [{k: v for k, v in row.items() if k not in ("reward", "best")} for row in scored]
    assert any(row["text"] != row["text"].strip() for row in scored)
    for row in scored:
        named = f"--- prompt {row['prompt_index']} ({row['prompt']!r}), sample {row['sample']}"
        assert f"{named}\n{row['text']}\n" in text


def test_nothing_to_prefer(best_of_n, prompts, tmp_path):
    """Prompts whose samples are blank, tied or equal are skipped. A pair has what its prompt gave the template,
    so that training renders the same prompt."""
    prompt = Prompt("p", given={"tools": ["weather"], "effort": "low"})
    rewards = [(" a", 1.0), (" b", 2.0), (" \n", 9.0), (" c", 1.0), (" a", 1.0 + 1e-7)]
    a, b, blank, tied, rounded = (Sample(prompt, text, True, reward) for text, reward in rewards)
    none = [[a, tied], [a, a, blank], [blank, blank], [a, rounded]]
    write_pairs(tmp_path / "some.jsonl", [[a, blank, b, a], *none])
    (row,) = read(tmp_path / "some.jsonl")
    assert (row["chosen"], row["rejected"]) == (" b", " a")
    assert (row["tools"], row["chat_template_kwargs"]) == (["weather"], {"effort": "low"})
    with pytest.raises(UserError, match="no prompt's samples differ in reward; raise --n, --temperature"):
        best_of_n("--data", prompts, "--temperature", 0)


def test_no_room(best_of_n, sampled, tmp_path):
    """Prompts that leave no room are left out and told; indices are those of the file."""
    long = {"prompt": "a cat " * 200}
    samples, _, text = best_of_n("--data", write(tmp_path / "a.jsonl", long, {"prompt": "a cat"}))
    assert {(row["prompt"], row["prompt_index"]) for row in samples} == {("a cat", 1)}
    assert "1 of 2 prompts left out" in text
    with pytest.raises(UserError, match="no prompt leaves room for --max-new-tokens 6"):
        best_of_n("--data", write(tmp_path / "b.jsonl", long))
    # BOS and what is sampled fill the model; in the reward model an EOS has to fit, too.
    assert "left out" not in sampled("--prompt", "", "--max-new-tokens", 255, "--temperature", 0)
    with pytest.raises(UserError, match="--max-new-tokens 255: the model takes 256 tokens, the reward"):
        best_of_n("--prompt", "", "--max-new-tokens", 255)


@pytest.fixture
def chatty(world, tmp_path):
    """A copy of the model with a chat template of its own and three ids that end a response."""
    path = shutil.copytree(world / "model", tmp_path / "chatty")
    edit_config(path, lambda fields: fields.update(eos_token_id=[2, 5, 70]))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.mark.parametrize(
    ("own", "option", "asked"),
    [
        (False, [], HH),
        (False, ["--template", "chatml"], CHATML),
        (True, [], OWN),
        (True, ["--template", "hh"], HH),
        (True, ["--system", "Be brief."], f"<system> Be brief.{OWN}"),
        (False, ["--system", "Be brief."], HH.replace("<s>", "<s>Be brief.")),
    ],
)
def test_human(sampled, world, chatty, tmp_path, monkeypatch, own, option, asked):
    """A question is put by the model's own template, and as in HH if it has none; any EOS ends a response. How
    to sample is as typed."""
    directory, out, calls = chatty if own else world / "model", tmp_path / "samples.jsonl", []
    monkeypatch.setattr(command, "generate", lambda *given, **_: calls.append(given) or [[5]])
    how = ["--seed", 7, "--temperature", 0.5, "--top-p", 0.25]
    sampled("--human", "a cat?", *option, *how, "--out", out, model=directory)
    ((_, (ids,), sampling, stops, seed),) = calls
    assert Tokenizer.from_pretrained(directory).decode(ids, special_tokens=True) == asked
    assert stops == ({2, 5, 70} if own else {2}) and read(out)[0]["ended"] == own
    assert (sampling, seed) == (Sampling(6, 0.5, 0.25), 7)


@pytest.mark.parametrize(("kind", "asked"), [("model", OWN), ("hh", HH), ("chatml", CHATML)])
def test_messages(best_of_n, chatty, tmp_path, kind, asked):
    """Pairs train on the prompts that were sampled from: in messages if the model has a template of its own,
    else in text, which needs no setting of a run."""
    conversation = {"prompt": "a cat?", "chosen": [*ASKED, {"role": "assistant", "content": "yes"}]}
    data = write(tmp_path / "chat.jsonl", {"prompt": ASKED}, conversation)
    samples, pairs, _ = best_of_n("--data", data, "--template", kind, model=chatty)
    assert all((row["prompt"] == ASKED) == (kind == "model") for row in (*samples, *pairs))
    tokenizer, texts = Tokenizer.from_pretrained(chatty), {row["text"] for row in samples}
    for pair in read_preferences(tmp_path / "best.jsonl", template=tokenizer.chat_template()):
        assert {pair.chosen, pair.rejected} <= texts
        assert tokenizer.decode(tokenizer.encode_pairs([pair])[0].prompt, special_tokens=True) == asked


def test_prompts_file(sampled, world, tmp_path):
    """One prompt per line of \\n or \\r\\n, without a byte order mark; other separators stay. It is taken as it
    is, also where the model's run made a user's turn of every text."""
    file, out = tmp_path / "prompts.txt", tmp_path / "samples.jsonl"
    model = shutil.copytree(world / "model", tmp_path / "final")
    (tmp_path / "config.toml").write_text('data.text = "template"\n')
    file.write_bytes("\ufeffa\x0cb\x85c\r\n\r\nd\u2028e\rf\\ng\n".encode())
    sampled("--prompts-file", file, "--out", out, model=model)
    assert [row["prompt"] for row in read(out)] == ["a\x0cb\x85c", "d\u2028e\rf\ng"]


def test_nobody_reads(best_of_n, prompts, tmp_path, monkeypatch):
    """The files are written before anything is printed: whoever reads that may have gone."""

    def gone(*_):
        assert {"samples.jsonl", "best.jsonl"} <= {path.name for path in tmp_path.iterdir()}
        raise BrokenPipeError

    monkeypatch.setattr(command, "show_best", gone)
    with pytest.raises(BrokenPipeError):
        best_of_n("--data", prompts)
