"""sources.py and what documents.py reads: every format, every mistake. The Hub's path is in test_remote.py."""

import gzip
import json
import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import documents
import shards
import sources
from config import SourceConfig, UserError
from documents import document_hash, read_unit

ROOT = Path(__file__).resolve().parent.parent


def resolve(path, **settings):
    return sources.resolve([SourceConfig(path=str(path), **settings)])


def texts(manifest):
    return [text for unit in manifest.units for text in read_unit(unit).items]


def skipped(manifest):
    return sum(read_unit(unit).skipped for unit in manifest.units)


def write_parquet(path, values, row_group_size=2, column="text"):
    table = pa.table({"other": list(range(len(values))), column: values})
    pq.write_table(table, path, row_group_size=row_group_size)


# ---- formats


def test_documents_know_their_place_hash_and_size(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "", "two", " \n", "drei ß"], row_group_size=6)
    (unit,) = resolve(tmp_path).units
    read = read_unit(unit)
    assert read.rows.tolist() == [0, 3, 5] and read.num_bytes.tolist() == [3, 3, 7]
    assert read.hashes.tolist() == [document_hash(text) for text in ("one", "two", "drei ß")]
    (tmp_path / "a.parquet").unlink()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{broken\n\n{"text": "two"}\n')
    (unit,) = resolve(tmp_path).units
    assert read_unit(unit).rows.tolist() == [0, 3] and read_unit(unit).skipped == 1


LINES = b"".join(json.dumps({"text": f"document {i}\n\u00e9"}).encode() + b"\n" for i in range(500))


def compress(data, suffix):
    import zstandard

    return {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}[suffix](
        data
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_lines_are_unpacked_once(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(documents, "UNIT_BYTES", 4000)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.jsonl").write_bytes(LINES)
    wanted = texts(resolve(tmp_path / "plain"))
    packed = tmp_path / f"a.jsonl{suffix}"
    packed.write_bytes(compress(LINES, suffix))
    settings, cache = [SourceConfig(path=str(packed))], str(tmp_path / "cache")
    manifest = sources.resolve(settings, cache)
    assert texts(manifest) == wanted and len(wanted) == 500 and len(manifest.units) > 3
    assert all(unit.name == str(packed) for unit in manifest.units)
    (kept,) = (tmp_path / "cache" / "plain-text").iterdir()
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(sources, "_decompressed", lambda *_: pytest.fail("unpacked again"))
    assert sources.resolve(settings, cache) == manifest and kept.stat().st_mtime_ns == before
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere")
    assert sources.resolve(settings, str(tmp_path / "elsewhere")).fingerprint == manifest.fingerprint


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_is_text(tmp_path, suffix):
    blocks = "\n\n".join(f"paragraph {i} " + "word " * 200 for i in range(60)).encode()
    (tmp_path / "a.txt").write_bytes(blocks)
    wanted = texts(resolve(tmp_path / "a.txt"))
    packed = tmp_path / f"b.txt{suffix}"
    packed.write_bytes(compress(blocks, suffix))
    assert (
        texts(sources.resolve([SourceConfig(path=str(packed))], str(tmp_path / "cache"))) == wanted and len(wanted) > 5
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damaged_archives_are_one_line_and_leave_nothing(tmp_path, suffix):
    whole = compress(os.urandom(100_000).hex().encode(), suffix)
    for number, data in enumerate(
        (whole[: len(whole) // 2], b"no archive at all", whole[:2000] + b"xx" + whole[2002:])
    ):
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{number}.jsonl{suffix} is damaged: ") as caught:
            sources.resolve([SourceConfig(path=str(path))], str(tmp_path / "cache"))
        assert "\n" not in str(caught.value) and not list((tmp_path / "cache" / "plain-text").iterdir())


def test_zstandard_s_long_windows_and_frames_are_read(tmp_path):
    import zstandard

    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=28, strategy=1))
    stream = wide.compressobj()  # its frame asks for the window, as its size is not known
    packed = stream.compress(LINES) + stream.flush() + compress(b'{"text": "second frame"}\n', ".zst")
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert zstandard.get_frame_parameters(packed).window_size > 128 << 20
    found = texts(sources.resolve([SourceConfig(path=str(tmp_path / "a.jsonl.zst"))], str(tmp_path / "cache")))
    assert len(found) == 501 and found[-1] == "second frame"


def test_a_bomb_stops_before_the_disk_is_full(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"x" * 50_000_000))
    monkeypatch.setattr(sources, "SPARE_BYTES", 1 << 60)
    with pytest.raises(UserError, match=r"a.jsonl.gz: too little space for its text in .*; see data.cache"):
        sources.resolve([SourceConfig(path=str(tmp_path / "a.jsonl.gz"))], str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "plain-text").iterdir())


def test_json_arrays_and_json_lines(tmp_path):
    (tmp_path / "lines.json").write_bytes(LINES)
    (tmp_path / "array.json").write_text(json.dumps([{"text": "a\nb"}, {"text": 1}, {"text": "c"}], indent=2))
    (tmp_path / "array.json.gz").write_bytes(gzip.compress((tmp_path / "array.json").read_bytes()))
    cache = str(tmp_path / "cache")
    read = {
        name: sources.resolve([SourceConfig(path=str(tmp_path / name))], cache)
        for name in ("lines.json", "array.json", "array.json.gz")
    }
    assert len(texts(read["lines.json"])) == 500
    for name in ("array.json", "array.json.gz"):
        assert texts(read[name]) == ["a\nb", "c"] and skipped(read[name]) == 1
    for content, said in (
        ('{"text": "a"', "neither an array of JSON objects nor JSON lines"),
        ('"text"', "neither an array"),
        ("[1]", "found a int"),
        ('[{"text": "a"}, {"text": ?}]', "value 1 of its array cannot be read: Expecting value"),
        ('[{"text": "a"}, {"text": "b', "value 1 of its array cannot be read: Unterminated string"),
        ('[{"text": "a"}]\n[{"text": "b"}]', "something follows its array"),
        ("[" * 100_000, "value 0 of its array cannot be read: "),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=said):
            sources.resolve([SourceConfig(path=str(tmp_path / "bad.json"))], cache)
        assert not list((tmp_path / "cache" / "plain-text").glob("*.tmp-*"))


@pytest.mark.parametrize("chunk", [1, 7, 40, 1 << 20])
def test_json_arrays_are_read_bit_by_bit(tmp_path, monkeypatch, chunk):
    """Wherever the pieces end: in a name, an escape, a number, between two values."""
    values: list[Any] = [
        {"text": f'\u00e9 \U0001f600 \\ " ]}},[ {i} \n', "n": [i / 7, -1e-9, None, True, {}]} for i in range(30)
    ]
    values[9] = {"text": "word " * 500}
    values[:0] = [1234567890, -1.25e-30, None, "text", [[]]] * 4  # to be counted as unreadable
    monkeypatch.setattr(sources, "CHUNK", chunk)
    for written in (
        json.dumps(values),
        json.dumps(values, ensure_ascii=False, indent=1),
        "\ufeff" + json.dumps(values),
    ):
        (tmp_path / "a.json").write_text(written, encoding="utf-8")
        assert [json.loads(line) for line in sources._array_lines(tmp_path / "a.json", tmp_path)] == values


def test_json_arrays_with_bytes_that_are_no_utf8(tmp_path):
    (tmp_path / "a.json").write_bytes(b'[{"text": "one"},\r\n {"text": "\xff"}, {"text": \r\n "\xc3\xa4"}]')
    manifest = sources.resolve([SourceConfig(path=str(tmp_path / "a.json"))], str(tmp_path / "cache"))
    assert texts(manifest) == ["one", "\u00e4"] and skipped(manifest) == 1
    assert [row for unit in manifest.units for row in read_unit(unit).rows] == [0, 2]


def test_what_is_unpacked_passes_through_little_memory(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps([{"text": "word " * 400}] * 6_000).encode(), 1))
    tracemalloc.start()
    (unit, *_) = sources.resolve([SourceConfig(path=str(tmp_path / "a.json.gz"))], str(tmp_path / "cache")).units
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert unit.size > 12_000_000 and peak < 8_000_000


def test_a_change_in_the_middle_of_a_packed_file_is_seen(tmp_path, monkeypatch):
    """Same size, same ends: unpacked text must not be stale."""
    monkeypatch.setattr(sources, "REMEMBERED_BYTES", 100)
    found = []
    for middle in ("a", "b"):
        (tmp_path / "a.json").write_text(json.dumps([{"text": "x" * 1_500_000 + middle + "x" * 1_500_000}]))
        manifest = sources.resolve([SourceConfig(path=str(tmp_path / "a.json"))], str(tmp_path / "cache"))
        found.append((manifest.fingerprint, texts(manifest)[0][1_500_000]))
    assert [middle for _, middle in found] == ["a", "b"] and found[0][0] != found[1][0]


def test_what_a_killed_process_left_is_removed(tmp_path):
    folder = tmp_path / "cache" / "plain-text"
    folder.mkdir(parents=True)
    for name, age in (("old.tmp-1", 2 * shards.LEFT_BEHIND_SEC), ("new.tmp-2", 0)):
        (folder / name).write_bytes(b"half")
        os.utime(folder / name, (time.time() - age, time.time() - age))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert texts(sources.resolve([SourceConfig(path=str(tmp_path / "a.txt.gz"))], str(tmp_path / "cache"))) == ["text"]
    assert sorted(file.suffix for file in folder.iterdir()) == [".tmp-2", ".txt"]


def test_a_cache_that_cannot_be_made_is_told_with_what_to_do(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    with pytest.raises(UserError, match=r"a.txt.gz: no place for its text, .* cannot be made \(.*\); see data.cache"):
        sources.resolve([SourceConfig(path=str(tmp_path / "a.txt.gz"))], str(tmp_path / "a.txt.gz"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_quota_is_a_full_disk(tmp_path):
    with pytest.raises(UserError, match=r"a.txt.gz: too little space for its text in .*; see data.cache"):
        sources._write(Path("/dev/full"), iter([b"text"]), Path("a.txt.gz"))


def test_unpacked_text_lies_beside_the_hub_s_caches(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text"))
    assert texts(resolve(tmp_path / "a.txt.gz")) == ["text"]
    assert [file.suffix for file in (tmp_path / "home" / "deepseek-plain").iterdir()] == [".txt"]


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_record_batches_are_units(tmp_path, kind, compression):
    table = pa.table({"text": ["one", None, "two", "", "drei ß"], "other": [1, 2, 3, 4, 5]})
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with make(str(tmp_path / "a.arrow"), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=2)
    manifest = resolve(tmp_path / "a.arrow")
    assert [read_unit(unit).rows.tolist() for unit in manifest.units] == [[0], [0], [0]]
    assert [unit.start for unit in manifest.units] == [0, 1, 2] and texts(manifest) == ["one", "two", "drei ß"]
    with pytest.raises(UserError, match=r"no text column 'body' \(text_field\); its columns: text \(string\), other"):
        resolve(tmp_path / "a.arrow", text_field="body")
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 or not")
    documents._arrow.cache_clear()
    with pytest.raises(UserError, match="is not a readable Arrow file"):
        resolve(tmp_path / "a.arrow")


def test_what_datasets_saves_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [f"document {i}" for i in range(2500)]}).save_to_disk(tmp_path / "saved")
    manifest = resolve(tmp_path / "saved" / "*.arrow")
    assert texts(manifest) == [f"document {i}" for i in range(2500)] and len(manifest.units) == 3


def test_parquet_row_groups_are_units(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", None, "", "two", " \n", "drei ß"])
    manifest = resolve(tmp_path / "a.parquet")
    assert [(unit.kind, unit.start) for unit in manifest.units] == [("parquet", 0), ("parquet", 1), ("parquet", 2)]
    assert texts(manifest) == ["one", "two", "drei ß"]


def test_parquet_with_bytes_that_are_no_utf8(tmp_path):
    broken = pa.array([b"good", b"\xff\xfe", None]).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert texts(resolve(tmp_path)) == ["good"] and skipped(resolve(tmp_path)) == 1


def test_parquet_of_categories(tmp_path):
    """What pandas writes for a categorical column; bad bytes are counted there, too."""
    column = pa.array(["one", "two", "one", None]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert texts(resolve(tmp_path)) == ["one", "two", "one"]


def test_a_damaged_footer_is_one_line(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["one", "two"])
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-40] + b"\xff" * 32 + data[-8:])
    with pytest.raises(UserError, match="not a readable Parquet file") as error:
        resolve(tmp_path)
    assert "\n" not in str(error.value)


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match="too long"):
        resolve(tmp_path / ("a" * 300))


def test_jsonl_skips_and_counts_what_it_cannot_read(tmp_path):
    lines = [b'\xef\xbb\xbf{"text": "first"}\r', b"", b"{broken", b'{"text": 3}', b'{"other": "x"}']
    lines += [b'{"text": "\xff"}', b"[1]", b'{"text": "\\ud800"}', b'{"text": ""}', '{"text": "läst"}'.encode()]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest = resolve(tmp_path / "a.jsonl")
    assert texts(manifest) == ["first", "läst"] and skipped(manifest) == 6


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "b.txt"])
def test_a_file_that_becomes_shorter_meanwhile_is_an_error(tmp_path, monkeypatch, name):
    monkeypatch.setattr(documents, "UNIT_BYTES", 1000)
    for path in {tmp_path / "a.txt", tmp_path / name}:  # two .txt are documents
        path.write_text('{"text": "some words"}\n' * 100)
    last = resolve(tmp_path if name == "b.txt" else tmp_path / name).units[-1]
    os.truncate(tmp_path / name, 500)
    with pytest.raises(UserError, match=f"{name} cannot be read: it has become shorter"):
        documents.read_unit(last)


def test_txt_alone_is_blocks_packed_to_documents(tmp_path):
    blocks = [f"block {i}\r\nof {'words ' * 50}" for i in range(200)]
    data = b"\xef\xbb\xbf" + "\r\n \r\n".join(blocks).encode() + b"\r\n\r\n\r\nbad \xff byte\n\n\n"
    (tmp_path / "a.txt").write_bytes(data)
    documents = texts(resolve(tmp_path / "a.txt"))
    assert documents == texts(resolve(tmp_path))
    sizes = [len(document.encode()) for document in documents]
    assert all(8192 <= size < 9000 for size in sizes[:-1]) and len(sizes) > 5
    joined = "\n \n".join(documents)
    assert "\r" not in joined and not joined.startswith("\ufeff") and "bad \ufffd byte" in joined
    assert [line for line in joined.split("\n") if line.startswith("block")] == [f"block {i}" for i in range(200)]


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} " + "x" * 100 for i in range(5000)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    documents = texts(resolve(tmp_path))
    assert "\n".join(documents).split("\n") == lines
    assert max(map(len, documents)) < 70_000


def test_txt_files_of_a_folder_are_documents(tmp_path):
    files = {"b.txt": "b\n\nb2", "sub/a.txt": "a", "empty.txt": "", ".hidden/c.txt": "c", "n.md": "m"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert texts(resolve(tmp_path)) == ["b\n\nb2", "a"]
    assert texts(resolve(tmp_path / "*.txt")) == ["b\n\nb2"]
    assert texts(resolve(tmp_path / "**" / "*.txt")) == ["b\n\nb2", "a"]


@pytest.mark.parametrize("unit_bytes", [1, 7, 64, 1000])
def test_units_part_a_text_file(tmp_path, monkeypatch, unit_bytes):
    lines = [json.dumps({"text": f"document {i} " + "x" * (i * 37 % 150)}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    blocks = [f"block {i}\n{'y' * (i * 53 % 90)}" + "\n" * (i % 3) for i in range(40)]
    (tmp_path / "b.txt").write_text("\n\n".join(blocks))
    monkeypatch.setattr(documents, "UNIT_BYTES", unit_bytes)
    monkeypatch.setattr(documents, "BLOCK_DOCUMENT_BYTES", 1)
    assert texts(resolve(tmp_path / "a.jsonl")) == [json.loads(line)["text"] for line in lines]
    lines = [line for text in texts(resolve(tmp_path / "b.txt")) for line in text.split("\n")]
    assert [line for line in lines if line.startswith("b")] == [f"block {i}" for i in range(40)]


def test_links_are_followed_and_every_folder_is_read_once(tmp_path):
    for name in ("there/real/x.txt", "there/y.txt", "outside/z.txt", "outside/deep/w.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    there = tmp_path / "there"
    try:
        (there / "again").symlink_to(there / "real")
        (there / "loop").symlink_to(there)
        (there / "link").symlink_to(tmp_path / "outside")
    except OSError:
        pytest.skip("no links here")
    found = resolve(there)
    assert sorted(texts(found)) == ["outside/deep/w.txt", "outside/z.txt", "there/real/x.txt", "there/y.txt"]
    assert [unit.origin for unit in found.units] == ["link/deep/w.txt", "link/z.txt", "real/x.txt", "y.txt"]
    assert resolve(there / "**" / "*.txt").units == found.units
    assert texts(resolve(there / "**" / "deep" / "*")) == ["outside/deep/w.txt"]
    (there / "lost.txt").symlink_to("nowhere")
    for path in (there, there / "*.txt"):  # left out, the corpus would be another one without a word
        with pytest.raises(UserError, match=r"lost\.txt is a link to what is not there"):
            resolve(path)


def test_suffixes_may_be_in_capitals(tmp_path):
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "two"}'))
    write_parquet(tmp_path / "C.Parquet", ["three"])
    assert texts(sources.resolve([SourceConfig(path=str(tmp_path))], str(tmp_path / ".cache"))) == [
        "one",
        "two",
        "three",
    ]


# ---- fingerprint


def test_fingerprint_follows_content_not_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.txt").write_text("hello")
    write_parquet(tmp_path / "a" / "y.parquet", ["p", "q", "r"])
    before = resolve(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere" / "b")
    assert resolve(tmp_path / "elsewhere" / "b").fingerprint == before.fingerprint
    assert pickle.loads(pickle.dumps(before)) == before
    (tmp_path / "a" / "x.txt").write_text("hallo")
    assert resolve(tmp_path / "a").fingerprint != before.fingerprint


def test_every_byte_of_a_large_file_counts_but_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "REMEMBERED_BYTES", 100)
    path, cache = tmp_path / "a.txt", tmp_path / ".cache"

    def found():
        return sources.resolve([SourceConfig(path=str(tmp_path))], str(cache)).fingerprint

    path.write_bytes(b"word " * 1000)
    before, times = found(), path.stat()
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_sha256", None)
        assert found() == before
    path.write_bytes(b"word " * 500 + b"ward " + b"word " * 499)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert found() != before
    for kept in cache.rglob("*.sha256"):  # what is no digest is none
        kept.write_bytes(b"\xff")
    path.write_bytes(b"word " * 1000)
    shutil.rmtree(cache)
    cache.touch()  # no place to remember it
    assert found() == before


def test_paths_are_relative_to_here_then_to_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = resolve("corpus/austen.parquet")
    assert len(manifest.units) == 9 and len(texts(manifest)) == 270
    (tmp_path / "corpus").mkdir()
    write_parquet(tmp_path / "corpus" / "austen.parquet", ["mine"])
    assert texts(resolve("corpus/austen.parquet")) == ["mine"]


# ---- mistakes


def test_mistakes_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_parquet(tmp_path / "corpus.parquet", ["x"], column="content")
    (tmp_path / "a.jsonl").write_text('{"content": "x"}\n')
    (tmp_path / "list.jsonl").write_text('[{"text": "x"}]')
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    (tmp_path / "notes.docx").write_bytes(b"x")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "none").mkdir()
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    (tmp_path / "long.jsonl").write_text('{"text": "' + "x" * 300)
    monkeypatch.setattr(sources, "MOST_LINE_BYTES", 256)
    for path, message in {
        "corpus.parket": "did you mean 'corpus.parquet'",
        "corpuz": "no such file.*did you mean 'corpus'",
        "tinystorys": "no such file.*did you mean 'tinystories'",
        "./nothing/here.txt": "no such file, folder or glob match",
        "*.arrow": "no such file, folder or glob match",
        "corpus.parquet": "no text column 'text' .text_field.; its columns: other .int64., content .string.",
        "a.jsonl": "no key 'text' .text_field.; its keys: content",
        "list.jsonl": "expected one JSON object a line, found a list",
        "broken.parquet": "not a readable Parquet",
        "notes.docx": "expected one of .parquet .arrow .jsonl .json .txt",
        "empty.txt": "holds no documents",
        "none": "holds no file of .parquet .arrow",
        "*.docx": "matches 'notes.docx' and the like, but no file of .parquet",
        "~no-such-user/x": "no such file, folder or glob match",
        "a\0b": "no such file, folder or glob match",
        "twice.parquet": "no text column 'text' .text_field.; its columns: text .string., text .string.",
        "long.jsonl": "its first line is over 0 MiB long",
    }.items():
        with pytest.raises(UserError, match=message) as caught:
            resolve(path)
        assert "\n" not in str(caught.value)
    assert texts(resolve("corpus.parquet", text_field="content")) == ["x"]


def test_a_file_that_goes_away(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    manifest = resolve(tmp_path / "a.txt")
    (tmp_path / "a.txt").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_unit(manifest.units[0])


def test_a_parquet_file_that_becomes_another(tmp_path):
    """The footer is known; the bytes are others, and pyarrow's errors are of many kinds."""
    write_parquet(tmp_path / "a.parquet", ["one", "two", "three"])
    manifest = resolve(tmp_path)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    damaged[4:-200] = os.urandom(len(damaged) - 204)
    (tmp_path / "a.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"a\.parquet cannot be read: ") as caught:
        texts(manifest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [pa.ArrowNotImplementedError("codec"), pa.ArrowKeyError("x"), IndexError("column")])
def test_whatever_reading_raises_is_one_line(tmp_path, monkeypatch, error):
    (tmp_path / "a.txt").write_text("x")
    (unit,) = resolve(tmp_path).units

    def fail(_):
        raise error

    monkeypatch.setattr(documents, "_read", fail)
    with pytest.raises(UserError, match=r"a\.txt cannot be read: "):
        read_unit(unit)
    monkeypatch.setattr(documents, "_read", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug of ours is none of the file's
        read_unit(unit)


def test_what_is_written_must_not_be_read_again(tmp_path):
    """A run would be refused at its next start: its own cache would have changed its documents."""
    (tmp_path / "a.txt").write_text("x")
    for path, cache in ((tmp_path, tmp_path / "cache"), (tmp_path / "**" / "*.txt", tmp_path / "b" / "cache")):
        with pytest.raises(UserError, match=r"data\.cache = .* lies in data\.sources = .*; choose another place"):
            sources.resolve([SourceConfig(path=str(path))], str(cache))
    for path, cache in (
        (tmp_path, tmp_path / ".cache"),
        (tmp_path / "a.txt", tmp_path),
        (tmp_path / "*.txt", tmp_path),
    ):
        assert texts(sources.resolve([SourceConfig(path=str(path))], str(cache))) == ["x"]


def test_weights_without_a_sum(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="the weights' sum is no finite number"):
        sources.resolve([SourceConfig(path=str(tmp_path), weight=1e308)] * 2)


@pytest.mark.parametrize("line", ["word " * 60_000, "\u4e2d" * 200_000], ids=["spaces", "none"])
def test_a_book_in_one_line_is_cut(tmp_path: Path, line: str) -> None:
    (tmp_path / "book.txt").write_text(line, encoding="utf-8")
    manifest = sources.resolve([SourceConfig(path=str(tmp_path / "book.txt"))])
    texts = [text for unit in manifest.units for text in read_unit(unit).items]
    assert len(texts) > 10 and max(map(len, texts)) <= 2 * documents.BLOCK_DOCUMENT_BYTES
    assert "".join("".join(texts).split()) == "".join(line.split())


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfeh\x00i\x00", ("A long enough text in plain letters. " * 100).encode("utf-16"),
        "caf\u00e9 cr\u00e8me, d\u00e9j\u00e0 vu".encode("latin-1"),
    ],
    ids=["short utf-16", "utf-16", "latin-1"],
)  # fmt: skip
def test_text_that_is_no_utf8_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="no UTF-8 text"):
        sources.resolve([SourceConfig(path=str(tmp_path / "a.txt"))])
