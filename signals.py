"""Stopping by signal: SIGINT and SIGTERM ask for the end of a run, a second one is the end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


class Stopped(Exception):
    """A signal came while waiting."""


class StopFlag:
    """Set by SIGINT and SIGTERM, polled between micro-batches; a second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.requested:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping, with the last completed step saved; once more to stop at once, without saving\n")
        if self._waiting:
            raise Stopped

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal raises `Stopped`: for what may wait long and may be left at any point."""
        self._waiting = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._waiting = False
