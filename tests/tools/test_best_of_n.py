"""Best of n: the reward model's own scores choose, and best and worst make a preference file that trains."""

import json
import re
import shutil

import pytest

from minidpo.data import Prompt, Tokenizer, read_preferences
from minidpo.errors import UserError
from minidpo.model import save_reward_model
from minidpo.tools import sample as command
from minidpo.tools.best_of_n import Sample, best_and_worst, write_pairs
from minidpo.tools.sample import main as sample
from minidpo.tools.score import main as score
from tiny import tiny_reward_model, write_tokenizer


@pytest.fixture(scope="session")
def reward_model(world) -> str:
    """With a tokenizer of its own: rewards are of texts, not of the sampler's ids."""
    texts = [pair.prompt + pair.rejected for pair in read_preferences(world / "pairs.jsonl.gz")]
    write_tokenizer(world / "scorer", texts, vocabulary=280)
    save_reward_model(tiny_reward_model(5, vocab_size=280), world / "scorer")
    return str(world / "scorer")


@pytest.fixture
def best_of_n(world, reward_model, tmp_path, capsys):
    """Samples and writes both files; returns the samples, the pairs file and what was printed."""

    def run(*arguments: str, n: int = 5) -> tuple[list[dict], list[dict], str]:
        out, pairs = tmp_path / "samples.jsonl", tmp_path / "best.jsonl"
        capsys.readouterr()
        sample(
            [
                "--model",
                str(world / "model"),
                "--reward-model",
                reward_model,
                "--n",
                str(n),
                "--device",
                "cpu",
            ]
            + ["--max-new-tokens", "6", "--out", str(out), "--pairs-out", str(pairs), *arguments]
        )
        rows = [[json.loads(line) for line in file.read_text().splitlines()] for file in (out, pairs)]
        return rows[0], rows[1], capsys.readouterr().out

    return run


@pytest.fixture
def prompts(tmp_path):
    """Three prompts in the forms that --data reads."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "\\n\\nHuman: a cat?\\n\\nAssistant:"}\n\n'
        '{"prompt": "the dog", "chosen": 3}\n'
        '{"chosen": "\\n\\nHuman: yes\\n\\nAssistant: no", "rejected": "else"}\n'
    )
    return ["--data", str(path)]


def test_rewards_of_score(best_of_n, prompts, reward_model, tmp_path):
    """The rewards are those of `score` for the same texts."""
    samples, _, _ = best_of_n(*prompts)
    assert len(samples) == 15
    spoken = [row for row in samples if row["text"].strip()]
    data, out = tmp_path / "all.jsonl", tmp_path / "scores.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": r["prompt"], "chosen": r["text"], "rejected": " x"}) + "\n" for r in spoken
        )
    )
    score(["--reward-model", reward_model, "--data", str(data), "--out", str(out), "--device", "cpu"])
    theirs = [json.loads(line)["chosen_reward"] for line in out.read_text().splitlines()]
    assert [row["reward"] for row in spoken] == pytest.approx(theirs, abs=1e-5)
    assert len({round(reward, 4) for reward in theirs}) > 10


def test_best(best_of_n, prompts):
    """The best is printed and all are written in order."""
    samples, _, text = best_of_n(*prompts)
    assert [(row["prompt_index"], row["sample"]) for row in samples] == [
        (p, k) for p in range(3) for k in range(5)
    ]
    assert [row["prompt"] for row in samples[::5]] == [
        "\n\nHuman: a cat?\n\nAssistant:",
        "the dog",
        "\n\nHuman: yes\n\nAssistant:",
    ]
    best_rewards = []
    for p in range(3):
        mine = samples[5 * p : 5 * p + 5]
        best = max(mine, key=lambda row: row["reward"])
        assert [row for row in mine if row["best"]] == [best]
        assert f"--- prompt {p}, best of 5: reward {best['reward']:.4f}" in text
        assert best["text"] in text
        best_rewards.append(best["reward"])
    assert f"of the best of 5 {sum(best_rewards) / 3:.4f} ±" in text
    assert "log n - (n-1)/n = 0.8094" in text


def test_out_without_a_reward_model(best_of_n, world, prompts, tmp_path, capsys):
    """Without a reward model every sample is kept too."""
    scored, _, _ = best_of_n(*prompts)
    out = tmp_path / "plain.jsonl"
    plain = ["--model", str(world / "model"), *prompts, "--n", "5", "--max-new-tokens", "6"]
    sample([*plain, "--device", "cpu", "--out", str(out)])
    assert f"15 samples written to {out}" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == [{k: v for k, v in row.items() if k not in ("reward", "best")} for row in scored]


def test_text(best_of_n, world, prompts, capsys):
    """A sample is the text that follows its prompt, blanks included."""
    samples, _, _ = best_of_n(*prompts, "--seed", "4")
    plain = ["--model", str(world / "model"), *prompts, "--n", "5", "--max-new-tokens", "6", "--seed", "4"]
    sample([*plain, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert any(row["text"] != row["text"].strip() for row in samples)
    for row in samples:
        assert f"--- prompt {row['prompt_index']}, sample {row['sample']}\n{row['text']}\n" in printed


def test_pairs(best_of_n, prompts, tmp_path):
    """Best and worst are a preference file."""
    samples, pairs, text = best_of_n(*prompts)
    read = list(read_preferences(tmp_path / "best.jsonl"))
    assert len(read) == len(pairs) == 3
    assert "3 pairs of best and worst" in text
    for p, pair in enumerate(read):
        mine = [row for row in samples[5 * p : 5 * p + 5] if row["text"].strip()]
        ranked = sorted(mine, key=lambda row: row["reward"])
        assert (pair.prompt, pair.chosen, pair.rejected) == (
            mine[0]["prompt"],
            ranked[-1]["text"],
            ranked[0]["text"],
        )
        assert pair.margin == pytest.approx(ranked[-1]["reward"] - ranked[0]["reward"])


def test_nothing_to_prefer(best_of_n, prompts, world, reward_model, tmp_path):
    """Prompts with nothing to prefer, such as greedy samples, are skipped and counted."""
    with pytest.raises(UserError, match="no prompt has two samples of different reward"):
        best_of_n(*prompts, "--temperature", "0")
    a, b, blank = (
        Sample(Prompt("p"), text, True, reward) for text, reward in ((" a", 1.0), (" b", 2.0), (" \n", 9.0))
    )
    assert best_and_worst([a, blank, b, a]) == (b, a)
    tied = Sample(Prompt("p"), " c", True, 1.0)
    assert best_and_worst([a, tied]) is None
    assert best_and_worst([a, a, blank]) is None
    assert best_and_worst([blank, blank]) is None
    rounded = Sample(Prompt("p"), " a", True, 1.0 + 1e-7)
    assert best_and_worst([a, rounded]) is None
    write_pairs(tmp_path / "some.jsonl", [[a, b], [a, tied], [a, a]])
    assert len((tmp_path / "some.jsonl").read_text().splitlines()) == 1


def test_cut_off(best_of_n, prompts):
    """Samples that were cut off are told."""
    samples, _, text = best_of_n(*prompts)
    cut = sum(not row["ended"] for row in samples)
    assert cut > 0
    assert re.search(rf"^{cut} of 15 samples were cut off", text, re.M)


def test_no_room(best_of_n, tmp_path):
    """Prompts that leave no room are left out and told."""
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"prompt": "a cat " * 200}) + '\n{"prompt": "a cat"}\n')
    samples, _, text = best_of_n("--data", str(data))
    assert {row["prompt"] for row in samples} == {"a cat"}
    assert "1 of 2 prompts left out" in text
    data.write_text(json.dumps({"prompt": "a cat " * 200}) + "\n")
    with pytest.raises(UserError, match="no prompt leaves room for --max-new-tokens 6"):
        best_of_n("--data", str(data))


def test_other_template(best_of_n, prompts, reward_model, tmp_path):
    """A reward model of another template is told where a template was used."""
    scorer = tmp_path / "chatty scorer"
    shutil.copytree(reward_model, scorer)
    template = Tokenizer.from_pretrained(scorer).chat_template("chatml").to_keep
    (scorer / "chat_template.jinja").write_text(template)
    asked, warning = ("--reward-model", str(scorer), "--human", "a cat?"), "has another chat template"
    assert warning in best_of_n(*asked, "--template", "hh")[2]
    assert warning not in best_of_n(*asked, "--template", "chatml")[2]
    assert warning not in best_of_n("--reward-model", str(scorer), *prompts)[2]  # of text
    assert warning not in best_of_n("--human", "a cat?", "--template", "hh")[2]  # one without a template


@pytest.mark.parametrize("kind", ["model", "hh", "chatml"])
def test_messages(best_of_n, world, tmp_path, monkeypatch, kind):
    """Pairs train on the ids that were sampled from and scored: in messages if the model has a template of
    its own, else in text, which needs no setting of a run."""
    marks = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    marks += "{% if add_generation_prompt %}<assistant> {% endif %}"
    directory = tmp_path / "chatty"
    shutil.copytree(world / "model", directory)
    (directory / "chat_template.jinja").write_text(marks)
    asked = [{"role": "user", "content": "a cat?"}]
    data = tmp_path / "chat.jsonl"
    conversation = {"prompt": "a cat?", "chosen": [*asked, {"role": "assistant", "content": "yes"}]}
    data.write_text("".join(json.dumps(record) + "\n" for record in ({"prompt": asked}, conversation)))
    sampled, real = [], command.generate

    def generate(model, prompts, *rest, **named):
        completions = real(model, prompts, *rest, **named)
        sampled.extend(zip(prompts, completions, strict=True))
        return completions

    monkeypatch.setattr(command, "generate", generate)
    samples, pairs, _ = best_of_n("--model", str(directory), "--data", str(data), "--template", kind)
    assert all((row["prompt"] == asked) == (kind == "model") for row in (*samples, *pairs))
    tokenizer = Tokenizer.from_pretrained(directory)
    texts = {row["text"] for row in samples}
    for pair in read_preferences(tmp_path / "best.jsonl", template=tokenizer.chat_template()):
        ids = tokenizer.encode_pair(pair)
        assert {pair.chosen, pair.rejected} <= texts
        assert ids.prompt in [prompt for prompt, _ in sampled]


def test_human(world, monkeypatch, capsys):
    """A question is put by the template that is asked for."""
    asked = []
    monkeypatch.setattr(command, "generate", lambda model, ids, *rest, **named: asked.extend(ids) or ids)
    tokenizer = Tokenizer.from_pretrained(world / "model")
    for template in ([], ["--template", "hh"], ["--template", "chatml"]):
        sample(["--model", str(world / "model"), "--human", "a cat?", "--device", "cpu", *template])
    hh = tokenizer.encode("\n\nHuman: a cat?\n\nAssistant:")
    chatml = tokenizer.encode("<|im_start|>user\na cat?<|im_end|>\n<|im_start|>assistant\n")
    assert asked == [hh, hh, chatml]


def test_without_a_reward_model(world, prompts, capsys):
    """Without a reward model every sample of every record is printed."""
    sample(
        ["--model", str(world / "model"), *prompts, "--n", "2", "--max-new-tokens", "3", "--device", "cpu"]
    )
    assert capsys.readouterr().out.count("--- prompt") == 6


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ('{"chosen": "no turn in it"}', ":1: no prompt; "),
        ('{"prompt": [{"role": "user", "content": "a"}]}', "no chat_template in .*--template hh"),
        ('{"prompt": [{"role": "user"}]}', ":1: a message in 'prompt' has no text under 'content'"),
        ('{"chosen": [{"role": "assistant", "content": "a"}]}', ":1: no prompt; "),
        ('{"prompt": "a", "chosen": [{"role": "user", "content": "a"}]}', ":1: no prompt; "),
        ('{"prompt": ""}', ":1: no prompt; "),
        ('{"prompt": "\\ud800"}', "give whole characters"),
        ("{", ":1: not JSON in UTF-8"),
        ("", "no prompt in the file"),
    ],
)
def test_no_prompt(best_of_n, tmp_path, record, says):
    """A record without a prompt is refused with its line."""
    (tmp_path / "p.jsonl").write_text(record)
    with pytest.raises(UserError, match=says):
        best_of_n("--data", str(tmp_path / "p.jsonl"))
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_options(world, best_of_n, tmp_path):
    """Options that do not go together are refused."""
    prompt = ["--prompt", "a"]
    for arguments, says in (
        (["--out", str(tmp_path / "no" / "s.jsonl")], "--out .*: a file in a directory that exists"),
        (["--pairs-out", str(tmp_path)], "--pairs-out .*: a file in a directory that exists"),
        (["--pairs-out", str(tmp_path / "samples.jsonl")], "give two files"),
        (["--reward-model", "nowhere"], "nowhere"),
        (["--reward-model", str(world / "model")], "score.weight"),
    ):
        with pytest.raises(UserError, match=says):
            best_of_n(*prompt, *arguments)
    with pytest.raises(UserError, match="--n is 1; give at least 2"):
        best_of_n(*prompt, n=1)
    with pytest.raises(UserError, match="--pairs-out goes with --reward-model"):
        sample(["--model", str(world / "model"), *prompt, "--pairs-out", str(tmp_path / "p.jsonl")])
    assert not list(tmp_path.iterdir())
