"""The directory of a run belongs to one process at a time."""

import errno
import os
import sys
from pathlib import Path

from minidpo.distributed import first_before_others, rank
from minidpo.errors import UserError
from minidpo.files import clear_leftovers, writing
from minidpo.log import print0

# Windows has neither of the last two.
FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


def require_parts(out: Path) -> None:
    """Raises UserError if `out`, or what a run keeps in directories of it, cannot be there, before the run
    trains until its first save."""
    for name in ("", "checkpoints", "tokens"):
        if os.path.lexists(out / name) and not (out / name).is_dir():
            what = "a link; is its disk mounted" if (out / name).is_symlink() else "a file"
            raise UserError(f"{out / name}: no directory, but {what}; give another run.out")


def lock_directory(out: Path) -> None:
    """Reserve `out` for this run until the process ends, and clear what killed runs left half done in it.

    All ranks call it, rank 0 holds the lock. Raises UserError if another process does.
    """
    with first_before_others(), writing(out):
        if rank() > 0:
            return
        out.mkdir(parents=True, exist_ok=True)
        # Writing through a link would change files of somebody else. checkpoints/ and tokens/ may be links to
        # a larger disk: what is in them is replaced as a whole, and the names are those of runs alone.
        for name in (".lock", "samples"):
            if (out / name).is_symlink():
                (out / name).unlink()
        # Never closed: the lock ends with the process, however that ends, and does not refuse it itself.
        descriptor = os.open(out / ".lock", FLAGS, 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                holder = f"another run is at work in it (process {os.read(descriptor, 20).decode()})"
                hint = "wait for its end, or give this one another run.out"
                raise UserError(f"{out}: {holder}; {hint}") from None
            print0(f"{out}: no locks on this file system ({error.strerror}); start no second run in it")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        for part in (".", "checkpoints", "tokens", "samples"):
            clear_leftovers(out / part)


def _lock(descriptor: int) -> None:
    """Lock an open file for this process alone. Raises OSError: EACCES or EAGAIN if another process has it.

    Never run on Windows.
    """
    if sys.platform == "win32":
        import msvcrt

        # Windows locks bytes, which then nobody else can read: one far behind the process number.
        os.lseek(descriptor, 2**30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)
    else:
        import fcntl

        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
