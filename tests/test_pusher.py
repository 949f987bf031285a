"""pusher.py, with the real huggingface_hub, against a Hub on this machine: pushes, others who push, the card."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
from fake_model_hub import NAME, RUN, TOKEN, Driven, FakeModelHub, Fault, contents, save, titles, tree_is_whole

import card
import hub
import remote
from config import UserError
from pusher import Pusher
from text import safe_text

# huggingface_hub hands httpx the file it uploads in a way that httpx calls out of date.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
COMMIT = r"POST .*/commit/main"


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
    ahead = [0.0]

    def hold(line: str) -> None:
        if "preupload" in line:
            reached.set()
            held.wait(30)

    push = Pusher(NAME, run_id=RUN, every_sec=0, note=lambda text: None, clock=lambda: time.monotonic() + ahead[0])
    server.on_request = hold
    push.offer(save(root, 1))
    assert reached.wait(30)
    shutil.rmtree(root / "step_00000001")  # retention
    for step in (2, 3, 4):
        push.offer(save(root, step))
    ahead[0] = 10.0  # of itself the lag may be less than the tenth of a second that is told
    assert push.metrics()["hub_lag_steps"] == 4 and push.metrics()["hub_lag_sec"] >= 10
    assert not push.flush(0.05)
    assert not push.flush(3600, stopped=lambda: True)
    held.set()
    assert push.flush(60)
    push.close()
    assert titles(server)[1:] == [f"step 1 of {RUN}", f"step 4 of {RUN}"]


def test_pushes_keep_their_distance(server: FakeModelHub, tmp_path: Path) -> None:
    driven = Driven(every_sec=1800.0)
    for minute in range(0, 70, 10):
        driven.clock.now = 1000.0 + 60 * minute
        driven.push.offer(save(tmp_path, 1 + minute, keep=2))
        driven.push._turn()
    assert titles(server) == [f"history squashed at step 61 of {RUN}"] and server.asked(COMMIT) == 3
    driven.clock.now += 600
    driven.push.offer(save(tmp_path, 71, keep=2))
    assert driven.push._turn() == 1200 and driven.push.metrics()["hub_lag_steps"] == 10
    driven.clock.now += 60
    assert driven.push.metrics()["hub_lag_sec"] == 60
    driven.push._hurry = True  # what flush does
    driven.turns()
    assert driven.push.metrics()["hub_pushed_step"] == 71


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
    for gone in (tmp_path / "step_00000002", tmp_path / "nowhere" / "step_00000002"):  # deleted before its turn
        driven.push.offer(gone)
        driven.turns()
        assert "step_00000002: gone before its turn; not pushed" in driven.notes.pop()
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


def test_records_that_were_made_up_for_are_pushed_again(server: FakeModelHub, tmp_path: Path) -> None:
    """The evaluation of the last step, cut short before; once."""
    path = save(tmp_path, 1)
    for record in (b'{"step": 1, "cut_short": true}\n', b'{"step": 1, "val_loss": 2.0}\n'):
        for _ in range(2):
            driven = Driven(card=lambda _, record=record: {"metrics.jsonl": record})
            driven.push.offer(path)
            driven.turns()
        assert server.repos[NAME].head.files["metrics.jsonl"] == record
    assert titles(server)[1:] == [f"step 1 of {RUN}"] * 2


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
        ({"LATEST.json": b"[" * 4000}, "is none of this program"),
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
    with pytest.raises(UserError, match=r"is public; hub\.public=true pushes there all the same"):
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
    "name",
    ["model", "me/", "/model", "me/model/x", "../model", "me/..", "me/a b", "me/x.git", "me/a--b", "é/x", "me/\n"],
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
        driven.push._tries = 0
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
        card=lambda path: {
            "README.md": f"{text} {path.name[:13]}".encode(),
            "config.json": b"never",
            "samples.md": path.name[:13].encode(),
        },
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
    assert server.repos[NAME].head.files["samples.md"] == b"step_00000003"
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
