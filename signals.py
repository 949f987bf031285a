"""Stopping by signal: SIGINT, SIGTERM and SIGUSR1 (Slurm's warning) ask for the end of a run, a second is the end."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

PATIENCE_SEC = 2.0  # what is waited for may be on its way, and is not to be torn off in the middle
ECHO_SEC = 1.0  # torchrun passes on a signal that its processes have had as well


ASKS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))  # Windows


def quiet() -> None:
    """From here on Ctrl-C prints no traceback where nobody catches it, say while torch is imported."""
    sys.excepthook = uncaught


def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """`environment.prepare` puts one in its place that also hides secrets."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


class Stopped(Exception):
    """A signal came while waiting."""


class StopFlag:
    """Set by one of `ASKS`, polled between micro-batches; a second signal ends the process at once, unless it is an
    echo: the same again, soon, and not typed."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = self._tired = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> StopFlag:
        self._before = {number: signal.signal(number, self._handle) for number in ASKS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self._tired:  # our own signal
            self._tired = False
            if self._waiting:
                raise Stopped
            return
        if self.requested:
            echo = number == self.signal != signal.SIGINT and time.monotonic() - self._since < ECHO_SEC
            if echo:
                return
            os._exit(128 + number)
        self.signal, self._since = number, time.monotonic()
        with contextlib.suppress(OSError):  # Ctrl-C has ended its reader, too: `2>&1 | tee log`
            os.write(2, b"\nstopping, with the last completed step saved; once more to stop at once, without saving\n")
        patience = threading.Timer(PATIENCE_SEC, self._lose_patience)
        patience.daemon = True
        patience.start()

    def _lose_patience(self) -> None:
        """In the timer's thread: signal the main thread, for only there an exception ends the wait."""
        if not self._waiting or self.signal is None:
            return
        self._tired = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident or 0, self.signal)
        else:  # Windows; noticed when the wait's own timeout is over
            _thread.interrupt_main(signal.Signals(self.signal))

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within, a signal raises `Stopped`, soon after: for what may wait long."""
        self._waiting = True
        try:
            if self.requested:
                raise Stopped
            yield
        finally:
            self._waiting = False
