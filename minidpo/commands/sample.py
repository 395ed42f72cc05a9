"""`python -m minidpo sample`: completions of one prompt, of every line of a file, or of every record of one.

With --reward-model the best of --n samples is printed, by that model's reward; --out keeps all of them, and
--pairs-out makes a preference file of the best and the worst of each prompt.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from minidpo.commands.best_of_n import Sample, show, write_pairs, write_samples
from minidpo.dataset import require_fit
from minidpo.device import choose_device
from minidpo.errors import UserError
from minidpo.files import require_file, require_place
from minidpo.formats import ASSISTANT, BadRecord
from minidpo.generate import Sampling, generate
from minidpo.judge import Judge, text_after
from minidpo.metrics import Progress, say
from minidpo.records import read_records
from minidpo.tokenizer import Tokenizer
from minidpo.weights import load_model


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m minidpo sample", description=__doc__)
    parser.add_argument("--model", metavar="DIR", required=True, help="Hugging Face model directory")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to continue, exactly as given (\\n is read as a line break)")
    prompt.add_argument(
        "--human", metavar="TEXT", help="a question, put as \\n\\nHuman: TEXT\\n\\nAssistant:"
    )
    prompt.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, \\n read as a line break")
    prompt.add_argument(
        "--data", metavar="FILE", help="records (.jsonl, .json) with a `prompt` in text, or HH dialogues"
    )
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--reward-model", metavar="DIR", help="print the best of the n samples by its reward")
    parser.add_argument(
        "--out", metavar="FILE", help="with it: every sample and its reward, one JSON line each"
    )
    parser.add_argument("--pairs-out", metavar="FILE", help="with it: best and worst as a preference file")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    _check(options)

    texts = _prompts(options)
    device = choose_device(options.device)
    model = load_model(options.model, device=device)
    tokenizer = Tokenizer.from_directory(options.model)
    require_fit("model", model.config, tokenizer, 1)
    judge = Judge(options.reward_model, device) if options.reward_model else None
    texts = _that_fit(texts, options.max_new_tokens, model.config.max_length, tokenizer, judge)
    progress = Progress("sampling", len(texts) * options.n, "completions")
    try:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
        prompts = [tokenizer.encode(text) for text in texts for _ in range(options.n)]
        completions = generate(
            model, prompts, sampling, tokenizer.eos_id, options.seed, progress=progress.advance
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    progress.clear()
    if judge:
        _best_of_n(options, judge, tokenizer, texts, prompts, completions)
        return
    for i, completion in enumerate(completions):
        if len(completions) > 1:
            print(f"--- prompt {i // options.n}, sample {i % options.n}")
        print(tokenizer.decode(completion))


def _that_fit(
    texts: list[str], new_tokens: int, limit: int, tokenizer: Tokenizer, judge: Judge | None
) -> list[str]:
    """The prompts that leave room for `new_tokens` in the model, and with EOS in the reward model."""
    fit = [
        text
        for text in texts
        if len(tokenizer.encode(text)) + new_tokens <= limit and (not judge or judge.room(text) > new_tokens)
    ]
    if not fit:
        raise UserError(
            f"no prompt leaves room for --max-new-tokens {new_tokens}: the model takes {limit} tokens"
            + (f", the reward model {judge.max_length}" if judge else "")
        )
    if len(fit) < len(texts):
        say(f"{len(texts) - len(fit)} of {len(texts)} prompts left out: no room for {new_tokens} more tokens")
    return fit


def _best_of_n(
    options: argparse.Namespace,
    judge: Judge,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
) -> None:
    samples = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = text_after(tokenizer, prompt, completion)
        samples.append(Sample(texts[i // options.n], text, completion[-1] == tokenizer.eos_id))
    rewards = judge.rewards([s.prompt for s in samples], [s.text for s in samples])
    samples = [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)]
    by_prompt = [samples[i : i + options.n] for i in range(0, len(samples), options.n)]
    show(by_prompt)
    if options.out:
        write_samples(Path(options.out), by_prompt)
        say(f"{len(samples)} samples written to {options.out}")
    if options.pairs_out:
        write_pairs(Path(options.pairs_out), by_prompt)


def _check(options: argparse.Namespace) -> None:
    if options.n < 1:
        raise UserError(f"--n {options.n}; at least 1 sample is needed")
    if options.reward_model and options.n < 2:
        raise UserError(f"--reward-model chooses among samples, and --n is {options.n}; give at least 2")
    for option in ("--out", "--pairs-out"):
        path = getattr(options, option[2:].replace("-", "_"))
        if path and not options.reward_model:
            raise UserError(f"{option} goes with --reward-model")
        if path:
            require_place(option, path)
    if options.out and options.out == options.pairs_out:
        raise UserError(f"--out and --pairs-out are both {options.out}; give two files")


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.data:
        texts = [_prompt_of(options.data, line, record) for line, record in read_records(Path(options.data))]
        if not texts:
            raise UserError(f"{options.data}: no record in the file; one prompt a record is needed")
        return texts
    if options.prompts_file:
        file = require_file(Path(options.prompts_file), "a text file with one prompt a line is needed")
        try:
            texts = [unescaped(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None
        if not texts:
            raise UserError(f"{file}: no prompt in it; one a line is needed")
        return texts
    if options.human is not None:
        return [f"\n\nHuman: {options.human}\n\nAssistant:"]
    return [unescaped(options.prompt)]


def _prompt_of(path: str, line: int, record: dict | BadRecord) -> str:
    """The prompt of one record: its text, or an HH dialogue through the last "\\n\\nAssistant:" of `chosen`."""
    if isinstance(record, BadRecord):
        raise UserError(f"{path}:{line}: {record}")
    prompt, chosen = record.get("prompt"), record.get("chosen")
    if prompt is None and isinstance(chosen, str):
        before, turn, _ = chosen.rpartition(ASSISTANT)
        prompt = before + turn
    if not (isinstance(prompt, str) and prompt):
        raise UserError(
            f"{path}:{line}: no prompt in text; give `prompt` as a string, or an HH dialogue as `chosen`"
        )
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{path}:{line}: {error}; give whole characters") from None
    return prompt


def unescaped(text: str) -> str:
    """Text as typed in a shell, its \\n read as line breaks."""
    return text.replace("\\n", "\n")
