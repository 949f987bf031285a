"""scripts/prepare_data.py: the same bytes whatever happens on the way; mistakes are one line."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards

ROOT = Path(shards.__file__).parent
posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "a.parquet"
    draw = random.Random(0)
    words = [f"word{i}" for i in range(500)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 300))) for _ in range(1200)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=20)
    return path


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
    shards._map.cache_clear()
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole
    assert "60 shards (59 were there" in capsys.readouterr().out


@posix
@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_started_again_it_comes_to_the_same_bytes(corpus, tmp_path, whole, workers):
    out = tmp_path / "shards"
    command = [sys.executable, str(ROOT / "scripts" / "prepare_data.py"), *arguments(corpus, out)]
    command += ["--workers", str(workers)]
    draw = random.Random(workers)
    kills = 0
    for wanted in sorted(draw.sample(range(1, 50), 2)):
        process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("unit-*.safetensors"))) < wanted:
            assert time.monotonic() < end
            time.sleep(0.002)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 1
    (out / "unit-00000059.safetensors.tmp-1").write_bytes(b"half")
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0
    assert contents(out) == whole


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_number_of_tokens_ends_it_at_the_same_unit(corpus, tmp_path, whole, workers, capsys):
    out = tmp_path / "shards"
    assert prepare_data.main(arguments(corpus, out, "--tokens", "160_000", "--workers", workers)) == 0
    found = contents(out)
    shard_names = [name for name in found if name.startswith("unit-")]
    assert 5 < len(shard_names) < 20 and all(found[name] == whole[name] for name in shard_names)
    assert not json.loads(found["index.json"])["complete"] and json.loads(found["index.json"])["num_units"] == 60
    tokens = int(capsys.readouterr().out.split(" documents, ")[1].split(" tokens")[0].replace(",", ""))
    assert 160_000 <= tokens < 200_000
    assert prepare_data.main(arguments(corpus, out)) == 0 and contents(out) == whole


def test_mistakes_are_one_line(corpus, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    shards_folder = tmp_path / "shards"
    assert prepare_data.main(arguments(corpus, shards_folder, "--tokens", "1")) == 0
    other = tmp_path / "b.jsonl"
    other.write_text('{"text": "other"}\n' * 3)
    cases = [
        (arguments(corpus, tmp_path / "full"), "exists and is no folder of token shards"),
        (arguments(other, shards_folder), "holds shards of other sources or another tokenizer"),
        (arguments(shards_folder, tmp_path / "again"), "token shards have no text|these are token shards already"),
        (arguments(corpus, tmp_path / "x", "--tokens", "many"), "'many' is not a number from 1 on"),
        (["--out", "x"], "required: --config"),
        (arguments(corpus, tmp_path / "x", "--wrokers", "2"), "did you mean --workers"),
    ]
    capsys.readouterr()
    for given, said in cases:
        assert prepare_data.main(given) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and any(part in told for part in said.split("|")), told
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
