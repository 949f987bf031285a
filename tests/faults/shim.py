"""Stands between a process and its files: sees every change below a folder before it happens, and may prevent it.

Counted are `mkdir`, `create`, `write`, `flush`, `sync` (of a file), `syncdir`, `rename`, `link`, `unlink` and `rmdir`:
the I/O boundaries of a save. A process killed at each of them has been killed everywhere, as far as its files can tell.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Operation:
    """A change that is about to be made. `data`: what is written; `other`: the new name of a renamed file."""

    kind: str
    path: str
    other: str = ""
    data: bytes = b""
    file: Any = None


Act = Callable[[int, Operation], None]


class Shim:
    """Calls `act(number, operation)` before every change below `root`, counting from the first whose path matches.

    What `act` raises is what the program gets.
    """

    def __init__(self, root: str, act: Act, *, since: str = ""):
        self.root, self.act = os.path.abspath(root), act
        self.since = re.compile(since)
        self.number = 0
        self.open = not since
        self.lock = threading.RLock()

    def before(self, operation: Operation) -> None:
        with self.lock:
            if not (operation.path + "/").startswith(self.root + "/"):
                return
            if not self.open and self.since.search(operation.path):
                self.open = True
            if self.open:
                self.number += 1
                self.act(self.number - 1, operation)

    def install(self) -> None:
        """For good: it is meant for a forked process."""
        self._install_names()
        self._install_files()

    def _install_names(self) -> None:
        real = {name: getattr(os, name) for name in ("mkdir", "rename", "replace", "link", "unlink", "remove", "rmdir")}

        def one(kind: str, name: str) -> Callable[..., Any]:
            def changed(path: Any, *rest: Any, **options: Any) -> Any:
                self.before(Operation(kind, _absolute(path, options.get("dir_fd"))))
                return real[name](path, *rest, **options)

            return changed

        def two(kind: str, name: str) -> Callable[..., Any]:
            def changed(source: Any, target: Any, **options: Any) -> Any:
                first = _absolute(source, options.get("src_dir_fd"))
                self.before(Operation(kind, first, _absolute(target, options.get("dst_dir_fd"))))
                return real[name](source, target, **options)

            return changed

        for kind, name in (("mkdir", "mkdir"), ("unlink", "unlink"), ("unlink", "remove"), ("rmdir", "rmdir")):
            setattr(os, name, one(kind, name))
        for kind, name in (("rename", "rename"), ("rename", "replace"), ("link", "link")):
            setattr(os, name, two(kind, name))

    def _install_files(self) -> None:
        opened, synced, opened_raw, written_raw = builtins.open, os.fsync, os.open, os.write

        def open_file(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if isinstance(file, int) or not set(mode) & set("wax+"):
                return opened(file, mode, *rest, **options)
            path = _absolute(file)
            if not (path + "/").startswith(self.root + "/"):
                return opened(file, mode, *rest, **options)
            if "x" in mode or "w" in mode or not os.path.exists(path):
                self.before(Operation("create", path))
            return Written(self, path, opened(file, mode, *rest, **options))

        def open_raw(path: Any, flags: int, *rest: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.before(Operation("create", _absolute(path, options.get("dir_fd"))))
            return opened_raw(path, flags, *rest, **options)

        def write_raw(descriptor: int, data: Any) -> int:
            if descriptor > 2:
                self.before(Operation("write", _of(descriptor), data=bytes(data)))
            return written_raw(descriptor, data)

        def sync(descriptor: Any) -> None:
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            path = _of(number)
            self.before(Operation("syncdir" if os.path.isdir(path) else "sync", path))
            synced(number)

        builtins.open = open_file
        io.open = open_file
        os.open, os.write, os.fsync = open_raw, write_raw, sync
        if hasattr(os, "fdatasync"):
            os.fdatasync = sync


class Written:
    """A file that tells before it is written to; everything else is the file's."""

    def __init__(self, shim: Shim, path: str, file: Any):
        self._shim, self._path, self._file = shim, path, file

    def write(self, data: Any) -> int:
        content = data.encode(self._file.encoding) if isinstance(data, str) else bytes(data)
        self._shim.before(Operation("write", self._path, data=content, file=self._file))
        return self._file.write(data)

    def flush(self) -> None:
        self._shim.before(Operation("flush", self._path))
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._shim.before(Operation("flush", self._path))
        self._file.close()

    def __enter__(self) -> Written:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Any:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _absolute(path: Any, folder: int | None = None) -> str:
    """The path as the program means it; relative to a descriptor when there is one, as `shutil.rmtree` does."""
    name = os.fspath(path)
    name = os.fsdecode(name)
    return os.path.normpath(os.path.join(os.getcwd() if folder is None else _of(folder), name))


def _of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
