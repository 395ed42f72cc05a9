"""What asks a run to stop after its step: Ctrl-C, SIGTERM, or a console that nobody reads any more."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from minidpo.distributed import any_rank, rank, ranks
from minidpo.errors import silence_closed_pipes


class Stop:
    """Whether this run is to stop. `requested` asks all processes together."""

    def __init__(self) -> None:
        self._requested = False

    def requested(self) -> bool:
        """Whether a signal has reached any of the processes: all must leave the loop at the same step."""
        return any_rank(self._requested)

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Within this block Ctrl-C and SIGTERM only ask the loop to stop after its step.

        If one of several processes leaves the block by an error, SIGTERM goes on doing nothing: torchrun,
        which ends all processes once one has failed, must not cut off the line that says why.
        """
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        failed = True
        try:
            yield
            failed = False
        except SystemExit:
            failed = False
            raise
        finally:
            if failed and ranks() > 1:
                self._requested = True  # so that the handler says nothing
            else:
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def if_nobody_reads(self) -> Iterator[None]:
        """Stop as after Ctrl-C, and save, if whoever read the console has gone: `train_dpo.py ... | head`."""
        try:
            yield
        except BrokenPipeError:
            silence_closed_pipes()
            self._requested = True

    def _on_signal(self, number: int, frame: object) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._requested and rank() == 0:
            # os.write, because print may be what was interrupted.
            text = "\nstopping after this step, and saving; Ctrl-C again stops at once, and loses the step\n"
            os.write(2, text.encode())
        self._requested = True
