"""pusher.py, with the real huggingface_hub, against a Hub on this machine: every fault of the push."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_model_hub
import huggingface_hub
import pytest
from fake_model_hub import NAME, RUN, TOKEN, FakeModelHub, Fault, contents, save

import card
import checkpoint
import hub
import remote
from config import UserError
from pusher import LONGEST_WAIT_SEC, REFUSED_WAIT_SEC, Pusher
from text import safe_text

# huggingface_hub hands httpx the file it uploads in a way that httpx calls out of date.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COMMIT = r"POST .*/commit/main"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeModelHub]:
    with fake_model_hub.served(monkeypatch, tmp_path) as server:
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_model_hub.impatient(monkeypatch):
        yield


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Driven:
    """A pusher without its thread: turns are made here, on a clock that waiting moves."""

    def __init__(self, **options: Any):
        self.clock, self.notes, self.waits = Clock(), [], []
        given = {"run_id": RUN, "every_sec": 300.0, "note": self.notes.append, **options}
        self.push = Pusher(NAME, clock=self.clock, start=False, **given)

    def turns(self, most: int = 60) -> None:
        """Until nothing is left to do."""
        for _ in range(most):
            delay = self.push._turn()
            if delay is None:
                return
            self.waits.append(delay)
            self.clock.now += delay
        raise AssertionError(f"no end after {most} turns: {self.notes}")


def titles(server: FakeModelHub) -> list[str]:
    return [commit.title for commit in server.repos[NAME].commits]


def tree_is_whole(server: FakeModelHub, folder: Path) -> int:
    """Write the head's tree down as a reader would see it; its step, after verification."""
    files = server.repos[NAME].head.files
    latest = json.loads(files["LATEST.json"])
    target = folder / f"step_{latest['step']:08d}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in (name for name in files if name not in ("LATEST.json", ".gitattributes")):
        (target / name).write_bytes(files[name])
    assert checkpoint.verify(target)["step"] == latest["step"]
    return latest["step"]


# ---- the everyday path


def test_from_an_offer_to_an_empty_machine(server: FakeModelHub, tmp_path: Path) -> None:
    root, notes = tmp_path / "run" / "checkpoints", []
    push = Pusher(NAME, run_id=RUN, every_sec=0, note=notes.append)
    assert push.metrics() == {"hub_pushed_step": None, "hub_lag_steps": 0, "hub_lag_sec": 0.0, "hub_error": None}
    assert push.flush(1)  # nothing was offered
    for step in (10, 20):
        path = save(root, step)
        push.offer(path)
        assert push.flush(60)
    assert push.metrics() == {"hub_pushed_step": 20, "hub_lag_steps": 0, "hub_lag_sec": 0.0, "hub_error": None}
    push.close()
    assert server.repos[NAME].private
    assert titles(server) == ["initial commit", f"step 10 of {RUN}", f"step 20 of {RUN}"]
    assert len(notes) == 1 and notes[0] == f"hub: step 10 is at {server.endpoint}/{NAME}"
    assert sorted(entry.name for entry in root.iterdir()) == ["step_00000010", "step_00000020"]

    latest = hub.newest(NAME)
    assert latest is not None and latest[:2] == (20, RUN) and latest.commit == server.repos[NAME].head.sha
    found = hub.pull(NAME, tmp_path / "empty" / "checkpoints", note=notes.append)
    assert found is not None and found.name == "step_00000020" and contents(found) == contents(path)
    assert [entry.name for entry in found.parent.iterdir()] == ["step_00000020"]


def test_training_never_waits_and_the_newest_wins(server: FakeModelHub, tmp_path: Path) -> None:
    root, held, reached = tmp_path / "checkpoints", threading.Event(), threading.Event()

    def hold(line: str) -> None:
        if "preupload" in line:
            reached.set()
            held.wait(30)

    push = Pusher(NAME, run_id=RUN, every_sec=0, note=lambda text: None)
    server.on_request = hold
    push.offer(save(root, 1))
    assert reached.wait(30)
    shutil.rmtree(root / "step_00000001")  # retention
    for step in (2, 3, 4):
        push.offer(save(root, step))
    assert push.metrics()["hub_lag_steps"] == 4 and push.metrics()["hub_lag_sec"] > 0
    assert not push.flush(0.05)
    held.set()
    assert push.flush(60)
    push.close()
    assert titles(server)[1:] == [f"step 1 of {RUN}", f"step 4 of {RUN}"]


def test_pushes_keep_their_distance(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=1800.0)
    for minute in range(0, 120, 5):
        driven.clock.now = 1000.0 + 60 * minute
        driven.push.offer(save(tmp_path, 1 + minute))
        driven.push._turn()
    assert server.asked(COMMIT) == 4
    assert driven.push.metrics()["hub_lag_steps"] == 25 and driven.push.metrics()["hub_lag_sec"] == 20 * 60
    driven.push._hurry = True  # what flush does
    driven.turns()
    assert driven.push.metrics()["hub_pushed_step"] == 116


def test_copies_where_a_disk_has_no_links(
    server: FakeModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    driven = Driven()
    (tmp_path / "step_00000001.hub-0123abcd").mkdir()  # of a process that was killed
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert tree_is_whole(server, tmp_path / "seen") == 1
    assert [entry.name for entry in tmp_path.glob("step_*")] == ["step_00000001"]


def test_only_what_is_whole_is_pushed(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    damaged = save(tmp_path, 1)
    (damaged / "model.safetensors").write_bytes(b"x" * (damaged / "model.safetensors").stat().st_size)
    driven.push.offer(damaged)
    driven.turns()
    assert "damaged" in driven.notes[0] and titles(server) == ["initial commit"]
    driven.push.offer(tmp_path / "step_00000002")  # deleted before its turn
    driven.turns()
    assert "step_00000002: gone before its turn; not pushed" in driven.notes[1]
    driven.push.offer(save(tmp_path, 3))
    driven.turns()
    assert tree_is_whole(server, tmp_path / "seen") == 3 and driven.push.metrics()["hub_error"] is None


def test_files_of_another_sharding_go_in_the_same_commit(server: FakeModelHub, tmp_path: Path) -> None:
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.txt": b"mine"}
    latest = {"schema": 1, "run": RUN, "writer": "before", "step": 1, "manifest_sha256": "0" * 64}
    server.make(NAME, {**old, "LATEST.json": json.dumps(latest).encode()})
    driven = Driven()
    driven.push.offer(save(tmp_path, 2))
    driven.turns()
    files = server.repos[NAME].head.files
    assert len(titles(server)) == 2 and "notes.txt" in files and "model.safetensors" in files
    assert not files.keys() & {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}


def test_a_step_reached_again_by_another_way(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=0.0)
    server.faults = [Fault(COMMIT, "503")]
    driven.push.offer(save(tmp_path, 5))
    assert driven.push._turn()  # fails, and keeps its links
    again = save(tmp_path, 5, salt=0.5)
    driven.push.offer(again)
    driven.turns()
    assert server.repos[NAME].head.files["model.safetensors"] == (again / "model.safetensors").read_bytes()
    assert len(titles(server)) == 2


# ---- F14: faults

PASSING = ("409", "412", "429 wait", "500", "502", "504", "reset", "lost", "lost 500", "half", "page")


@pytest.mark.parametrize("kind", PASSING)
def test_a_commit_comes_through_every_fault_once(kind: str, server: FakeModelHub, tmp_path: Path) -> None:
    comes_through(kind, server, tmp_path)


def test_a_commit_comes_through_silence(impatient: None, server: FakeModelHub, tmp_path: Path) -> None:
    comes_through("stall", server, tmp_path)


def comes_through(kind: str, server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    server.faults = [Fault(COMMIT, kind, 1 if kind.startswith(("lost", "half")) else 2)]
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert all(fault.times == 0 for fault in server.faults)
    assert titles(server) == ["initial commit", f"step 1 of {RUN}"]  # no duplicate, nothing partial
    assert tree_is_whole(server, tmp_path / "seen") == 1
    if kind.startswith(("lost", "half")):  # found at the head, at once
        assert driven.waits == [0.0] and server.asked(COMMIT) == 1
    else:
        assert len(driven.waits) == 3 and server.asked(COMMIT) == 3
        assert [7 <= wait <= 8 for wait in driven.waits[:2]] == [kind == "429 wait"] * 2
        assert sum("tried again" in note for note in driven.notes) == 1  # told once
    assert driven.push.metrics()["hub_error"] is None


STAGES = (r"GET /api/models/me/model$", r"/resolve/.*LATEST", "preupload", "objects/batch", "PUT /storage", "/tree/")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_push_is_tried_again(stage: str, server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    server.faults = [Fault(stage, kind, 12) for kind in ("503", "reset")]
    server.faults += [Fault(stage, "half")]
    if "PUT" in stage:
        server.faults += [Fault(stage, "403")]  # an address that has run out: no answer of the Hub itself
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert all(fault.times == 0 for fault in server.faults)
    assert titles(server) == ["initial commit", f"step 1 of {RUN}"] and max(driven.waits) <= LONGEST_WAIT_SEC
    assert tree_is_whole(server, tmp_path / "seen") == 1


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_what_no_waiting_mends_is_told_once(status: str, server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    server.faults = [Fault(COMMIT, status, 3)]
    driven.push.offer(save(tmp_path, 1))
    assert driven.push._turn() == REFUSED_WAIT_SEC
    driven.clock.now += 60
    driven.push.offer(save(tmp_path, 2))
    assert driven.push._turn() == REFUSED_WAIT_SEC - 60 and server.asked(COMMIT) == 1
    assert driven.push.metrics()["hub_error"].startswith(f"hub.repo_id = {NAME!r}: the Hub ")
    driven.turns()  # mended in the end
    assert titles(server)[1:] == [f"step 2 of {RUN}"] and driven.push.metrics()["hub_error"] is None
    assert len(driven.notes) == 2 and "tried again" in driven.notes[0] and "step 2 is at" in driven.notes[1]


def test_flush_gives_up_where_waiting_is_no_use(server: FakeModelHub, tmp_path: Path) -> None:
    push = Pusher(NAME, run_id=RUN, every_sec=0, note=lambda text: None)
    server.faults = [Fault(COMMIT, "403", 100)]
    push.offer(save(tmp_path, 1))
    assert not push.flush(60)
    assert not push.flush(60)
    push.close()
    assert 1 <= server.asked(COMMIT) <= 3 and not list(tmp_path.glob("*.hub-*"))


def test_a_day_without_the_hub(server: FakeModelHub, tmp_path: Path) -> None:
    """One line at its beginning, one at its end, one commit that catches up; no more tries than one in minutes."""
    driven = Driven(every_sec=1800.0)
    server.faults = [Fault(".", "503", 10**9)]
    before = len(server.log)
    steps = range(1, 24 * 12 + 1)
    paths = [save(tmp_path, step) for step in (1, 2, steps[-1])]
    for step in steps:
        driven.push.offer(paths[min(step, 3) - 1])
        until = driven.clock.now + 300.0
        while driven.clock.now < until:
            delay = driven.push._turn()
            assert delay is not None and 0 < delay <= LONGEST_WAIT_SEC
            driven.clock.now = min(until, driven.clock.now + delay)
    assert len(server.log) - before < 2 * 24 * 60
    assert driven.push.metrics()["hub_lag_sec"] == 24 * 3600 and len(driven.notes) == 1
    server.faults.clear()
    driven.turns()
    assert titles(server)[1:] == [f"step {steps[-1]} of {RUN}"]
    assert len(driven.notes) == 2 and driven.push.metrics()["hub_lag_steps"] == 0


@pytest.mark.parametrize("kind", ["reset", "503", "stall"])
def test_a_hub_that_is_away_at_the_start_is_asked_again(
    kind: str, impatient: None, server: FakeModelHub, tmp_path: Path
) -> None:
    server.faults = [Fault(".", kind, 3)]
    driven = Driven()
    assert "could not be reached" in driven.notes[0] or "tried again" in driven.notes[0]
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert titles(server) == ["initial commit", f"step 1 of {RUN}"]


def test_no_network_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with fake_model_hub.served(monkeypatch, tmp_path):
        pass  # its port is closed now
    driven = Driven()
    driven.push.offer(save(tmp_path, 1))
    assert 0 < (driven.push._turn() or 0) <= LONGEST_WAIT_SEC
    assert len(driven.notes) == 1 and "refused" in driven.notes[0]


# ---- F15: whoever reads, whenever


def test_at_every_instant_of_a_push_the_head_is_whole(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=0.0, keep=1)
    seen: list[int] = []

    def look(line: str) -> None:
        with server.lock:
            if "LATEST.json" in server.repos[NAME].head.files:
                seen.append(tree_is_whole(server, tmp_path / "seen"))

    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    server.on_request = look
    for step in range(2, 6):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    assert sorted(seen) == seen and set(seen) == {1, 2, 3, 4, 5} and len(seen) > 40


def deaths(server: FakeModelHub, tmp_path: Path, which: Callable[[int], bool]) -> int:
    """Cut a pusher off at each request of a push, with and without that request's effect; the next one goes on."""
    first = Driven(every_sec=0.0)
    first.push.offer(save(tmp_path, 1))
    before = len(server.log)
    first.turns()
    requests, died = len(server.log) - before, 0
    for number in range(requests):
        for kind in ("reset", "lost"):
            if not which(2 * number + (kind == "lost")):
                continue
            step, count = 2 + died * 2, [0]

            def cut(line: str, number: int = number, kind: str = kind, count: list[int] = count) -> None:
                if count[0] == number:
                    server.faults = [Fault(".", kind), Fault(".", "reset", 10**6)]
                count[0] += 1

            dying = Driven(every_sec=0.0)
            dying.push.offer(save(tmp_path, step))
            server.on_request = cut
            dying.push._turn()
            server.on_request, server.faults = lambda line: None, []
            assert tree_is_whole(server, tmp_path / "seen") in (step - 2, step - 1, step)
            died += 1
            after = Driven(every_sec=0.0)
            after.push.offer(save(tmp_path, step + 1))
            after.turns()
            assert tree_is_whole(server, tmp_path / "seen") == step + 1
    return died


def test_a_pusher_that_dies_leaves_the_head_whole(server: FakeModelHub, tmp_path: Path) -> None:
    assert deaths(server, tmp_path, lambda number: number % 4 == 1) >= 5


@pytest.mark.slow
def test_a_pusher_that_dies_anywhere_leaves_the_head_whole(server: FakeModelHub, tmp_path: Path) -> None:
    assert deaths(server, tmp_path, lambda number: True) >= 20


@pytest.mark.slow
def test_two_hundred_readers_of_pushes_under_way(server: FakeModelHub, tmp_path: Path) -> None:
    push = Pusher(NAME, run_id=RUN, every_sec=0, note=lambda text: None, keep=1)
    push.offer(save(tmp_path, 1))
    assert push.flush(60)
    over, known = threading.Event(), {1: contents(tmp_path / "step_00000001")}

    def train() -> None:
        step = 2
        while not over.is_set():
            path = save(tmp_path, step)
            known[step] = contents(path)
            push.offer(path)
            step += 1

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        steps = set()
        for number in range(200):
            found = hub.pull(NAME, tmp_path / f"reader{number}", note=lambda text: None)
            assert found is not None and contents(found) == known[int(found.name[5:])]
            steps.add(found.name)
    finally:
        over.set()
        trainer.join()
        push.close()
    assert len(steps) > 20


# ---- F16: others


def test_of_two_pushers_one_stops_and_names_the_other(server: FakeModelHub, tmp_path: Path) -> None:
    first, second = Driven(every_sec=0.0), Driven(every_sec=0.0)
    first.push.offer(save(tmp_path / "a", 1))
    first.turns()
    second.push.offer(save(tmp_path / "b", 2))
    second.turns()
    assert "nothing more is pushed" in second.notes[-1] and first.push.writer in second.notes[-1]
    assert not second.push.flush(60) and first.push.writer in second.push.metrics()["hub_error"]
    second.push.offer(save(tmp_path / "b", 3))
    second.turns()
    assert len(second.notes) == 1 and titles(server)[1:] == [f"step 1 of {RUN}"]
    assert not list((tmp_path / "b").glob("*.hub-*"))
    first.push.offer(save(tmp_path / "a", 4))
    first.turns()
    assert titles(server)[1:] == [f"step 1 of {RUN}", f"step 4 of {RUN}"]


def test_one_that_pushes_between_our_look_and_our_commit(server: FakeModelHub, tmp_path: Path) -> None:
    first, second = Driven(), Driven()
    second.push.offer(save(tmp_path / "b", 2))

    def between(line: str) -> None:
        if "POST" in line and "/commit/" in line:
            server.on_request = lambda line: None
            second.turns()

    server.on_request = between
    first.push.offer(save(tmp_path / "a", 1))
    first.turns()
    assert titles(server)[1:] == [f"step 2 of {RUN}"] and second.push.writer in first.notes[-1]


def test_a_run_started_again_goes_on_in_its_repository(server: FakeModelHub, tmp_path: Path) -> None:
    for step in (1, 2):
        driven = Driven(every_sec=0.0)
        assert driven.push.metrics()["hub_pushed_step"] == (step - 1 or None)
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    again = Driven()
    again.push.offer(tmp_path / "step_00000002")  # it is there already
    again.turns()
    assert titles(server)[1:] == [f"step 1 of {RUN}", f"step 2 of {RUN}"]
    assert again.push.metrics()["hub_lag_steps"] == 0


def test_another_runs_repository_is_left_alone(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    with pytest.raises(UserError, match=f"holds another run, '{RUN}' at step 1; give another hub.repo_id"):
        Driven(run_id="run-2")
    taken = Driven(run_id="run-2", force=True)
    taken.push.offer(save(tmp_path, 7))
    taken.turns()
    assert titles(server)[1:] == [f"step 1 of {RUN}", "step 7 of run-2"]
    driven.push.offer(save(tmp_path, 2))
    driven.clock.now += 300
    driven.turns()
    assert "holds another run, 'run-2' at step 7" in driven.notes[-1]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model.safetensors": b"x"}, "holds other files, such as 'model.safetensors'"),
        ({"LATEST.json": b'{"schema": 99}'}, "is none of this program"),
        ({"LATEST.json": b"[" * 100_000}, "is none of this program"),
        ({"README.md": b"# mine", "LICENSE": b"MIT"}, ""),
    ],
)
def test_a_repository_of_something_else(files: dict[str, bytes], said: str, server: FakeModelHub) -> None:
    server.make(NAME, files)
    if said:
        with pytest.raises(UserError, match=said) as caught:
            Driven()
        assert "\n" not in str(caught.value)
    else:
        assert Driven().notes == []


def test_private_unless_asked(server: FakeModelHub, tmp_path: Path) -> None:
    server.make(NAME, private=False)
    with pytest.raises(UserError, match="is public; hub.public=true pushes there all the same"):
        Driven()
    assert Driven(public=True).notes == []
    server.repos[NAME].private = True
    driven = Driven()
    server.repos[NAME].private = False  # made public meanwhile
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert "is public" in driven.notes[0] and titles(server) == ["initial commit"]
    del server.repos[NAME]
    assert Driven(public=True).notes == [] and not server.repos[NAME].private


# ---- mistakes at the start


@pytest.mark.parametrize(
    "name", ["model", "me/", "/model", "me/model/x", "../model", "me/..", "me/a b", "me/x.git", "me/a--b", "é/x", "me/\n"]
)
def test_a_name_that_is_none(name: str, server: FakeModelHub) -> None:
    with pytest.raises(UserError, match=r"^hub\.repo_id = .* is no name of a repository on the Hub; give owner/name$"):
        Pusher(name, run_id=RUN, every_sec=300, note=print)
    assert server.log == []


def test_tokens_and_rights(server: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "may_create", False)
    with pytest.raises(UserError, match="the Hub refuses: the token may not do this"):
        Driven()
    wrong = "hf_" + "Wrong" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(UserError, match="the Hub does not accept the token; set HF_TOKEN") as caught:
        Driven()
    assert wrong not in str(caught.value) and not isinstance(caught.value, remote.Unreachable)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match="needs a token with write access: set HF_TOKEN"):
        Driven()


def test_the_token_is_in_no_message(
    server: FakeModelHub, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    driven = Driven(every_sec=0.0, card=lambda path: {"README.md": f"{TOKEN} {1 / 0}".encode()})
    secret = f"Bearer {TOKEN} at https://me:{TOKEN}@host/{TOKEN}"
    told = [secret, f"x {TOKEN[:20]}...", f"'{TOKEN}'"]
    for step, text in enumerate(told, 1):
        driven.push._fail(ConnectionError(text))
        driven.push._failing = ""
        driven.push.offer(save(tmp_path, step))
        server.faults = [Fault(COMMIT, "403"), Fault(COMMIT, "reset")]
        driven.turns()
    seen = " ".join([*driven.notes, *capfd.readouterr(), caplog.text, json.dumps(driven.push.metrics())])
    assert len(driven.notes) > 5 and "[hidden]" in seen
    assert TOKEN not in seen and TOKEN[:12] not in seen and safe_text(seen) == seen
    for commit in server.repos[NAME].commits:
        assert not any(TOKEN.encode() in content for content in commit.files.values())
    assert not any(TOKEN in path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())


# ---- the history and the card


@pytest.mark.parametrize("keep", [1, 3])
def test_the_history_is_squashed_once_it_holds_more_than_it_should(
    keep: int, server: FakeModelHub, tmp_path: Path
) -> None:
    driven = Driven(every_sec=0.0, keep=keep)
    most = 0
    for step in range(1, 8):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
        most = max(most, len({title for title in titles(server) if " of " in title}))
        assert tree_is_whole(server, tmp_path / "seen") == step
    assert most == keep and server.asked("super-squash") > 0
    assert driven.push.metrics()["hub_error"] is None


def test_a_history_of_others_stays(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=0.0, keep=1)
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    server.repos[NAME].commit("Update README.md", {**server.repos[NAME].head.files, "README.md": b"# mine"})
    for step in (2, 3):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    assert server.asked("super-squash") == 0 and len(titles(server)) == 5
    assert sum("somebody else ('Update README.md')" in note for note in driven.notes) == 1
    assert server.repos[NAME].head.files["README.md"] == b"# mine"


def test_a_squash_that_fails_is_no_failure_of_the_push(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=0.0, keep=1)
    server.faults = [Fault("super-squash", "500")]
    for step in (1, 2):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    assert driven.push.metrics()["hub_pushed_step"] == 2
    assert "could not be squashed" in driven.push.metrics()["hub_error"] and len(titles(server)) == 3
    driven.push.offer(save(tmp_path, 3))
    driven.turns()
    assert len(titles(server)) == 1 and driven.push.metrics()["hub_error"] is None


def test_the_card_comes_with_the_checkpoint(server: FakeModelHub, tmp_path: Path) -> None:
    text = f"---\ntags: [x]\n---\n{card.MARK}\n# card"
    driven = Driven(
        every_sec=0.0,
        card=lambda path: {"README.md": f"{text} {path.name[:13]}".encode(), "config.json": b"never"},
    )
    for step in (1, 2):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    files = server.repos[NAME].head.files
    assert files["README.md"].endswith(b"# card step_00000002") and files["config.json"] != b"never"
    mine = {**files, "README.md": b"# now I write it"}
    server.repos[NAME].commit("Update README.md", mine)
    driven.push.offer(save(tmp_path, 3))
    driven.turns()
    assert server.repos[NAME].head.files["README.md"] == b"# now I write it"
    assert tree_is_whole(server, tmp_path / "seen") == 3


@pytest.mark.parametrize("content", [b"!bad", None])
def test_a_bad_card_does_not_cost_a_checkpoint(content: bytes | None, server: FakeModelHub, tmp_path: Path) -> None:
    def write(path: Path) -> dict[str, bytes]:
        if content is None:
            raise KeyError("model")
        return {"README.md": content}

    driven = Driven(every_sec=0.0, card=write)
    for step in (1, 2):
        driven.push.offer(save(tmp_path, step))
        driven.turns()
    assert titles(server)[1:] == [f"step 1 of {RUN}", f"step 2 of {RUN}"]
    assert sum("no model card" in note for note in driven.notes) == 1
