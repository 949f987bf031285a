"""Atomic, verified, pickle-free checkpoints: safetensors and JSON files under a manifest of their SHA-256.

A directory `step_XXXXXXXX` exists only when it is whole: every file is written and synced in a temporary directory, the
manifest last, then the directory is renamed and read back once. Bytes depend on the content alone. This module knows
names and tensors, not the model; reading also takes Hugging Face model directories, which have no manifest.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import UserError
from foreign import FILE_NAME, MAX_NAME, CheckpointError, check_header, plain_file, read_json, unreadable
from options import shown

SCHEMA = 2  # of the manifest; 1 had no digest of its own and none of the tensors, and is still read
LEAST_KEPT = 2  # intact checkpoints that retention never touches
ROOM = 1.2  # of a checkpoint's size, free before a run begins
MANIFEST = "manifest.json"
MAX_SHARD_BYTES = 5 * 10**9

STEP = re.compile(r"step_(\d{8})")
# .tmp-: a save that died. .old-: moved aside for a new directory of the same step. .trash-: a deletion that died.
# A damaged one becomes step_XXXXXXXX.bad-<reason> and stays: scripts/checkpoints.py prune deletes it.
LEFTOVER = re.compile(r"step_(\d{8})\.(tmp|old|trash|hub)-[0-9a-f]{8}")
BAD = re.compile(r"step_\d{8}\.bad-[a-z0-9-]+")
SAFETENSORS_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

log = logging.getLogger(__name__)


Known = set[tuple[str, str]]  # checkpoints that were read back: the name, the SHA-256 of the manifest


# ---------------------------------------------------------------------------------------------------------------- save


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder, if it is there: raises UserError where another process does.

    A lock on the folder itself: no file is written, and it ends with the process, however that ends; no child inherits
    it. Windows goes without, and so do file systems without locks, with a logged warning.
    """
    handle = None
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        assert handle is not None  # only the lock blocks
        os.close(handle)
        raise UserError(
            f"run.dir = {str(folder)!r}: another process trains this run; stop it, or give another"
        ) from None
    except (ImportError, FileNotFoundError):
        pass
    except OSError as error:  # NFS, say
        log.warning("%s cannot be locked (%s): see that no other process trains this run", folder, error.strerror)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def preflight(folder: Path, num_bytes: int, keep: int = 1, *, afresh: bool = False) -> list[str]:
    """Raise UserError unless `folder`, or the nearest one above it, can be written and has room for a checkpoint of
    `num_bytes`; a line to tell where `keep` of them will not fit, with the one under way, in place of those that are
    there; `afresh` these stay, under another name."""
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise UserError(f"run.dir = {str(folder)!r}: {there} is a file")
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".preflight-") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
        if (folder / "checkpoints").is_dir():
            _sweep(folder / "checkpoints", "tmp", "trash", "hub")  # of processes that died
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise UserError(f"run.dir = {str(folder)!r} cannot be written: {there}: {error.strerror}") from None
    replaced = [] if afresh else _checkpoints(folder / "checkpoints")
    held = [sum(file.stat().st_size for file in path.iterdir()) for path in replaced]
    spare = "" if held else " and a fifth to spare"  # a run that was going needs no more than it did
    if free + sum(held[LEAST_KEPT:]) < num_bytes * (ROOM if spare else 1):
        raise UserError(
            f"run.dir = {str(folder)!r}: {free / 2**30:.2f} GiB are free, a checkpoint of this run takes "
            f"{num_bytes / 2**30:.2f} GiB{spare}; free some, or give another run.dir=..."
        )
    needed = (max(keep, LEAST_KEPT) + 1) * num_bytes - sum(held)
    told = (
        f"checkpoint.keep = {keep} needs {needed / 2**30:.2f} GiB more for checkpoints, and {free / 2**30:.2f} GiB are "
        f"free: once they are full, all but the newest {LEAST_KEPT} are deleted early"
    )
    return [told] if free < needed else []


def network_drive(folder: Path, mounts: Path = Path("/proc/mounts")) -> str | None:
    """The file system's type where a folder lies on a network or cloud drive; None where it does not, or Linux does not
    tell. Such drives may lose what they have acknowledged, and locks."""
    try:
        entries = [line.split(" ")[1:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    place = folder.resolve()
    above = [(len(point), kind) for point, kind in entries if place.is_relative_to(point.replace("\\040", " "))]
    kind = max(above)[1] if above else ""
    return (
        kind if re.match(r"nfs|cifs|smb|fuse(?!\.overlay|\.lxcfs|ctl|blk)|9p|afs|ceph|gluster|lustre", kind) else None
    )


def make_folder(path: Path) -> None:
    """Like `mkdir -p`, and durable: a folder is lost with the power unless the one that names it was synced."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_directory(folder.parent)


def save(
    root: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
    *,
    keep: int,
    known: Known | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write `root/step_XXXXXXXX`, read it back, delete older ones as `prune` does; return its path.

    `tensors` holds a mapping of tensors per group ("model", "optimizer"), on any device, views and copies welcome;
    `files` are written as they are. A directory of this step that holds the same bytes already is left alone. Raises
    OSError (a full disk; nothing of it is left) and CheckpointError (not what was written; it is moved aside).
    """
    known = set() if known is None else known
    make_folder(root)
    final = root / f"step_{step:08d}"
    _sweep(root, "tmp", "trash")  # before writing: a save that died may have filled the disk
    try:
        _make(final, step, tensors, files, max_shard_bytes)
    except OSError as error:
        # What is kept beyond the least makes room; what dead saves left is swept.
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not prune(root, LEAST_KEPT, known=known):
            raise
        log.warning("the disk is full: of the checkpoints in %s only the newest %d are kept", root, LEAST_KEPT)
        _make(final, step, tensors, files, max_shard_bytes)
    sync_directory(root)
    sync_directory(root.parent)
    for file in final.iterdir():
        _forget(file)
    try:
        _verify_once(final, known)
    except CheckpointError:
        _quarantine(final)
        raise
    prune(root, keep, never=final, known=known)
    return final


def _make(
    final: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], files: Mapping[str, bytes],
    max_shard_bytes: int,
) -> None:  # fmt: skip
    temporary = _aside(final, "tmp")
    temporary.mkdir()
    try:
        manifest = _manifest_bytes(step, write(temporary, tensors, files, max_shard_bytes=max_shard_bytes))
        _write_file(temporary / MANIFEST, [manifest])
        sync_directory(temporary)
        if not _holds(final, manifest):
            if final.exists():
                os.rename(final, _aside(final, "old"))  # `latest` still finds it should we die before the next line
            os.rename(temporary, final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing there after the rename


def _manifest_bytes(step: int, entries: Mapping[str, Any]) -> bytes:
    content = {"schema": SCHEMA, "step": step, "files": dict(sorted(entries.items()))}
    return _json_bytes(content | {"digest": _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json_bytes(content)).hexdigest()


def _forget(path: Path) -> None:
    """Ask the system to drop a synced file from its page cache, so that it is read back from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def write(
    directory: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    files: Mapping[str, bytes],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, dict[str, Any]]:
    """Write and sync groups and files into an empty directory; return {file name: {"bytes", "sha256", "tensors"}}.

    `dtypes` names tensors to be stored in another dtype. One tensor at a time is copied to the CPU.
    """
    entries: dict[str, dict[str, Any]] = {}
    for group, state in tensors.items():
        entries |= _write_group(directory, group, state, dtypes or {}, max_shard_bytes)
    for name, content in files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST or name in entries:
            raise ValueError(f"{name!r} cannot be a file of a checkpoint")
        entries[name] = _write_file(directory / name, [content])
    return entries


def prune(root: Path, keep: int, *, never: Path | None = None, known: Known | None = None) -> list[Path]:
    """Delete all but the newest `keep` intact checkpoints, and what dead saves and deletions left; `never` stays.

    Nothing goes before `LEAST_KEPT` newer ones were read back whole; what is damaged among those is moved aside.
    Failures are logged, not raised: the next save tries again, and training need not stop for them. Returns what was
    deleted.
    """
    intact, deleted = 0, []
    for path in _checkpoints(root):
        if intact >= max(keep, LEAST_KEPT):
            if path != never:
                try:
                    os.rename(path, _aside(path, "trash"))  # one step: a half deleted directory never looks whole
                    deleted.append(path)
                except OSError as error:
                    log.warning("cannot delete checkpoint %s: %s", path, error)
            continue
        try:
            _verify_once(path, known)
            intact += 1
        except CheckpointError as error:
            log.warning("a damaged checkpoint is moved aside: %s", error)
            _quarantine(path)
        except UserError as error:  # it may be whole all the same
            log.warning("%s", error)
    _sweep(root, "tmp", "trash", *(("old",) if intact else ()))
    return deleted


def set_newer_aside(root: Path, step: int) -> None:
    """Checkpoints past `step` are of a way that was given up: a start must not find them."""
    for path in _checkpoints(root, moved_aside=True):
        if step_of(path) > step:
            _quarantine(path, "diverged")


def key_of(path: Path) -> tuple[str, str]:
    """What a checkpoint is `known` by: its name, and the SHA-256 of its manifest; raises CheckpointError."""
    try:
        return path.name, hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise unreadable(path / MANIFEST, error) from None


def _verify_once(path: Path, known: Known | None) -> None:
    """Verify unless this very checkpoint was before; raises CheckpointError."""
    key = key_of(path)
    if known is None or key not in known:
        verify(path)
    if known is not None:
        known.add(key)


def _quarantine(path: Path, reason: str = "") -> None:
    """Rename a bad checkpoint: it is no longer looked at, and can be examined."""
    reason = reason or ("damaged" if (path / MANIFEST).is_file() else "no-manifest")
    for number in itertools.count():
        target = path.with_name(f"{path.name[:13]}.bad-{reason}{f'-{number}' if number else ''}")
        if not target.exists():
            break
    try:
        os.rename(path, target)
    except OSError as error:
        log.warning("cannot move %s aside: %s", path, error)


def _write_group(
    directory: Path, group: str, state: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], max_bytes: int
) -> dict[str, dict[str, Any]]:
    """Write `group.safetensors`, or shards of at most `max_bytes` with an index, in Hugging Face's naming."""
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(state):
        num_bytes = state[name].numel() * dtypes.get(name, state[name].dtype).itemsize
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
        total += num_bytes
    if len(shards) == 1:
        file = f"{group}.safetensors"
        return {file: _write_safetensors(directory / file, state, shards[0], dtypes)}
    entries, weight_map = {}, {}
    for i, names in enumerate(shards, 1):
        file = f"{group}-{i:05d}-of-{len(shards):05d}.safetensors"
        entries[file] = _write_safetensors(directory / file, state, names, dtypes)
        weight_map |= dict.fromkeys(names, file)
    index = f"{group}.safetensors.index.json"
    content = _json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    return entries | {index: _write_file(directory / index, [content])}


def _write_safetensors(
    path: Path, state: Mapping[str, Tensor], names: Iterable[str], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Any]:
    """Stream one file. Ours instead of `safetensors.torch.save_file`, which wants the whole file in CPU memory without
    shared storage (our experts are views, the MTP copies the same tensor), and cannot hash while it writes.

    Format: length of the header (8 bytes, little endian), JSON header padded to 8 bytes, the tensors without gaps.
    """
    stored = {name: dtypes.get(name, state[name].dtype) for name in names}
    order = sorted(stored, key=lambda name: (-stored[name].itemsize, name))  # widest first keeps all of them aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape = SAFETENSORS_DTYPES[stored[name]], list(state[name].shape)
        end = offset + state[name].numel() * stored[name].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    contents = (_tensor_bytes(state[name], stored[name]) for name in order)
    checksums: list[int] = []
    entry = _write_file(path, itertools.chain([len(head).to_bytes(8, "little"), head], _summed(contents, checksums)))
    return entry | {"tensors": {name: f"{value:08x}" for name, value in zip(order, checksums, strict=True)}}


def _summed(contents: Iterable[memoryview], checksums: list[int]) -> Iterator[memoryview]:
    """Pass on, with a CRC-32 each: with it a damaged tensor can be named."""
    for content in contents:
        checksums.append(zlib.crc32(content))
        yield content


def _tensor_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    return tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "xb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def replace(path: Path, content: bytes) -> None:
    """The file with this content, or as it was before, whatever comes between."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    _write_file(temporary, [content])
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make names in a directory durable. Windows cannot open one; some network file systems refuse to sync it."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _holds(path: Path, manifest: bytes) -> bool:
    """Whether `path` is an intact checkpoint with this very manifest."""
    try:
        return (path / MANIFEST).read_bytes() == manifest and bool(verify(path))
    except (OSError, UserError):
        return False


def _aside(path: Path, kind: str) -> Path:
    return path.with_name(f"{path.name[:13]}.{kind}-{secrets.token_hex(4)}")


def _sweep(root: Path, *kinds: str) -> None:
    for path in root.iterdir():
        match = LEFTOVER.fullmatch(path.name)
        if match and match[2] in kinds:
            shutil.rmtree(path, ignore_errors=True)


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------- find


def find(path: Path | str) -> Path:
    """The model directory a user means: a checkpoint, a Hugging Face model directory, or a run (its newest checkpoint).

    Raises UserError when there is none, CheckpointError when a checkpoint is damaged.
    """
    try:
        path = Path(os.path.expanduser(path))  # Path's own raises where there is no such user
        there = path.is_dir()
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"{path}: {error.strerror}") from None
    if not there:
        raise UserError(f"{path}: no such directory; give a run, a checkpoint or a Hugging Face model directory")
    if (path / MANIFEST).is_file():
        verify(path)
        return path
    if any((path / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if newest := latest(root):
        return newest
    damaged = len(_checkpoints(root))
    raise UserError(
        f"{path}: {damaged} checkpoints, all of them damaged"
        if damaged
        else f"{path}: no model here; looked for model.safetensors, its .index.json and checkpoints/step_*/"
    )


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint, moved aside or not."""
    match = STEP.match(path.name)
    assert match is not None, path
    return int(match[1])


def latest(root: Path, *, quarantine: bool = False, most: int | None = None, known: Known | None = None) -> Path | None:
    """The newest intact checkpoint in `root`, of at most step `most`. Damaged ones are skipped with a logged warning.

    With `quarantine` they are moved aside, once an intact one is found; otherwise nothing is changed. What is `known`
    is not read again, what is found becomes known.
    """
    damaged: list[Path] = []
    for path in _checkpoints(root, moved_aside=True):
        if most is not None and step_of(path) > most:
            continue
        try:
            _verify_once(path, known)
        except CheckpointError as error:
            log.warning("skipping a damaged checkpoint: %s", error)
            damaged.append(path)
        else:
            for other in damaged if quarantine else ():
                _quarantine(other)
            return path
    return None


def verify(path: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its manifest and return it; CheckpointError names what is damaged and how."""
    manifest = read_json(path / MANIFEST)
    files = manifest.get("files")
    schema, step = manifest.get("schema"), manifest.get("step")
    if type(schema) is int and schema > SCHEMA and manifest.pop("digest", "") == _digest(manifest):
        raise UserError(
            f"{path / MANIFEST}: of schema {schema}, this program reads up to {SCHEMA}; a newer version wrote it"
        )
    if schema not in (1, SCHEMA) or type(step) is not int or not isinstance(files, dict):
        raise CheckpointError(f"{path / MANIFEST}: not a manifest of schema {SCHEMA}")
    content = {key: value for key, value in manifest.items() if key != "digest"}
    if _json_bytes(manifest) != (path / MANIFEST).read_bytes() or (
        schema == SCHEMA and manifest.get("digest") != _digest(content)
    ):
        raise CheckpointError(f"{path / MANIFEST}: damaged, not the bytes that were written")
    name = STEP.match(path.name)
    if name and int(name[1]) != step:
        raise CheckpointError(f"{path / MANIFEST}: says step {step}")
    for file, entry in files.items():
        if not FILE_NAME.fullmatch(file) or not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
            raise CheckpointError(f"{path / MANIFEST}: bad entry {file!r}")
        _verify_file(path / file, entry)
    for stray in path.glob("*.safetensors*"):  # would shadow a file that was checked
        if stray.name not in files:
            raise CheckpointError(f"{stray}: not in the manifest")
    return manifest


def _verify_file(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = plain_file(path).stat().st_size
        if size != entry["bytes"]:
            raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except OSError as error:
        raise unreadable(path, error) from None
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(f"{path}: damaged{_in_tensor(path, entry)}, its SHA-256 is not the manifest's")


def _in_tensor(path: Path, entry: Mapping[str, Any]) -> str:
    """Which tensor is not as it was written, for a message; empty where that cannot be told."""
    with contextlib.suppress(CheckpointError, SafetensorError, AttributeError), _open(path) as handle:
        for name, checksum in entry.get("tensors", {}).items():
            tensor = handle.get_tensor(name)
            if f"{zlib.crc32(_tensor_bytes(tensor, tensor.dtype)):08x}" != checksum:
                return f" in {name}"
    return ""


def _checkpoints(root: Path, *, moved_aside: bool = False) -> list[Path]:
    """Directories of checkpoints, newest first; what was moved aside for the same step comes after it."""
    found: list[tuple[int, bool, str]] = []
    for path in root.iterdir() if root.is_dir() else ():
        whole, left = STEP.fullmatch(path.name), LEFTOVER.fullmatch(path.name)
        if whole and path.is_dir():
            found.append((int(whole[1]), True, path.name))
        elif left and left[2] == "old" and moved_aside:
            found.append((int(left[1]), False, path.name))
    return [root / name for *_, name in sorted(found, reverse=True)]


# ---------------------------------------------------------------------------------------------------------------- load


def load(path: Path, group: str = "model") -> dict[str, Tensor]:
    """The tensors of a group, on the CPU. They are mapped from the files: copy them before the directory goes."""
    state: dict[str, Tensor] = {}
    for file, names in _shards(path, group).items():
        with _open(file) as handle:
            state |= {name: handle.get_tensor(name) for name in names or handle.keys()}
    return state


def _shards(path: Path, group: str) -> dict[Path, list[str] | None]:
    """The files of a group and which tensors to take from each; None: all."""
    single, index = path / f"{group}.safetensors", path / f"{group}.safetensors.index.json"
    if single.is_file():
        return {single: None}
    if not index.is_file():
        raise CheckpointError(f"{path}: neither {single.name} nor {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    names: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not FILE_NAME.fullmatch(file):
            raise CheckpointError(f"{index}: {shown(file)} is not the plain name of a file")
        if len(name) > MAX_NAME:
            raise CheckpointError(f"{index}: {shown(name)} is longer than {MAX_NAME} characters")
        names.setdefault(path / file, []).append(name)  # type: ignore[union-attr]
    return dict(sorted(names.items()))


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, its header checked before the library sees it; errors become CheckpointError."""
    try:
        check_header(path)
        with safe_open(path, framework="pt") as handle:
            yield handle
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None
