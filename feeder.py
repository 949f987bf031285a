"""Batches from a process of their own: it tells that it is alive, and when it dies or hangs another one goes on.

The feeding process runs `Feed.batches`; with several workers it has as many processes tokenise, and keeps their results
in order. A thread here takes the batches and starts the process again from the cursor of the last one that arrived:
what was under way is made again, alike. All of them end with the process that started them, however that ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import faulthandler
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing import connection, resource_tracker
from typing import Any

import numpy as np

import environment
import remote
from config import UserError
from signals import ASKS
from stream import Batch, Feed
from tokenizer import Encoder

PREFETCH_STEPS = 4
STALL_SEC = 120.0  # without a sign of life: no read tried, no chunk tokenised
RESTARTS = 3  # in a row without a batch in between
BEAT_SEC = 0.25  # between two signs of life of a tokenising process, at least
_SPAWN = multiprocessing.get_context("spawn")  # forked children would inherit locks that nobody releases


class Feeder(Iterator[Batch]):
    """The batches of `feed`, made ahead by background processes; `close` ends them within seconds.

    Args:
        workers: 1: the feeding process tokenises, too; more: that many others do.
        finish: applied to each batch, in a thread. note: told about restarts.
    """

    def __init__(self, feed: Feed, workers: int, finish: Callable[[Batch], Batch], note: Callable[[str], None]):
        self.feed, self.workers, self.finish, self.note = feed, workers, finish, note
        self.restarts = 0
        self._ready: queue.Queue[Batch | Exception | None] = queue.Queue(PREFETCH_STEPS)
        self._closed = threading.Event()
        self._process: Any = None
        self._thread = threading.Thread(target=self._run, name="feeder", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # before multiprocessing's own, which would wait for a process deaf to SIGTERM

    @property
    def depth(self) -> int:
        """Batches that are ready."""
        return self._ready.qsize()

    def __next__(self) -> Batch:
        item: Batch | Exception | None = None
        while not self._closed.is_set():
            with contextlib.suppress(queue.Empty):
                item = self._ready.get(timeout=0.5)  # on Windows nothing interrupts a wait without end
                break
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        atexit.unregister(self.close)
        self._closed.set()
        self._end_process()
        if threading.current_thread() is not self._thread:
            self._thread.join(10)

    # ---- the thread

    def _run(self) -> None:
        """Put batches, then None, or the exception in their place."""
        if hasattr(signal, "pthread_sigmask"):
            # A signal to the group must not end the child before it ignores it: a child inherits this thread's mask.
            resource_tracker.ensure_running()  # or the child's start would start it, which unblocks the signals
            signal.pthread_sigmask(signal.SIG_BLOCK, set(ASKS))
        failures = 0
        while not self._closed.is_set():
            try:
                for batch in self._received():
                    failures = 0
                    self.feed = dataclasses.replace(self.feed, cursor=batch.cursor)
                    self._put(self.finish(batch))
                    if batch.last:
                        self._put(None)
                        return
            except _Lost as lost:
                failures += 1
                if self._closed.is_set():
                    return
                if failures > RESTARTS:
                    hint = "data.workers=0 shows where"
                    self._put(UserError(f"data: the feeding process {lost}, {failures} times in a row; {hint}"))
                    return
                self.restarts += 1
                self.note(f"data: the feeding process {lost}; another one goes on where it was")
            except Exception as error:  # noqa: BLE001  # it belongs to whoever asks for the next batch
                self._put(error)
                return

    def _put(self, item: Batch | Exception | None) -> None:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._ready.put(item, timeout=0.2)
                return

    def _received(self) -> Iterator[Batch]:
        """Batches of one feeding process. Raises _Lost where it died or hangs, else what ended it."""
        beats = _SPAWN.Value("Q", 0, lock=False)
        receiver, sender = _SPAWN.Pipe(duplex=False)
        self._process = _SPAWN.Process(target=_feed, args=(sender, beats, self.feed, self.workers, STALL_SEC))
        self._process.start()
        sender.close()  # or its end would not be seen
        if self._closed.is_set():
            self._end_process()
        try:
            while True:
                self._wait(receiver, beats)
                try:
                    message = receiver.recv()
                except (EOFError, OSError):
                    self._process.join(5)
                    raise _Lost(f"died (exit code {self._process.exitcode})") from None
                if isinstance(message, Batch):
                    yield message
                else:
                    kind, text = message
                    raise UserError(text) if kind == "mistake" else RuntimeError(f"in the feeding process:\n{text}")
        finally:
            receiver.close()
            self._end_process()

    def _wait(self, receiver: Any, beats: Any) -> None:
        seen, since = -1, time.monotonic()
        while not receiver.poll(0.5):
            if beats.value != seen:
                seen, since = beats.value, time.monotonic()
            elif time.monotonic() - since > STALL_SEC + 1:  # it says where it hangs first
                raise _Lost(f"gave no sign of life for {STALL_SEC:.0f} s")
            if self._closed.is_set():
                raise _Lost("was ended")

    def _end_process(self) -> None:
        process = self._process
        if process is not None and process.is_alive():
            process.kill()
            process.join(5)


class _Lost(Exception):
    """The feeding process is gone, or as good as."""


# ---- the feeding process


def _feed(sender: Any, beats: Any, feed: Feed, workers: int, stall_sec: float) -> None:
    _begin_child()
    environment.tokenise_alone()
    armed = 0.0

    def beat() -> None:
        nonlocal armed
        beats.value += 1
        if time.monotonic() - armed > 1:
            armed = time.monotonic()
            faulthandler.dump_traceback_later(stall_sec)

    remote.beat = beat
    beat()
    try:
        with contextlib.ExitStack() as stack:
            encode = stack.enter_context(Pool(feed.encoder, workers)).map if workers > 1 else None
            for batch in feed.batches(encode):
                faulthandler.cancel_dump_traceback_later()  # the trainer may take its time
                sender.send(batch)
                armed = 0.0
                beat()
    except UserError as error:
        sender.send(("mistake", str(error)))
    except BrokenPipeError:
        pass  # nobody wants more
    except Exception:  # noqa: BLE001  # told where it is seen
        sender.send(("failure", traceback.format_exc()))
    sender.close()
    os._exit(0)  # threads may wait for the network still


def _begin_child() -> None:
    """The main process alone decides when to stop, but its end is everyone's."""
    for name in ASKS:
        signal.signal(name, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---- the tokenising processes


class Pool:
    """Processes that tokenise chunks of texts; one that dies or hangs is replaced and its chunks are done again."""

    def __init__(self, encoder: Encoder, workers: int, stall_sec: float = STALL_SEC / 2):
        self.workers = [_Worker(encoder, stall_sec) for _ in range(workers)]
        self._tickets = count()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.end()

    def map(self, chunks: Iterator[Sequence[str]]) -> Iterator[list[np.ndarray | None]]:
        """The ids of each chunk, in order; a few are under way at any time."""
        pending: deque[tuple[_Worker, int]] = deque()
        for texts in chunks:
            ticket = next(self._tickets)
            worker = self.workers[ticket % len(self.workers)]
            worker.send(ticket, texts)
            pending.append((worker, ticket))
            if len(pending) > 2 * len(self.workers):
                worker, ticket = pending.popleft()
                yield worker.result(ticket)
        for worker, ticket in pending:
            yield worker.result(ticket)


class _Worker:
    """One tokenising process. Pipes only: semaphores of a killed process would be left behind."""

    def __init__(self, encoder: Encoder, stall_sec: float):
        self.encoder, self.stall_sec, self.failures = encoder, stall_sec, 0
        self.sent: dict[int, Sequence[str]] = {}  # by ticket, without a result yet
        self.results: dict[int, list[np.ndarray | None]] = {}
        self._start()

    def send(self, ticket: int, texts: Sequence[str]) -> None:
        self.sent[ticket] = texts
        with contextlib.suppress(OSError):  # it died: noticed by whoever waits for a result
            self.connection.send((ticket, texts))

    def result(self, ticket: int) -> list[np.ndarray | None]:
        while ticket not in self.results:
            try:
                if not self.connection.poll(self.stall_sec):
                    raise TimeoutError
                message = self.connection.recv()
                if message is not None:  # which is a sign of life in the middle of a long document
                    done, ids = message
                    del self.sent[done]
                    self.results[done] = ids
                    self.failures = 0
            except (EOFError, OSError):
                self._replace()
            remote.beat()
        return self.results.pop(ticket)

    def end(self) -> None:
        self.process.kill()
        self.process.join(5)
        self.connection.close()

    def _start(self) -> None:
        self.connection, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_tokenise, args=(theirs, self.encoder), daemon=True)
        self.process.start()
        theirs.close()  # or its end would not be seen

    def _replace(self) -> None:
        self.end()
        self.failures += 1
        if self.failures > RESTARTS:
            texts = next(iter(self.sent.values()))
            start = " ".join(texts[0][:40].split())
            raise UserError(
                f"data: tokenising {len(texts)} document(s), the first of them {start!r}, ended its process or took "
                f"over {self.stall_sec:.0f} s, {self.failures} times in a row"
            )
        self._start()
        for ticket, texts in list(self.sent.items()):
            self.send(ticket, texts)


def _tokenise(connection: Any, encoder: Encoder) -> None:
    _begin_child()
    environment.tokenise_alone()
    tasks: queue.SimpleQueue[tuple[int, Sequence[str]]] = queue.SimpleQueue()

    def read() -> None:  # always, or two full pipes would wait for each other
        with contextlib.suppress(EOFError, OSError):
            while True:
                tasks.put(connection.recv())
        os._exit(0)

    told = time.monotonic()

    def beat() -> None:
        nonlocal told
        if time.monotonic() - told > BEAT_SEC:
            connection.send(None)
            told = time.monotonic()

    remote.beat = beat
    threading.Thread(target=read, daemon=True).start()
    while True:
        ticket, texts = tasks.get()
        connection.send((ticket, encoder(texts)))
