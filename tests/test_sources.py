"""sources.py and remote.py: every format, every mistake, and the Hub's path against a server on this machine."""

import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import fake_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import documents
import remote
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
        ('{"text": "a"', "neither a JSON array nor"),
        ('"text"', "found a str"),
        ("[1]", "found a int"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=said):
            sources.resolve([SourceConfig(path=str(tmp_path / "bad.json"))], cache)


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_arrow_record_batches_are_units(tmp_path, kind):
    table = pa.table({"text": ["one", None, "two", "", "drei ß"], "other": [1, 2, 3, 4, 5]})
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    manifest = resolve(tmp_path / "a.arrow")
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


def test_fingerprint_of_large_files_reads_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HASH_WHOLE_BYTES", 100)
    (tmp_path / "a.txt").write_text("word " * 1_000_000)
    before = resolve(tmp_path).fingerprint
    assert resolve(tmp_path).fingerprint == before
    (tmp_path / "a.txt").write_text("word " * 999_999 + "worb ")
    assert resolve(tmp_path).fingerprint != before


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
    for path, message in {
        "corpus.parket": "did you mean 'corpus.parquet'",
        "corpuz": "no such file.*did you mean 'corpus'",
        "./nothing/here.txt": "no such file, folder or glob match",
        "*.arrow": "no such file, folder or glob match",
        "corpus.parquet": "no text column 'text' .text_field.; its columns: other .int64., content .string.",
        "a.jsonl": "no key 'text' .text_field.; its keys: content",
        "list.jsonl": "expected one JSON object a line, found a list",
        "broken.parquet": "not a readable Parquet",
        "notes.docx": "expected one of .parquet .arrow .jsonl .json .txt",
        "empty.txt": "holds no documents",
        "none": "holds no file of .parquet .arrow",
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


# ---- the Hub

CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
- config_name: csv
  data_files: [{split: train, path: csv/*}]
---
"""
HUB_CLIENT = """
import json, sys
import remote, sources
from config import SourceConfig, UserError
from documents import read_unit
remote.TIMEOUT_SEC = 1
remote._sleep = lambda seconds: None  # how long it waits is in test_remote.py
results = []
for settings in json.loads(sys.argv[1]):
    try:
        manifest = sources.resolve([SourceConfig(**settings)])
        documents = [text for unit in manifest.units for text in read_unit(unit).items]
        results.append([manifest.fingerprint, [unit.path for unit in manifest.units], documents])
    except UserError as error:
        results.append(str(error))
print(json.dumps(results))
"""


def ask_hub(settings, endpoint, home, **extra):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **extra}
    env["HF_ENDPOINT"] = endpoint
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", HUB_CLIENT, json.dumps(settings)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=50)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def parquet_bytes(values):
    stream = io.BytesIO()
    ballast = [os.urandom(4000) for _ in values]  # a column that must not be fetched
    pq.write_table(pa.table({"ballast": ballast, "text": values}), stream, row_group_size=20)
    return stream.getvalue()


def test_hub_row_groups_stream_by_ranges_through_faults(tmp_path):
    documents = [f"document {i}" for i in range(90)]
    shards = {"000": parquet_bytes(documents[:50]), "001": parquet_bytes(documents[50:])}
    files = {f"sample/10BT/{name}_00000.parquet": data for name, data in shards.items()}
    files |= {"README.md": CARD, "data/0.parquet": parquet_bytes(["full"]), "csv/a.csv": b"text\nx\n"}
    base = {"path": "owner/set", "name": "sample-10BT"}
    asked = [
        base,
        {**base, "revision": fake_hub.COMMIT},
        {**base, "name": "sample-1BT"},
        {**base, "split": "test"},
        {**base, "text_field": "body"},
        {**base, "revision": "nope"},
        {**base, "path": "owner/other"},
    ]
    with fake_hub.FakeHub("owner/set", files) as hub:
        hub.faults = ["", "", "429", "", "503", "", "reset", "429 wait", "truncate", "403", "stall"]  # footers first
        first, pinned, *problems = ask_hub(asked, hub.endpoint, tmp_path)
        log, sent_bytes = hub.log, hub.sent_bytes
    assert not hub.faults
    assert first[2] == pinned[2] == documents and first[0] == pinned[0]
    assert first[1][0] == f"hf://datasets/owner/set@{fake_hub.COMMIT}/sample/10BT/000_00000.parquet"
    ranges = [path for method, path, span in log if span]
    assert len(ranges) == 2 + 2 * 5 + 7  # footers once, a request for each row group, seven tried again
    assert not [path for method, path, span in log if method == "GET" and path.endswith(".parquet") and not span]
    resolved = Counter(path for _, path, _ in log if "/resolve/" in path and path.endswith("_00000.parquet"))
    assert sorted(resolved.values()) == [1, 2]  # once a file; twice where the address had run out
    assert sent_bytes < 0.8 * sum(map(len, shards.values()))  # mostly the footers' 64 KiB
    messages = [
        "'sample-1BT': BuilderConfig 'sample-1BT' not found. Available: ['default', 'sample-10BT', 'csv']",
        "has no split 'test'; it has: train",
        "no text column 'body'",
        "no such revision",
        "no such repository on the Hub",
    ]
    for problem, message in zip(problems, messages, strict=True):
        assert message in problem and "\n" not in problem


def test_a_hub_dataset_of_other_files_goes_through_datasets(tmp_path):
    lines = "".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(30)).encode()
    files = {"README.md": CARD, "data/0.jsonl": lines, "sample/10BT/a.jsonl": b"{x\n"}
    asked = [
        {"path": "owner/set"},
        {"path": "owner/set", "text_field": "body"},
        {"path": "owner/set", "name": "sample-10BT"},
    ]
    with fake_hub.FakeHub("owner/set", files) as hub:
        found, no_column, broken = ask_hub(asked, hub.endpoint, tmp_path / "first")
        again, *_ = ask_hub(asked, hub.endpoint, tmp_path / "second")
    assert found[2] == [f"line {i}" for i in range(30)] and found[1][0].endswith(".arrow") and again[0] == found[0]
    assert f"owner/set@{fake_hub.COMMIT} has no text column 'body'" in no_column
    assert "Hub dataset 'owner/set': JSON parse error" in broken and "\n" not in broken
    with fake_hub.FakeHub("owner/set", {"a.csv": b"text\none\ntwo\n"}) as hub:
        (found,) = ask_hub([{"path": "owner/set"}], hub.endpoint, tmp_path / "third")
    assert found[2] == ["one", "two"]


@pytest.mark.parametrize("setting", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_the_hub_one_line_says_what_to_do(setting, tmp_path):
    (problem,) = ask_hub([{"path": "HuggingFaceFW/fineweb-edu"}], "http://127.0.0.1:9", tmp_path, **setting)
    assert "Hub dataset 'HuggingFaceFW/fineweb-edu': the Hugging Face Hub could not be reached" in problem
    assert "data.sources=FILE" in problem and "--config quickstart" in problem and "\n" not in problem


def test_retries_are_bounded_and_only_for_what_may_pass(monkeypatch):
    from huggingface_hub import errors

    clock = [0.0]
    monkeypatch.setattr(remote.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(remote.time, "sleep", lambda wait: clock.__setitem__(0, clock[0] + wait))
    calls = []

    def read():
        calls.append(clock[0])
        if len(calls) < 4:
            raise TimeoutError("slow")
        return "data"

    assert remote.retry(read, "file") == "data" and len(calls) == 4 and 3 < clock[0] < 8
    calls.clear()

    def barred():
        calls.append(0)
        response: Any = type("Response", (), {"status_code": 403, "headers": {}, "request": None})()
        raise errors.HfHubHTTPError("forbidden", response=response)

    with pytest.raises(UserError, match="forbidden"):
        remote.retry(barred, "file")
    assert len(calls) == 1
    clock[0] = 0.0
    with pytest.raises(UserError, match=r"could not be read from the Hub \(no route"):
        remote.retry(lambda: (_ for _ in ()).throw(OSError("no route")), "file", seconds=100)
    assert 30 < clock[0] <= 100


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
