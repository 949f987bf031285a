"""Where documents come from: local .txt, .jsonl and .parquet, or a Hub dataset, listed as units that can be sought.

`resolve` looks at every source once and returns a `Manifest`: small and plain. A `Unit` is what is read at a time, a
Parquet row group or a range of bytes of a text file; `read_unit` returns its documents in order. Ranges are nominal,
the reader moves both ends on to the next cut, so that no text is parsed to be listed.
"""

from __future__ import annotations

import difflib
import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import remote
from config import SourceConfig, UserError

ROOT = Path(__file__).resolve().parent
SUFFIXES = (".parquet", ".jsonl", ".txt")
UNIT_BYTES = 8 << 20
BLOCK_DOCUMENT_BYTES = 8 << 10  # a lone .txt is cut at blank lines into documents of about this size
HASH_WHOLE_BYTES = 64 << 20  # a larger local file is fingerprinted by its size, first and last MiB
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INSTEAD = "data.sources=FILE trains on a local file, --config quickstart on the text in this repository"


@dataclass(frozen=True)
class Unit:
    """What is read at a time.

    `parquet`: row group `start` of `path`. `jsonl`, `blocks`: bytes [start, stop), both moved on to the next line end
    or blank line. `file`: all of a .txt as one document. `size` is that of the file, in bytes.
    """

    kind: Literal["parquet", "jsonl", "blocks", "file"]
    path: str
    start: int
    stop: int
    size: int
    text_field: str


@dataclass(frozen=True)
class Manifest:
    """All units of all sources in a fixed order; `fingerprint` (hex) knows names and contents, not folders."""

    units: tuple[Unit, ...]
    fingerprint: str


class Documents(NamedTuple):
    texts: list[str]  # neither empty nor blank
    skipped: int  # unreadable ones: no JSON object, no text in the field, no valid UTF-8


def resolve(sources: Sequence[SourceConfig]) -> Manifest:
    """List the units of `sources`. Raises UserError for what is missing, unreachable, empty or of an unknown kind."""
    units: list[Unit] = []
    digest = hashlib.sha256()
    for source in sources:
        try:
            files = _local_files(source.path)
            found, identity = _resolve_hub(source) if files is None else _resolve_local(source, files)
        except OSError as error:  # what may not be read, a name that is too long
            if error.filename is None:
                raise
            raise UserError(f"data.sources: {error.filename}: {error.strerror}") from None
        if not found:
            raise UserError(f"data.sources: {source.path!r} holds no documents")
        units += found
        digest.update(json.dumps([source.text_field, identity]).encode())
    return Manifest(tuple(units), digest.hexdigest())


def read_unit(unit: Unit) -> Documents:
    """The documents of a unit, in order. Reads from the Hub are tried again for `remote.RETRY_SEC`."""
    if unit.path.startswith(remote.PREFIX):
        return remote.retry(lambda: _read(unit), unit.path)
    try:
        return _read(unit)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"data.sources: {unit.path} cannot be read: {error}") from None


# ---- local files


def _local_files(path: str) -> list[Path] | None:
    """The files a source path names, sorted, or None where it is a Hub dataset's name.

    A relative path is looked for in the working directory, then in the repository.
    """
    path = os.path.expanduser(path)
    for place in (Path(path), ROOT / path):
        place = Path(os.path.abspath(place))  # keeps links: in the Hub's cache only the link has a suffix
        if place.is_file() and place.suffix not in SUFFIXES:
            raise UserError(f"data.sources: {path!r}: expected one of {' '.join(SUFFIXES)}")
        if place.is_dir():
            files = [file for file in place.rglob("*") if not _hidden(file.relative_to(place))]
        else:
            files = [place] if place.is_file() else [Path(name) for name in glob.glob(str(place), recursive=True)]
        files = [file for file in files if file.suffix in SUFFIXES and file.is_file()]
        if files:
            return sorted(files, key=lambda file: file.as_posix())
        if place.is_dir():
            raise UserError(f"data.sources: folder {path!r} holds no {' '.join(SUFFIXES)} file")
    near = _near_path(path)
    if near is None and _HUB_NAME.fullmatch(path) and not path.endswith(SUFFIXES):
        return None
    hint = f"; did you mean {near!r}?" if near else "; a Hub dataset is named owner/name"
    raise UserError(f"data.sources: {path!r}: no such file, folder or glob match{hint}")


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


def _near_path(path: str) -> str | None:
    """An existing path whose last part resembles that of `path`."""
    for folder in (Path(path).parent, ROOT / Path(path).parent):
        siblings = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(Path(path).name, siblings, n=1)
        if near:
            return Path(path).with_name(near[0]).as_posix()
    return None


def _resolve_local(source: SourceConfig, files: list[Path]) -> tuple[list[Unit], list[Any]]:
    lone_txt = sum(file.suffix == ".txt" for file in files) == 1
    top = os.path.commonpath([file.parent for file in files])
    units: list[Unit] = []
    identity: list[Any] = []
    for file in files:
        size = file.stat().st_size
        identity.append([file.relative_to(top).as_posix(), size, _digest(file, size)])
        if file.suffix == ".parquet":
            units += _row_groups(str(file), size, source.text_field)
        elif file.suffix == ".jsonl":
            _check_jsonl(file, source.text_field)
            units += _ranges("jsonl", str(file), size, source.text_field)
        else:
            _check_utf8(file)
            if lone_txt:
                units += _ranges("blocks", str(file), size, "")
            elif size:
                units.append(Unit("file", str(file), 0, size, size, ""))
    return units, identity


def _check_utf8(file: Path) -> None:
    """Refuse what is no UTF-8 text by its first MiB; a bad byte here and there is replaced."""
    with file.open("rb") as stream:
        start = stream.read(1 << 20)
    bad = start.decode("utf-8", errors="replace").count("\ufffd") + start.count(0)  # UTF-16 is half NULs
    if bad > 1 + len(start) / 1000:
        raise UserError(f"data.sources: {file}: no UTF-8 text ({bad} bad places in its first MiB); convert it first")


def _check_jsonl(file: Path, text_field: str) -> None:
    """Refuse a file whose first line tells that no line will do; a line that is no JSON at all may be one bad line."""
    with file.open("rb") as stream:
        line = stream.readline()
    try:
        first = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return
    if not isinstance(first, dict):
        raise UserError(f"data.sources: {file}: expected one JSON object a line, found a {type(first).__name__}")
    if text_field not in first:
        raise UserError(f"data.sources: {file} has no key {text_field!r} (text_field); its keys: {', '.join(first)}")


def _digest(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if size <= HASH_WHOLE_BYTES:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        else:
            digest.update(stream.read(1 << 20))
            stream.seek(size - (1 << 20))
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _ranges(kind: Literal["jsonl", "blocks"], path: str, size: int, text_field: str) -> list[Unit]:
    starts = range(0, size, UNIT_BYTES)
    return [Unit(kind, path, start, min(start + UNIT_BYTES, size), size, text_field) for start in starts]


# ---- the Hub


def _resolve_hub(source: SourceConfig) -> tuple[list[Unit], list[Any]]:
    commit = remote.hub_commit("dataset", source.path, source.revision, instead=_INSTEAD)
    files = remote.dataset_files(source, commit, instead=_INSTEAD)
    others = [name for name, _ in files if not name.endswith(".parquet")]
    if others:
        raise UserError(
            f"data.sources: {source.path} keeps its data in {Path(others[0]).suffix or others[0]!r} files; "
            "of Hub datasets only Parquet is read: download it and name the files instead"
        )

    def row_groups(file: tuple[str, int]) -> list[Unit]:
        return remote.retry(lambda: _row_groups(*file, source.text_field), file[0], seconds=30)

    with ThreadPoolExecutor(16) as pool:  # a footer is a few round trips, FineWeb-Edu has thousands of files
        units = [unit for found in pool.map(row_groups, files) for unit in found]
    return units, [source.path, commit, [[name.split(commit, 1)[1], size] for name, size in files]]


# ---- reading


def _read(unit: Unit) -> Documents:
    if unit.kind == "parquet":
        texts, skipped = _read_row_group(unit)
    else:
        with open(unit.path, "rb") as file:
            data = file.read() if unit.kind == "file" else _read_range(file, unit)
        if unit.kind == "jsonl":
            texts, skipped = _parse_jsonl(data, unit.text_field)
        else:
            text = (
                data.decode("utf-8-sig" if unit.start == 0 else "utf-8", errors="replace")
                .replace("\r\n", "\n")
                .replace("\r", "\n")
            )
            texts, skipped = ([text] if unit.kind == "file" else list(_pack_blocks(text))), 0
    return Documents([text for text in texts if text and not text.isspace()], skipped)


def _open(path: str, size: int) -> Any:
    return remote.open_file(path, size) if path.startswith(remote.PREFIX) else open(path, "rb")


@functools.lru_cache(maxsize=64)
def _footer(path: str, size: int) -> Any:
    import pyarrow.parquet as pq

    with _open(path, size) as file:
        return pq.read_metadata(file)


def _row_groups(path: str, size: int, text_field: str) -> list[Unit]:
    import pyarrow as pa

    try:
        footer = _footer(path, size)
    except (pa.ArrowInvalid, OSError) as error:
        if path.startswith(remote.PREFIX):
            raise  # tried again
        raise UserError(f"data.sources: {path} is not a readable Parquet file: {remote.one_line(error)}") from None
    schema = footer.schema.to_arrow_schema()
    kind = schema.field(text_field).type if text_field in schema.names else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(
            f"data.sources: {path} has no text column {text_field!r} (text_field); its columns: "
            + ", ".join(f"{field.name} ({field.type})" for field in schema)
        )
    groups = range(footer.num_row_groups)
    return [Unit("parquet", path, i, i + 1, size, text_field) for i in groups if footer.row_group(i).num_rows]


def _read_row_group(unit: Unit) -> tuple[list[str], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _open(unit.path, unit.size) as file:
        table = pq.ParquetFile(file, metadata=_footer(unit.path, unit.size), pre_buffer=True).read_row_group(
            unit.start, columns=[unit.text_field], use_threads=False
        )
    column = table.column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        values = column.to_pylist()
        return [value for value in values if value is not None], 0
    except UnicodeDecodeError:  # Parquet promises UTF-8, a writer may have broken the promise
        values = [_decode(value) for value in column.cast(pa.large_binary()).to_pylist() if value is not None]
        return [value for value in values if value is not None], values.count(None)


def _decode(value: bytes) -> str | None:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _read_range(file: IO[bytes], unit: Unit) -> bytes:
    start, stop = (_cut(file, position, unit) for position in (unit.start, unit.stop))
    file.seek(start)
    return file.read(stop - start)


def _cut(file: IO[bytes], position: int, unit: Unit) -> int:
    """The line end (of `blocks`: blank line) from which documents belong to the unit that starts at `position`.

    A function of file and position alone that never decreases, so the units of a file part its documents. Where no
    blank line comes for a whole MiB, a line end will do.
    """
    if position in (0, unit.size):
        return position
    file.seek(position - 1)
    line = file.readline()  # the rest of a line
    while line and unit.kind == "blocks":
        line = file.readline()
        if not line.strip() or file.tell() - position > 1 << 20:
            break
    return file.tell()


def _parse_jsonl(data: bytes, text_field: str) -> tuple[list[str], int]:
    texts: list[str] = []
    skipped = 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode("utf-8"))[text_field]
            text.encode("utf-8")  # refuses the halves of surrogate pairs that JSON can spell
            texts.append(text)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped += 1
    return texts, skipped


def _cut_long(lines: Iterable[str]) -> Iterator[str]:
    """Lines without end (a book in one line) in pieces of at most BLOCK_DOCUMENT_BYTES characters, cut at a space."""
    for line in lines:
        if len(line) > 8 * BLOCK_DOCUMENT_BYTES:
            while len(line) > BLOCK_DOCUMENT_BYTES:
                cut = line.rfind(" ", 1, BLOCK_DOCUMENT_BYTES) + 1 or BLOCK_DOCUMENT_BYTES
                yield line[:cut]
                yield ""  # a document may end here
                line = line[cut:]
        yield line


def _pack_blocks(text: str) -> Iterator[str]:
    """Documents of at least BLOCK_DOCUMENT_BYTES that end at blank lines, or at a line end once 8 times as long."""
    lines: list[str] = []
    length = 0
    for line in _cut_long(text.split("\n")):
        if length >= BLOCK_DOCUMENT_BYTES and (not line.strip() or length >= 8 * BLOCK_DOCUMENT_BYTES):
            yield "\n".join(lines).strip("\n")
            lines, length = [], 0
        lines.append(line)
        length += len(line.encode("utf-8")) + 1
    yield "\n".join(lines).strip("\n")
