"""Documents, read a unit at a time: a row group, a record batch, a range of a text file, a token shard.

A `Unit` is sought at once, whatever lies before it. Ranges of bytes are nominal: the reader moves both ends on to the
next cut, so that no text is parsed to be listed. No torch: the processes that read need none.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple

import numpy as np

import remote
from config import UserError

UNIT_BYTES = 8 << 20
BLOCK_DOCUMENT_BYTES = 8 << 10  # a lone .txt is cut at blank lines into documents of about this size


@dataclass(frozen=True)
class Unit:
    """What is read at a time.

    `parquet`: row group `start` of `path`. `arrow`: record batch `start`. `jsonl`, `blocks`: bytes [start, stop), both
    moved on to the next line end or blank line. `file`: all of a .txt as one document. `tokens`: a token shard.
    """

    kind: Literal["parquet", "arrow", "jsonl", "blocks", "file", "tokens"]
    path: str
    start: int
    stop: int
    size: int  # of the file, bytes
    text_field: str
    name: str = ""  # what it was made from, where that is another file
    origin: str = ""  # its path within the source, wherever that lies; of a token shard, what it has to be made of
    source: int = 0  # number among the sources


class Documents(NamedTuple):
    """The documents of a unit, in order: texts, or their token ids (without EOS) where the unit is a token shard."""

    items: list[Any]  # str, neither empty nor blank; or ids, (n,), none where the tokenizer refused the text
    rows: np.ndarray  # (n,) uint32: where in the unit each was: row, line or block, counted from 0
    hashes: np.ndarray  # (n,) uint64: `document_hash` of the text
    num_bytes: np.ndarray  # (n,) uint32: of the text in UTF-8
    skipped: int  # unreadable ones: no JSON object, no text in the field, no valid UTF-8


@dataclass(frozen=True)
class Stream:
    """Units that are shuffled together: of one source with a weight, or of all sources without one."""

    names: tuple[str, ...]  # the sources' paths as configured
    units: tuple[Unit, ...]  # in a fixed order
    weight: float = 1.0
    epochs: int | None = None  # None: without end


@dataclass(frozen=True)
class Manifest:
    """All units of all sources."""

    streams: tuple[Stream, ...]
    identities: tuple[str, ...]  # of each source: names and contents, not folders

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.identities)

    @property
    def units(self) -> tuple[Unit, ...]:
        return tuple(unit for stream in self.streams for unit in stream.units)


def fingerprint(identities: Iterable[str]) -> str:
    """Hex digest of what identifies some sources."""
    return hashlib.sha256("".join(identities).encode()).hexdigest()


def document_hash(text: str) -> int:
    """Uniform in [0, 2**64), by content alone: equal texts are on one side of the split, whatever the seed."""
    return _hash(text.encode("utf-8"))


def _hash(raw: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big")


def text_documents(texts: Iterable[str | None], skipped: int = 0) -> Documents:
    """Documents of texts in the unit's order; what is None, empty or blank has a row but is left out."""
    kept = [(row, text) for row, text in enumerate(texts) if text and not text.isspace()]
    encoded = [text.encode("utf-8") for _, text in kept]
    return Documents(
        [text for _, text in kept],
        np.array([row for row, _ in kept], dtype=np.uint32),
        np.array([_hash(raw) for raw in encoded], dtype=np.uint64),
        np.array([len(raw) for raw in encoded], dtype=np.uint32),
        skipped,
    )


def read_unit(unit: Unit) -> Documents:
    """The documents of a unit, in order. Reads from the Hub are tried again for `remote.RETRY_SEC`."""
    if unit.kind == "tokens":
        import shards

        return shards.read(unit)
    if unit.path.startswith(remote.PREFIX):
        return remote.retry(lambda: _read(unit), unit.path)
    try:
        return _read(unit)
    except Exception as error:
        # pyarrow's errors are of many kinds; a file that was replaced may lack the column.
        arrow = type(error).__module__.startswith("pyarrow")
        if not arrow and not isinstance(error, (OSError, ValueError, LookupError)):
            raise
        raise UserError(f"data.sources: {unit.name or unit.path} cannot be read: {remote.one_line(error)}") from None


def _read(unit: Unit) -> Documents:
    if unit.kind in ("parquet", "arrow"):
        texts, skipped = _read_column(unit)
    else:
        with open(unit.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < unit.size:  # or its text would be missed without a word
                raise ValueError("it has become shorter since it was listed")
            data = file.read() if unit.kind == "file" else _read_range(file, unit)
        if unit.kind == "jsonl":
            texts, skipped = _parse_jsonl(data, unit.text_field)
        else:
            text = (
                data.decode("utf-8-sig" if unit.start == 0 else "utf-8", errors="replace")
                .replace("\r\n", "\n")
                .replace("\r", "\n")
            )
            texts, skipped = [text] if unit.kind == "file" else list(_pack_blocks(text)), 0
    return text_documents(texts, skipped)


def _open(path: str, size: int) -> Any:
    return remote.HubFile(path, size) if path.startswith(remote.PREFIX) else open(path, "rb")


@functools.lru_cache(maxsize=64)
def _footer(path: str, size: int) -> Any:
    import pyarrow.parquet as pq

    with _open(path, size) as file:
        return pq.read_metadata(file)


def row_groups(path: str, size: int, text_field: str) -> list[Unit]:
    """The units of a Parquet file. Raises UserError where it has no such text column."""
    import pyarrow as pa

    try:
        footer = _footer(path, size)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        if path.startswith(remote.PREFIX):
            raise  # tried again
        raise UserError(f"data.sources: {path} is not a readable Parquet file: {remote.one_line(error)}") from None
    _check_column(schema, text_field, path)
    groups = range(footer.num_row_groups)
    return [Unit("parquet", path, i, i + 1, size, text_field) for i in groups if footer.row_group(i).num_rows]


def record_batches(path: str, size: int, text_field: str, name: str = "") -> list[Unit]:
    """The units of an Arrow file. Raises UserError where it has no such text column."""
    import pyarrow as pa

    try:
        schema, batch, count = _arrow(path)
        filled = [i for i in range(count) if len(batch(i))]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"data.sources: {path} is not a readable Arrow file: {remote.one_line(error)}") from None
    _check_column(schema, text_field, name or path)
    return [Unit("arrow", path, i, i + 1, size, text_field, name) for i in filled]


@functools.lru_cache(maxsize=64)
def _arrow(path: str) -> tuple[Any, Callable[[int], Any], int]:
    """Schema, record batches by number (views of the mapped file if they are not compressed), and how many there are.

    The format is that of files or of streams.
    """
    import pyarrow as pa

    source = pa.memory_map(path)
    try:
        reader = pa.ipc.open_file(source)
        return reader.schema, reader.get_batch, reader.num_record_batches
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_stream(source)
        schema, batches = reader.schema, list(reader)
        return schema, batches.__getitem__, len(batches)


def _check_column(schema: Any, text_field: str, path: str) -> None:
    import pyarrow as pa

    kind = schema.field(text_field).type if schema.names.count(text_field) == 1 else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view()):
        raise UserError(
            f"data.sources: {path} has no text column {text_field!r} (text_field); its columns: "
            + ", ".join(f"{field.name} ({field.type})" for field in schema)
        )


def _read_column(unit: Unit) -> tuple[list[str | None], int]:
    """The texts of a row group or record batch, None where there is none, and how many are no UTF-8."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if unit.kind == "arrow":
        column = _arrow(unit.path)[1](unit.start).column(unit.text_field)
    else:
        with _open(unit.path, unit.size) as file:
            table = pq.ParquetFile(file, metadata=_footer(unit.path, unit.size), pre_buffer=True).read_row_group(
                unit.start, columns=[unit.text_field], use_threads=False
            )
        column = table.column(0)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    try:
        return column.to_pylist(), 0
    except UnicodeDecodeError:  # Arrow promises UTF-8, a writer may have broken the promise
        raw = column.cast(pa.large_binary()).to_pylist()
        values = [None if value is None else _decode(value) for value in raw]
        return values, sum(value is None and before is not None for value, before in zip(values, raw, strict=True))


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


def _parse_jsonl(data: bytes, text_field: str) -> tuple[list[str | None], int]:
    """The text of each line, None where there is none, and how many lines are bad."""
    texts: list[str | None] = []
    skipped = 0
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        text = None
        try:
            if line.strip():
                found = json.loads(line.decode("utf-8"))[text_field]
                found.encode("utf-8")  # refuses the halves of surrogate pairs that JSON can spell
                text = found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            skipped += 1
        texts.append(text)
    return texts, skipped


def _cut_long(lines: Iterable[str]) -> Iterator[str]:
    """Lines without end (a book in one line) in pieces of at most BLOCK_DOCUMENT_BYTES characters, cut at a space."""
    for line in lines:
        start = 0  # slicing off what is done would copy the rest each time
        if len(line) > 8 * BLOCK_DOCUMENT_BYTES:
            while len(line) - start > BLOCK_DOCUMENT_BYTES:
                stop = start + BLOCK_DOCUMENT_BYTES
                cut = line.rfind(" ", start + 1, stop) + 1 or stop
                yield line[start:cut]
                yield ""  # a document may end here
                start = cut
        yield line[start:]


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


def byte_ranges(kind: Literal["jsonl", "blocks"], path: str, size: int, text_field: str, name: str = "") -> list[Unit]:
    """The units of a text file."""
    starts = range(0, size, UNIT_BYTES)
    return [Unit(kind, path, start, min(start + UNIT_BYTES, size), size, text_field, name) for start in starts]
