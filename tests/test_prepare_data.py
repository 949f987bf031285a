"""scripts/prepare_data.py: the same bytes whatever happens on the way; mistakes are one line."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards
import sources
from config import SourceConfig
from documents import read_unit
from remote import Unreachable

ROOT = Path(shards.__file__).parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.parquet"
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) for _ in range(1200)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    return path


def unreachable(kind, name, revision, *, instead):
    raise Unreachable(f"{name} cannot be reached")


def arguments(corpus, out, *more):
    return ["--config", "quickstart", "--out", str(out), f"data.sources={corpus}", "data.tokenizer=bytes", *more]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """What an undisturbed run writes."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    assert prepare_data.main(arguments(corpus, out)) == 0
    return contents(out)


def test_it_says_what_it_did_and_what_comes_next(corpus, tmp_path, capsys, whole):
    out = tmp_path / "shards"
    assert prepare_data.main(arguments(corpus, out, "--workers", "2")) == 0
    told = capsys.readouterr().out
    assert "60 shards (0 were there, and are whole), 1,200 documents" in told
    assert f"next: python train.py --config quickstart data.sources={out} data.tokenizer={out / 'tokenizer'}" in told
    assert contents(out) == whole and len(whole) > 60
    before = {path: path.stat().st_mtime_ns for path in out.glob("unit-*")}
    assert prepare_data.main(arguments(corpus, out)) == 0
    assert "60 shards (60 were there, and are whole)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.glob("unit-*")} == before
    damaged = out / shards.file_name(7)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copy(out / shards.file_name(3), out / shards.file_name(4))  # whole, but of another unit
    (out / "tokenizer" / "tokenizer.json").write_text("{}")
    shards._map.cache_clear()
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole
    assert "60 shards (58 were there" in capsys.readouterr().out


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A corpus of six units, and what an undisturbed run writes of it."""
    folder = tmp_path_factory.mktemp("few")
    texts = [f"text number {i}" for i in range(18)]
    pq.write_table(pa.table({"text": texts}), folder / "few.parquet", row_group_size=3)
    assert prepare_data.main(arguments(folder / "few.parquet", folder / "shards")) == 0
    return folder / "few.parquet", contents(folder / "shards")


def gone(group):
    """Whether no process of a group is left, soon."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.slow
@posix
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_started_again_it_comes_to_the_same_bytes(corpus, tmp_path, workers):
    """Killed with or without its processes, and stopped from the keyboard."""
    pq.write_table(pq.read_table(corpus), tmp_path / "many.parquet", row_group_size=5)  # more than it makes till then
    corpus, out = tmp_path / "many.parquet", tmp_path / "shards"
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments(corpus, out)]
    command += ["--workers", str(workers)]
    draw = random.Random(workers)
    ends = [(os.kill, signal.SIGKILL), (os.killpg, signal.SIGINT)]  # the main process alone; all, as Ctrl-C does
    met = 0
    for wanted, (end, number) in zip([draw.randrange(1, 25), draw.randrange(1, 20)], ends, strict=True):
        wanted += len(list(out.glob("unit-*.safetensors")))  # not before this process made some itself
        process = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        limit = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("unit-*.safetensors"))) < wanted:
            assert time.monotonic() < limit
            time.sleep(0.002)
        if process.poll() is None:
            end(process.pid, number)
            met += 1
        told = process.communicate()[1]
        assert gone(process.pid)
        if process.returncode == 130:
            assert told == "stopped; the same command goes on\n"
        else:
            assert process.returncode in (0, -signal.SIGKILL), told
    assert met >= 1
    (out / "unit-00000239.safetensors.tmp-1").write_bytes(b"half")
    for folder in (out, tmp_path / "undisturbed"):
        assert prepare_data.main(arguments(corpus, folder)) == 0
    assert contents(out) == contents(tmp_path / "undisturbed") and len(list(out.glob("unit-*"))) == 240


class Dead(BaseException):
    pass


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(9))
def test_dead_at_a_rename_it_goes_on(few, tmp_path, number, after):
    """Of the index, the tokenizer, each shard, the last index: what a run leaves that dies there, cleaning nothing."""
    corpus, whole = few
    out = tmp_path / "shards"
    renames = 0

    def dying(real):
        def rename(self, target):
            nonlocal renames
            renames += 1
            if renames <= number:
                return real(self, target)
            if after and renames == number + 1:
                real(self, target)
            raise Dead

        return rename

    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(Path, name, dying(getattr(Path, name)))
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Dead):
            prepare_data.main(arguments(corpus, out))
    assert contents(out) != whole or (number == 8 and after)
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole


def test_a_full_disk_is_one_line_and_no_loss(few, tmp_path, capsys, monkeypatch):
    corpus, whole = few
    out = tmp_path / "shards"
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    assert prepare_data.main(arguments(corpus, out)) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(out / "unit-0000000") in told and "No space left" in told
    assert not list(out.glob("*.tmp-*"))
    monkeypatch.undo()
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole


def test_the_next_command_is_fit_for_a_shell():
    given = SimpleNamespace(config="mini", overrides=["data.sources=a", "model.vocab_size=300", "data.tokenizer=bpe"])
    assert prepare_data.for_training(given, Path("tinystories")) == [  # which is the name of a ready list, too
        "--config", "mini", "data.sources=./tinystories", "data.tokenizer=./tinystories/tokenizer",
        "model.vocab_size=300",
    ]  # fmt: skip
    assert "data.sources=a b/c" in prepare_data.for_training(given, Path("a b", "c"))


def test_sources_that_moved_are_the_same(few, tmp_path):
    corpus, whole = few
    out = tmp_path / "shards"
    moved = tmp_path / "elsewhere" / corpus.name
    moved.parent.mkdir()
    shutil.copy(corpus, moved)
    assert prepare_data.main(arguments(corpus, out, "--tokens", "100")) == 0
    assert prepare_data.main(arguments(moved, out)) == 0
    found = contents(out)
    assert {name for name in whole if found[name] != whole[name]} <= {shards.INDEX}  # it has the path as configured


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_number_of_tokens_ends_it_at_the_same_unit(corpus, tmp_path, whole, workers, capsys):
    out = tmp_path / "shards"
    assert prepare_data.main(arguments(corpus, out, "--tokens", "45_000", "--workers", workers)) == 0
    found = contents(out)
    shard_names = [name for name in found if name.startswith("unit-")]
    assert 5 < len(shard_names) < 20 and all(found[name] == whole[name] for name in shard_names)
    assert not json.loads(found["index.json"])["complete"] and json.loads(found["index.json"])["num_units"] == 60
    told = capsys.readouterr().out
    assert f"{len(shard_names)} shards (" in told
    tokens = int(told.split(" documents, ")[1].split(" tokens")[0].replace(",", ""))
    assert 45_000 <= tokens < 55_000
    if workers == "2":
        return
    name = shards.file_name(len(shard_names) + 2)
    (out / name).write_bytes(whole[name])  # as a process leaves it that was ahead when the run was killed
    assert prepare_data.main(arguments(corpus, out, "--tokens", "45_000")) == 0
    assert contents(out) == found
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole


def test_sources_share_a_number_of_tokens_by_their_weights(corpus, tmp_path, capsys):
    """As training would take them; one that has less gives all it has. Going on for more comes to the same bytes."""
    for name, rows in (("a", 200), ("b", 100)):
        pq.write_table(pq.read_table(corpus).slice(rows, rows), tmp_path / f"{name}.parquet", row_group_size=10)
    (tmp_path / "few.jsonl").write_text('{"text": "one of few"}\n' * 3)
    weights = {"a.parquet": 3, "b.parquet": 1, "few.jsonl": 1}
    listed = ", ".join(f"{{path: {tmp_path / name}, weight: {weight}}}" for name, weight in weights.items())

    def made(out, *more):
        assert prepare_data.main(arguments(corpus, out, f"data.sources=[{listed}]", *more)) == 0
        return contents(out)

    found = made(tmp_path / "some", "--tokens", "25_000")
    opened = sources.resolve([SourceConfig(path=str(tmp_path / "some"))])
    for stream, share in zip(opened.streams[:2], (15_000, 5_000), strict=True):
        taken = [sum(len(ids) + 1 for ids in read_unit(unit).items) for unit in stream.units]
        assert sum(taken[:-1]) < share <= sum(taken)
    assert len(opened.streams[2].units) == 1 and not json.loads(found["index.json"])["complete"]
    assert made(tmp_path / "some") == made(tmp_path / "all")


def test_nobody_else_writes_meanwhile(few, tmp_path, capsys, monkeypatch):
    """Each would remove the other's temporary files."""
    pytest.importorskip("fcntl")
    corpus, whole = few
    out = tmp_path / "shards"
    real, codes = prepare_data.make_shard, []

    def and_again(job):
        if not codes:
            codes.append(None)
            codes[:] = [prepare_data.main(arguments(corpus, out))]
            prepare_data.begin(encoder[0])
        return real(job)

    encoder, begin = [], prepare_data.begin
    monkeypatch.setattr(prepare_data, "begin", lambda given: (encoder.append(given), begin(given)))
    monkeypatch.setattr(prepare_data, "make_shard", and_again)
    assert prepare_data.main(arguments(corpus, out)) == 0 and codes == [2]
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"--out {out}: another process writes to it" in told
    assert contents(out) == whole


def test_mistakes_are_one_line(corpus, tmp_path, capsys, whole):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    shards_folder = tmp_path / "shards"
    assert prepare_data.main(arguments(corpus, shards_folder, "--tokens", "1")) == 0
    done = tmp_path / "done"
    for name, data in whole.items():
        (done / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).write_bytes(data)
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "other"}\n' * 3)
    missing = ["data.sources=nobody/nothing", f"data.fallback={corpus}", "data.tokenizer=bytes"]
    cases = [
        (arguments(corpus, tmp_path / "full"), "exists and is no folder of token shards"),
        (arguments(other, shards_folder), "holds shards of other sources"),
        (arguments(corpus, shards_folder, "data.tokenizer=chars"), "holds shards of another tokenizer"),
        (arguments(corpus, done, "--tokens", "1"), "is complete; leave out --tokens"),
        (arguments(shards_folder, tmp_path / "again"), "token shards have no text|these are token shards already"),
        (arguments(corpus, tmp_path / "x", "--tokens", "many"), "'many' is not a number from 1 on"),
        (arguments(corpus.parent, corpus.parent / "x"), "lies in data.sources = "),
        (["--config", "quickstart", "--out", str(tmp_path / "x"), *missing], "nobody/nothing"),
        (["--out", "x"], "required: --config"),
        (arguments(corpus, tmp_path / "x", "--wrokers", "2"), "did you mean --workers"),
    ]
    capsys.readouterr()
    for given, said in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("remote.hub_commit", unreachable)
            assert prepare_data.main(given) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and any(part in told for part in said.split("|")), told
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine" and contents(done) == whole
    assert not (tmp_path / "x").exists()
