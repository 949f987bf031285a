"""What a configuration's `data` section comes to: documents, split, tokenizer, held-out rows, the feed of batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import data
import resume
import shards
import sources
import tokenizer as tokenizers
from config import Config, UserError
from data import Validation
from documents import Manifest
from remote import Unreachable
from stream import Cursor, Feed
from text import say
from tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MADE = ("bpe", "chars", "bytes")  # tokenizers that are made from the sources
SAMPLE_BYTES = 1 << 20  # of text, on which a faster encoder has to agree


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Small and plain, so that one rank can open it for all."""

    manifest: Manifest
    threshold: int  # documents whose hash is below are held out
    tokenizer: PreTrainedTokenizerFast
    encoder: Encoder
    fingerprint: str  # of the tokenizer
    fallback: bool  # whether data.fallback stands in for data.sources

    @property
    def notes(self) -> list[str]:
        """What a user would want to know and nothing else tells, a line each."""
        slow = self.encoder.reason and any(unit.kind != "tokens" for unit in self.manifest.units)
        return [f"tokenising without fastokens, several times slower: {self.encoder.reason}"] if slow else []

    def validation(self, config: Config) -> Validation:
        """The held-out rows."""
        return data.validation(
            self.manifest, threshold=self.threshold, encoder=self.encoder, seq_len=config.data.seq_len,
            extra=tokens_ahead(config), tokens=config.eval.tokens,
        )  # fmt: skip

    def feed(self, config: Config, cursor: Cursor, *, rank: int = 0, world_size: int = 1) -> Feed:
        """The batches from `cursor` on."""
        cache = None
        if config.data.cache is not None:
            folder = Path(os.path.expanduser(config.data.cache))
            cache = shards.Cache(folder, self.manifest, self.tokenizer, self.fingerprint)
        return Feed(
            manifest=self.manifest, encoder=self.encoder, seq_len=config.data.seq_len, extra=tokens_ahead(config),
            rows=config.rows_per_step, seed=config.train.seed, cursor=cursor, threshold=self.threshold,
            shuffle_window=config.data.shuffle_window, rank=rank, world_size=world_size, packing=config.data.packing,
            document_mask=config.data.document_mask, cross_targets=config.data.cross_targets,
            max_skipped=config.data.max_skipped, cache=cache,
        )  # fmt: skip


def tokens_ahead(config: Config) -> int:
    """How many tokens a row needs past its inputs: one for the main head, one more for each MTP head."""
    return 1 + config.model.num_nextn_predict_layers


def open_dataset(
    config: Config, start: Path | None = None, *, fallback: bool | None = None, note: Callable[[str], None] = say
) -> Dataset:
    """Resolve sources and tokenizer (the checkpoint's, a named one, or one made from the sources).

    Args:
        start: the checkpoint to go on from. fallback: whether it was trained on data.fallback; None: not decided yet.
    """
    # The embeddings of initial weights mean the tokens of their tokenizer.
    origin = resume.tokenizer_folder(config.train.init_from) if start is None else start
    wanted = config.data.tokenizer
    tokenizer = None
    if wanted not in MADE and start is None:
        tokenizer = tokenizers.load(wanted)  # first: it fails sooner than the sources
        theirs = tokenizers.load(str(origin)) if origin is not None else tokenizer
        if tokenizers.fingerprint(theirs) != tokenizers.fingerprint(tokenizer):
            raise UserError(f"data.tokenizer = {wanted!r} is not the tokenizer of train.init_from={origin}")
    manifest, fallback = _resolve(config, fallback, note)
    threshold = data.split_threshold(manifest, config.data.val_fraction)
    if origin is not None:
        tokenizer = tokenizers.load(str(origin))
    elif tokenizer is None:
        prepared = next((Path(unit.path).parent for unit in manifest.units if unit.kind == "tokens"), None)
        if prepared is not None:
            raise UserError(
                f"data.tokenizer = {wanted}: token shards have no text to make it from; "
                f"theirs is data.tokenizer={prepared / 'tokenizer'}"
            )
        note(f"making a tokenizer ({wanted}, at most {config.model.vocab_size} tokens) from the sources")
        tokenizer = tokenizers.make(wanted, data.training_texts(manifest, threshold), config.model.vocab_size)
    if len(tokenizer) > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size} is too small for {wanted!r}, "
            f"which has {len(tokenizer)} tokens"
        )
    fingerprint = tokenizers.fingerprint(tokenizer)
    shards.check_tokenizer(manifest, fingerprint)
    sample = (text[:SAMPLE_BYTES] for text in data.training_texts(manifest, threshold, SAMPLE_BYTES))
    return Dataset(manifest, threshold, tokenizer, Encoder.fastest(tokenizer, sample), fingerprint, fallback)


def _resolve(config: Config, fallback: bool | None, note: Callable[[str], None]) -> tuple[Manifest, bool]:
    """The manifest, and whether it is that of data.fallback: for a new run whose sources cannot be reached."""
    cache = config.data.cache
    if fallback:
        return sources.resolve(config.data.fallback or config.data.sources, cache), True
    try:
        return sources.resolve(config.data.sources, cache), False
    except Unreachable as error:
        if fallback is not None or not config.data.fallback:
            raise
        names = ", ".join(source.path for source in config.data.fallback)
        note(f"{error}; training on data.fallback = {names} instead, for the whole of this run")
    return sources.resolve(config.data.fallback, cache), True
