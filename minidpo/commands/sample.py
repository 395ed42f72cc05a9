"""`python -m minidpo sample`: completions of one prompt, of every line of a file, or of every record of one.

--out keeps all samples. With --reward-model the best of --n is printed, by that model's reward, and --pairs-out
makes a preference file of the best and the worst of each prompt.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from minidpo.chat import TEMPLATES, ChatTemplate
from minidpo.commands.best_of_n import Sample, show_all, show_best, write_pairs, write_samples
from minidpo.dataset import require_fit
from minidpo.device import choose_device
from minidpo.errors import UserError
from minidpo.files import require_file, require_place
from minidpo.formats import BadRecord, Prompt, prompt_of
from minidpo.generate import Sampling, generate
from minidpo.hf_config import read_config
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
        "--human",
        metavar="TEXT",
        help="a question, put as \\n\\nHuman: TEXT\\n\\nAssistant: or by --template",
    )
    prompt.add_argument("--prompts-file", metavar="FILE", help="one prompt a line, \\n read as a line break")
    prompt.add_argument(
        "--data",
        metavar="FILE",
        help="records (.jsonl, .json) with a `prompt` in text or messages, or dialogues",
    )
    parser.add_argument(
        "--template", choices=TEMPLATES, help="of messages (default model) and of --human (default hh)"
    )
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--reward-model", metavar="DIR", help="print the best of the n samples by its reward")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="every sample as a JSON line, with its reward if there is a reward model",
    )
    parser.add_argument(
        "--pairs-out", metavar="FILE", help="with a reward model: best and worst as a preference file"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    _check(options)

    config, tokenizer = read_config(Path(options.model)), Tokenizer.from_directory(options.model)
    require_fit("model", config, tokenizer, 1)
    template = tokenizer.chat_template(options.template or ("hh" if options.human is not None else "model"))
    prompts = _prompts(options, template)
    device = choose_device(options.device)
    model = load_model(options.model, device=device)
    judge = Judge(options.reward_model, device) if options.reward_model else None
    if judge and (options.template or any(prompt.messages for prompt in prompts)):
        judge.compare_template(template)
    prompts = _that_fit(prompts, options.max_new_tokens, model.config.max_length, tokenizer, judge)
    progress = Progress("sampling", len(prompts) * options.n, "completions")
    try:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
        ids = [tokenizer.prompt_ids(prompt) for prompt in prompts for _ in range(options.n)]
        completions = generate(
            model, ids, sampling, tokenizer.eos_id, options.seed, progress=progress.advance
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    progress.clear()
    samples = [
        Sample(prompts[i // options.n], text_after(tokenizer, *both), both[1][-1] == tokenizer.eos_id)
        for i, both in enumerate(zip(ids, completions, strict=True))
    ]
    if judge:
        rewards = judge.rewards([s.prompt for s in samples], [s.text for s in samples])
        samples = [replace(sample, reward=reward) for sample, reward in zip(samples, rewards, strict=True)]
    by_prompt = [samples[i : i + options.n] for i in range(0, len(samples), options.n)]
    if judge:
        show_best(by_prompt)
    else:
        show_all(by_prompt)
    if options.out:
        write_samples(Path(options.out), by_prompt)
    if options.pairs_out:
        write_pairs(Path(options.pairs_out), by_prompt)


def _that_fit(
    prompts: list[Prompt], new_tokens: int, limit: int, tokenizer: Tokenizer, judge: Judge | None
) -> list[Prompt]:
    """The prompts that leave room for `new_tokens` in the model, and with EOS in the reward model."""
    fit = [
        prompt
        for prompt in prompts
        if len(tokenizer.prompt_ids(prompt)) + new_tokens <= limit
        and (not judge or judge.room(prompt) > new_tokens)
    ]
    if not fit:
        raise UserError(
            f"no prompt leaves room for --max-new-tokens {new_tokens}: the model takes {limit} tokens"
            + (f", the reward model {judge.max_length}" if judge else "")
        )
    if len(fit) < len(prompts):
        say(
            f"{len(prompts) - len(fit)} of {len(prompts)} prompts left out: no room for {new_tokens} more tokens"
        )
    return fit


def _check(options: argparse.Namespace) -> None:
    if options.n < 1:
        raise UserError(f"--n {options.n}; at least 1 sample is needed")
    if options.reward_model and options.n < 2:
        raise UserError(f"--reward-model chooses among samples, and --n is {options.n}; give at least 2")
    if options.pairs_out and not options.reward_model:
        raise UserError("--pairs-out goes with --reward-model")
    for option, path in (("--out", options.out), ("--pairs-out", options.pairs_out)):
        if path:
            require_place(option, path)
    if options.template and options.human is None and not options.data:
        raise UserError("--template is for messages and --human; a prompt in text is taken as it is")
    if options.out and options.out == options.pairs_out:
        raise UserError(f"--out and --pairs-out are both {options.out}; give two files")


def _prompts(options: argparse.Namespace, template: ChatTemplate) -> list[Prompt]:
    if options.data:
        prompts = []
        for line, record in read_records(Path(options.data)):
            try:
                if isinstance(record, BadRecord):
                    raise record
                prompts.append(prompt_of(record, template))
            except BadRecord as bad:
                raise UserError(f"{options.data}:{line}: {bad}") from None
        if not prompts:
            raise UserError(f"{options.data}: no record in the file; one prompt a record is needed")
        return prompts
    if options.prompts_file:
        file = require_file(Path(options.prompts_file), "a text file with one prompt a line is needed")
        try:
            texts = [unescaped(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None
        if not texts:
            raise UserError(f"{file}: no prompt in it; one a line is needed")
        return [Prompt(text) for text in texts]
    if options.human is not None:
        try:
            return [Prompt.of_messages([{"role": "user", "content": options.human}], template)]
        except BadRecord as bad:
            raise UserError(f"--human: {bad.kind}") from None
    return [Prompt(unescaped(options.prompt))]


def unescaped(text: str) -> str:
    """Text as typed in a shell, its \\n read as line breaks."""
    return text.replace("\\n", "\n")
