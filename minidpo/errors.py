"""What a user can get wrong, told in one line.

Everything that depends on what was typed, or on a file that the user named, raises `UserError` with what is
wrong, where (file, line, key) and what would be right. `exit_on_user_error` prints it as that one line with
exit status 2, `RunStopped` and a GPU out of memory as one line with status 1, Ctrl-C with status 130. Any
other exception is a bug in minidpo and keeps its traceback.
"""

import sys
from collections.abc import Callable

STOPPED = 130  # the exit status that shells give Ctrl-C: `train && publish` does not publish half a run


class UserError(ValueError):
    """Bad input from the user. The message is a single line that says what, where and what is right."""


class RunStopped(RuntimeError):
    """A run that must not go on although the user did nothing wrong, such as a non-finite gradient."""


def one_line(error: BaseException) -> str:
    """The message of an error, without its line breaks."""
    return " ".join(str(error).split())


def is_out_of_memory(error: BaseException) -> bool:
    # PyTorch's class, by its name: importing torch here would delay every `--help` by a second.
    return type(error).__name__ == "OutOfMemoryError"


def exit_on_user_error(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`; print errors that are no bugs as one line to stderr and exit."""
    try:
        main(sys.argv[1:])
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        hint = "lower optim.micro_tokens, or set run.activation_checkpointing = true"
        print(f"error: {str(error).splitlines()[0]} ({hint})", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(STOPPED)
