"""The directory of a run belongs to one process at a time."""

import errno
import os
from pathlib import Path

from minidpo.distributed import first_before_others, rank
from minidpo.errors import UserError, one_line
from minidpo.files import clear_leftovers, writing
from minidpo.log import print0


def require_parts(out: Path) -> None:
    """Raises UserError, before the run trains, if `out` or a directory in it cannot be there."""
    for name in ("", "checkpoints", "tokens"):
        if os.path.lexists(out / name) and not (out / name).is_dir():
            what = "a link; is its disk mounted" if (out / name).is_symlink() else "a file"
            raise UserError(f"{out / name}: no directory, but {what}; give another run.out")


def lock_directory(out: Path) -> None:
    """Reserve `out` for this run until the process ends, and clear what killed runs left half done in it. All
    ranks call it, rank 0 holds the lock. Raises UserError if another process does."""
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
        descriptor = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            import fcntl  # Windows has none.

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (OSError, ImportError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EAGAIN):
                holder = f"another run is at work in it (process {os.read(descriptor, 20).decode()})"
                hint = "wait for its end, or give this one another run.out"
                raise UserError(f"{out}: {holder}; {hint}") from None
            print0(f"{out}: no locks here ({one_line(error)}); start no second run in it")
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        for part in (".", "checkpoints", "tokens", "samples"):
            clear_leftovers(out / part)
