"""feeder.py: the same batches from any number of processes, through kills, hangs and resumes."""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import feeder
import remote
import sources
import tokenizer
from config import SourceConfig, UserError
from documents import Manifest, Stream
from feeder import Feeder, Pool
from stream import Cursor, Feed

posix = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
ROOT = Path(feeder.__file__).parent
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def texts(count):
    draw = random.Random(0)
    return [" ".join([f"n{i}", *draw.choices(WORDS, k=draw.randrange(0, 30))]) for i in range(count)]


@pytest.fixture(scope="module")
def encoder():
    return tokenizer.Encoder(tokenizer.train_bpe(texts(300), 400))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("a", 700), ("b", 400)):
        pq.write_table(pa.table({"text": texts(rows)}), folder / f"{name}.parquet", row_group_size=50)
    return sources.resolve(
        [
            SourceConfig(path=str(folder / "a.parquet"), weight=0.7),
            SourceConfig(path=str(folder / "b.parquet"), weight=0.3),
        ]
    )


@pytest.fixture
def feed(manifest, encoder):
    def make(**changes):
        settings = {"seq_len": 32, "extra": 2, "rows": 4, "seed": 1, "cursor": Cursor(), "threshold": 0}
        return Feed(manifest=manifest, encoder=encoder, shuffle_window=3, **settings | changes)

    return make


@pytest.fixture
def fed():
    """`Feeder`s that are closed at the end, and what they noted."""
    with contextlib.ExitStack() as stack:

        def make(feed, workers=1):
            notes = []
            made = Feeder(feed, workers, lambda batch: batch, notes.append)
            stack.callback(made.close)
            return made, notes

        yield make


def same(left, right):
    return len(left) == len(right) and all(
        np.array_equal(a.tokens, b.tokens) and a.cursor == b.cursor and a.num_targets == b.num_targets
        for a, b in zip(left, right, strict=True)
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def alive(pid):
    with contextlib.suppress(OSError):
        os.kill(pid, 0)
        return "zombie" not in Path(f"/proc/{pid}/status").read_text() if Path("/proc").is_dir() else True
    return False


def children_of(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(child) for child in listed.split()]


def wait_until(check, seconds=10):
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.mark.parametrize("workers", [1, 2])
def test_processes_make_the_same_batches(feed, fed, workers):
    whole = take(feed().batches(), 60)
    batches, _ = fed(feed(cursor=whole[4].cursor, rank=1, world_size=2), workers)
    wanted = take(feed(rank=1, world_size=2).batches(), 60)
    assert same(take(batches, 55), wanted[5:])
    assert 0 <= batches.depth <= feeder.PREFETCH_STEPS and batches.restarts == 0


@posix
def test_it_outlives_signals_and_ends_when_closed(feed, fed):
    batches, _ = fed(feed())
    wait_until(lambda: batches._process is not None and batches._process.pid)
    child = batches._process
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)  # while it starts
    first = take(batches, 5)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(child.pid, number)
    assert same(first + take(batches, 20), take(feed().batches(), 25)) and batches.restarts == 0
    start = time.monotonic()
    batches.close()
    batches.close()
    assert not child.is_alive() and time.monotonic() - start < 10
    assert next(batches, None) is None


def digest(batches):
    total = hashlib.sha256()
    for batch in batches:
        total.update(batch.tokens.tobytes())
        total.update(repr(batch.cursor).encode())
    return total.hexdigest()


def through_kills(feed, fed, count, *, workers, kills, resumes, seed):
    """`count` batches with the feeding process killed `kills` times and the whole resumed `resumes` times."""
    draw = random.Random(seed)
    points = draw.sample(range(1, count // 20 - 1), kills + resumes)  # far enough apart for a kill to be noticed
    events = {20 * point + draw.randrange(5): "kill" if i < kills else "resume" for i, point in enumerate(points)}
    restarts, cursor = 0, Cursor()
    batches = None
    for number in range(count):
        if batches is None:
            made = feed(cursor=cursor)
            batches = fed(made, workers)[0] if workers else made.batches()
        batch = next(batches)
        cursor = batch.cursor
        yield batch
        if workers and events.get(number) == "kill":
            batches._process.kill()
        if workers and (events.get(number) == "resume" or number == count - 1):
            restarts += batches.restarts
            batches.close()
        if events.get(number) == "resume":
            batches = None
    assert restarts == (kills if workers else 0)


def d1(feed, fed, count, workers, kills=5, resumes=3):
    wanted = digest(take(feed().batches(), count))
    again = through_kills(feed, fed, count, workers=workers, kills=kills, resumes=resumes, seed=workers)
    assert digest(again) == wanted
    for world_size in (2, 4):
        ranks = [feed(rank=rank, world_size=world_size).batches() for rank in range(world_size)]
        joined = (
            parts[0]._replace(tokens=np.concatenate([part.tokens for part in parts]))
            for parts in itertools.islice(zip(*ranks, strict=True), count)
        )
        assert digest(joined) == wanted


@posix
@pytest.mark.parametrize("workers", [0, 1])
def test_kills_resumes_workers_and_ranks_leave_the_order_alone(feed, fed, workers):
    """D1 in small; the whole of it: pytest -m slow tests/test_feeder.py"""
    d1(feed, fed, 300, workers, kills=1, resumes=2)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_d1_over_ten_thousand_batches(feed, fed, workers):
    d1(feed, fed, 10_000, workers)


@posix
def test_a_tokenising_process_that_dies_is_replaced(encoder):
    with Pool(encoder, 2) as pool:
        chunks = [texts(40)[i : i + 4] for i in range(0, 40, 4)]
        made = pool.map(iter(chunks * 20))
        first = [next(made)]
        pool.workers[0].process.kill()
        found = first + list(made)
    wanted = [encoder(chunk) for chunk in chunks] * 20
    assert all(np.array_equal(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))


class Stuck:
    """An encoder that hangs on one text: for ever, or once, when a file is there."""

    def __init__(self, encoder, marker):
        self.encoder, self.marker, self.eos = encoder, marker, encoder.eos

    def __call__(self, texts):
        if any("HANG" in text for text in texts) and (not self.marker or os.path.exists(self.marker)):
            if self.marker:
                os.unlink(self.marker)
            time.sleep(600)
        return self.encoder(texts)


class Threads:
    """An encoder that tells how many threads `tokenizers` started in its process."""

    def __init__(self, encoder):
        self.encoder = encoder

    def __call__(self, texts):
        before = len(list(Path("/proc/self/task").iterdir()))
        self.encoder(texts)
        return [np.array([len(list(Path("/proc/self/task").iterdir())) - before])]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("alone", [True, False])
def test_a_tokenising_process_takes_one_thread(encoder, monkeypatch, alone):
    """`environment.prepare` allows many for this process, which its children inherit; several would fight for cores."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    if alone:
        with Pool(Threads(encoder), 1) as pool:
            ((started,),) = pool.map(iter([["a b c", "d e f"] * 100]))
    else:  # that the counting can see them
        code = "import os; os.environ['TOKENIZERS_PARALLELISM'] = 'true'\n" + COUNT
        started = [int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)]
    assert (started[0] == 0) == alone


class Settings:
    """Token 7 for a text where tokenizers and fastokens may take one thread, 8 where more."""

    eos = 0

    def __call__(self, texts):
        one = os.environ["TOKENIZERS_PARALLELISM"] == "false" and os.environ["RAYON_NUM_THREADS"] == "1"
        return [np.array([7 if one else 8])] * len(texts)


def test_a_feeding_process_takes_one_thread(feed, monkeypatch):
    """Its cores are those of the training beside it."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with contextlib.closing(
        Feeder(dataclasses.replace(feed(), encoder=Settings()), 1, lambda batch: batch, print)
    ) as batches:
        assert set(np.unique(next(batches).tokens).tolist()) == {0, 7}


COUNT = """
from pathlib import Path
from tokenizers import Tokenizer, models
made = Tokenizer(models.WordLevel({"a": 0}, "a"))
before = len(list(Path("/proc/self/task").iterdir()))
made.encode_batch_fast(["a"] * 1000)
print(len(list(Path("/proc/self/task").iterdir())) - before)
"""


def test_a_tokenising_process_that_hangs_is_replaced(encoder, tmp_path, monkeypatch):
    """On a busy machine a process takes long to start: only the one that runs is hurried."""
    replace, replaced = feeder._Worker._replace, []

    def patient(worker):
        replaced.append(worker)
        worker.stall_sec = 60
        replace(worker)

    monkeypatch.setattr(feeder._Worker, "_replace", patient)
    (tmp_path / "once").touch()
    with Pool(Stuck(encoder, str(tmp_path / "once")), 1, stall_sec=60) as pool:
        (first,) = pool.map(iter([["a b"]]))
        pool.workers[0].stall_sec = 0.5
        found = list(pool.map(iter([["HANG c"], ["d"]])))
    assert len(replaced) == 1 and len(first) == 1
    assert [len(ids) for ids in found] == [1, 1] and np.array_equal(found[0][0], encoder(["HANG c"])[0])


class Slow:
    """An encoder that takes its time and tells that it is alive."""

    def __call__(self, texts):
        for _ in range(8 if "SLOW" in texts[0] else 0):
            time.sleep(0.3)
            remote.beat()
        return [np.arange(len(text)) for text in texts]


def test_a_long_document_is_no_hang(monkeypatch):
    monkeypatch.setattr(feeder._Worker, "_replace", lambda _: pytest.fail("replaced"))
    with Pool(Slow(), 1, stall_sec=60) as pool:
        list(pool.map(iter([["start"]])))
        pool.workers[0].stall_sec = 1.8
        assert [len(ids) for ids in next(pool.map(iter([["SLOW and long", "b"]])))] == [13, 1]


def test_a_document_that_always_hangs_is_named(encoder, monkeypatch):
    monkeypatch.setattr(feeder, "RESTARTS", 1)
    with (
        Pool(Stuck(encoder, ""), 1, stall_sec=0.6) as pool,
        pytest.raises(UserError, match=r"1 document\(s\), the first of them 'HANG for ever'.*over 1 s, 2 times"),
    ):
        list(pool.map(iter([["HANG for ever"]])))


def test_a_feeding_process_that_hangs_is_replaced(feed, fed, encoder, tmp_path, monkeypatch):
    """Only after its first batch: on a busy machine a process takes long to start."""
    pq.write_table(pa.table({"text": ["a b c", "HANG d e f"] * 100}), tmp_path / "a.parquet")
    manifest = sources.resolve([SourceConfig(path=str(tmp_path / "a.parquet"))])
    plain = Feed(**{**feed().__dict__, "manifest": manifest})
    hanging = Feed(**{**plain.__dict__, "encoder": Stuck(encoder, str(tmp_path / "once"))})
    batches, notes = fed(hanging)
    found = take(batches, 1)
    (tmp_path / "once").touch()
    monkeypatch.setattr(feeder, "STALL_SEC", -0.4)  # and a second to say where it hangs
    noted = batches.note

    def patient(text):
        monkeypatch.setattr(feeder, "STALL_SEC", 120.0)
        noted(text)

    batches.note = patient
    found += take(batches, 60)
    assert same(found, take(plain.batches(), 61)) and batches.restarts == 1
    assert "gave no sign of life for -0 s; another one goes on" in notes[0]


def test_a_trainer_that_is_slow_is_no_hang(feed, fed, monkeypatch, capfd):
    monkeypatch.setattr(feeder, "STALL_SEC", 1.5)
    batches, notes = fed(feed())
    next(batches)
    monkeypatch.setattr(feeder, "STALL_SEC", 120.0)
    time.sleep(2.5)  # the next ones fill queue and pipe
    assert same([next(batches)], take(feed().batches(), 2)[1:])
    assert batches.restarts == 0 and not notes and capfd.readouterr().err == ""


def test_a_process_that_dies_again_and_again_is_an_error(feed, fed, monkeypatch):
    monkeypatch.setattr(feeder, "RESTARTS", 1)
    monkeypatch.setattr(feeder, "_feed", _die)
    batches, notes = fed(feed())
    with pytest.raises(UserError, match=r"died \(exit code 7\), 2 times in a row; data.workers=0 shows where"):
        next(batches)
    assert len(notes) == 1 and next(batches, None) is None


def _die(*_):
    os._exit(7)


def _fail(sender, *_):
    sender.send(("failure", "Traceback: it broke"))


def test_a_bug_in_the_process_is_told_whole(feed, fed, monkeypatch):
    monkeypatch.setattr(feeder, "_feed", _fail)
    batches, _ = fed(feed())
    with pytest.raises(RuntimeError, match=r"in the feeding process:\nTraceback: it broke"):
        next(batches)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_users_mistake_is_one_line(tmp_path, feed, fed, workers):
    (tmp_path / "a.jsonl").write_text("{broken\n")
    manifest = sources.resolve([SourceConfig(path=str(tmp_path))])
    batches, _ = fed(Feed(**{**feed().__dict__, "manifest": manifest}), workers)
    with pytest.raises(UserError) as caught:
        next(batches)
    assert "no training document in the whole epoch (1 were unreadable" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_last_batch_ends_it(feed, fed, manifest):
    streams = tuple(Stream(part.names, part.units, part.weight, 1) for part in manifest.streams)
    finite = Feed(**{**feed().__dict__, "manifest": Manifest(streams, manifest.identities)})
    batches, _ = fed(finite)
    assert same(list(batches), list(finite.batches()))


@posix
def test_everyone_ends_with_the_process_that_started_them(tmp_path, encoder):
    """SIGKILL of the trainer leaves no feeding and no tokenising process behind."""
    pq.write_table(pa.table({"text": texts(500)}), tmp_path / "a.parquet", row_group_size=50)
    program = textwrap.dedent("""
        import pickle, sys, time
        import sources
        from config import SourceConfig
        from feeder import Feeder
        from stream import Cursor, Feed
        if __name__ == "__main__":
            manifest = sources.resolve([SourceConfig(path=sys.argv[1])])
            with open(sys.argv[2], "rb") as file:
                encoder = pickle.load(file)
            feed = Feed(manifest, encoder, 32, 1, 4, 1, Cursor(), 0, 3)
            batches = Feeder(feed, 2, lambda batch: batch, print)
            next(batches)
            print("ready", batches._process.pid, flush=True)
            time.sleep(600)
    """)
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "encoder").write_bytes(pickle.dumps(encoder))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    trainer = subprocess.Popen(
        [sys.executable, *(str(tmp_path / name) for name in ("program.py", "a.parquet", "encoder"))],
        stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    with trainer:
        assert trainer.stdout is not None
        child = int(trainer.stdout.readline().split()[1])
        family = [child, *children_of(child)]
        assert len(family) >= 3 and all(map(alive, family))
        trainer.kill()
        wait_until(lambda: not any(map(alive, family)))


def resident_mib(pid):
    return int(Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()[0]) / 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("workers", [1, 2])
def test_memory_stays_flat(tmp_path, fed, workers):
    """D8: no process grows by more than 1%, or 2 MiB, from one quarter of a billion tokens to the next."""
    corpus = pq.read_table(ROOT / "corpus" / "austen.parquet")["text"].to_pylist()
    pieces = [text[i : i + 3000] for text in corpus for i in range(0, len(text), 3000)]
    pq.write_table(pa.table({"text": pieces}), tmp_path / "a.parquet", row_group_size=100)
    manifest = sources.resolve([SourceConfig(path=str(tmp_path / "a.parquet"))])
    fast = tokenizer.Encoder.fastest(tokenizer.train_bpe(corpus, 16384), corpus[:3])
    batches, _ = fed(Feed(manifest, fast, 2048, 2, 64, 1, Cursor(), 0, 8), workers)
    per_step, sizes = 64 * 2048, []
    for number in range(4000):
        next(batches)
        if number * per_step > 15e6 and number % 5 == 0:
            family = [os.getpid(), batches._process.pid, *children_of(batches._process.pid)]
            sizes.append([resident_mib(pid) for pid in family])
    series = np.array(sizes)
    assert series.shape[1] == 2 + (workers if workers > 1 else 0) and len(series) > 70
    half = len(series) // 2
    # Allocators keep some MiB more or less from one moment to the next: the medians tell what stays.
    before, after = (np.median(part, axis=0) for part in (series[:half], series[half:]))
    print("MiB before", before.round(1), "after", after.round(1))
    assert (after - before < np.maximum(2, 0.01 * before)).all(), (before, after)
