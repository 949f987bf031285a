"""Token shards: the ids of a unit's documents in a safetensors file, mapped when read.

A folder of shards holds `unit-00000012.safetensors` for each unit, the tokenizer, and `index.json`, which says what the
units were made of. Streaming the sources and reading such a folder gives the same units with the same documents in the
same order, so training on either is the same. Nothing in a file depends on time, machine or where the folder lies.
A shard says of which documents and tokenizer its folder was made, and is refused in any other.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
from safetensors.numpy import save

from config import SourceConfig, UserError
from documents import Documents, Manifest, Stream, Unit, fingerprint
from remote import one_line

INDEX = "index.json"
FORMAT = "deepseek-tokens-2"
DTYPES = {"U16": np.uint16, "U32": np.uint32, "U64": np.uint64, "I64": np.int64}
TENSORS = {  # name: the dtypes it may have, in the order that is hashed
    "tokens": ("U16", "U32"), "ends": ("I64",), "rows": ("U32",), "hashes": ("U64",), "num_bytes": ("U32",),
}  # fmt: skip
MOST_HEADER_BYTES = 1 << 20
MOST_INDEX_BYTES = 64 << 20
SPARE_BYTES = 1 << 30  # of a disk, left free by the cache: checkpoints need it more
LEFT_BEHIND_SEC = 4 * 3600.0  # a temporary file that nobody wrote to for as long is of a process that was killed
_FILE_NAME = re.compile(r"unit-(\d{8,18})\.safetensors")
_CHECKED = ConfigDict(extra="forbid")

log = logging.getLogger(__name__)


@dataclass(frozen=True, config=_CHECKED)
class Layout:
    """A stream of the sources."""

    names: list[str]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    epochs: Annotated[int, Field(ge=1)] | None
    units: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_CHECKED)
class Index:
    """What a folder holds."""

    identities: list[str]  # of the sources: what `Manifest.fingerprint` is made of
    streams: list[Layout]
    num_units: int  # of the sources, whether all are here or not
    complete: bool
    tokenizer: str  # fingerprint
    vocab_size: int
    eos: int

    def write(self, folder: Path) -> None:
        write_file(folder / INDEX, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> Index:
        try:
            with (folder / INDEX).open("rb") as file:
                raw = file.read(MOST_INDEX_BYTES + 1)
            if len(raw) > MOST_INDEX_BYTES:
                raise ValueError(f"larger than {MOST_INDEX_BYTES} bytes")
            values = json.loads(raw)
            found = values.pop("format", None)
            if found != FORMAT:
                older = str(found).startswith("deepseek-tokens")
                raise ValueError(f"not of format {FORMAT}" + "; an earlier version's: make it again elsewhere" * older)
            index = cls(**values)
            if index.num_units != sum(part.units for part in index.streams):
                raise ValueError("its streams do not have num_units units")
            return index
        except ValidationError as error:
            first = error.errors()[0]
            why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = one_line(error)
        raise UserError(f"{folder / INDEX}: no index of token shards: {why}")

    @classmethod
    def of(cls, manifest: Manifest, tokenizer: Any, fingerprint: str, *, complete: bool) -> Index:
        streams = [Layout(list(map(_unplaced, s.names)), s.weight, s.epochs, len(s.units)) for s in manifest.streams]
        return cls(
            list(manifest.identities), streams, len(manifest.units), complete, fingerprint, len(tokenizer),
            tokenizer.eos_token_id,
        )  # fmt: skip


def is_folder(folder: Path) -> bool:
    """Whether it is one of token shards, or was meant to be: others, too, call a file index.json."""
    path = folder / INDEX
    if not path.is_file():
        return False
    with path.open("rb") as file:
        ours = b"deepseek-tokens-" in file.read(4096)
    return ours or any(_FILE_NAME.fullmatch(name) for name in os.listdir(folder))


def file_name(number: int) -> str:
    return f"unit-{number:08d}.safetensors"


def sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed. Those of live ones are younger, wherever they run."""
    for left in folder.glob("*.tmp-*"):
        with contextlib.suppress(OSError):  # someone else was faster
            if time.time() - left.stat().st_mtime > LEFT_BEHIND_SEC:
                left.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Write it whole or not at all, whoever else writes it."""
    # Threads read units, two of them perhaps the same one; the processes may be on machines that share the folder.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def pack(documents: Documents, ids: Sequence[np.ndarray | None]) -> Documents:
    """The documents of a unit as ids; what the tokenizer refused keeps its place, without any."""
    empty = np.zeros(0, dtype=np.int32)
    return documents._replace(items=[empty if found is None else found for found in ids])


def to_bytes(number: int, unit: Unit, documents: Documents, *, corpus: str, tokenizer: str, vocab_size: int) -> bytes:
    """A shard's file. `documents` as `pack` makes them. corpus, tokenizer: fingerprints of what the folder is of."""
    ends = np.cumsum([len(ids) for ids in documents.items], dtype=np.int64)
    ids = np.concatenate(documents.items) if len(ends) else np.zeros(0, np.int32)
    most = max(vocab_size, int(ids.max(initial=0)) + 1)  # a vocabulary with holes has ids past its size
    tokens = ids.astype(np.uint16 if most <= 1 << 16 else np.uint32)
    tensors = {
        "tokens": tokens, "ends": ends, "rows": documents.rows, "hashes": documents.hashes,
        "num_bytes": documents.num_bytes,
    }  # fmt: skip
    described = {
        "format": FORMAT,
        "unit": str(number),
        "source": _source(unit),
        "corpus": corpus,
        "tokenizer": tokenizer,
        "skipped": str(documents.skipped),
        "sha256": _digest(tensors),
    }
    return _sorted_metadata(save(tensors, described))


def _sorted_metadata(raw: bytes) -> bytes:
    """The same file with its header's keys in order: safetensors keeps metadata in a hash map of no order."""
    length = int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def _source(unit: Unit) -> str:
    """JSON. Of local files the path within the source: where that lay is nobody's affair."""
    described = {
        "path": unit.origin or _unplaced(unit.name or unit.path), "kind": unit.kind, "start": unit.start,
        "stop": unit.stop, "text_field": unit.text_field, "number": unit.source,
    }  # fmt: skip
    return json.dumps(described, sort_keys=True)


def _unplaced(path: str) -> str:
    return Path(path).name if "://" not in path and Path(path).is_absolute() else path


def _made_of(corpus: str | None, tokenizer: str | None) -> str:
    """What all shards of a folder have in common, in one word."""
    return f"{corpus}-{tokenizer}"


def provenance(unit: Unit) -> str:
    """Where a unit's documents come from, for people."""
    if unit.kind == "tokens":
        try:
            found = json.loads(_map(unit.path)[0]["source"])
            names = _names(str(Path(unit.path).parent))
            of = f" of {names[found['number']]} (source {found['number'] + 1})" if len(names) > 1 else ""
            where = f"{found['path']}{of} (in {Path(unit.path).name})"
            kind, start, stop = (str(found[key]) for key in ("kind", "start", "stop"))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UserError(f"data.sources: {unit.path} does not say what it was made from") from None
    else:
        where, kind, start, stop = unit.name or unit.path, unit.kind, unit.start, unit.stop
    if kind == "file":
        return where
    what = {"parquet": f"row group {start}", "arrow": f"record batch {start}"}.get(kind, f"bytes {start}-{stop}")
    return f"{where}, {what}"


@functools.lru_cache(maxsize=64)
def _names(folder: str) -> list[str]:
    """The sources that a folder was made from."""
    if not Path(folder, INDEX).is_file():
        return []
    return [name for part in Index.read(Path(folder)).streams for name in part.names]


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


# ---- reading


def read(unit: Unit) -> Documents:
    """A shard's documents: views of the mapped file. Raises UserError, one line, for a damaged one."""
    described, tensors = _map(unit.path)
    if described.get("unit") != str(unit.start):
        raise UserError(f"data.sources: {unit.path} is the shard of another unit, number {described.get('unit')}")
    if unit.origin and unit.origin != _made_of(described.get("corpus"), described.get("tokenizer")):
        raise UserError(
            f"data.sources: {unit.path} is the shard of other sources or of another tokenizer than its folder; "
            "run scripts/prepare_data.py again"
        )
    tokens, ends = tensors["tokens"], tensors["ends"].tolist()
    items = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return Documents(items, tensors["rows"], tensors["hashes"], tensors["num_bytes"], int(described["skipped"]))


@functools.lru_cache(maxsize=64)
def _map(path: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a shard, checked whole: header, bounds, digest."""
    try:
        described, tensors = _parse(path)
        ends = tensors["ends"]
        sizes = {len(tensors[name]) for name in TENSORS if name != "tokens"}
        if len(sizes) != 1 or described.get("format") != FORMAT:
            raise ValueError("its parts do not belong together")
        starts = np.concatenate((np.zeros(1, np.int64), ends))  # compared, not subtracted: that may wrap
        if (starts[:-1] > ends).any() or starts[-1] != len(tensors["tokens"]):
            raise ValueError("its documents lie outside of it")
        if _digest(tensors) != described["sha256"]:
            raise ValueError("its SHA-256 is not the one it was written with")
        int(described["skipped"])
        return described, tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else one_line(error)[:200]
        raise UserError(f"data.sources: {path} is no token shard, or a damaged one: {why}") from None


def _parse(path: str) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(MOST_HEADER_BYTES, size - 8):
            raise ValueError("no safetensors header")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length) if size > 8 + length else np.zeros(0, np.uint8)
    tensors = {}
    for name, allowed in TENSORS.items():
        entry = header[name]
        start, stop = entry["data_offsets"]
        (count,) = entry["shape"]
        if entry["dtype"] not in allowed or not 0 <= start <= stop <= len(data):
            raise ValueError(f"{name} is not what it should be")
        kind = np.dtype(DTYPES[entry["dtype"]])
        if count * kind.itemsize != stop - start:
            raise ValueError(f"{name} is not as long as it says")
        tensors[name] = np.asarray(data)[start:stop].view(kind)
    return header["__metadata__"], tensors


def resolve_folder(folder: Path, source: SourceConfig) -> tuple[list[Stream], list[str]]:
    """The streams of a folder of shards, and its identities: those of the sources it was made from, if it is complete.

    Made from several weighted sources it keeps their weights; the configuration's own apply to a folder of one.
    """
    index = Index.read(folder)
    there: dict[int, int] = {}  # the numbers of the shards, and their sizes
    for entry in os.scandir(folder):
        match = _FILE_NAME.fullmatch(entry.name)
        if match and int(match[1]) < index.num_units and entry.is_file():
            there[int(match[1])] = entry.stat().st_size
    missing = next((number for number in range(len(there)) if number not in there), len(there))
    if index.complete and missing < index.num_units:
        raise UserError(f"data.sources: {folder} lacks {file_name(missing)}; run scripts/prepare_data.py again")
    numbers = sorted(there)
    made_of = _made_of(fingerprint(index.identities), index.tokenizer)
    streams, first = [], 0
    for part in index.streams:
        mine = numbers[bisect_left(numbers, first) : bisect_left(numbers, first + part.units)]
        if part.units and not mine and numbers:  # a stream without units would never come to a row
            raise UserError(f"data.sources: {folder} has no shard of {', '.join(part.names)} yet, which has a weight")
        paths = [str(folder.absolute() / file_name(number)) for number in mine]
        units = tuple(
            Unit("tokens", path, n, n + 1, there[n], "", origin=made_of) for path, n in zip(paths, mine, strict=True)
        )
        first += part.units
        streams.append(Stream(tuple(part.names), units, part.weight, part.epochs))
    identities = list(index.identities)
    if len(numbers) < index.num_units:
        identities.append(json.dumps(["of its units", numbers]))
    if len(streams) == 1:
        return [Stream((source.path,), streams[0].units, source.weight or 1.0, source.epochs)], identities
    return streams, identities


def find(folder: Path, number: int, unit: Unit, *, corpus: str, tokenizer: str) -> Documents | None:
    """What was kept of a unit; None if nothing was. Raises UserError where the file is damaged or of something else."""
    path = folder / file_name(number)
    if not path.is_file():
        return None
    documents = read(Unit("tokens", str(path), number, number + 1, 0, "", origin=_made_of(corpus, tokenizer)))
    if _map(str(path))[0].get("source") != _source(unit):
        raise UserError(f"data.sources: {path} is the shard of another source")
    return documents


def check_tokenizer(manifest: Manifest, fingerprint: str) -> None:
    """Raise UserError where shards were made with another tokenizer."""
    for folder in sorted({Path(unit.path).parent for unit in manifest.units if unit.kind == "tokens"}):
        if Index.read(folder).tokenizer != fingerprint:
            raise UserError(
                f"data.tokenizer: the shards in {folder} were made with another one; "
                f"theirs is data.tokenizer={folder / 'tokenizer'}"
            )


# ---- written while streaming


class Cache:
    """`data.cache`: a folder of shards that fills while the sources are streamed, and is read where it is filled."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Any, fingerprint: str):
        self.corpus, self.fingerprint, self.vocab_size = manifest.fingerprint, fingerprint, len(tokenizer)
        self.folder = folder / f"{self.corpus[:16]}-{fingerprint[:16]}"
        self.told = False  # that it cannot be written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            if not (self.folder / INDEX).is_file():
                Index.of(manifest, tokenizer, fingerprint, complete=False).write(self.folder)
        except OSError as error:
            raise UserError(f"data.cache = {str(folder)!r} cannot be written: {error.strerror}") from None

    def get(self, number: int, unit: Unit) -> Documents | None:
        """The unit's documents; None where they are not there yet, or damaged: then `put` replaces them."""
        try:
            return find(self.folder, number, unit, corpus=self.corpus, tokenizer=self.fingerprint)
        except UserError as error:
            log.warning("data.cache: %s; it is made again", str(error).removeprefix("data.sources: "))
            return None

    def put(self, number: int, unit: Unit, documents: Documents, ids: Sequence[np.ndarray | None]) -> None:
        """Keep them, if there is room; from several processes at once they are the same bytes."""
        packed = pack(documents, ids)
        data = to_bytes(
            number, unit, packed, corpus=self.corpus, tokenizer=self.fingerprint, vocab_size=self.vocab_size
        )
        try:
            if shutil.disk_usage(self.folder).free < SPARE_BYTES + len(data):
                raise OSError(errno.ENOSPC, f"less than {SPARE_BYTES >> 30} GiB of space left", str(self.folder))
            write_file(self.folder / file_name(number), data)
        except OSError as error:  # no reason to stop: it is a cache
            if not self.told:
                log.warning("data.cache: %s: %s; training goes on without", error.filename, error.strerror)
            self.told = True
