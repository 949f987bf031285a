"""stream.py: one order, its exact resume on any ranks, mixing, epochs that end, packed rows."""

import dataclasses
import itertools
import json
import random
import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data
import sources
import stream
import tokenizer
from config import SourceConfig, UserError
from documents import document_hash
from stream import PADDING, Cursor, Feed, Place

SEQ_LEN, EXTRA, ROWS = 16, 2, 5
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def some_documents(count, seed=0, name="n", most=12):
    draw = random.Random(seed)
    return [" ".join([f"{name}{i}", *draw.choices(WORDS, k=draw.randrange(0, most))]) for i in range(count)]


@pytest.fixture(scope="module")
def documents():
    unique = some_documents(300)
    return unique + unique[:20]  # some texts twice


def write(folder, name, texts, row_group_size=25):
    path = folder / f"{name}.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    return str(path)


@pytest.fixture(scope="module")
def manifest(documents, tmp_path_factory):
    return sources.resolve([SourceConfig(path=write(tmp_path_factory.mktemp("data"), "a", documents))])


@pytest.fixture(scope="module")
def tok(documents):
    return tokenizer.train_bpe(documents, 400)


@pytest.fixture(scope="module")
def encoder(tok):
    return tokenizer.Encoder(tok)


@pytest.fixture(scope="module")
def threshold(manifest):
    return data.split_threshold(manifest, 0.1)


@pytest.fixture
def feed(manifest, encoder, threshold, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_DOCUMENTS", {"concat": 8, "best_fit": 40})

    def make(**changes):
        settings: dict[str, Any] = {
            "manifest": manifest, "encoder": encoder, "seq_len": SEQ_LEN, "extra": EXTRA, "rows": ROWS, "seed": 1,
            "cursor": Cursor(), "threshold": threshold, "shuffle_window": 3,
        }  # fmt: skip
        return Feed(**settings | changes)

    return make


def take(feed, count):
    return list(itertools.islice(feed.batches(), count))


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a.tokens, b.tokens) and a.cursor == b.cursor and a.num_targets == b.num_targets
        for a, b in zip(left, right, strict=True)
    )


def stream_of(batches):
    """The tokens of consecutive steps laid end to end, without the overlap of rows."""
    return np.concatenate([batch.tokens[:, :SEQ_LEN].reshape(-1) for batch in batches]).tolist()


def cut(ids, tok):
    """The documents among ids, cut at EOS."""
    return [tok.decode(list(part)) for end, part in itertools.groupby(ids, lambda i: i == tok.eos_token_id) if not end]


def epoch_documents(feed, tok, epoch, **changes):
    """The documents of one epoch as the stream has them."""
    batches = []
    for batch in feed(cursor=Cursor(0, (Place(epoch),)), **changes).batches():
        batches.append(batch)
        if batch.epoch > epoch:
            break
    return cut(stream_of(batches), tok)


# ---- the order


def test_permutation_is_fixed_for_ever():
    assert stream.permutation(8, 1, 0).tolist() == [3, 5, 4, 0, 7, 2, 6, 1]
    assert sorted(stream.permutation(1000, 3).tolist()) == list(range(1000))
    assert stream.permutation(50, 1, 0).tolist() != stream.permutation(50, 1, 1).tolist()
    assert stream.permutation(0, 1).tolist() == []


def test_rows_overlap_by_the_extra_tokens(feed):
    batches = take(feed(), 4)
    rows = np.concatenate([batch.tokens for batch in batches])
    assert rows.shape == (4 * ROWS, SEQ_LEN + EXTRA) and rows.dtype == np.int64 and rows.min() >= 0
    assert np.array_equal(rows[:-1, SEQ_LEN:], rows[1:, :EXTRA])
    assert {batch.num_targets for batch in batches} == {(ROWS * SEQ_LEN,) * EXTRA}


def test_an_epoch_holds_every_training_document_once(feed, tok, documents, threshold):
    expected = [text for text in documents if document_hash(text) >= threshold]
    assert 0 < len(documents) - len(expected) < 80
    first = epoch_documents(feed, tok, 0)
    assert Counter(first[: len(expected)]) == Counter(expected)
    second = epoch_documents(feed, tok, 1)
    assert Counter(second[: len(expected)]) == Counter(expected) and second != first
    other = epoch_documents(feed, tok, 0, seed=2)
    assert Counter(other[: len(expected)]) == Counter(expected) and other != first
    assert not {text for text in first + second + other if document_hash(text) < threshold}


def test_epochs_follow_without_a_gap(feed, encoder, documents, threshold):
    batches = take(feed(), 250)
    assert batches[-1].epoch >= 2
    tokens = stream_of(batches)
    training = [text for text in documents if document_hash(text) >= threshold]
    per_epoch = sum(len(ids) + 1 for ids in encoder(training))
    second = stream_of(take(feed(cursor=Cursor(0, (Place(1),))), 50))
    assert tokens[per_epoch : per_epoch + len(second)] == second


# ---- resume and ranks

PACKINGS = [{}, {"packing": "best_fit"}]


@pytest.mark.parametrize("changes", PACKINGS)
def test_resume_at_every_step_is_exact(feed, changes):
    whole = take(feed(**changes), 130)
    assert whole[-1].epoch >= 1 and len({(p.epoch, p.window) for batch in whole for p in batch.cursor.places}) > 5
    for i, batch in enumerate(whole[:-3]):
        state = json.loads(json.dumps(batch.cursor.to_dict()))
        assert same(take(feed(cursor=Cursor.from_dict(state), **changes), 3), whole[i + 1 : i + 4])


@pytest.mark.parametrize("changes", PACKINGS)
def test_resumes_chain(feed, changes):
    whole = take(feed(**changes), 40)
    parts, cursor = [], Cursor()
    for count in (7, 1, 12, 20):
        parts += take(feed(cursor=cursor, **changes), count)
        cursor = parts[-1].cursor
    assert same(parts, whole)


def test_resume_tokenises_one_chunk(feed, monkeypatch):
    cursor = take(feed(), 60)[-1].cursor
    calls = []
    encode = tokenizer.Encoder.__call__
    monkeypatch.setattr(tokenizer.Encoder, "__call__", lambda self, texts: calls.append(texts) or encode(self, texts))
    batch = next(feed(cursor=cursor).batches())
    assert sum(map(len, calls)) <= 8 + batch.tokens.size and cursor.places[0].window > 0


def test_the_first_batch_after_a_resume_comes_soon(tmp_path, feed, encoder):
    """D2, on documents of real length: 40,000 of them, about 6 million tokens."""
    texts = some_documents(40_000, name="", most=150)
    big = sources.resolve([SourceConfig(path=write(tmp_path, "big", texts, row_group_size=1000))])
    for packing in ("concat", "best_fit"):
        cursor = Cursor(0, (Place(0, 2, 3, 5),))
        start = time.monotonic()
        next(feed(manifest=big, packing=packing, cursor=cursor, shuffle_window=8, threshold=0).batches())
        assert time.monotonic() - start < 5


def test_the_state_is_small(tmp_path, feed):
    """D3: at most 4 KiB of JSON, whatever was read; with 40 sources."""
    listed = [
        SourceConfig(path=write(tmp_path, f"s{i}", some_documents(30, i)), weight=1 + i, epochs=10**9)
        for i in range(40)
    ]
    mixed = feed(manifest=sources.resolve(listed), threshold=0, cursor=Cursor(10**12, (Place(10**6, 10**6),) * 40))
    mixed = dataclasses.replace(mixed, cursor=Cursor())
    cursors = [Cursor(10**12, (Place(10**5, 10**5, 10**4, 10**7),) * 40), take(mixed, 20)[-1].cursor]
    assert all(len(json.dumps(cursor.to_dict())) <= 4096 for cursor in cursors)


@pytest.mark.parametrize("changes", PACKINGS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_one_global_batch(feed, world_size, changes):
    whole = take(feed(**changes), 12)
    shares = [take(feed(rank=rank, world_size=world_size, **changes), 12) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([share[step].tokens for share in shares]), batch.tokens)
        assert {share[step].cursor for share in shares} == {batch.cursor}
        assert {share[step].num_targets for share in shares} == {batch.num_targets}


def test_seeds_and_rows(feed):
    assert not same(take(feed(), 2), take(feed(seed=2), 2))
    rows = [batch.tokens for batch in take(feed(rows=1), 10)]
    assert np.array_equal(np.concatenate(rows), np.concatenate([batch.tokens for batch in take(feed(), 2)]))


# ---- mixing and the end of epochs


def test_pick_gives_each_its_share_everywhere():
    for weights in ([1.0], [0.7, 0.2, 0.1], [3, 1], [1e-6, 1]):
        picked = np.array([stream.pick(row, weights) for row in range(30_000)])
        for start, length in ((0, 1000), (7, 5000), (10_000, 20_000)):
            counts = np.bincount(picked[start : start + length], minlength=len(weights))
            assert np.abs(counts - length * np.array(weights) / sum(weights)).max() <= 4
    assert stream.pick(10**15, [0.5, 0.5]) in (0, 1)


@pytest.fixture
def mixture(tmp_path):
    """Three sources that can be told apart by their words."""

    def make(weights, epochs=(None, None, None)):
        listed = []
        for i, (weight, limit) in enumerate(zip(weights, epochs, strict=True)):
            path = write(tmp_path, "abc"[i], some_documents(40 * (i + 1), i, "xyz"[i]), 10)
            listed.append(SourceConfig(path=path, weight=weight, epochs=limit))
        return sources.resolve(listed)

    return make


def test_mixing_by_weight_resumes_exactly(feed, mixture):
    manifest = mixture((0.6, 0.3, 0.1))
    assert [len(part.units) for part in manifest.streams] == [4, 8, 12]
    whole = take(feed(manifest=manifest, threshold=0), 60)
    for i in (0, 3, 17, 41, 55):
        assert same(take(feed(manifest=manifest, threshold=0, cursor=whole[i].cursor), 4), whole[i + 1 : i + 5])
    rows = [0, 0, 0]
    for number in range(60 * ROWS):
        rows[stream.pick(number, (0.6, 0.3, 0.1))] += 1
    assert np.allclose(np.array(rows) / (60 * ROWS), (0.6, 0.3, 0.1), atol=0.01)


def test_each_row_is_of_the_source_that_was_picked(feed, mixture, tok):
    manifest = mixture((0.5, 0.25, 0.25))
    alone = [
        np.concatenate([b.tokens for b in take(feed(manifest=dataclasses.replace(manifest, streams=(part,)), seed=1
        + number * 2**64, threshold=0), 10)])
        for number, part in enumerate(manifest.streams)
    ]  # fmt: skip
    mixed = np.concatenate([batch.tokens for batch in take(feed(manifest=manifest, threshold=0), 10)])
    taken = [0, 0, 0]
    for number, row in enumerate(mixed):
        source = stream.pick(number, (0.5, 0.25, 0.25))
        assert np.array_equal(row, alone[source][taken[source]])
        taken[source] += 1


def test_sources_without_weights_are_shuffled_as_one(tmp_path, feed, tok):
    paths = [write(tmp_path, name, some_documents(50, seed, name), 10) for seed, name in enumerate("ab")]
    manifest = sources.resolve([SourceConfig(path=path) for path in paths])
    assert len(manifest.streams) == 1 and manifest.streams[0].names == tuple(paths)
    found = epoch_documents(feed, tok, 0, manifest=manifest, threshold=0, shuffle_window=10)[:100]
    assert {text[0] for text in found[:20]} == {"a", "b"}


def test_a_finite_epoch_ends_on_one_step_for_all_ranks(feed, mixture, encoder):
    """D7: uneven sources, each with its number of epochs; every rank sees the same last step."""
    manifest = mixture((1, 1, 1), (1, 2, 1))
    ends = []
    for world_size in (1, 2, 3):
        for rank in range(world_size):
            batches = list(feed(manifest=manifest, threshold=0, rank=rank, world_size=world_size).batches())
            assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
            ends.append((len(batches), batches[-1].cursor))
    assert len(set(ends)) == 1
    tokens = sum(
        len(ids) + 1
        for i, epochs in enumerate((1, 2, 1))
        for ids in encoder(some_documents(40 * (i + 1), i, "xyz"[i]) * epochs)
    )
    steps = ends[0][0]
    assert tokens // SEQ_LEN - 3 - ROWS < steps * ROWS <= tokens // SEQ_LEN


def test_a_resume_near_the_end_ends_alike(feed, mixture):
    manifest = mixture((1, 2, 1), (1, 1, 1))
    whole = list(feed(manifest=manifest, threshold=0).batches())
    for i in range(len(whole) - 1):
        rest = list(feed(manifest=manifest, threshold=0, cursor=whole[i].cursor).batches())
        assert same(rest, whole[i + 1 :]) and rest[-1].last
    with pytest.raises(UserError, match="fewer than 5 rows"):
        next(feed(manifest=manifest, threshold=0, cursor=whole[-1].cursor).batches())


# ---- bad documents


def test_skipped_documents_are_counted(tmp_path, feed):
    (tmp_path / "a.jsonl").write_text('{"text": "good good good"}\n{"text": 1}\n{broken\n' * 100)
    manifest = sources.resolve([SourceConfig(path=str(tmp_path))])
    tally = next(feed(manifest=manifest, threshold=0, rows=1, max_skipped=0.9).batches()).tally
    assert (tally.documents, tally.skipped) == (300, 200)
    with pytest.raises(UserError, match=r"200 of 300 documents are unreadable, more than data.max_skipped = 0.05"):
        next(feed(manifest=manifest, threshold=0, rows=1, max_skipped=0.05).batches())


def test_an_epoch_without_documents_is_an_error_not_a_loop(tmp_path, feed):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    manifest = sources.resolve([SourceConfig(path=str(tmp_path))])
    with pytest.raises(UserError, match=r"no training document in the whole epoch \(1 were unreadable"):
        next(feed(manifest=manifest, threshold=0).batches())


def test_a_source_whose_documents_are_all_held_out_is_named(tmp_path, feed):
    (tmp_path / "one.jsonl").write_text('{"text": "the only one"}\n')
    (tmp_path / "many.jsonl").write_text("".join(f'{{"text": "number {i}"}}\n' for i in range(50)))
    listed = [SourceConfig(path=str(tmp_path / name), weight=1) for name in ("many.jsonl", "one.jsonl")]
    held_out = document_hash("the only one") + 1
    with pytest.raises(UserError, match=r"held out by data.val_fraction\) of \S+one\.jsonl"):
        next(feed(manifest=sources.resolve(listed), threshold=held_out).batches())


def test_documents_the_tokenizer_refuses_are_left_out(feed, encoder, documents, threshold, tok):
    class Picky:
        eos = encoder.eos

        def __call__(self, texts):
            return [None if "zeta" in text else ids for text, ids in zip(texts, encoder(texts), strict=True)]

    found = epoch_documents(feed, tok, 0, encoder=Picky())
    expected = [text for text in documents if document_hash(text) >= threshold and "zeta" not in text]
    assert Counter(found[: len(expected)]) == Counter(expected) and len(expected) > 50
    batch = take(feed(encoder=Picky()), 20)[-1]
    assert batch.tally.skipped > 10


# ---- packed rows


def test_best_fit_rows_start_at_a_document_and_hold_whole_ones(feed, encoder, documents, threshold):
    training = {text for text in documents if document_hash(text) >= threshold}
    known = {tuple(ids.tolist()) for ids in encoder(sorted(training))}
    batches = take(feed(packing="best_fit"), 60)
    seen = 0
    for row in np.concatenate([batch.tokens for batch in batches]):
        assert row[0] == encoder.eos
        ids = row[row != PADDING].tolist()
        assert row.tolist() == ids + [PADDING] * (len(row) - len(ids))
        pieces = [tuple(part) for end, part in itertools.groupby(ids, lambda i: i == encoder.eos) if not end]
        for piece in pieces[:-1]:
            assert piece in known
        assert any(full[: len(pieces[-1])] == pieces[-1] for full in known)
        seen += len(pieces)
    tally = batches[-1].tally
    assert seen > 200 and tally.padding / tally.positions < 0.1 and 0 < tally.cropped / tally.tokens < 0.4


@pytest.mark.parametrize("extra", [1, 2, 3])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize("crossing", [False, True])
def test_targets_are_counted_as_the_model_counts_them(feed, encoder, extra, packing, isolated, crossing):
    from config import ModelConfig
    from model import DeepSeekV3, init_weights

    config = ModelConfig(
        vocab_size=400, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, q_lora_rank=None, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=8, moe_intermediate_size=4,
        n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=1, num_nextn_predict_layers=extra - 1,
    )  # fmt: skip
    model = DeepSeekV3(config)
    init_weights(model, 0)
    options = {"packing": packing, "document_mask": isolated, "cross_targets": crossing}
    for batch in take(feed(extra=extra, **options), 3):
        given = data.inputs(
            torch.from_numpy(batch.tokens), SEQ_LEN, encoder.eos, packed=packing == "best_fit", isolated=isolated,
            crossing=crossing,
        )  # fmt: skip
        assert given.tokens.min() >= 0
        out = model(given.tokens, given.targets, positions=given.positions, doc_ids=given.doc_ids)
        assert tuple(out.num_targets.tolist()) == batch.num_targets
    if packing == "best_fit" and not isolated and not crossing:
        assert batch.num_targets[0] < ROWS * SEQ_LEN


def test_a_row_tells_what_it_is_made_of(feed, encoder, documents):
    texts = {tuple(ids.tolist()): text for text, ids in zip(documents, encoder(documents), strict=True)}
    for packing in ("concat", "best_fit"):
        wanted = feed(packing=packing)
        mixed = stream.Mixed(wanted, [Place()], lambda chunks: map(encoder, chunks), stream.Tally())
        for number in range(50):
            _, row = mixed.next(number)
            told = np.concatenate([chunk.ids[start:stop] for chunk, start, stop in row.parts])
            if packing == "concat":
                assert np.array_equal(told, row.tokens)
            for chunk, start, stop in row.parts:
                first = int(np.searchsorted(chunk.ends, start, side="right"))
                ids = chunk.ids[chunk.ends[first - 1] if first else 0 : chunk.ends[first] - 1]
                unit = wanted.manifest.units[chunk.units[first]]
                assert documents[unit.start * 25 + chunk.rows[first]] == texts[tuple(ids.tolist())]
                assert stop > start
