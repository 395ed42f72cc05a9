"""What a user can get wrong, told in one line.

Exit status 2: a `UserError`, about what was typed or a file that was named. 1: `RunStopped`, a GPU out of
memory, PyTorch's compiler, a full disk where the output goes (`> file`). 130: Ctrl-C. 141, without a word:
whoever read the output has gone (`| head`). Any other exception is a bug in minidpo and keeps its traceback.
"""

import errno
import io
import os
import select
import sys
from collections.abc import Callable

# Why a model's numbers are nan or inf.
NOT_FINITE = (
    "some of its weights are nan, inf or far too large (a run that diverged, a torn file);"
    " take an earlier checkpoint, or fetch it again"
)
STOPPED, UNREAD = 130, 141  # The exit statuses of shells: `train && publish` does not publish half a run.


class UserError(ValueError):
    """Bad input from the user. The message is a single line: what, where (file, line, key), what is right."""


class RunStopped(RuntimeError):
    """A run that must not go on although the user did nothing wrong, such as a non-finite gradient."""


def one_line(error: BaseException) -> str:
    """The message of an error, without its line breaks; its kind where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def remedy(error: BaseException) -> str:
    """What to do about an error of PyTorch's that is no bug of minidpo; empty if it may be one."""
    # PyTorch's classes, by their names: importing torch here would delay every `--help` by a second.
    if type(error).__name__ == "OutOfMemoryError":
        return (
            "lower optim.micro_tokens, or set run.activation_checkpointing = true; then the same command goes"
            " on from the last checkpoint"
        )
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton")):
        return 'PyTorch could not compile: run.attention = "sdpa" and run.compile = false do without'
    return ""


def exit_on_user_error(main: Callable[[list[str]], None]) -> None:
    """Run `main(arguments)`; print errors that are no bugs as one line to stderr and exit."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # A model writes characters that a terminal may not know.
    try:
        status = _exit_status(main)
        if sys.stdout:
            sys.stdout.flush()  # Now, because what fails at the interpreter's exit has a traceback.
    except BrokenPipeError:
        silence_closed_pipes()
        status = UNREAD
    except OSError as error:
        # Who writes a file does so within `files.writing`: what is full is where standard output goes.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sys.stdout = open(os.devnull, "w")  # for what is still to be printed
        print(f"error: the output cannot be written ({error.strerror}); make room", file=sys.stderr)
        status = 1
    if status:
        sys.exit(status)


def silence_closed_pipes() -> None:
    """Send what is still to be printed into a pipe that nobody reads any more nowhere."""
    if not hasattr(select, "poll"):  # Windows, where a broken pipe is an OSError of another kind anyway.
        return
    for stream in filter(None, (sys.stdout, sys.stderr)):
        poll = select.poll()
        poll.register(stream, 0)
        if any(event & select.POLLERR for _, event in poll.poll(0)):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _exit_status(main: Callable[[list[str]], None]) -> str | int | None:
    try:
        for argument in sys.argv[1:]:
            if argument != argument.encode(errors="replace").decode():
                raise UserError(f"{argument!r} is not text in UTF-8; type it, or name the file, in UTF-8")
        main(sys.argv[1:])
        return 0
    except SystemExit as stop:
        return stop.code
    except (UserError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except Exception as error:
        if not (hint := remedy(error)):
            raise
        print(f"error: {(str(error) or type(error).__name__).splitlines()[0]} ({hint})", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *stop.args]), file=sys.stderr)
        return STOPPED
