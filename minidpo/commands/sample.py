"""`python -m minidpo sample`: completions of one prompt, or of every line of a file."""

import argparse
from pathlib import Path

from minidpo.dataset import require_fit
from minidpo.device import choose_device
from minidpo.errors import UserError
from minidpo.files import require_file
from minidpo.generate import Sampling, generate
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
    parser.add_argument("--n", type=int, default=1, help="samples a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args(arguments)

    if options.n < 1:
        raise UserError(f"--n {options.n}; at least 1 sample is needed")
    if options.prompts_file:
        file = require_file(Path(options.prompts_file), "a text file with one prompt a line is needed")
        try:
            texts = [_unescape(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error})") from None
        if not texts:
            raise UserError(f"{file}: no prompt in it; one a line is needed")
    elif options.human is not None:
        texts = [f"\n\nHuman: {options.human}\n\nAssistant:"]
    else:
        texts = [_unescape(options.prompt)]
    model = load_model(options.model, device=choose_device(options.device))
    tokenizer = Tokenizer.from_directory(options.model)
    require_fit("model", model.config, tokenizer, 1)
    try:
        sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p)
        prompts = [tokenizer.encode(text) for text in texts for _ in range(options.n)]
        completions = generate(model, prompts, sampling, tokenizer.eos_id, options.seed)
    except ValueError as error:
        raise UserError(str(error)) from None
    for i, completion in enumerate(completions):
        if len(completions) > 1:
            print(f"--- prompt {i // options.n}, sample {i % options.n}")
        print(tokenizer.decode(completion))


def _unescape(text: str) -> str:
    return text.replace("\\n", "\n")
