"""The data stream: one global order of documents, tokenised, packed into rows, sought by a cursor of four numbers.

The order is a pure function of (manifest, seed). An epoch permutes the units and cuts them into windows; the training
documents of a window are permuted and cut into chunks; a chunk is tokenised as a whole, EOS after each document; rows
are cut from the chunks laid end to end, over windows and epochs. Step s takes rows [s * R, (s + 1) * R), rank r of W
the slice [r * R // W, (r + 1) * R // W) of these. No buffer is saved, and nothing depends on ranks or workers: `Cursor`
says where the next row starts, and whoever goes on from it reads one window and tokenises one chunk again.

Every rank tokenises every row and keeps its own: where a row starts is known only once all before it is tokenised.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from config import UserError
from losses import IGNORE
from sources import Documents, Manifest, Unit, read_unit
from tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_DOCUMENTS = 64
PREFETCH_STEPS = 4
READERS = 8  # threads that read the units of a window
SPLIT_SCAN_BYTES = 1 << 30  # of text; a search for held-out documents goes no further
_HASH_SPACE = 1 << 64


@dataclass(frozen=True)
class Cursor:
    """Where the next row's first token lies: token `offset` of chunk `chunk` of window `window` of epoch `epoch`."""

    epoch: int = 0
    window: int = 0
    chunk: int = 0
    offset: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, int]) -> Cursor:
        return cls(**state)


class Batch(NamedTuple):
    """One rank's rows of one optimizer step."""

    tokens: torch.Tensor  # (rows of this rank, seq_len + extra) int64
    cursor: Cursor  # after the step: the same on every rank
    skipped: int  # documents that could not be read, in the windows this stream has opened so far

    @property
    def epoch(self) -> int:
        return self.cursor.epoch


@dataclass(frozen=True)
class Validation:
    """Whole held-out documents as one sequence EOS doc EOS ... doc EOS, whose every token after the first is a target.

    `targets[:, i]` follows `tokens[:, i]`; the main loss takes the first seq_len columns, MTP depth d those from d on.
    What is past the sequence's end is token 0 and target IGNORE.
    """

    tokens: torch.Tensor  # (N, seq_len) int64
    targets: torch.Tensor  # (N, seq_len + extra - 1) int64
    num_tokens: int  # predicted by the main loss, EOS included
    num_bytes: int  # of the documents, in UTF-8
    num_documents: int


# ---- the split


def document_hash(text: str) -> int:
    """Uniform in [0, 2**64), by content alone: equal texts are on one side of the split, whatever the seed."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def split_threshold(manifest: Manifest, fraction: float) -> int:
    """A document is held out for validation where its hash is below this.

    Where the first SPLIT_SCAN_BYTES of text hold no document below `fraction` of the hash space (a small corpus), it is
    moved to hold out exactly one text of them; where they hold no other, to leave one. One text alone is trained on.
    """
    threshold = int(fraction * _HASH_SPACE)
    if not threshold:
        return 0
    lowest, highest = _HASH_SPACE, -1
    for text in _bounded(_texts(manifest), SPLIT_SCAN_BYTES):
        value = document_hash(text)
        lowest, highest = min(lowest, value), max(highest, value)
        if lowest < threshold <= highest:
            return threshold
    if lowest >= highest:
        return 0
    return lowest + 1 if lowest >= threshold else highest


def training_texts(manifest: Manifest, threshold: int, limit_bytes: int = 64 << 20) -> Iterator[str]:
    """Training documents in the manifest's order, about `limit_bytes` of them: what a tokenizer is trained on."""
    return _bounded((text for text in _texts(manifest) if document_hash(text) >= threshold), limit_bytes)


def validation(
    manifest: Manifest, *, threshold: int, tokenizer: PreTrainedTokenizerFast, seq_len: int, extra: int, tokens: int
) -> Validation:
    """Held-out documents in the manifest's order, whole ones until they have at least `tokens` tokens.

    No held-out document gives no rows. At most SPLIT_SCAN_BYTES of text are searched.
    """
    encoder = Encoder(tokenizer)
    stream, num_bytes, num_documents = [encoder.eos], 0, 0
    for text in _bounded(_texts(manifest), SPLIT_SCAN_BYTES):
        if len(stream) > tokens:
            break
        if document_hash(text) < threshold:
            stream += encoder([text])[0]
            num_bytes += len(text.encode("utf-8"))
            num_documents += 1
    num_tokens = len(stream) - 1
    num_rows = -(-num_tokens // seq_len)
    ids = np.array(stream, dtype=np.int64)
    inputs = _windows(ids[:-1], seq_len, seq_len, num_rows, padding=0)
    targets = _windows(ids[1:], seq_len, seq_len + extra - 1, num_rows, padding=IGNORE)
    return Validation(torch.from_numpy(inputs), torch.from_numpy(targets), num_tokens, num_bytes, num_documents)


def _windows(ids: np.ndarray, step: int, width: int, count: int, padding: int) -> np.ndarray:
    """(count, width): row i is ids[i * step : i * step + width], padded."""
    padded = np.full(count * step + width, padding, dtype=np.int64)
    padded[: len(ids)] = ids
    return padded[np.arange(count)[:, None] * step + np.arange(width)]


def _texts(manifest: Manifest) -> Iterator[str]:
    for unit in manifest.units:
        yield from read_unit(unit).texts


def _bounded(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    for text in texts:
        yield text
        limit_bytes -= len(text.encode("utf-8"))
        if limit_bytes <= 0:
            return


# ---- the order


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), the same on every machine and with every version of numpy.

    It sorts the raw output of Philox, a counter-based generator: numpy promises to keep its bit stream (NEP 19), but
    not what `Generator.permutation` makes of it, nor do torch and Python promise the algorithm of their shuffles.
    """
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=16).digest()
    return np.argsort(np.random.Philox(key=int.from_bytes(digest, "big")).random_raw(count), kind="stable")


@dataclass(frozen=True)
class _Stream:
    """All there is to know to make the batches from `cursor` on; sent to the worker as it is."""

    manifest: Manifest
    encoder: Encoder
    seq_len: int
    extra: int
    rows: int
    rank: int
    world_size: int
    seed: int
    cursor: Cursor
    threshold: int
    shuffle_window: int

    def batches(self) -> Iterator[Batch]:
        first, last = (r * self.rows // self.world_size for r in (self.rank, self.rank + 1))
        width = self.seq_len + self.extra
        chunks = self._chunks()
        held: deque[tuple[Cursor, np.ndarray, int]] = deque()  # chunks not yet cut up: (its start, ids, skipped)
        offset, available = self.cursor.offset, -self.cursor.offset
        while True:
            tokens = np.empty((last - first, width), dtype=np.int64)
            for row in range(self.rows):
                while available < width:
                    held.append(next(chunks))
                    available += len(held[-1][1])
                if first <= row < last:
                    _copy(held, offset, tokens[row - first])
                offset += self.seq_len
                available -= self.seq_len
                while offset >= len(held[0][1]):  # never the last one: `available` is still at least `extra`
                    offset -= len(held.popleft()[1])
            start, _, _ = held[0]
            cursor = Cursor(start.epoch, start.window, start.chunk, offset)
            yield Batch(torch.from_numpy(tokens), cursor, held[-1][2])

    def _chunks(self) -> Iterator[tuple[Cursor, np.ndarray, int]]:
        """Chunks from the cursor's on, for ever: (where it starts, ids, documents skipped so far)."""
        epoch, first_window, first_chunk, skipped = self.cursor.epoch, self.cursor.window, self.cursor.chunk, 0
        while True:
            units = [self.manifest.units[i] for i in permutation(len(self.manifest.units), self.seed, epoch)]
            empty = first_window == first_chunk == 0  # an epoch entered in its middle had a document before
            for window in range(first_window, -(-len(units) // self.shuffle_window)):
                read = _read_all(units[window * self.shuffle_window : (window + 1) * self.shuffle_window])
                skipped += read.skipped
                texts = [text for text in read.texts if document_hash(text) >= self.threshold]
                texts = [texts[i] for i in permutation(len(texts), self.seed, epoch, window)]
                for chunk in range(first_chunk, -(-len(texts) // CHUNK_DOCUMENTS)):
                    empty = False
                    encoded = self.encoder(texts[chunk * CHUNK_DOCUMENTS : (chunk + 1) * CHUNK_DOCUMENTS])
                    ids = np.fromiter(chain.from_iterable(encoded), dtype=np.int64)
                    yield Cursor(epoch, window, chunk), ids, skipped
                first_chunk = 0
            if empty:
                raise UserError(f"data.sources: no training document in the whole epoch ({skipped} were unreadable)")
            epoch, first_window = epoch + 1, 0


def _read_all(units: Sequence[Unit]) -> Documents:
    with ThreadPoolExecutor(READERS) as pool:  # round trips to the Hub overlap
        read = list(pool.map(read_unit, units))
    return Documents([text for documents in read for text in documents.texts], sum(item.skipped for item in read))


def _copy(held: Iterable[tuple[Cursor, np.ndarray, int]], offset: int, row: np.ndarray) -> None:
    """Fill `row` with the tokens from `offset` on of the chunks laid end to end."""
    filled = 0
    for _, ids, _ in held:
        piece = ids[offset : offset + len(row) - filled]
        row[filled : filled + len(piece)] = piece
        filled += len(piece)
        offset = 0
        if filled == len(row):
            return


# ---- the loader


def loader(
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerFast,
    *,
    seq_len: int,
    extra: int,
    rows: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    cursor: Cursor,
    threshold: int,
    shuffle_window: int,
    workers: int,
    pin_memory: bool = False,
) -> Loader:
    """One `Batch` per optimizer step, without end, from `cursor` on.

    `rows` are those of a step over all ranks; a row holds seq_len + `extra` tokens, the next one starts seq_len later.
    `workers` = 1 makes them ahead of time in a process of their own, whose errors surface in `next`.
    """
    stream = _Stream(
        manifest, Encoder(tokenizer), seq_len, extra, rows, rank, world_size, seed, cursor, threshold, shuffle_window
    )
    return Loader(stream, workers, pin_memory)


class Loader(Iterator[Batch]):
    """Iterator over the batches; `close` ends the worker within seconds, whatever it waits for."""

    def __init__(self, stream: _Stream, workers: int, pin_memory: bool):
        self._children: list[Any] = []
        if not workers:
            self._batches: Iterator[Any] = stream.batches()
            return
        torch_loader = DataLoader(
            _Dataset(stream),
            batch_size=None,
            num_workers=1,
            prefetch_factor=PREFETCH_STEPS,
            pin_memory=pin_memory,
            multiprocessing_context="spawn",
            worker_init_fn=_ignore_signals,
        )
        before = set(multiprocessing.active_children())
        with _signals_blocked():
            self._batches = iter(torch_loader)
        self._children = [child for child in multiprocessing.active_children() if child not in before]
        atexit.register(self.close)  # before multiprocessing's own, which would wait for a worker deaf to SIGTERM

    def __next__(self) -> Batch:
        item = next(self._batches)
        if isinstance(item, str):
            self.close()
            raise UserError(item)
        return item

    def close(self) -> None:
        atexit.unregister(self.close)
        self._batches = iter(())
        for child in self._children:
            child.join(0.1)
            if child.is_alive():
                child.kill()
        self._children = []


class _Dataset(IterableDataset):
    def __init__(self, stream: _Stream):
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | str]:
        try:
            yield from self.stream.batches()
        except UserError as error:  # torch would wrap its one line into a traceback
            yield str(error)


def _ignore_signals(worker_id: int) -> None:
    """The main process alone decides when to stop: it finishes what it does with what the worker has made."""
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Until `_ignore_signals` has run a signal to the group would kill the worker; the mask it inherits saves it."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or the worker's start would start it, which unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
