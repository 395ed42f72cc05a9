"""The directory of a run belongs to one process at a time."""

import errno
import fcntl
import os
from pathlib import Path

from minidpo.distributed import first_before_others, rank
from minidpo.errors import UserError
from minidpo.files import clear_leftovers, writing
from minidpo.log import print0


def lock_directory(out: Path) -> None:
    """Reserve `out` for this run until the process ends, and clear what killed runs left half done in it.

    All ranks call it, rank 0 holds the lock. Raises UserError if another process does.
    """
    with first_before_others(), writing(out):
        if rank() > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        # Never closed: the lock ends with the process, however that ends, and does not refuse it itself.
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = f"another run is at work in it (process {os.read(descriptor, 20).decode()})"
                raise UserError(
                    f"{out}: {holder}; wait for its end, or give this one another run.out"
                ) from None
            print0(f"{out}: no locks on this file system ({error.strerror}); start no second run in it")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        for part in (".", "checkpoints", "tokens", "samples"):
            clear_leftovers(out / part)
