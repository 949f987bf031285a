"""shards.py: the file, what damage does to it, the folder as a source, and the cache; training sees the same rows."""

import dataclasses
import itertools
import json
import logging
import os
import re
import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open
from safetensors.numpy import save

import data
import shards
import sources
import stream
import tokenizer
from config import SourceConfig, UserError
from documents import Unit, read_unit, text_documents
from shards import Cache, Index
from stream import Cursor, Feed

TEXTS = ["the cat", "sat on", "the mat", "and the dog lay down", "é", "good night"] * 40


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def encoder(tok):
    return tokenizer.Encoder(tok)


@pytest.fixture
def texts(tmp_path):
    """Two sources, and the manifest of either or both."""
    unique = [f"{text} {i}" for i, text in enumerate(TEXTS)]
    for name, part in (("a", unique[:150]), ("b", unique[150:])):
        pq.write_table(pa.table({"text": part}), tmp_path / f"{name}.parquet", row_group_size=20)
    return lambda *names, **settings: sources.resolve(
        [SourceConfig(path=str(tmp_path / f"{name}.parquet"), **settings) for name in names]
    )


def prepare(folder, manifest, tok, *, complete=True, units=None):
    """What scripts/prepare_data.py writes, but for the tokenizer's files."""
    encoder, fingerprint = tokenizer.Encoder(tok), tokenizer.fingerprint(tok)
    folder.mkdir()
    for number, unit in enumerate(manifest.units[:units]):
        documents = read_unit(unit)
        packed = shards.pack(documents, encoder(documents.items))
        described = {"corpus": manifest.fingerprint, "tokenizer": fingerprint, "vocab_size": len(tok)}
        made = shards.to_bytes(number, unit, packed, **described)
        shards.write_file(folder / shards.file_name(number), made)
    Index.of(manifest, tok, fingerprint, complete=complete).write(folder)
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("unit-*")}


def feed(manifest, encoder, **changes):
    settings = {"seq_len": 24, "extra": 2, "rows": 4, "seed": 1, "cursor": Cursor(), "shuffle_window": 3}
    settings["threshold"] = data.split_threshold(manifest, 0.1)
    return Feed(manifest=manifest, encoder=encoder, **settings | changes)


def rows_of(manifest, encoder, count=60, **changes):
    batches = list(itertools.islice(feed(manifest, encoder, **changes).batches(), count))
    return np.concatenate([batch.tokens for batch in batches]), [batch.cursor for batch in batches]


# ---- the file


def test_a_shard_is_a_safetensors_file_of_what_was_read(tmp_path, encoder, tok):
    documents = text_documents(["one", "", "two words", None, "three"], skipped=7)
    ids = encoder(documents.items)
    unit = Unit("parquet", "/somewhere/else/deep/a.parquet", 3, 4, 999, "text", origin="deep/a.parquet")
    packed = shards.pack(documents, [ids[0], None, ids[2]])
    made = shards.to_bytes(12, unit, packed, corpus="c", tokenizer="f" * 64, vocab_size=len(tok))
    assert made == shards.to_bytes(12, unit, packed, corpus="c", tokenizer="f" * 64, vocab_size=len(tok))
    path = tmp_path / shards.file_name(12)
    shards.write_file(path, made)
    with safe_open(str(path), "numpy") as file:  # nobody needs this project to read it
        assert file.get_tensor("tokens").tolist() == [*ids[0], *ids[2]] and file.get_tensor("tokens").dtype == np.uint16
        described = file.metadata()
    assert b"somewhere" not in made and json.loads(described["source"])["path"] == "deep/a.parquet"
    read = shards.read(Unit("tokens", str(path), 12, 13, len(made), ""))
    assert [item.tolist() for item in read.items] == [ids[0].tolist(), [], ids[2].tolist()]
    assert read.rows.tolist() == [0, 2, 4] and read.hashes.tolist() == documents.hashes.tolist()
    assert read.num_bytes.tolist() == [3, 9, 5] and read.skipped == 7
    told = shards.provenance(Unit("tokens", str(path), 12, 13, len(made), ""))
    assert told == "deep/a.parquet (in unit-00000012.safetensors), row group 3"
    wide = shards.to_bytes(12, unit, packed, corpus="c", tokenizer="", vocab_size=100_000)
    shards.write_file(path, wide)
    with safe_open(str(path), "numpy") as file:
        assert file.get_tensor("tokens").dtype == np.uint32


def test_an_empty_unit_is_a_shard(tmp_path):
    packed = shards.pack(text_documents([]), [])
    shards.write_file(
        tmp_path / "a",
        shards.to_bytes(0, Unit("jsonl", "a", 0, 1, 1, ""), packed, corpus="c", tokenizer="", vocab_size=9),
    )
    assert shards.read(Unit("tokens", str(tmp_path / "a"), 0, 1, 0, "")).items == []


def good_shard():
    packed = shards.pack(text_documents(["one", "two"]), [np.arange(3), np.arange(5)])
    return shards.to_bytes(0, Unit("jsonl", "a", 0, 1, 1, ""), packed, corpus="c", tokenizer="", vocab_size=99)


def lying(name, value):
    """A shard whose header says something else."""
    raw = good_shard()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header[name] |= value
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + raw[8 + length :]


def hostile(ends, tokens):
    """A shard whose digest is right and whose contents are not."""
    tensors = {"tokens": np.zeros(tokens, np.uint16), "ends": np.array(ends, np.int64)}
    for name, kind in (("rows", np.uint32), ("hashes", np.uint64), ("num_bytes", np.uint32)):
        tensors[name] = np.zeros(len(ends), kind)
    described = {"format": shards.FORMAT, "unit": "0", "source": "5", "tokenizer": "", "skipped": "0"}
    return save(tensors, {**described, "sha256": shards._digest(tensors)})


DAMAGE = {
    "empty": b"",
    "short": good_shard()[:100],
    "cut": good_shard()[:-1],
    "a bit": good_shard()[:-3] + bytes([good_shard()[-3] ^ 1]) + good_shard()[-2:],
    "no header": (2**63).to_bytes(8, "little") + b"{}",
    "a large header": (2**40).to_bytes(8, "little") + b"{" * 100,
    "deep": (90_000).to_bytes(8, "little") + b"[" * 90_000,
    "other tensors": save({"a": np.zeros(3)}),
    "huge": lying("tokens", {"shape": [2**60], "data_offsets": [0, 2**61]}),
    "negative": lying("tokens", {"shape": [-1], "data_offsets": [8, 0]}),
    "another dtype": lying("tokens", {"dtype": "F64"}),
    "two dimensions": lying("ends", {"shape": [1, 2]}),
    "lists": lying("ends", {"data_offsets": "ab"}),
    "no digest": lying("__metadata__", {"sha256": ""}),
    "ends that wrap around": hostile([0, 2**63 - 1, -(2**63), -1, 4], 4),
    "ends that go back": hostile([3, 1, 4], 4),
    "ends past the tokens": hostile([5], 4),
    "tokens of no document": hostile([], 4),
    "no format": lying("__metadata__", {"format": "x"}),
}


@pytest.mark.parametrize("damage", DAMAGE, ids=str)
def test_damage_is_one_line_at_once(tmp_path, damage):
    path = tmp_path / f"{damage}.safetensors"
    path.write_bytes(DAMAGE[damage])
    start = time.monotonic()
    with pytest.raises(UserError, match="is no token shard, or a damaged one") as caught:
        shards.read(Unit("tokens", str(path), 0, 1, 0, ""))
    assert time.monotonic() - start < 1 and "\n" not in str(caught.value)


def test_every_bit_of_a_shard_counts(tmp_path):
    """Each byte of the tensors, and of what the header says of them."""
    whole = good_shard()
    start = whole.index(b'"__metadata__"')
    length = int.from_bytes(whole[:8], "little")
    kept = {"tokens", "ends", "rows", "hashes", "num_bytes"}
    unnoticed = []
    for place in range(start, len(whole), 1):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path = tmp_path / f"{place}"
        path.write_bytes(damaged)
        try:
            read = shards.read(Unit("tokens", str(path), 0, 1, 0, ""))
        except UserError:
            continue
        assert [item.tolist() for item in read.items] == [[0, 1, 2], [0, 1, 2, 3, 4]]
        assert place < 8 + length, "a changed token went unnoticed"
        unnoticed.append(place)
    assert unnoticed and kept  # names of files and the like, and blanks


def test_an_id_past_the_vocabulary_keeps_its_value(tmp_path):
    """A vocabulary with holes has ids that are larger than its size."""
    packed = shards.pack(text_documents(["a"]), [np.array([3, 70_000], np.int32)])
    raw = shards.to_bytes(0, Unit("jsonl", "a", 0, 1, 1, ""), packed, corpus="c", tokenizer="", vocab_size=65_000)
    shards.write_file(tmp_path / "a", raw)
    assert shards.read(Unit("tokens", str(tmp_path / "a"), 0, 1, 0, "")).items[0].tolist() == [3, 70_000]


def test_a_shard_is_of_its_number_source_and_tokenizer(tmp_path):
    unit = Unit("jsonl", "a", 0, 1, 1, "")
    shards.write_file(tmp_path / shards.file_name(0), good_shard())
    shards.write_file(tmp_path / shards.file_name(1), good_shard())
    assert shards.find(tmp_path, 2, unit, corpus="c", tokenizer="") is None
    found = shards.find(tmp_path, 0, unit, corpus="c", tokenizer="")
    assert found is not None and [item.tolist() for item in found.items] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    for number, other, corpus, fingerprint, said in (
        (1, unit, "c", "", "is the shard of another unit, number 0"),
        (0, dataclasses.replace(unit, stop=2), "c", "", "of another source$"),
        (0, dataclasses.replace(unit, source=1), "c", "", "of another source$"),
        (0, unit, "c", "f" * 64, "of other sources or of another tokenizer"),
        (0, unit, "d", "", "of other sources or of another tokenizer"),
    ):
        with pytest.raises(UserError, match=said):
            shards.find(tmp_path, number, other, corpus=corpus, tokenizer=fingerprint)


def test_a_shard_that_does_not_say_where_it_is_from(tmp_path):
    (tmp_path / "a").write_bytes(hostile([4], 4))
    with pytest.raises(UserError, match="does not say what it was made from"):
        shards.provenance(Unit("tokens", str(tmp_path / "a"), 0, 1, 0, ""))


def test_two_threads_write_a_file_as_one_does(tmp_path):
    """The same unit may be in the last window of an epoch and the first of the next."""
    path, data, failures = tmp_path / "a", b"x" * 1_000_000, []

    def write():
        for _ in range(30):
            try:
                shards.write_file(path, data)
            except OSError as error:
                failures.append(error)

    shards.write_file(path, data)
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert path.read_bytes() == data
    assert failures == [] and [file.name for file in tmp_path.iterdir()] == ["a"]


# ---- the folder


def test_documents_are_those_of_the_sources(tmp_path, texts, encoder, tok):
    streamed = texts("a", "b")
    mapped = sources.resolve([SourceConfig(path=str(prepare(tmp_path / "shards", streamed, tok)))])
    assert len(mapped.units) == len(streamed.units) == 13
    for ours, theirs in zip(mapped.units, streamed.units, strict=True):
        left, right = read_unit(ours), read_unit(theirs)
        for name in ("rows", "hashes", "num_bytes"):
            assert np.array_equal(getattr(left, name), getattr(right, name)) and len(getattr(left, name)) >= 10
        assert [ids.tolist() for ids in left.items] == [ids.tolist() for ids in encoder(right.items)]
        assert left.skipped == right.skipped and not left.items[0].flags.writeable  # views of the file


@pytest.mark.parametrize("changes", [{}, {"packing": "best_fit"}, {"seed": 9, "shuffle_window": 2}])
def test_training_on_shards_is_training_on_the_sources(tmp_path, texts, encoder, tok, changes):
    streamed = texts("a", "b")
    folder = prepare(tmp_path / "shards", streamed, tok)
    mapped = sources.resolve([SourceConfig(path=str(folder))])
    assert mapped.fingerprint == streamed.fingerprint and {unit.kind for unit in mapped.units} == {"tokens"}
    left, right = rows_of(streamed, encoder, **changes), rows_of(mapped, encoder, **changes)
    assert np.array_equal(left[0], right[0]) and left[1] == right[1]
    assert data.split_threshold(mapped, 0.1) == data.split_threshold(streamed, 0.1)
    settings = {"threshold": data.split_threshold(mapped, 0.1), "encoder": encoder, "seq_len": 24, "extra": 2}
    ours, theirs = (data.validation(manifest, tokens=500, **settings) for manifest in (mapped, streamed))
    assert ours.tokens.equal(theirs.tokens) and ours.num_bytes == theirs.num_bytes > 0
    elsewhere = shutil.copytree(folder, tmp_path / "moved" / "shards")
    assert sources.resolve([SourceConfig(path=str(elsewhere))]).fingerprint == streamed.fingerprint


def test_a_foreign_shard_is_refused_when_it_is_opened(tmp_path, texts, encoder, tok):
    """The right number, whole, of the same tokenizer and of a unit at the same place: but of other documents."""
    folder = prepare(tmp_path / "shards", texts("a"), tok)
    (tmp_path / "b.parquet").replace(tmp_path / "a.parquet")
    foreign = prepare(tmp_path / "foreign", texts("a"), tok)
    shutil.copy(foreign / shards.file_name(2), folder / shards.file_name(2))
    manifest = sources.resolve([SourceConfig(path=str(folder))])
    with pytest.raises(UserError, match=r"unit-00000002\.safetensors is the shard of other sources") as caught:
        rows_of(manifest, encoder)
    assert "\n" not in str(caught.value)
    other = tokenizer.train_bpe(TEXTS[:3], 290)
    shutil.copytree(prepare(tmp_path / "other", texts("a"), other), folder, dirs_exist_ok=True)
    shutil.copy(foreign / shards.INDEX, folder / shards.INDEX)
    shards._map.cache_clear()
    with pytest.raises(UserError, match=r"or of another tokenizer than its folder; run scripts/prepare_data\.py again"):
        read_unit(sources.resolve([SourceConfig(path=str(folder))]).units[0])


def test_files_of_one_name_are_told_apart(tmp_path, tok):
    """By their path within the source, and several sources by theirs; where these lie is in no file."""
    for name in ("one/a/x.txt", "one/b/x.txt", "two/a/x.txt", "two/b/x.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(f"the text of {name}")
    both = [SourceConfig(path=str(tmp_path / name)) for name in ("one", "two")]
    for listed, wanted in (
        (both[:1], ["a/x.txt", "b/x.txt"]),
        (both, ["a/x.txt of one", "b/x.txt of one", "a/x.txt of two", "b/x.txt of two"]),
    ):
        folder = prepare(tmp_path / f"shards{len(listed)}", sources.resolve(listed), tok)
        told = [shards.provenance(unit) for unit in sources.resolve([SourceConfig(path=str(folder))]).units]
        assert [re.sub(r" \(source \d\)| \(in .*\)", "", line) for line in told] == wanted
        assert not [path for path in folder.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    assert told[2] == "a/x.txt of two (source 2) (in unit-00000002.safetensors)"


def test_an_index_of_someone_else_is_a_file_like_others(tmp_path):
    (tmp_path / "index.json").write_text('{"text": "mine"}\n')
    (unit,) = sources.resolve([SourceConfig(path=str(tmp_path))]).units
    assert read_unit(unit).items == ["mine"]
    (tmp_path / "index.json").write_text('{"format": "deepseek-tokens-1"}')
    with pytest.raises(UserError, match="not of format deepseek-tokens-2; an earlier version's: make it again"):
        sources.resolve([SourceConfig(path=str(tmp_path))])


def test_a_document_the_tokenizer_refuses_changes_no_other(tmp_path, texts, encoder, tok, monkeypatch):
    real = tokenizer.Encoder.__call__
    refuse = lambda self, items: [None if "dog" in t else ids for t, ids in zip(items, real(self, items), strict=True)]  # noqa: E731
    monkeypatch.setattr(tokenizer.Encoder, "__call__", refuse)
    folder = prepare(tmp_path / "shards", texts("a"), tok)
    left = rows_of(texts("a"), encoder)
    right = rows_of(sources.resolve([SourceConfig(path=str(folder))]), encoder)
    assert np.array_equal(left[0], right[0]) and left[1] == right[1]


def test_weights_survive_and_stand_alone(tmp_path, texts, encoder, tok):
    streamed = texts("a", "b", weight=2, epochs=3)
    folder = prepare(tmp_path / "shards", streamed, tok)
    mapped = sources.resolve([SourceConfig(path=str(folder))])
    assert [(s.weight, s.epochs, len(s.units)) for s in mapped.streams] == [(2, 3, 8), (2, 3, 5)]
    assert np.array_equal(rows_of(streamed, encoder)[0], rows_of(mapped, encoder)[0])
    with pytest.raises(UserError, match="are of several sources with weights of their own"):
        sources.resolve([SourceConfig(path=str(folder), weight=1)])
    one = prepare(tmp_path / "one", texts("a"), tok)
    two = sources.resolve([SourceConfig(path=str(one), weight=3, epochs=1), SourceConfig(path=str(one), weight=1)])
    assert [(s.weight, s.epochs) for s in two.streams] == [(3, 1), (1, None)]


def test_part_of_a_folder_is_another_corpus(tmp_path, texts, tok):
    streamed = texts("a")
    folder = prepare(tmp_path / "shards", streamed, tok, complete=False, units=3)
    part = sources.resolve([SourceConfig(path=str(folder))])
    assert len(part.units) == 3 and part.fingerprint != streamed.fingerprint
    whole = prepare(tmp_path / "whole", streamed, tok)
    (whole / shards.file_name(2)).unlink()
    with pytest.raises(UserError, match=r"lacks unit-00000002.safetensors; run scripts/prepare_data.py again"):
        sources.resolve([SourceConfig(path=str(whole))])
    (whole / shards.INDEX).write_text('{"format": "something else"}')
    with pytest.raises(UserError, match="no index of token shards"):
        sources.resolve([SourceConfig(path=str(whole))])


@pytest.mark.parametrize(
    "changes",
    [
        {"num_units": 10**12},
        {"num_units": -1},
        {"streams": 5},
        {"streams": [{"names": ["a"], "weight": float("nan"), "epochs": None, "units": 8}]},
        {"streams": [{"names": ["a"], "weight": 1, "epochs": 0, "units": 8}]},
        {"streams": [{"names": ["a"], "weight": 1, "epochs": None}]},
        {"identities": "x"},
        {"complete": "perhaps"},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_hostile_index_is_one_line_at_once(tmp_path, texts, tok, changes):
    folder = prepare(tmp_path / "shards", texts("a"), tok)
    path = folder / shards.INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    start = time.monotonic()
    with pytest.raises(UserError, match="no index of token shards") as caught:
        sources.resolve([SourceConfig(path=str(folder))])
    assert time.monotonic() - start < 1 and "\n" not in str(caught.value)


def test_an_index_that_is_honest_about_a_trillion_units_costs_nothing(tmp_path, texts, tok):
    folder = prepare(tmp_path / "shards", texts("a"), tok)
    path = folder / shards.INDEX
    values = json.loads(path.read_text())
    values["num_units"] = values["streams"][0]["units"] = 10**12
    path.write_text(json.dumps(values))
    start = time.monotonic()
    with pytest.raises(UserError, match=r"lacks unit-00000008\.safetensors"):
        sources.resolve([SourceConfig(path=str(folder))])
    path.write_text(json.dumps(values | {"complete": False}))
    assert len(sources.resolve([SourceConfig(path=str(folder))]).units) == 8
    assert time.monotonic() - start < 1
    for text in ("[" * 100_000, "5", "\xff"):
        path.write_text(text)
        with pytest.raises(UserError, match="no index of token shards"):
            Index.read(folder)


def test_a_source_with_a_weight_and_no_shard_is_refused(tmp_path, texts, tok):
    """It would have its share of the rows and no document: training would wait for ever."""
    folder = prepare(tmp_path / "shards", texts("a", "b", weight=1), tok, complete=False, units=3)
    with pytest.raises(UserError, match=r"has no shard of .*b.parquet yet"):
        sources.resolve([SourceConfig(path=str(folder))])


def test_another_tokenizer_is_refused(tmp_path, texts, tok):
    folder = prepare(tmp_path / "shards", texts("a"), tok)
    manifest = sources.resolve([SourceConfig(path=str(folder))])
    shards.check_tokenizer(manifest, tokenizer.fingerprint(tok))
    other = tokenizer.fingerprint(tokenizer.train_bpe(TEXTS[:3], 290))
    with pytest.raises(
        UserError, match=r"the shards in .*shards were made with another one; theirs is data.tokenizer="
    ):
        shards.check_tokenizer(manifest, other)


# ---- the cache


def test_the_cache_fills_while_streaming_and_is_read_afterwards(tmp_path, texts, encoder, tok, monkeypatch):
    streamed = texts("a", "b")
    plain = rows_of(streamed, encoder)
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))
    first = rows_of(streamed, encoder, cache=cache)
    assert np.array_equal(first[0], plain[0]) and first[1] == plain[1]
    kept = sorted(path.name for path in cache.folder.glob("unit-*"))
    assert kept == [shards.file_name(number) for number in range(len(streamed.units))]
    real = tokenizer.Encoder.__call__
    monkeypatch.setattr(
        tokenizer.Encoder, "__call__", lambda self, items: pytest.fail("again") if items else real(self, items)
    )
    monkeypatch.setattr(stream, "read_unit", lambda unit: pytest.fail("read the source again"))
    second = rows_of(streamed, encoder, cache=Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok)))
    assert np.array_equal(second[0], plain[0]) and second[1] == plain[1]
    monkeypatch.undo()
    as_source = sources.resolve([SourceConfig(path=str(cache.folder))])
    assert as_source.fingerprint == streamed.fingerprint
    assert np.array_equal(rows_of(as_source, encoder)[0], plain[0])


def test_the_cache_takes_the_ids_that_training_has_made(tmp_path, texts, encoder, tok, monkeypatch):
    """Wherever they are made, each once. First rows wait for no others, the rest of a window comes at its end."""
    made, told = [], []
    real = tokenizer.Encoder.__call__
    monkeypatch.setattr(stream, "CHUNK_DOCUMENTS", {"concat": 4, "best_fit": 4})
    monkeypatch.setattr(stream.remote, "beat", lambda: told.append(1))
    monkeypatch.setattr(tokenizer.Encoder, "__call__", lambda self, items: pytest.fail("in the feeding process"))

    def elsewhere(chunks):
        return (made.append(chunk) or real(encoder, chunk) for chunk in chunks)

    streamed = texts("a", epochs=1)
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))
    batches = feed(streamed, encoder, cache=cache, threshold=1 << 62, rows=1).batches(elsewhere)
    cursors = [next(batches).cursor]
    assert sum(map(len, made)) < 20 and not list(cache.folder.glob("unit-*"))
    cursors += [batch.cursor for batch in batches]
    documents = [text for unit in streamed.units for text in read_unit(unit).items]
    assert sorted(text for chunk in made for text in chunk) == sorted(documents)
    assert max(map(len, made)) == 4 and len(told) > len(made)  # alive, if a unit is of a million documents
    monkeypatch.undo()
    wanted = contents(prepare(tmp_path / "whole", streamed, tok))
    assert contents(cache.folder) == wanted
    middle = next(cursor for cursor in cursors if cursor.places[0].window == 1 and cursor.places[0].chunk > 3)
    cache = Cache(tmp_path / "resumed", streamed, tok, tokenizer.fingerprint(tok))
    assert list(feed(streamed, encoder, cache=cache, threshold=1 << 62, rows=1, cursor=middle).batches())
    kept = contents(cache.folder)
    assert len(kept) == len(wanted) - 3 and kept.items() <= wanted.items()  # without the first window's


def test_a_window_of_held_out_documents_is_kept_too(tmp_path, texts, encoder, tok):
    pq.write_table(pa.table({"text": TEXTS[:6]}), tmp_path / "few.parquet", row_group_size=1)
    streamed = sources.resolve([SourceConfig(path=str(tmp_path / "few.parquet"), epochs=1)])
    hashes = sorted(int(read_unit(unit).hashes[0]) for unit in streamed.units)
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))
    some = {"threshold": hashes[3], "shuffle_window": 1, "seq_len": 2, "extra": 1, "rows": 1}
    assert list(feed(streamed, encoder, cache=cache, **some).batches())
    assert contents(cache.folder) == contents(prepare(tmp_path / "whole", streamed, tok))


def test_a_resume_into_the_cache_is_exact(tmp_path, texts, encoder, tok):
    streamed = texts("a", "b")
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))
    whole = list(itertools.islice(feed(streamed, encoder).batches(), 40))
    for start in (3, 11, 25):
        again = itertools.islice(feed(streamed, encoder, cache=cache, cursor=whole[start].cursor).batches(), 10)
        for left, right in zip(again, whole[start + 1 :], strict=False):
            assert np.array_equal(left.tokens, right.tokens) and left.cursor == right.cursor


def test_a_damaged_shard_of_the_cache_is_made_again(tmp_path, texts, encoder, tok, caplog):
    streamed = texts("a")
    plain = rows_of(streamed, encoder)
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))
    rows_of(streamed, encoder, cache=cache)
    path = cache.folder / shards.file_name(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    shards._map.cache_clear()
    assert np.array_equal(rows_of(streamed, encoder, cache=cache)[0], plain[0]) and path.read_bytes() == whole
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "its SHA-256 is not the one it was written with; it is made again" in told[0]
    other = (cache.folder / shards.file_name(2)).read_bytes()
    path.unlink()
    path.write_bytes(other)  # whole, but of another unit
    shards._map.cache_clear()
    assert np.array_equal(rows_of(streamed, encoder, cache=cache)[0], plain[0]) and path.read_bytes() == whole


def test_a_full_disk_is_no_reason_to_stop(tmp_path, texts, encoder, tok, monkeypatch, caplog):
    streamed = texts("a")
    plain = rows_of(streamed, encoder)
    cache = Cache(tmp_path / "cache", streamed, tok, tokenizer.fingerprint(tok))

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(shards, "write_file", full)
    assert np.array_equal(rows_of(streamed, encoder, cache=cache)[0], plain[0])
    assert not list(cache.folder.glob("unit-*"))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]  # once, not for every unit
    assert "No space left on device; training goes on without" in caplog.text
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=shards.SPARE_BYTES))
    cache = Cache(tmp_path / "little left", streamed, tok, tokenizer.fingerprint(tok))
    assert np.array_equal(rows_of(streamed, encoder, cache=cache)[0], plain[0])
    assert not list(cache.folder.glob("unit-*"))  # what is left is for checkpoints
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache = .* cannot be written"):
        Cache(tmp_path / "file", streamed, tok, "")


def test_what_killed_processes_left_in_the_cache_is_removed(tmp_path, texts, tok):
    streamed, fingerprint = texts("a"), tokenizer.fingerprint(tok)
    folder = Cache(tmp_path / "cache", streamed, tok, fingerprint).folder
    for name, age in ((".tmp-1-ab", 2), (".tmp-2-cd", 0.5), ("", 2)):
        path = folder / (shards.file_name(3) + name)
        path.write_bytes(b"half")
        os.utime(path, (time.time() - age * shards.LEFT_BEHIND_SEC,) * 2)
    Cache(tmp_path / "cache", streamed, tok, fingerprint)
    assert {path.name for path in folder.iterdir()} == {
        shards.INDEX, shards.file_name(3) + ".tmp-2-cd", shards.file_name(3),  # a live writer's, and what is finished
    }  # fmt: skip


def test_the_cache_travels_to_another_process(tmp_path, texts, tok):
    import pickle

    cache = Cache(tmp_path / "cache", texts("a"), tok, tokenizer.fingerprint(tok))
    assert dataclasses.is_dataclass(Index) and pickle.loads(pickle.dumps(cache)).folder == cache.folder
