"""pusher.py against a Hub that fails, an outage, a death at each request, and readers at every instant."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_model_hub
import pytest
from fake_model_hub import NAME, RUN, Driven, FakeModelHub, Fault, contents, save, titles, tree_is_whole

import hub
from pusher import LONGEST_WAIT_SEC, REFUSED_WAIT_SEC, Pusher

# huggingface_hub hands httpx the file it uploads in a way that httpx calls out of date.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COMMIT = r"POST .*/commit/main"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with fake_model_hub.impatient(monkeypatch):
        yield


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
    assert any("may write, not only open pull requests" in note for note in driven.notes) == (kind == "412")
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


def test_an_outage_that_ends_with_a_refusal_is_told_twice(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven()
    server.faults = [Fault(COMMIT, "503", 3), Fault(COMMIT, "403", 2)]
    driven.push.offer(save(tmp_path, 1))
    driven.turns()
    assert ["(503" in note or "503 " in note for note in driven.notes] == [True, False, False]
    assert "may not do this" in driven.notes[1] and "step 1 is at" in driven.notes[2]


def test_flush_gives_up_where_waiting_is_no_use(server: FakeModelHub, tmp_path: Path) -> None:
    push = Pusher(NAME, run_id=RUN, every_sec=0, note=lambda text: None)
    server.faults = [Fault(COMMIT, "403", 100)]
    push.offer(save(tmp_path, 1))
    assert not push.flush(60)
    assert not push.flush(60)
    push.close()
    assert 1 <= server.asked(COMMIT) <= 3 and not list(tmp_path.glob("*.hub-*"))


@pytest.mark.parametrize("hours", [2, pytest.param(24, marks=pytest.mark.slow)])
def test_hours_without_the_hub(hours: int, server: FakeModelHub, tmp_path: Path) -> None:
    """One line at their beginning, one at their end, one commit that catches up; no more tries than one in minutes."""
    driven = Driven(every_sec=1800.0)
    server.faults = [Fault(".", "503", 10**9)]
    before = len(server.log)
    steps = range(1, hours * 12 + 1)
    paths = [save(tmp_path, step) for step in (1, 2, steps[-1])]
    for step in steps:
        driven.push.offer(paths[min(step, 3) - 1])
        until = driven.clock.now + 300.0
        while driven.clock.now < until:
            delay = driven.push._turn()
            assert delay is not None and 0 < delay <= LONGEST_WAIT_SEC
            driven.clock.now = min(until, driven.clock.now + delay)
    assert len(server.log) - before < 60 * hours
    assert driven.push.metrics()["hub_lag_sec"] == 3600 * hours and len(driven.notes) == 1
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


def test_at_every_instant_of_a_push_the_head_is_whole(
    server: FakeModelHub, tmp_path: Path, row: Callable[[str], Any]
) -> None:
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
    with row("F15") as case:
        for before, step in zip([1, *seen], seen, strict=False):
            case.expect(step >= before, f"step {step} after {before}")
        case.figures["reads between requests"] = len(seen)
    assert set(seen) == {1, 2, 3, 4, 5} and len(seen) > 40


def deaths(server: FakeModelHub, tmp_path: Path, which: Callable[[int], bool], case: Any, *, keep: int = 100) -> None:
    """Cut a pusher off at each request of a push: before it had any effect, after it, within the answer; the
    next one goes on."""
    first = Driven(every_sec=0.0, keep=keep)
    for step in (1, 2):
        first.push.offer(save(tmp_path, step))
        before = len(server.log)
        first.turns()
    requests, last = len(server.log) - before, 2
    for number, (at, kind) in enumerate(itertools.product(range(requests), ("reset", "lost", "lost 500", "half"))):
        if not which(number):
            continue
        step, count = last + 2, [0]

        def cut(line: str, at: int = at, kind: str = kind, count: list[int] = count) -> None:
            if count[0] == at:
                server.faults = [Fault(".", kind), Fault(".", "reset", 10**6)]
            count[0] += 1

        dying = Driven(every_sec=0.0, keep=keep)
        dying.push.offer(save(tmp_path, step))
        server.on_request = cut
        dying.push._turn()
        server.on_request, server.faults = lambda line: None, []
        case.expect(tree_is_whole(server, tmp_path / "seen") in (last, step), f"request {at}, {kind}")
        after = Driven(every_sec=0.0, keep=keep)
        after.push.offer(save(tmp_path, last := step + 1))
        after.turns()
        case.expect(tree_is_whole(server, tmp_path / "seen") == last, f"after request {at}, {kind}")
        case.figures["deaths of a pusher"] = case.figures.get("deaths of a pusher", 0) + 1


def test_a_pusher_that_dies_leaves_the_head_whole(
    server: FakeModelHub, tmp_path: Path, row: Callable[[str], Any]
) -> None:
    with row("F15") as case:
        deaths(server, tmp_path, lambda number: number % 7 == 1, case)
        assert case.figures["deaths of a pusher"] >= 5


@pytest.mark.slow
def test_a_pusher_that_dies_anywhere_leaves_the_head_whole(
    server: FakeModelHub, tmp_path: Path, row: Callable[[str], Any]
) -> None:
    """While states gather, and where each push squashes the history."""
    with row("F15") as case:
        for keep in (100, 1):
            server.repos.clear()
            deaths(server, tmp_path / str(keep), lambda number: True, case, keep=keep)
        assert case.figures["deaths of a pusher"] >= 100


@pytest.mark.slow
def test_two_hundred_readers_of_pushes_under_way(
    server: FakeModelHub, tmp_path: Path, row: Callable[[str], Any]
) -> None:
    push = Pusher(NAME, run_id=RUN, every_sec=0.05, note=lambda text: None, keep=20)
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
        with row("F15") as case:
            for number in range(200):
                found = hub.pull(NAME, tmp_path / f"reader{number}", note=lambda text: None)
                case.expect(found is not None and contents(found) == known[int(found.name[5:])], f"reader {number}")
                steps.add(found and found.name)
            case.figures["reads during a push"] = case.tried
    finally:
        over.set()
        trainer.join()
        push.close()
    assert len(steps) > 20
