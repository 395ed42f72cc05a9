"""`python -m minidpo sample`: responses to one prompt, to every line of a file, or to every record of one.

--out keeps all samples. With --reward-model the best of --n is printed, by that model's reward, and
--pairs-out makes a preference file of the best and the worst of each prompt.
"""

import argparse
from collections.abc import Iterator
from math import nan
from pathlib import Path
from typing import Any

from minidpo.config import data_of_model
from minidpo.data import BadRecord, ChatTemplate, Prompt, Tokenizer, prompt_of, read_records, require_fit
from minidpo.errors import UserError
from minidpo.files import require_file, require_place
from minidpo.log import Progress, print0
from minidpo.model import Sampling, generate, load_model
from minidpo.model.adapter_files import HELP, with_tokenizer
from minidpo.sections import TEMPLATES, DataSection
from minidpo.tools.best_of_n import Sample, show_all, show_best, write_pairs, write_samples
from minidpo.tools.reading import add_reading_options, reading_section
from minidpo.training.device import choose_device
from minidpo.training.reward_scorer import RewardScorer, text_after


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    files, device = with_tokenizer(options.model, options.adapter), choose_device(options.device)
    tokenizer = Tokenizer.from_pretrained(files)
    as_hh = options.human is not None and tokenizer.chat_template().form is None
    kind = options.template or ("hh" if as_hh else "model")
    template = tokenizer.chat_template(kind, data_of_model(Path(options.adapter or options.model)).date)
    prompts = _prompts(options, template)
    if options.template == "chatml" and all(prompt.tail is None for prompt in prompts):
        raise UserError("--template = chatml is for messages, and the prompts are text; leave it out")
    model = load_model(options.model, device=device, adapter=options.adapter)
    require_fit("model", model.config, tokenizer, 1)
    scorer = RewardScorer(options.reward_model, device) if options.reward_model else None
    if scorer:
        templated = options.template or any(prompt.tail is not None for prompt in prompts)
        scorer.compare(tokenizer, template if templated else None)
    prompts = _that_fit(prompts, options.max_new_tokens, model.config.max_length, tokenizer, scorer)

    n = options.n
    of_samples = [prompt for prompt in prompts for _ in range(n)]
    ids = list(map(tokenizer.prompt_ids, of_samples))
    progress = Progress("sampling", len(ids), "responses")
    try:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
        drawn = generate(model, ids, sampling, tokenizer.stop_ids, options.seed, progress=progress.advance)
    except ValueError as error:
        raise UserError(str(error)) from None
    progress.close(last_line=False)
    texts = [text_after(tokenizer, *both) for both in zip(ids, drawn, strict=True)]
    ended = [tokens[-1] in tokenizer.stop_ids for tokens in drawn]
    rewards = scorer.rewards(prompts, texts).tolist() if scorer else [nan] * len(texts)
    samples = list(map(Sample, of_samples, texts, ended, rewards))
    by_prompt = [samples[i : i + n] for i in range(0, len(samples), n)]
    # Files first: whoever reads what is printed may go away, as `| head` does.
    try:
        if options.out:
            write_samples(Path(options.out), by_prompt)
        if options.pairs_out:
            write_pairs(Path(options.pairs_out), by_prompt)
    finally:
        (show_best if scorer else show_all)(by_prompt)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m minidpo sample", description=__doc__)
    prompt, add = parser.add_mutually_exclusive_group(required=True), parser.add_argument
    add("--model", metavar="DIR", required=True, help="Hugging Face model directory")
    add("--adapter", metavar="DIR", help=HELP)
    prompt.add_argument("--prompt", help="text to continue, exactly as given (\\n is read as a line break)")
    about = "a question, put by the model's chat template, else as \\n\\nHuman: TEXT\\n\\nAssistant:"
    prompt.add_argument("--human", metavar="TEXT", help=about)
    add("--system", metavar="TEXT", help="with --human: what stands before it, as the system's turn")
    prompt.add_argument("--prompts-file", metavar="FILE", help="one prompt per line, \\n is a line break")
    about = "a file of records with a `prompt` in text or messages, or dialogues"
    prompt.add_argument("--data", metavar="FILE", help=about)
    about = "of messages and --human (default model; hh for --human without one)"
    add("--template", choices=TEMPLATES, help=about)
    add_reading_options(add)
    add("--n", type=int, default=1, help="samples per prompt")
    add("--reward-model", metavar="DIR", help="print the best of the n samples by its reward")
    add("--out", metavar="FILE", help="every sample as a JSON line, with its reward if it has one")
    add("--pairs-out", metavar="FILE", help="with a reward model: best and worst as a preference file")
    add("--max-new-tokens", type=int, default=128)
    add("--temperature", type=float, default=1.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)
    if options.n < (least := 2 if options.reward_model else 1):
        raise UserError(f"--n is {options.n}; give at least {least} (--reward-model chooses among samples)")
    if options.pairs_out and not options.reward_model:
        raise UserError("--pairs-out goes with --reward-model")
    for option, path in (("--out", options.out), ("--pairs-out", options.pairs_out)):
        if path:
            require_place(option, path, options.data, options.prompts_file)
    if options.template and options.human is None and not options.data:
        raise UserError("--template is for messages and --human; a prompt in text is taken as it is")
    if options.system is not None and options.human is None:
        raise UserError("--system goes with --human; a record may have `system`")
    if (options.text or options.column) and not options.data:
        raise UserError("--text and --column are for the records of --data")
    if options.out and options.out == options.pairs_out:
        raise UserError(f"--out and --pairs-out are both {options.out}; give two files")
    return options


def _prompts(options: argparse.Namespace, template: ChatTemplate) -> list[Prompt]:
    if options.prompt == "":
        return [Prompt("")]  # The model begins after its BOS.
    data = reading_section(options, options.adapter or options.model) if options.data else DataSection()
    prompts = []
    for index, (place, record) in enumerate(_records(options)):
        try:
            if isinstance(record, BadRecord):
                raise record
            if record is not None:
                prompts.append(prompt_of(record, template, data)._replace(index=index))
        except BadRecord as bad:
            raise UserError(f"{place}: {bad}") from None
    if not prompts:
        file = options.data or options.prompts_file
        raise UserError(f"{file}: no prompt in the file; at least one is needed")
    return prompts


def _records(options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """Where each prompt stands, and a record of it; None for a blank line."""
    if options.human is not None:
        asked = [{"role": "user", "content": options.human}]
        yield "--human", {"prompt": asked, "system": options.system}
    elif options.prompt is not None:
        yield "--prompt", {"prompt": options.prompt.replace("\\n", "\n")}
    elif options.data:
        for place, record in read_records(Path(options.data)):
            yield f"{options.data}:{place}", record
    else:
        file = require_file(Path(options.prompts_file), "a text file with one prompt per line is needed")
        try:
            # str.splitlines would also break lines at form feeds and other characters inside a prompt.
            lines = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None
        for number, line in enumerate(lines, start=1):
            yield f"{file}:{number}", {"prompt": line.replace("\\n", "\n")} if line else None


def _that_fit(
    prompts: list[Prompt], new_tokens: int, limit: int, tokenizer: Tokenizer, scorer: RewardScorer | None
) -> list[Prompt]:
    """The prompts that leave room for `new_tokens` in the model, and with EOS in the reward model."""
    fit = [prompt for prompt in prompts if len(tokenizer.prompt_ids(prompt)) + new_tokens <= limit]
    if scorer:
        fit = [prompt for prompt in fit if scorer.room(prompt) > new_tokens]
    if not fit:
        too_long = f"no prompt leaves room for --max-new-tokens {new_tokens}: the model takes {limit} tokens"
        raise UserError(too_long + (f", the reward model {scorer.max_length}" if scorer else ""))
    if out := len(prompts) - len(fit):
        print0(f"{out} of {len(prompts)} prompts left out: no room for {new_tokens} more tokens")
    return fit
