"""Power loss: from the log of what a program did to its files, every state a disk may be left in.

The model is what POSIX promises and no more. A file's data are on the disk once the file is synced, up to what had
been flushed; before, none, half or all of it may be. A name (created, renamed, deleted) is there, or gone, once its
directory is synced; before, any of the pending changes may have happened without the others. A rename happens as a
whole.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from injected import wrap
from shim import Operation, Shim

Tree = dict[str, bytes | None]  # path below the root -> content, None: a directory


@dataclass
class Node:
    """A file or a directory; `durable` is what a sync has made sure of."""

    folder: bool
    data: bytes = b""
    flushed: int = 0
    durable_data: bytes = b""
    names: dict[str, int] = field(default_factory=dict)
    durable_names: dict[str, int] = field(default_factory=dict)


Change = list[tuple[int, str, int | None]]  # in a directory, a name is now that node, or none; all of it or nothing


class Disk:
    """What a program sees, and what would be left of it."""

    def __init__(self) -> None:
        self.nodes = {0: Node(True)}
        self.pending: list[Change] = []

    def apply(self, kind: str, path: str, other: str, data: bytes) -> None:
        if kind in ("mkdir", "create"):
            self._create(path, folder=kind == "mkdir")
        elif kind == "write":
            self.nodes[self._find(path)].data += data
        elif kind == "flush":
            node = self.nodes[self._find(path)]
            node.flushed = len(node.data)
        elif kind == "sync":
            node = self.nodes[self._find(path)]
            node.durable_data = node.data[: node.flushed]
        elif kind == "syncdir":
            number = self._find(path)
            self.nodes[number].durable_names = dict(self.nodes[number].names)
            self.pending = [rest for change in self.pending if (rest := [part for part in change if part[0] != number])]
        elif kind == "rename":
            (source, name), (target, new) = self._place(path), self._place(other)
            moved = self.nodes[source].names.pop(name)
            self.nodes[target].names[new] = moved
            self.pending.append([(source, name, None), (target, new, moved)])
        elif kind in ("unlink", "rmdir"):
            parent, name = self._place(path)
            del self.nodes[parent].names[name]
            self.pending.append([(parent, name, None)])
        else:
            raise ValueError(kind)

    def states(self) -> Iterator[Tree]:
        """Prefixes of the pending changes, each alone, all but each; unsynced data not there, half there, all there."""
        count = len(self.pending)
        chosen = {tuple(range(size)) for size in range(count + 1)}
        chosen |= {(one,) for one in range(count)}
        chosen |= {tuple(number for number in range(count) if number != one) for one in range(count)}
        for share in (0.0, 0.5, 1.0):
            for subset in sorted(chosen):
                yield self._state([self.pending[number] for number in subset], share)

    def _state(self, changes: list[Change], share: float) -> Tree:
        names = {number: dict(node.durable_names) for number, node in self.nodes.items() if node.folder}
        for change in changes:
            for folder, name, node in change:
                if node is None:
                    names[folder].pop(name, None)
                else:
                    names[folder][name] = node
        tree: Tree = {}

        def walk(number: int, path: str) -> None:
            for name, child in names[number].items():
                node, below = self.nodes[child], f"{path}{name}"
                if node.folder:
                    tree[below] = None
                    walk(child, below + "/")
                else:
                    unsynced = node.data[len(node.durable_data) :] if node.data.startswith(node.durable_data) else b""
                    tree[below] = node.durable_data + unsynced[: int(share * len(unsynced))]

        walk(0, "")
        return tree

    def _create(self, path: str, *, folder: bool) -> None:
        parent, name = self._place(path)
        if name in self.nodes[parent].names:  # opened for writing: cut to nothing
            node = self.nodes[self.nodes[parent].names[name]]
            node.data, node.flushed = b"", 0
            return
        number = len(self.nodes)
        self.nodes[number] = Node(folder)
        self.nodes[parent].names[name] = number
        self.pending.append([(parent, name, number)])

    def _place(self, path: str) -> tuple[int, str]:
        above, _, name = path.rpartition("/")
        return self._find(above), name

    def _find(self, path: str) -> int:
        number = 0
        for name in filter(None, path.split("/")):
            number = self.nodes[number].names[name]
        return number


# ---- recording


def record(root: str, path: str, mutation: str = "") -> None:
    """Log every change below `root`, and where a save had returned, for `check`. A fault for a run's process.

    `mutation`: a kind of operation that is left out of the log, as if the program did not do it.
    """
    import atexit

    import checkpoint

    log: list[dict[str, Any]] = []

    def act(number: int, operation: Operation) -> None:
        if operation.kind == mutation or _no_change(operation):
            return
        places = [os.path.relpath(place, root) for place in (operation.path, operation.other) if place]
        log.append({"kind": operation.kind, "paths": [place if place != "." else "" for place in places],
                    "data": base64.b64encode(operation.data).decode()})  # fmt: skip

    def around(real: Any, folder: Any, step: int, *rest: Any, **options: Any) -> Any:
        result = real(folder, step, *rest, **options)
        log.append({"kind": "saved", "step": step, "manifest": hashlib.sha256(
            (result / "manifest.json").read_bytes()).hexdigest()})  # fmt: skip
        return result

    wrap(checkpoint, "save", around)
    Shim(root, act).install()
    atexit.register(lambda: Path(path).write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8"))


def _no_change(operation: Operation) -> bool:
    """What fails without the shim, too: a folder that is there already, a name that is gone."""
    if operation.kind == "mkdir":
        return os.path.isdir(operation.path) or not os.path.isdir(os.path.dirname(operation.path))
    return operation.kind in ("unlink", "rmdir", "rename") and not os.path.lexists(operation.path)


def save_some(root: str, keep: int, steps: int) -> None:
    """Saves alone, of a small checkpoint: what a log is recorded of."""
    import boundaries

    for step in range(1, steps + 1):
        boundaries.save(Path(root, "runs", "run", "checkpoints"), step, keep)


# ---- checking


def check(log: str, checkpoints: str, folder: str, report: str, prepared: list[str], most: int = 10**9) -> None:
    """Make every state, and let `checkpoint.latest` find a verified step in it: not older than the last save that had
    returned. `prepared`: folders that were there, and durable, before the log begins. `most`: failures to be found."""
    import checkpoint

    os.fsync = lambda descriptor: None
    disk, place = Disk(), Path(folder, "state")
    for path in prepared:
        disk.apply("mkdir", path, "", b"")
        disk.apply("syncdir", path.rpartition("/")[0], "", b"")
    seen: set[bytes] = set()
    saved, manifests = 0, {}
    lines = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    manifests = {line["step"]: line["manifest"] for line in lines if line["kind"] == "saved"}
    found: dict[str, Any] = {"operations": len(lines), "points": 0, "states": 0, "failures": []}
    for number, line in enumerate(lines):
        if line["kind"] == "saved":
            saved = line["step"]
        else:
            paths = [*line["paths"], ""]
            disk.apply(line["kind"], paths[0], paths[1], base64.b64decode(line["data"]))
        found["points"] += 1
        if len(found["failures"]) >= most:
            break
        for tree in disk.states() if saved else ():
            key = hashlib.sha256(repr((saved, sorted(tree.items(), key=lambda item: item[0]))).encode()).digest()
            if key in seen:
                continue
            seen.add(key)
            found["states"] += 1
            _make(place, tree)
            newest = checkpoint.latest(place / checkpoints)
            step = int(newest.name[5:13]) if newest is not None else -1
            if step < saved:
                found["failures"].append(
                    f"after {number} {line['kind']} {line.get('paths')}: {newest} is left of {saved}"
                )
            elif step in manifests and newest is not None:
                content = (newest / "manifest.json").read_bytes()
                if hashlib.sha256(content).hexdigest() != manifests[step]:
                    found["failures"].append(f"after {number}: {newest} is not what was saved")
    Path(report).write_text(json.dumps(found), encoding="utf-8")


def _make(place: Path, tree: Tree) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    for path, content in sorted(tree.items()):
        if content is None:
            (place / path).mkdir(exist_ok=True)
        else:
            (place / path).write_bytes(content)
