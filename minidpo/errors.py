"""What a user can get wrong, told in one line.

Everything that depends on what was typed, or on a file somebody pointed at, raises `UserError` with
what is wrong, where (file, line, key) and what would be right. `exit_on_user_error` turns it into
that one line and exit status 2, `RunStopped` into one line and status 1, Ctrl-C into status 130; any other exception is a
bug in minidpo and keeps its traceback.
"""

import sys
from collections.abc import Callable

STOPPED = 130  # exit status after Ctrl-C, as shells have it: `train && publish` does not publish half a run


class UserError(ValueError):
    """Bad input from the user: its message is a single line that says what, where and what is right."""


class RunStopped(RuntimeError):
    """A run that must not go on, though nobody typed anything wrong (a non-finite gradient)."""


def one_line(error: BaseException) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


def exit_on_user_error(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`; print a `UserError` or `RunStopped` as one line to stderr and exit."""
    try:
        main(sys.argv[1:])
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; by name, for torch takes seconds to import
            raise
        reason = str(error).splitlines()[0]
        print(
            f"error: {reason} (lower optim.micro_tokens, or set run.activation_checkpointing = true)",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(STOPPED)
