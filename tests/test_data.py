"""data.py: the order, its exact resume on any ranks and workers, the split, and validation."""

import itertools
import math
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data
import sources
import tokenizer
from config import SourceConfig, UserError
from data import Cursor

SEQ_LEN, EXTRA, ROWS = 16, 2, 5
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def documents():
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
    draw = random.Random(0)
    unique = [" ".join([f"n{i}", *draw.choices(words, k=draw.randrange(0, 12))]) for i in range(300)]
    return unique + unique[:20]  # some texts twice


@pytest.fixture(scope="module")
def manifest(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    pq.write_table(pa.table({"text": documents}), path, row_group_size=25)
    return sources.resolve([SourceConfig(path=str(path))])


@pytest.fixture(scope="module")
def tok(documents):
    return tokenizer.train_bpe(documents, 400)


@pytest.fixture(scope="module")
def threshold(manifest):
    return data.split_threshold(manifest, 0.1)


@pytest.fixture
def load(manifest, tok, threshold, monkeypatch):
    monkeypatch.setattr(data, "CHUNK_DOCUMENTS", 8)

    def make(**changes):
        settings: dict[str, Any] = {
            "seq_len": SEQ_LEN, "extra": EXTRA, "rows": ROWS, "seed": 1, "cursor": Cursor(), "threshold": threshold,
            "shuffle_window": 3, "workers": 0,
        }  # fmt: skip
        return data.loader(changes.pop("manifest", manifest), tok, **settings | changes)

    return make


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(a.tokens, b.tokens) and a.cursor == b.cursor for a, b in zip(left, right, strict=True)
    )


def stream_of(batches):
    """The tokens of consecutive steps laid end to end, without the overlap of rows."""
    return torch.cat([batch.tokens[:, :SEQ_LEN].reshape(-1) for batch in batches]).tolist()


def epoch_documents(load, tok, epoch, **changes):
    """The documents of one epoch as the stream has them, cut at EOS."""
    batches = []
    for batch in load(cursor=Cursor(epoch), **changes):
        batches.append(batch)
        if batch.cursor.epoch > epoch:
            break
    ids, found = [], []
    for token in stream_of(batches):
        if token == tok.eos_token_id:
            found.append(tok.decode(ids))
            ids = []
        else:
            ids.append(token)
    return found


# ---- the order


def test_permutation_is_fixed_for_ever():
    assert data.permutation(8, 1, 0).tolist() == [3, 5, 4, 0, 7, 2, 6, 1]
    assert sorted(data.permutation(1000, 3).tolist()) == list(range(1000))
    assert data.permutation(50, 1, 0).tolist() != data.permutation(50, 1, 1).tolist()
    assert data.permutation(0, 1).tolist() == []


def test_rows_overlap_by_the_extra_tokens(load):
    batches = take(load(), 4)
    rows = torch.cat([batch.tokens for batch in batches])
    assert rows.shape == (4 * ROWS, SEQ_LEN + EXTRA) and rows.dtype == torch.int64 and rows.min() >= 0
    assert torch.equal(rows[:-1, SEQ_LEN:], rows[1:, :EXTRA])


def test_an_epoch_holds_every_training_document_once(load, tok, documents, threshold):
    expected = [text for text in documents if data.document_hash(text) >= threshold]
    assert 0 < len(documents) - len(expected) < 80
    first = epoch_documents(load, tok, 0)
    assert Counter(first[: len(expected)]) == Counter(expected)
    second = epoch_documents(load, tok, 1)
    assert Counter(second[: len(expected)]) == Counter(expected) and second != first
    other = epoch_documents(load, tok, 0, seed=2)
    assert Counter(other[: len(expected)]) == Counter(expected) and other != first
    assert not {text for text in first + second + other if data.document_hash(text) < threshold}


def test_epochs_follow_without_a_gap(load, tok, documents, threshold):
    batches = take(load(), 250)
    assert batches[-1].epoch >= 2
    stream = stream_of(batches)
    training = [text for text in documents if data.document_hash(text) >= threshold]
    per_epoch = sum(len(ids) for ids in tokenizer.Encoder(tok)(training))
    start = next(i for i, batch in enumerate(batches) if batch.epoch == 1)
    second = stream_of(take(load(cursor=Cursor(epoch=1)), 50))
    assert stream[per_epoch : per_epoch + len(second)] == second
    assert start * ROWS * SEQ_LEN <= per_epoch <= (start + 1) * ROWS * SEQ_LEN


# ---- resume, ranks, workers


def test_resume_at_every_step_is_exact(load):
    whole = take(load(), 130)
    assert whole[-1].epoch >= 2 and len({(batch.cursor.epoch, batch.cursor.window) for batch in whole}) > 5
    for i, batch in enumerate(whole[:-3]):
        cursor = Cursor.from_dict(batch.cursor.to_dict())
        assert same(take(load(cursor=cursor), 3), whole[i + 1 : i + 4])


def test_resumes_chain(load):
    whole = take(load(), 40)
    parts, cursor = [], Cursor()
    for count in (7, 1, 12, 20):
        parts += take(load(cursor=cursor), count)
        cursor = parts[-1].cursor
    assert same(parts, whole)


def test_resume_tokenises_one_chunk(load, tok, monkeypatch):
    cursor = take(load(), 60)[-1].cursor
    calls = []
    encode = tokenizer.Encoder.__call__
    monkeypatch.setattr(tokenizer.Encoder, "__call__", lambda self, texts: calls.append(texts) or encode(self, texts))
    batch = next(load(cursor=cursor))
    assert sum(map(len, calls)) <= 8 + batch.tokens.numel() and cursor.window > 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_one_global_batch(load, world_size):
    whole = take(load(), 12)
    shares = [take(load(rank=rank, world_size=world_size), 12) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([share[step].tokens for share in shares]), batch.tokens)
        assert {share[step].cursor for share in shares} == {batch.cursor}


def test_seeds_and_rows(load):
    assert not same(take(load(), 2), take(load(seed=2), 2))
    rows = [batch.tokens for batch in take(load(rows=1), 10)]
    assert torch.equal(torch.cat(rows), torch.cat([batch.tokens for batch in take(load(), 2)]))


@posix
def test_a_worker_makes_the_same_batches_and_outlives_signals(manifest, tok, threshold):
    def batches(workers, cursor):
        return data.loader(
            manifest, tok, seq_len=SEQ_LEN, extra=EXTRA, rows=3, rank=1, world_size=2, seed=1, cursor=cursor,
            threshold=threshold, shuffle_window=3, workers=workers,
        )  # fmt: skip

    whole = take(batches(0, Cursor()), 30)
    worker = batches(1, whole[4].cursor)
    (child,) = worker._children
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, name)  # while it starts
    assert same(take(worker, 5), whole[5:10])
    for name in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, name)
    assert same(take(worker, 20), whole[10:])
    started = time.monotonic()
    worker.close()
    worker.close()
    assert not child.is_alive() and time.monotonic() - started < 10
    assert next(worker, None) is None


def test_a_users_mistake_in_the_worker_is_one_line(tmp_path, tok):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    manifest = sources.resolve([SourceConfig(path=str(tmp_path))])
    for workers in (0, 1):
        batches = data.loader(
            manifest, tok, seq_len=4, extra=1, rows=1, seed=1, cursor=Cursor(), threshold=0, shuffle_window=1,
            workers=workers,
        )  # fmt: skip
        with pytest.raises(UserError) as caught:
            next(batches)
        assert "no training document in the whole epoch (1 were unreadable)" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_skipped_documents_are_counted(tmp_path, load):
    (tmp_path / "a.jsonl").write_text('{"text": "good good good"}\n{"text": 1}\n{broken\n')
    manifest = sources.resolve([SourceConfig(path=str(tmp_path))])
    assert next(load(manifest=manifest, threshold=0, rows=1)).skipped >= 2


# ---- the split and validation


def small(tmp_path, texts):
    pq.write_table(pa.table({"text": texts}), tmp_path / "s.parquet")
    return sources.resolve([SourceConfig(path=str(tmp_path / "s.parquet"))])


def test_split_threshold_of_small_corpora(tmp_path):
    texts = ["a", "b", "c", "a"]
    hashes = sorted({data.document_hash(text) for text in texts})
    manifest = small(tmp_path, texts)
    assert data.split_threshold(manifest, 0) == 0
    assert data.split_threshold(manifest, 1e-9) == hashes[0] + 1  # exactly one text
    assert data.split_threshold(manifest, (hashes[1] + 1) / 2**64) == int((hashes[1] + 1) / 2**64 * 2**64)
    assert data.split_threshold(manifest, 0.9999999) == hashes[-1]  # all but one
    assert data.split_threshold(small(tmp_path, ["a", "a"]), 0.4) == 0  # one text is trained on
    assert list(data.training_texts(small(tmp_path, ["a", "a"]), 0)) == ["a", "a"]


def test_training_texts_are_bounded_and_leave_validation_out(manifest, documents, threshold):
    texts = list(data.training_texts(manifest, threshold))
    assert texts == [text for text in documents if data.document_hash(text) >= threshold]
    some = list(data.training_texts(manifest, threshold, limit_bytes=200))
    assert some == texts[: len(some)] and 200 <= sum(map(len, some)) < 300


@pytest.mark.parametrize("extra", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_validation_predicts_each_token_once(manifest, documents, tok, threshold, extra, tokens):
    val = data.validation(manifest, threshold=threshold, tokenizer=tok, seq_len=SEQ_LEN, extra=extra, tokens=tokens)
    held_out = [text for text in documents if data.document_hash(text) < threshold]
    taken = held_out[: val.num_documents]
    encoded = tokenizer.Encoder(tok)(taken)
    stream = list(itertools.chain([tok.eos_token_id], *encoded))
    assert val.num_bytes == sum(len(text.encode()) for text in taken)
    assert val.num_tokens == len(stream) - 1 >= min(tokens, val.num_tokens)
    assert taken == held_out or len(stream) - 1 - len(encoded[-1]) < tokens <= len(stream) - 1
    assert val.tokens.shape == (math.ceil(val.num_tokens / SEQ_LEN), SEQ_LEN)
    assert val.targets.shape == (len(val.tokens), SEQ_LEN + extra - 1) and val.tokens.min() >= 0
    main = val.targets[:, :SEQ_LEN]
    assert main[main != data.IGNORE].tolist() == stream[1:]
    for depth in range(extra):  # MTP depth d predicts each token but the first d + 1 once
        targets = val.targets[:, depth : depth + SEQ_LEN]
        assert targets[targets != data.IGNORE].tolist() == stream[1 + depth :]
    flat = val.tokens.reshape(-1).tolist()
    assert flat[: val.num_tokens] == stream[:-1] and not any(flat[val.num_tokens :])


def test_validation_without_documents(tmp_path, tok):
    val = data.validation(
        small(tmp_path, ["only one"]), threshold=0, tokenizer=tok, seq_len=SEQ_LEN, extra=2, tokens=100
    )
    assert val.tokens.shape == (0, SEQ_LEN) and val.targets.shape == (0, SEQ_LEN + 1)
    assert (val.num_tokens, val.num_bytes, val.num_documents) == (0, 0, 0)


def test_searches_are_bounded(manifest, tok, monkeypatch):
    monkeypatch.setattr(data, "SPLIT_SCAN_BYTES", 500)
    seen = [data.document_hash(text) for text in data._bounded(data._texts(manifest), 500)]
    assert data.split_threshold(manifest, 1e-12) == min(seen) + 1
    val = data.validation(manifest, threshold=min(seen) + 1, tokenizer=tok, seq_len=SEQ_LEN, extra=1, tokens=10**6)
    assert val.num_documents == 1


def test_the_bundled_corpus(tok):
    manifest = sources.resolve([SourceConfig(path="corpus/austen.parquet")])
    texts = list(data._texts(manifest))
    assert len(texts) == len(set(texts)) == 270 and sum(len(text.encode()) for text in texts) == 4_012_498
    held_out = sum(data.document_hash(text) < data.split_threshold(manifest, 0.05) for text in texts)
    assert 5 <= held_out <= 25
    assert np.all([text == text.strip() and "\r" not in text and "\t" not in text for text in texts])


def test_no_document_of_the_bundled_corpus_nearly_repeats_another():
    """Over all pairs, so whichever are held out. The figures of corpus/README.md, by word 5-grams."""
    texts = pq.read_table(Path(__file__).parent.parent / "corpus" / "austen.parquet")["text"].to_pylist()
    holders: dict[tuple[str, ...], list[int]] = {}
    sizes = []
    for number, text in enumerate(texts):
        words = re.findall(r"[a-z']+", text.lower().replace("\u2019", "'"))
        grams = set(zip(*(words[start:] for start in range(5)), strict=False))
        sizes.append(len(grams))
        for gram in grams:
            holders.setdefault(gram, []).append(number)
    shared = Counter(pair for held in holders.values() if len(held) > 1 for pair in itertools.combinations(held, 2))
    assert min(sizes) > 100 and shared
    jaccard = max(count / (sizes[a] + sizes[b] - count) for (a, b), count in shared.items())
    contained = max(count / min(sizes[a], sizes[b]) for (a, b), count in shared.items())
    assert round(jaccard, 4) == 0.0035 and round(contained, 3) == 0.009


@posix
def test_a_worker_that_dies_is_an_error_not_a_hang(load):
    batches = load(workers=1, rows=50)
    next(batches)

    def starve():
        os.kill(batches._children[0].pid, signal.SIGKILL)
        time.sleep(20)  # torch's SIGCHLD handler ends it; were the broken connection first, it would hit a later test
        take(batches, 100)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="killed by signal"):
        starve()
    assert time.monotonic() - start < 10
    batches.close()
