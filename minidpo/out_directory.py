"""The directory of a run belongs to one process at a time."""

import errno
import fcntl
import os
from pathlib import Path

from minidpo.distributed import first_before_others, rank
from minidpo.errors import UserError
from minidpo.files import clear_leftovers, writing
from minidpo.metrics import say

_PARTS = (".", "checkpoints", "tokens")


def claim(out: Path) -> None:
    """Take `out` for this run until it ends, however it ends, and clear away what a killed one left there.

    Of several processes rank 0 holds it. Raises UserError where another process is at work in it, or where it cannot be written.
    """
    with first_before_others():
        if rank() == 0:
            _lock(out)


def _lock(out: Path) -> None:
    file = out / ".lock"
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock is the process's, goes when it goes, and does not refuse the process itself.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{out}: another run is at work in it (process {os.read(descriptor, 20).decode()});"
                    " wait for its end, or give this one another run.out"
                ) from None
            say(f"{file}: no locks on this file system ({error.strerror}); start no second run in {out}")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        for part in _PARTS:
            clear_leftovers(out / part)
