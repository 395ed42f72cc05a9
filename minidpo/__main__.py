"""`python -m minidpo COMMAND`: each command is a file in minidpo/tools with a `main(arguments)`."""

import importlib

from minidpo.errors import UserError, exit_on_user_error

COMMANDS = {
    "demo": "a small world, a reward model and DPO from nothing, in minutes on a CPU",
    "exact": "losses trained to their analytic optima in a world small enough to list",
    "verify": "the proofs, asked of every loss here or of a function of yours",
    "vectors": "test vectors of every loss, for programs in any language",
    "frontier": "true reward against KL for five losses: the DPO paper's Figure 2, on a CPU",
    "report": "a page to open in a browser: curves, pairs token by token, samples before and after",
    "plot": "how a run went, or how several compare, as a figure",
    "data": "what a run would be trained on: read, dropped and why, truncated, lengths",
    "explain": "one pair from tokens to loss and gradient weight, to check with a calculator",
    "score": "log-probs or rewards of every pair of a preference file, accuracy",
    "sample": "responses to a prompt; best of n by a reward model, and preferences made of them",
    "bench": "how fast a training step is here, beside the textbook's and TRL's",
}


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m minidpo COMMAND [options]   (COMMAND --help tells the options)\n")
        print("\n".join(f"  {name:<8} {about}" for name, about in COMMANDS.items()))
        return
    if arguments[0] not in COMMANDS:
        raise UserError(f"no command {arguments[0]!r}; there are {', '.join(COMMANDS)}")
    importlib.import_module(f"minidpo.tools.{arguments[0]}").main(arguments[1:])


if __name__ == "__main__":
    exit_on_user_error(main)
