"""Saving beside training: a copy of the state in memory, then a thread that writes, syncs, hashes and reads it back.

Training waits for the copy alone, and for the writer where the next checkpoint comes before it is done, or where memory
is too small for a copy.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

import checkpoint
import environment
from config import UserError

PATIENCE = 6  # failures in a row, and cadences without a checkpoint, after which a run that cannot save ends

Contents = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, bytes]]  # groups of tensors, files


class Saver:
    """Writes checkpoints into `root`, one at a time.

    A full disk or memory, or anything else that the system refuses, is told by `note`, and the next checkpoint tries
    again; any other failure of the writer is raised by the next call.

    Args:
        keep: how many stay, see `checkpoint.prune`.
        known: checkpoints that were verified already.
        every_sec: between checkpoints by the clock, None: never due.
        on_saved: called, in the writer's thread, with every checkpoint that was read back.
    """

    def __init__(
        self, root: Path, *, keep: int, every_sec: float | None, note: Callable[[str], None],
        on_saved: Callable[[Path], None] | None = None, known: checkpoint.Known | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self.root, self.keep, self.every_sec, self.note = root, keep, every_sec, note
        self.on_saved, self.clock = on_saved, clock
        self.known: checkpoint.Known = set() if known is None else known
        self.live = False  # what is being written are the run's own tensors: they must not change
        self.newest: Path | None = None  # that this process wrote
        self.failing_since: float | None = None
        self.failures = 0  # in a row
        self.stall_sec = self.longest_sec = 0.0  # that training has waited in all; the longest save
        self._last = clock()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def due(self) -> bool:
        """Whether the clock asks for a checkpoint, and the writer is free for one."""
        return not self.busy and self.clock() - self._last >= (self.every_sec or math.inf)

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def hopeless(self) -> bool:
        """Whether nothing could be saved in `PATIENCE` tries and cadences."""
        patience = PATIENCE * (self.every_sec or 300.0)
        since = self.failing_since
        return self.failures >= PATIENCE and since is not None and self.clock() - since > patience

    def save(self, step: int, contents: Callable[[], Contents]) -> None:
        """Copy what `contents` returns, and write it in the background as the checkpoint of `step`.

        Where memory is too small for the copy, it is `live`: `wait` before the tensors change.
        """
        start = self.clock()
        self.wait()
        tensors, files = contents()
        copies = environment.within_memory(snapshot, tensors)
        self.live = copies is None
        if self.live:
            self.note(f"too little memory to copy the state of step {step}: training waits while it is written")
        self._last = self.clock()
        written = tensors if copies is None else copies
        self._thread = threading.Thread(target=self._write, args=(step, written, files), name="saver")
        self._thread.start()
        self.stall_sec += self.clock() - start

    def check(self) -> None:
        """Raise what the writer has failed with, unless the system refused it: that was told."""
        if not self.busy and self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> bool:
        """Until the writer is done; whether the newest checkpoint asked for is on the disk."""
        self.close()
        self.check()
        return self.failing_since is None

    def close(self) -> None:
        """Until the writer is done, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], files: Mapping[str, bytes]) -> None:
        start = self.clock()
        try:
            self.newest = checkpoint.save(self.root, step, tensors, files, keep=self.keep, known=self.known)
            self.failing_since, self.failures = None, 0
            self.longest_sec = max(self.longest_sec, self.clock() - start)
        except BaseException as error:  # noqa: BLE001
            full = environment.out_of_memory(error)
            if not full and not isinstance(error, OSError | UserError):
                self._error = error  # raised again where somebody can see it
                return
            self.failures += 1
            if self.failing_since is None:
                self.failing_since = self.clock()
            told = "out of memory" if full else f"{error.strerror}" if isinstance(error, OSError) else str(error)
            self.note(f"the checkpoint of step {step} could not be written: {told}; training goes on")
            return
        try:
            if self.on_saved is not None:
                self.on_saved(self.newest)
        except BaseException as error:  # noqa: BLE001
            self._error = error


def snapshot(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU. Tensors that share memory (slices of stacked experts, a head and its copy) share it again."""
    copies: dict[tuple[torch.device, int], Tensor] = {}
    return {group: {name: _copy(tensor, copies) for name, tensor in state.items()} for group, state in tensors.items()}


def _copy(tensor: Tensor, copies: dict[tuple[torch.device, int], Tensor]) -> Tensor:
    tensor = tensor.detach()
    storage = tensor.untyped_storage()
    key = tensor.device, storage.data_ptr()
    if key not in copies:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        copies[key] = whole.to("cpu", copy=True)
    return torch.empty(0, dtype=tensor.dtype).set_(
        copies[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )
