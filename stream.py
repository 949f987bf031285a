"""The data stream: one global order of documents, tokenised, packed into rows, sought by a few numbers per source.

The order is a pure function of (manifest, seed). An epoch permutes a stream's units and cuts them into windows; the
training documents of a window are permuted and cut into chunks; a chunk is tokenised as a whole. Rows are cut from the
chunks laid end to end, over windows and epochs ("concat"), or packed chunk by chunk ("best_fit"). Which stream a row
comes from is a function of its number. Step s takes rows [s * R, (s + 1) * R), rank r of W the slice
[r * R // W, (r + 1) * R // W) of these. No buffer is saved, and nothing depends on ranks or processes: `Cursor` says
where the next row starts, and whoever goes on from it reads one window and tokenises one chunk again.

Every rank makes every row and keeps its own: where a row starts is known only once all before it is tokenised. numpy
only: the processes that run this need no torch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

import remote
from config import UserError
from documents import Documents, Manifest, Stream, read_unit
from packing import best_fit
from tokenizer import Encoder

if TYPE_CHECKING:
    from shards import Cache

CHUNK_DOCUMENTS = {"concat": 64, "best_fit": 2048}
READERS = 8  # threads that read the units of a window
PADDING = -1  # a row's position that holds no token
ENOUGH_DOCUMENTS = 1000  # from here on the share of unreadable ones is judged
_HASH_SPACE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / golden ratio: its multiples spread evenly over the hash space

Ids = np.ndarray
Encode = Callable[[Iterator[Sequence[str]]], Iterator[list[Ids | None]]]  # an ordered map over chunks of texts


@dataclass(frozen=True)
class Place:
    """Where a stream's next row starts: token (best_fit: row) `offset` of chunk `chunk` of window `window`."""

    epoch: int = 0
    window: int = 0
    chunk: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Cursor:
    """How many rows were taken, and the place of each stream; without places, the start."""

    row: int = 0
    places: tuple[Place, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {"row": self.row, "places": [list(astuple(place)) for place in self.places]}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Cursor:
        return cls(state["row"], tuple(Place(*place) for place in state["places"])) if state else cls()


@dataclass
class Tally:
    """What this process has met so far; it starts from zero on resume."""

    documents: int = 0  # in the windows opened, the skipped ones among them
    skipped: int = 0  # unreadable or refused by the tokenizer
    positions: int = 0  # of the rows packed
    padding: int = 0  # of these
    tokens: int = 0  # of the documents packed
    cropped: int = 0  # of these


class Batch(NamedTuple):
    """One rank's rows of one optimizer step."""

    tokens: Any  # (rows of this rank, seq_len + extra) int64, PADDING past a packed row's end
    num_targets: tuple[int, ...]  # over all ranks: of the main head, of each MTP head
    cursor: Cursor  # after the step: the same on every rank
    last: bool  # every source has come to its end: there is no further step
    tally: Tally
    retries: int  # reads that had to be tried again

    @property
    def epoch(self) -> int:
        return max((place.epoch for place in self.cursor.places), default=0)


class Chunk(NamedTuple):
    """Documents tokenised together."""

    start: Place
    ids: Ids  # (n,) int64: doc EOS doc EOS ...
    ends: np.ndarray  # of each document in `ids`, its EOS included
    units: np.ndarray  # of each document: index in the stream's units
    rows: np.ndarray  # of each document: its row in the unit


class Row(NamedTuple):
    tokens: Ids  # (seq_len + extra,)
    after: Place
    parts: list[tuple[Chunk, int, int]]  # what it was made of, without the EOS that starts it: ranges of chunks' ids


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), the same on every machine and with every version of numpy.

    It sorts the raw output of Philox, a counter-based generator: numpy promises to keep its bit stream (NEP 19), but
    not what `Generator.permutation` makes of it, nor do torch and Python promise the algorithm of their shuffles.
    """
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
    return np.argsort(np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count), kind="stable")


def pick(row: int, weights: Sequence[float]) -> int:
    """The stream that row number `row` comes from: in any run of rows each has its share, give or take a few rows."""
    total, bounds, reached = sum(weights), [], 0.0
    for weight in weights:
        reached += weight
        bounds.append(int(reached / total * _HASH_SPACE))
    return min(bisect_right(bounds, row * _GOLDEN % _HASH_SPACE), len(weights) - 1)


@dataclass(frozen=True)
class Feed:
    """All there is to know to make the batches from `cursor` on; small and plain, to be sent to another process."""

    manifest: Manifest
    encoder: Encoder
    seq_len: int
    extra: int  # tokens a row holds past its inputs
    rows: int  # of a step, over all ranks
    seed: int
    cursor: Cursor
    threshold: int  # documents whose hash is below are held out
    shuffle_window: int
    rank: int = 0
    world_size: int = 1
    packing: Literal["concat", "best_fit"] = "concat"
    document_mask: bool = False
    cross_targets: bool = False
    max_skipped: float = 1.0
    cache: Cache | None = None

    def batches(self, encode: Encode | None = None) -> Iterator[Batch]:
        """`encode` tokenises chunks elsewhere; by default the encoder does, here."""
        made = self._steps(encode or (lambda chunks: map(self.encoder, chunks)))
        if any(stream.epochs is None for stream in self.manifest.streams):
            yield from made
        batch = next(made, None)
        if batch is None:
            raise UserError(
                f"data.sources: until the last epoch ends fewer than {self.rows} rows are left, the rows of one step"
            )
        while batch is not None:
            following = next(made, None)
            yield batch._replace(last=following is None)
            batch = following

    def _steps(self, encode: Encode) -> Iterator[Batch]:
        first, end = (r * self.rows // self.world_size for r in (self.rank, self.rank + 1))
        width = self.seq_len + self.extra
        tally = Tally()
        places = list(self.cursor.places) or [Place()] * len(self.manifest.streams)
        mixed = Mixed(self, places, encode, tally)
        number = self.cursor.row
        while True:
            tokens = np.empty((self.rows, width), dtype=np.int64)
            for row in range(self.rows):
                made = mixed.next(number)
                if made is None:
                    return
                tokens[row] = made[1].tokens
                number += 1
            mine = tokens[first:end].copy() if self.world_size > 1 else tokens
            cursor = Cursor(number, tuple(mixed.places))
            yield Batch(mine, self.count_targets(tokens), cursor, False, Tally(*astuple(tally)), remote.retries)

    def count_targets(self, tokens_RX: np.ndarray) -> tuple[int, ...]:
        """How many targets of these rows `data.inputs` and the model leave, by head."""
        depth = self.extra - 1
        if self.packing == "concat" and not self.document_mask:
            return (len(tokens_RX) * self.seq_len,) * (1 + depth)
        starts_RX = tokens_RX == self.encoder.eos
        valid_RX = (tokens_RX[:, 1:] != PADDING) & (tokens_RX[:, :-1] != PADDING)  # target i follows token i
        if self.packing == "best_fit" and not self.document_mask and not self.cross_targets:
            valid_RX[:, 1:] &= ~starts_RX[:, 1:-1]
        documents_RX = np.cumsum(starts_RX, axis=1)
        known_RT = valid_RX[:, : self.seq_len]  # all that the head reads
        counts = [int(known_RT.sum())]
        for head in range(1, 1 + depth):
            if self.document_mask:
                known_RT = known_RT & (documents_RX[:, head : head + self.seq_len] == documents_RX[:, : self.seq_len])
            known_RT = known_RT & valid_RX[:, head : head + self.seq_len]
            counts.append(int(known_RT.sum()))
        return tuple(counts)


class Mixed:
    """Rows of all streams in the global order; `places` follows what was taken of each."""

    def __init__(self, feed: Feed, places: list[Place], encode: Encode, tally: Tally):
        self.feed, self.places = feed, places
        self.streams = feed.manifest.streams
        self._rows = [_Rows(feed, number, places[number], encode, tally).rows() for number in range(len(places))]

    def next(self, number: int) -> tuple[int, Row] | None:
        """The stream that row `number` is of, and the row; None when all streams have come to their end."""
        while True:
            # That a stream has ended is told by its place, so this, too, goes on alike after a resume.
            alive = [
                (index, stream)
                for index, (stream, place) in enumerate(zip(self.streams, self.places, strict=True))
                if stream.epochs is None or place.epoch < stream.epochs
            ]
            if not alive:
                return None
            stream, _ = alive[pick(number, [stream.weight for _, stream in alive])]
            row = next(self._rows[stream], None)
            if row is not None:
                self.places[stream] = row.after
                return stream, row
            self.places[stream] = Place(self.streams[stream].epochs or 0)


@dataclass
class _Window:
    """The training documents of a window, permuted."""

    epoch: int
    number: int
    items: list[Any]
    units: np.ndarray
    rows: np.ndarray
    order: np.ndarray  # of each document: its number among all of the window, held-out ones too
    read: list[_Read]  # all units, if the cache wants one


class _Read(NamedTuple):
    """A unit that was read."""

    unit: int  # index in the stream's units
    documents: Documents
    new: bool  # the cache wants it


@dataclass
class _Rows:
    """The rows of one stream from `place` on."""

    feed: Feed
    number: int
    place: Place
    encode: Encode
    tally: Tally

    def __post_init__(self) -> None:
        streams = self.feed.manifest.streams
        self.stream: Stream = streams[self.number]
        self.base = sum(len(stream.units) for stream in streams[: self.number])  # of its first unit among all units
        self.seed = self.feed.seed + self.number * _HASH_SPACE

    def rows(self) -> Iterator[Row]:
        chunks = self._chunks()
        return self._cut(chunks) if self.feed.packing == "concat" else self._packed(chunks)

    def _cut(self, chunks: Iterator[Chunk]) -> Iterator[Row]:
        """Rows of chunks laid end to end, each starting seq_len after the one before."""
        seq_len, width = self.feed.seq_len, self.feed.seq_len + self.feed.extra
        held: deque[Chunk] = deque()  # not yet cut up
        offset, available = self.place.offset, -self.place.offset
        while True:
            while available < width:
                chunk = next(chunks, None)
                if chunk is None:
                    return
                held.append(chunk)
                available += len(chunk.ids)
            parts, missing, start = [], width, offset
            for chunk in held:
                stop = min(start + missing, len(chunk.ids))
                parts.append((chunk, start, stop))
                missing -= stop - start
                start = 0
                if not missing:
                    break
            tokens = np.concatenate([chunk.ids[start:stop] for chunk, start, stop in parts])
            offset += seq_len
            available -= seq_len
            while offset >= len(held[0].ids):  # never the last one: `available` is still at least `extra`
                offset -= len(held.popleft().ids)
            start_place = held[0].start
            yield Row(tokens, Place(start_place.epoch, start_place.window, start_place.chunk, offset), parts)

    def _packed(self, chunks: Iterator[Chunk]) -> Iterator[Row]:
        """Rows that start at a document, packed chunk by chunk."""
        feed, eos, first = self.feed, self.feed.encoder.eos, self.place.offset
        width = feed.seq_len + feed.extra
        for chunk in chunks:
            starts = np.concatenate(([0], chunk.ends[:-1])).astype(np.int64)
            packed = best_fit((chunk.ends - starts).tolist(), feed.seq_len)
            start = chunk.start
            order = permutation(len(packed), self.seed, start.epoch, start.window, start.chunk)
            for number in range(first, len(packed)):
                tokens = np.full(width, PADDING, dtype=np.int64)
                parts, filled = [], 0
                for piece in packed[order[number]]:
                    begin = int(starts[piece.document])
                    end = int(chunk.ends[piece.document])
                    tokens[filled] = eos
                    # After a cropped document its own next tokens are the targets, after a whole one its EOS.
                    taken = chunk.ids[begin : min(end, begin + width - filled - 1)]
                    tokens[filled + 1 : filled + 1 + len(taken)] = taken
                    parts.append((chunk, begin, begin + piece.length - 1))
                    filled += piece.length
                self.tally.positions += feed.seq_len
                self.tally.padding += feed.seq_len - filled
                yield Row(tokens, Place(start.epoch, start.window, start.chunk, number + 1), parts)
            first = 0
            kept = sum(piece.length for row in packed for piece in row)
            self.tally.tokens += len(chunk.ids)
            self.tally.cropped += len(chunk.ids) - kept

    def _chunks(self) -> Iterator[Chunk]:
        """Chunks from the place's on; the encoder may be a few of them ahead."""
        ahead: deque[tuple[Place, _Window, int]] = deque()

        def texts() -> Iterator[Sequence[str]]:
            size = CHUNK_DOCUMENTS[self.feed.packing]
            first = self.place.chunk
            for window in self._windows():
                chunks = range(first, -(-len(window.items) // size))
                for chunk in chunks:
                    ahead.append((Place(window.epoch, window.number, chunk), window, chunk * size))
                    yield [item for item in window.items[chunk * size : (chunk + 1) * size] if isinstance(item, str)]
                if not chunks:
                    self._keep(window)
                first = 0

        size = CHUNK_DOCUMENTS[self.feed.packing]
        for encoded in self.encode(texts()):
            place, window, first = ahead.popleft()
            part, made = slice(first, first + size), iter(encoded)
            found = [next(made) if isinstance(item, str) else item for item in window.items[part]]
            if window.read:
                window.items[part] = found
                if first + size >= len(window.items):
                    self._keep(window)
            yield self._chunk(place, found, window.units[part], window.rows[part])

    def _keep(self, window: _Window) -> None:
        """Write a window's new units to the cache, of the ids that training took; what it did not take is encoded."""
        items = [item for read in window.read for item in read.documents.items]
        for number, item in zip(window.order.tolist(), window.items, strict=True):
            items[number] = item
        left = [number for number, item in enumerate(items) if isinstance(item, str)]
        size = CHUNK_DOCUMENTS["concat"]
        chunks = ([items[number] for number in left[start : start + size]] for start in range(0, len(left), size))
        for number, ids in zip(left, self._each(chunks), strict=True):
            items[number] = ids
        start = 0
        for unit, documents, new in window.read:
            stop = start + len(documents.items)
            if new and self.feed.cache is not None:
                self.feed.cache.put(self.base + unit, self.stream.units[unit], documents, items[start:stop])
                remote.beat()
            start = stop

    def _each(self, chunks: Iterator[Sequence[str]]) -> Iterator[Ids | None]:
        for encoded in self.encode(chunks):
            remote.beat()
            yield from encoded

    def _chunk(self, place: Place, found: list[Ids | None], units: np.ndarray, rows: np.ndarray) -> Chunk:
        remote.beat()
        good = [number for number, ids in enumerate(found) if ids is not None and len(ids)]
        self.tally.skipped += len(found) - len(good)
        documents: list[Ids] = [found[number] for number in good]  # type: ignore[misc]
        ends = np.cumsum([len(ids) + 1 for ids in documents], dtype=np.int64)
        ids = np.full(int(ends[-1]) if good else 0, self.feed.encoder.eos, dtype=np.int64)
        start = 0
        for document, end in zip(documents, ends.tolist(), strict=True):
            ids[start : end - 1] = document
            start = end
        return Chunk(place, ids, ends, units[good], rows[good])

    def _windows(self) -> Iterator[_Window]:
        """Windows from the place's on, to the end of the last epoch; the next one is read meanwhile."""
        units, size = self.stream.units, self.feed.shuffle_window
        num_windows = -(-len(units) // size)
        pool = ThreadPoolExecutor(READERS)  # round trips to the Hub overlap
        reading: deque[tuple[int, int, list[Future[_Read]]]] = deque()

        def schedule() -> Iterator[tuple[int, int]]:
            first = self.place.window
            for epoch in count(self.place.epoch) if self.stream.epochs is None else self._epochs_left():
                yield from ((epoch, number) for number in range(first, num_windows))
                first = 0

        try:
            coming = schedule()
            found = self.place.window > 0 or self.place.chunk > 0  # an epoch entered in its middle had a document
            while True:
                for epoch, number in islice(coming, 2 - len(reading)):
                    order = permutation(len(units), self.seed, epoch)[number * size : (number + 1) * size].tolist()
                    reading.append((epoch, number, [pool.submit(self._read, unit) for unit in order]))
                if not reading:
                    return
                epoch, number, futures = reading.popleft()
                window = self._window(epoch, number, [future.result() for future in futures])
                found |= bool(window.items)
                if number == num_windows - 1:
                    self._check(found, whole=True)
                    found = False
                yield window
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _epochs_left(self) -> range:
        return range(self.place.epoch, self.stream.epochs or 0)

    def _read(self, unit: int) -> _Read:
        wanted = self.stream.units[unit]
        cache = None if wanted.kind == "tokens" else self.feed.cache
        found = None if cache is None else cache.get(self.base + unit, wanted)
        if found is not None:
            return _Read(unit, found, False)
        found = read_unit(wanted)
        remote.beat()  # a row group of a million documents takes its time
        return _Read(unit, found, cache is not None)

    def _window(self, epoch: int, number: int, read: list[_Read]) -> _Window:
        parts = [found.documents for found in read]
        items = [item for documents in parts for item in documents.items]
        units = np.repeat([found.unit for found in read], [len(documents.items) for documents in parts])
        hashes, rows = (np.concatenate([getattr(part, name) for part in parts]) for name in ("hashes", "rows"))
        skipped = sum(documents.skipped for documents in parts)
        self.tally.documents += len(items) + skipped
        self.tally.skipped += skipped
        self._check(True, whole=False)
        kept = np.flatnonzero(hashes >= np.uint64(self.feed.threshold))
        order = kept[permutation(len(kept), self.seed, epoch, number)]
        wanted = read if any(found.new for found in read) else []
        return _Window(epoch, number, [items[i] for i in order.tolist()], units[order], rows[order], order, wanted)

    def _check(self, found: bool, *, whole: bool) -> None:
        """Stop at an epoch without a document, and where too many cannot be read; a few say nothing yet."""
        tally, most = self.tally, self.feed.max_skipped
        if not found:
            raise UserError(
                f"data.sources: no training document in the whole epoch ({tally.skipped} were unreadable, all others "
                f"blank or held out by data.val_fraction) of {', '.join(self.stream.names)}"
            )
        if (whole or tally.documents >= ENOUGH_DOCUMENTS) and tally.skipped > most * tally.documents:
            raise UserError(
                f"data.sources: {tally.skipped} of {tally.documents} documents are unreadable, more than "
                f"data.max_skipped = {most:g} of them"
            )
