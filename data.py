"""What training and evaluation take of the data: batches as tensors, the split by hash, the held-out rows.

The order and its cursor are in `stream.py`, the processes that make batches ahead of time in `feeder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import ops
from documents import Manifest, read_unit
from feeder import Feeder
from losses import IGNORE
from stream import PADDING, Batch, Feed
from tokenizer import Encoder

SPLIT_SCAN_BYTES = 1 << 30  # of text; a search for held-out documents goes no further
_HASH_SPACE = 1 << 64


@dataclass(frozen=True)
class Validation:
    """Whole held-out documents as one sequence EOS doc EOS ... doc EOS, whose every token after the first is a target.

    `targets[:, i]` follows `tokens[:, i]`; the main loss takes the first seq_len columns, MTP depth d those from d on.
    What is past the sequence's end is token 0 and target IGNORE.
    """

    tokens: Tensor  # (N, seq_len) int64
    targets: Tensor  # (N, seq_len + extra - 1) int64
    num_tokens: int  # predicted by the main loss, EOS included
    num_bytes: int  # of the documents, in UTF-8
    num_documents: int


# ---- the split


def split_threshold(manifest: Manifest, fraction: float) -> int:
    """A document is held out for validation where its hash is below this.

    Where the first SPLIT_SCAN_BYTES of text hold no document below `fraction` of the hash space (a small corpus), it is
    moved to hold out exactly one text of them; where they hold no other, to leave one. One text alone is trained on.
    """
    threshold = int(fraction * _HASH_SPACE)
    if not threshold:
        return 0
    lowest, highest = _HASH_SPACE, -1
    for document in walk(manifest, SPLIT_SCAN_BYTES):
        lowest, highest = min(lowest, document.hash), max(highest, document.hash)
        if lowest < threshold <= highest:
            return threshold
    if lowest >= highest:
        return 0
    return lowest + 1 if lowest >= threshold else highest


def training_texts(manifest: Manifest, threshold: int, limit_bytes: int = 64 << 20) -> Iterator[str]:
    """Training documents in the manifest's order, about `limit_bytes` of them: what a tokenizer is trained on."""
    for document in walk(manifest, limit_bytes, lambda value: value >= threshold):
        if isinstance(document.item, str):
            yield document.item


def validation(
    manifest: Manifest, *, threshold: int, encoder: Encoder, seq_len: int, extra: int, tokens: int
) -> Validation:
    """Held-out documents in the manifest's order, whole ones until they have at least `tokens` tokens.

    No held-out document gives no rows. At most SPLIT_SCAN_BYTES of text are searched.
    """
    eos = np.array([encoder.eos])
    stream, num_tokens, num_bytes, num_documents = [eos], 0, 0, 0
    for document in walk(manifest, SPLIT_SCAN_BYTES):
        if num_tokens >= tokens:
            break
        if document.hash < threshold:
            ids = encoder([document.item])[0] if isinstance(document.item, str) else document.item
            if ids is not None and len(ids):
                stream += [ids, eos]
                num_tokens += len(ids) + 1
                num_bytes += document.num_bytes
                num_documents += 1
    num_rows = -(-num_tokens // seq_len)
    ids = np.concatenate(stream).astype(np.int64)
    inputs = _rows(ids[:-1], seq_len, seq_len, num_rows, padding=0)
    targets = _rows(ids[1:], seq_len, seq_len + extra - 1, num_rows, padding=IGNORE)
    return Validation(torch.from_numpy(inputs), torch.from_numpy(targets), num_tokens, num_bytes, num_documents)


def _rows(ids: np.ndarray, step: int, width: int, count: int, padding: int) -> np.ndarray:
    """(count, width): row i is ids[i * step : i * step + width], padded."""
    padded = np.full(count * step + width, padding, dtype=np.int64)
    padded[: len(ids)] = ids
    return padded[np.arange(count)[:, None] * step + np.arange(width)]


class Document(NamedTuple):
    item: str | np.ndarray  # text, or token ids without EOS
    hash: int
    num_bytes: int


def walk(
    manifest: Manifest, limit_bytes: int, wanted: Callable[[int], bool] = lambda value: True
) -> Iterator[Document]:
    """The documents whose hash is wanted, in the manifest's order, until they have `limit_bytes` of text."""
    for unit in manifest.units:
        read = read_unit(unit)
        for item, value, size in zip(read.items, read.hashes.tolist(), read.num_bytes.tolist(), strict=True):
            if wanted(value):
                yield Document(item, value, size)
                limit_bytes -= size
                if limit_bytes <= 0:
                    return


# ---- batches


class Inputs(NamedTuple):
    """What the model is given of some rows."""

    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T + depth), IGNORE where nothing is predicted
    positions: Tensor | None  # (B, T), with isolated documents: from each one's start
    doc_ids: Tensor | None  # (B, T + 1 + depth)


def inputs(rows_BX: Tensor, seq_len: int, eos: int, *, packed: bool, isolated: bool, crossing: bool) -> Inputs:
    """Cut rows of seq_len + extra tokens into inputs and targets.

    An EOS ends the document before it, as a target, and starts the one after it, as an input. Where documents are
    isolated, it predicts the next one's first token as it would at the start of a text; where they are `packed` but see
    each other, it would do so from the wrong document, and predicts nothing unless `crossing`. (MTP layers read the
    token all the same.)
    """
    tokens_BT, targets_BX = rows_BX[:, :seq_len], rows_BX[:, 1:]
    if not packed and not isolated:
        return Inputs(tokens_BT, targets_BX, None, None)
    if packed:
        starts_BX = rows_BX[:, :-1] == eos
        starts_BX[:, 0] = False
        missing_BX = (targets_BX == PADDING) | (rows_BX[:, :-1] == PADDING)
        if not isolated and not crossing:
            missing_BX |= starts_BX
        targets_BX = targets_BX.masked_fill(missing_BX, IGNORE)
        tokens_BT = tokens_BT.clamp(min=0)
    if not isolated:
        return Inputs(tokens_BT, targets_BX, None, None)
    doc_ids_BX, positions_BX = ops.documents(rows_BX, eos)
    return Inputs(tokens_BT, targets_BX, positions_BX[:, :seq_len], doc_ids_BX)


class Loader(Iterator[Batch]):
    """The batches of `feed` with torch tensors, one per optimizer step; `close` ends its processes within seconds.

    Args:
        workers: 0: made here; 1: ahead of time in a process of its own; more: tokenised by that many others.
        pin_memory: for copies to a GPU that nothing waits for.
    """

    def __init__(self, feed: Feed, workers: int, *, pin_memory: bool = False, note: Callable[[str], None] = print):
        def finish(batch: Batch) -> Batch:
            tokens = torch.from_numpy(batch.tokens)
            return batch._replace(tokens=tokens.pin_memory() if pin_memory else tokens)

        self.feeder = Feeder(feed, workers, finish, note) if workers else None
        self._batches: Iterator[Batch] = self.feeder or map(finish, feed.batches())

    def __next__(self) -> Batch:
        return next(self._batches)

    @property
    def depth(self) -> int | None:
        """Batches that are ready; None without processes."""
        return None if self.feeder is None else self.feeder.depth

    @property
    def restarts(self) -> int:
        return 0 if self.feeder is None else self.feeder.restarts

    def close(self) -> None:
        if self.feeder is not None:
            self.feeder.close()
        self._batches = iter(())
