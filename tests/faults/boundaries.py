"""A save alone, killed or refused at each of its operations: what `checkpoint.save` leaves, for every one of them.

Functions run in a child of the driver, fork once per case, and write their findings as JSON.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from injected import FULL
from shim import Operation, Shim

import checkpoint

Findings = dict[str, Any]


def contents(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, bytes]]:
    """A small checkpoint of a step: two groups, two files."""
    draw = torch.Generator().manual_seed(step)
    model = {name: torch.randn(7, 5, generator=draw) for name in ("a.weight", "b.weight")}
    optimizer = {f"{name}.momentum": torch.randn(7, 5, generator=draw) for name in model}
    files = {"config.json": b"{}\n", "training_state.json": json.dumps({"step": step}).encode()}
    return {"model": model, "optimizer": optimizer}, files


def save(root: Path, step: int, keep: int) -> None:
    checkpoint.save(root, step, *contents(step), keep=keep)


class Bench:
    """Checkpoints to begin a case with, and what they should look like."""

    def __init__(self, folder: str, steps: range, keep: int, next_step: int):
        os.fsync = lambda descriptor: None  # a kill does not lose what the kernel has; power.py is about that
        self.folder, self.keep, self.next_step = Path(folder), keep, next_step
        self.base, self.root = self.folder / "base", self.folder / "case" / "checkpoints"
        for step in steps:
            save(self.base, step, 1000)
        self.manifests: dict[int, bytes] = {}
        for step in (*steps, next_step, next_step + 1):
            save(self.folder / "reference", step, 1000)
            path = self.folder / "reference" / f"step_{step:08d}" / "manifest.json"
            self.manifests[step] = path.read_bytes()

    def reset(self) -> None:
        shutil.rmtree(self.root.parent, ignore_errors=True)
        shutil.copytree(self.base, self.root, copy_function=os.link)  # nothing is written to twice

    def in_child(self, act: Callable[[int, Operation], None], inside: Callable[[], None] | None = None) -> int:
        """Run the save behind a shim in a process of its own; its exit code."""
        pid = os.fork()
        if pid == 0:
            try:
                Shim(str(self.root.parent), act).install()
                (inside or self.save)()
            except BaseException as error:  # noqa: BLE001  # told by the exit code
                os.write(2, f"{error!r}\n".encode())
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def save(self) -> None:
        save(self.root, self.next_step, self.keep)

    def operations(self) -> list[str]:
        """The kinds of what one save does, with the files' names."""
        self.reset()
        listed = self.folder / "operations"
        with open(listed, "w", encoding="utf-8") as file:

            def act(number: int, operation: Operation) -> None:
                file.write(f"{operation.kind} {os.path.relpath(operation.path, self.root)}\n")
                file.flush()

            assert self.in_child(act) == 0
        return listed.read_text(encoding="utf-8").splitlines()

    def intact(self) -> list[int]:
        """Steps whose checkpoints verify and are what was saved."""
        found = []
        for path in self.root.glob("step_????????"):
            try:
                step = checkpoint.verify(path)["step"]
            except checkpoint.CheckpointError:
                continue
            if (path / "manifest.json").read_bytes() == self.manifests[step]:
                found.append(step)
        return sorted(found)

    def judge(self, least: int) -> str:
        """After a case: the newest verified is the one before or the new one, the next save leaves nothing behind."""
        before = self.intact()
        newest = checkpoint.latest(self.root)
        if newest is None or not before or int(newest.name[5:13]) < self.next_step - 1:
            return f"nothing newer than {newest} loads"
        if int(newest.name[5:13]) not in before:
            return f"{newest.name} is not what was saved"
        if len(before) < least:
            return f"only {before} are intact"
        save(self.root, self.next_step + 1, self.keep)
        names = sorted(path.name for path in self.root.iterdir())
        wanted = [f"step_{step:08d}" for step in self.intact()]
        if names != wanted or len(names) < min(self.keep, 2) or len(names) > max(self.keep, 2):
            return f"after the next save there is {names}"
        return ""


def kill_everywhere(folder: str, report: str, keep: int = 3, have: int = 3, since: str = "", every: int = 1) -> None:
    """SIGKILL before every operation of a save and in the middle of every write; the retention of old ones with it.

    `since`: only at the operations from the first that matches. `every`: at so many of them only.
    """
    first = 2
    bench = Bench(folder, range(first, first + have), keep, first + have)
    found: Findings = {"operations": bench.operations(), "cases": 0, "failures": [], "least": have}
    begin = next(number for number, line in enumerate(found["operations"]) if since in line)
    for torn in (False, True):
        for boundary, operation in enumerate(found["operations"]):
            if boundary < begin or boundary % every or (torn and not operation.startswith("write")):
                continue
            bench.reset()

            def act(number: int, operation: Operation, boundary: int = boundary, torn: bool = torn) -> None:
                if number == boundary:
                    if torn:
                        operation.file.write(operation.data[: len(operation.data) // 2])
                        operation.file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)

            code = bench.in_child(act)
            found["cases"] += 1
            found["least"] = min(found["least"], len(bench.intact()))
            problem = "was not killed" if code != -signal.SIGKILL else bench.judge(least=min(have, 2))
            if problem:
                found["failures"].append(f"{boundary} {operation}{' torn' * torn}: {problem}")
    Path(report).write_text(json.dumps(found), encoding="utf-8")


def refuse_everywhere(folder: str, report: str, every: int = 1) -> None:
    """ENOSPC and EDQUOT at every operation that needs room: once, and the oldest makes room; or for good, and it is an
    OSError, the old ones untouched, and the next save works. `every`: at so many of them only."""
    bench = Bench(folder, range(2, 5), 3, 5)
    wanted = [line for line in bench.operations() if line.split()[0] in FULL]
    found: Findings = {"operations": wanted, "cases": 0, "failures": []}
    disk = Disk()
    Shim(str(bench.root.parent), disk.act).install()
    for number, (code, count) in enumerate(itertools.product((errno.ENOSPC, errno.EDQUOT), (1, 10**9))):
        for boundary in range(number % every, len(wanted), every):
            disk.left = 0
            bench.reset()
            found["cases"] += 1
            disk.fill(code, boundary, count)
            try:
                _refused(bench, disk, mended=count == 1)
            except AssertionError as error:
                found["failures"].append(f"{errno.errorcode[code]} {count} {boundary} {wanted[boundary]}: {error}")
    Path(report).write_text(json.dumps(found), encoding="utf-8")


class Disk:
    """Full, from an operation on, for some operations."""

    def __init__(self) -> None:
        self.code = self.first = self.left = self.seen = 0

    def fill(self, code: int, first: int, count: int) -> None:
        self.code, self.first, self.left, self.seen = code, first, count, 0

    def act(self, number: int, operation: Operation) -> None:
        if operation.kind in FULL and self.left:
            self.seen += 1
            if self.seen > self.first:
                self.left -= 1
                raise OSError(self.code, os.strerror(self.code), operation.path)


def _refused(bench: Bench, disk: Disk, *, mended: bool) -> None:
    refused = None
    try:
        bench.save()
    except OSError as error:
        refused = error.errno
    assert refused is None or not mended, "the oldest did not make room"
    if refused is not None:
        assert refused == disk.code
        left = sorted(path.name for path in bench.root.iterdir())
        new = [f"step_{step:08d}" for step in (3, 4)]  # for want of room the oldest may go
        # The rename is done where a directory cannot be synced.
        assert [name for name in left if name not in ("step_00000002", "step_00000005")] == new, left
    disk.left = 0
    assert len(bench.intact()) >= 2, bench.intact()
    save(bench.root, 6, bench.keep)
    names = sorted(path.name for path in bench.root.iterdir())
    assert names == [f"step_{step:08d}" for step in bench.intact()] and names[-1] == "step_00000006", names


def damaged_neighbours(folder: str, report: str, damaged: int = 2) -> None:
    """Retention where the newest ones are damaged: at every kill, intact ones stay."""
    bench = Bench(folder, range(1, 6), 2, 6)
    for step in range(6 - damaged, 6):
        path = bench.base / f"step_{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    found: Findings = {"operations": bench.operations(), "cases": 0, "failures": [], "least": 99}
    begin = next(number for number, line in enumerate(found["operations"]) if line == "syncdir ..")
    for boundary in range(begin, len(found["operations"])):
        bench.reset()

        def act(number: int, operation: Operation, boundary: int = boundary) -> None:
            if number == boundary:
                os.kill(os.getpid(), signal.SIGKILL)

        bench.in_child(act)
        found["cases"] += 1
        intact = bench.intact()
        found["least"] = min(found["least"], len(intact))
        if len(intact) < 2 or checkpoint.latest(bench.root) is None:
            found["failures"].append(f"{boundary} {found['operations'][boundary]}: only {intact} are intact")
    Path(report).write_text(json.dumps(found), encoding="utf-8")


# ---- saves that are not what they should be: the harness has to notice


def in_place(*arguments: Any) -> None:
    """As `kill_everywhere`, of a save that writes into the final directory from the start."""
    real = os.rename

    def aside(path: Path, kind: str) -> Path:
        return path if kind == "tmp" else checkpoint_aside(path, kind)

    checkpoint_aside, checkpoint._aside = checkpoint._aside, aside
    os.rename = lambda source, target: None if source == target else real(source, target)
    shutil_rmtree = shutil.rmtree

    def keep_it(path: Any, *rest: Any, **options: Any) -> None:
        if not Path(path).name.startswith("step_") or not checkpoint.STEP.fullmatch(Path(path).name):
            shutil_rmtree(path, *rest, **options)

    shutil.rmtree = keep_it  # type: ignore[assignment]
    kill_everywhere(*arguments, every=9)


def untidy(*arguments: Any) -> None:
    """As `refuse_everywhere`, of a save that leaves its temporary directory."""
    real = shutil.rmtree

    def keep_it(path: Any, *rest: Any, **options: Any) -> None:
        if ".tmp-" not in Path(path).name:
            real(path, *rest, **options)

    shutil.rmtree = keep_it  # type: ignore[assignment]
    refuse_everywhere(*arguments, every=20)
