"""hub.py, with the real huggingface_hub, against a Hub on this machine: damage, hostile names, squashed histories."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_model_hub
import huggingface_hub
import pytest
from fake_model_hub import NAME, RUN, TOKEN, FakeModelHub, Fault, Repo, contents, save
from pydantic import ValidationError

import checkpoint
import config
import foreign
import hub
import remote
from checkpoint import CheckpointError
from config import HubConfig, UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeModelHub]:
    monkeypatch.setattr(remote, "sleep", lambda seconds: None)
    with fake_model_hub.served(monkeypatch, tmp_path) as server:
        yield server


def put(repo: Repo, folder: Path, *, run: str = RUN, writer: str = "w", **changed: bytes | None) -> dict[str, bytes]:
    """Commit a checkpoint's folder as a pusher would, with some files `changed` (model_safetensors=...) or left out."""
    files = contents(folder)
    step = int(folder.name[5:])
    digest = hashlib.sha256(files["manifest.json"]).hexdigest()
    latest = {"schema": 1, "run": run, "writer": writer, "step": step, "manifest_sha256": digest}
    files["LATEST.json"] = json.dumps(latest).encode()
    for name, content in changed.items():
        name = name.replace("_", ".") if name.replace("_", ".") in files else name
        if content is None:
            del files[name]
        else:
            files[name] = content
    repo.commit(f"step {step} of {run}", files)
    return files


def pull(tmp_path: Path, **options: Any) -> tuple[Path | None, list[str]]:
    notes: list[str] = []
    return hub.pull(NAME, tmp_path / "pulled", note=notes.append, **options), notes


def nothing_there(tmp_path: Path) -> bool:
    return checkpoint.latest(tmp_path / "pulled") is None and not list((tmp_path / "pulled").glob("step_????????"))


# ---- the everyday path


def test_the_newest_checkpoint_as_it_was(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    paths = [save(tmp_path / "run", step) for step in (1, 2)]
    for path in paths:
        put(repo, path)
    latest = hub.newest(NAME)
    digest = hashlib.sha256((paths[1] / "manifest.json").read_bytes()).hexdigest()
    assert latest == (2, RUN, digest, repo.head.sha, "w")
    found, notes = pull(tmp_path)
    assert found == tmp_path / "pulled" / "step_00000002" and contents(found) == contents(paths[1])
    assert notes == [f"hub: step 2 from {NAME} at commit {repo.head.sha[:8]}, 0.00 GiB"]
    assert [path.name for path in found.parent.iterdir()] == ["step_00000002"]
    before = len(server.log)
    assert pull(tmp_path) == (found, [])  # it is there
    assert len(server.log) == before + 2
    first, _ = pull(tmp_path, revision=repo.commits[1].sha)
    assert first is not None and contents(first) == contents(paths[0])
    assert hub.newest(NAME, repo.commits[1].sha)[0] == 1  # type: ignore[index]


def test_where_there_is_none(server: FakeModelHub, tmp_path: Path) -> None:
    assert hub.newest(NAME) is None and pull(tmp_path) == (None, [])
    server.make(NAME, {"model.safetensors": b"of somebody else"})
    assert hub.newest(NAME) is None and pull(tmp_path) == (None, [])
    with pytest.raises(UserError, match="the Hub has no revision 'v9'"):
        pull(tmp_path, revision="v9")
    assert nothing_there(tmp_path)


def test_what_the_hub_refuses(server: FakeModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.faults = [Fault(".", "403")]
    with pytest.raises(UserError, match="the Hub refuses") as caught:
        hub.newest(NAME)
    assert not isinstance(caught.value, remote.Unreachable)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Other" * 6)
    with pytest.raises(UserError, match="does not accept the token") as caught:
        pull(tmp_path)
    assert "Other" not in str(caught.value)
    with pytest.raises(UserError, match="is no name of a repository"):
        hub.newest("../me/model")
    for kind in ("503", "reset", "page"):
        server.faults = [Fault(".", kind)]
        with pytest.raises(remote.Unreachable, match="could not be reached"):
            hub.newest(NAME)


@pytest.mark.slow
def test_from_a_terminal(server: FakeModelHub, tmp_path: Path) -> None:
    """As a user has it: everything from the environment, huggingface_hub as it comes."""
    repo = server.make(NAME)
    path = save(tmp_path / "run", 3)
    put(repo, path)
    code = f"""
import hub, sys
from pathlib import Path
print(hub.newest({NAME!r})[:2])
print(hub.pull({NAME!r}, Path(sys.argv[1]), note=print))
"""
    env = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    env |= {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", code, str(tmp_path / "pulled")]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0] == f"(3, {RUN!r})" and TOKEN not in result.stdout + result.stderr
    assert contents(tmp_path / "pulled" / "step_00000003") == contents(path)


# ---- damage

Change = Callable[[dict[str, bytes]], dict[str, bytes | None]]
DAMAGE: dict[str, Change] = {
    "a flipped bit": lambda files: {"model.safetensors": flipped(files["model.safetensors"])},
    "a flipped bit in a small file": lambda files: {"config.json": flipped(files["config.json"])},
    "a file cut short": lambda files: {"optimizer.safetensors": files["optimizer.safetensors"][:-1]},
    "a file gone": lambda files: {"optimizer.safetensors": None},
    "no manifest": lambda files: {"manifest.json": None},
    "another manifest": lambda files: {"manifest.json": files["manifest.json"] + b" "},
    "a manifest that is none": lambda files: another_manifest(files, b"[" * 50_000),
    "a manifest of nothing": lambda files: another_manifest(files, b'{"files": [], "schema": 2, "step": 2}'),
    "another step": lambda files: {"LATEST.json": files["LATEST.json"].replace(b'"step": 2', b'"step": 7')},
    "a LATEST.json that is none": lambda files: {"LATEST.json": b'{"step": 2}'},
}


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def another_manifest(files: dict[str, bytes], content: bytes) -> dict[str, bytes | None]:
    latest = {**json.loads(files["LATEST.json"]), "manifest_sha256": hashlib.sha256(content).hexdigest()}
    return {"manifest.json": content, "LATEST.json": json.dumps(latest).encode()}


def damage(repo: Repo, change: Change) -> None:
    files: dict[str, bytes | None] = {**repo.head.files}
    files |= change(dict(repo.head.files))
    repo.head.files = {name: content for name, content in files.items() if content is not None}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(kind: str, server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    good = save(tmp_path / "run", 1)
    put(repo, good)
    put(repo, save(tmp_path / "run", 2))
    damage(repo, DAMAGE[kind])
    found, notes = pull(tmp_path)
    assert found is not None and found.name == "step_00000001" and contents(found) == contents(good)
    assert sum("looking at the commit before" in note for note in notes) == 1
    assert [path.name for path in found.parent.iterdir()] == ["step_00000001"]


def test_a_checkpoint_that_is_whole_but_not_the_one_that_was_pushed(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    good = save(tmp_path / "run", 1)
    put(repo, good)
    put(repo, save(tmp_path / "run", 2))
    other = contents(save(tmp_path / "other", 2, salt=0.5))
    damage(repo, lambda _: {**other})
    found, _ = pull(tmp_path)
    assert found is not None and contents(found) == contents(good)


def test_none_that_is_whole(server: FakeModelHub, tmp_path: Path) -> None:
    """Never a quiet start from nothing where there is something."""
    repo = server.make(NAME)
    put(repo, save(tmp_path / "run", 1))
    damage(repo, DAMAGE["a flipped bit"])
    with pytest.raises(CheckpointError, match="no intact checkpoint in its history"):
        pull(tmp_path)
    assert nothing_there(tmp_path)


def test_sizes_and_digests_are_compared_before_anything_is_downloaded(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    put(repo, save(tmp_path / "run", 1))
    damage(repo, DAMAGE["a flipped bit"])
    with pytest.raises(CheckpointError):
        pull(tmp_path)
    assert server.asked("HEAD") == 0 and not (tmp_path / "pulled").exists()


def test_another_runs_history_is_no_way_back(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    put(repo, save(tmp_path / "run", 1), run="another")
    put(repo, save(tmp_path / "run", 2))
    damage(repo, DAMAGE["a flipped bit"])
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        pull(tmp_path)


def test_what_lies_there_already(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    path = save(tmp_path / "run", 1)
    put(repo, path)
    other = save(tmp_path / "pulled", 1, salt=0.5)
    before = contents(other)
    found, _ = pull(tmp_path)
    assert found == other and contents(other) == contents(path)
    (aside,) = other.parent.glob("step_00000001.old-*")
    assert contents(aside) == before
    (other / "model.safetensors").write_bytes(b"damaged on this disk")
    found, _ = pull(tmp_path)
    assert found == other and contents(other) == contents(path)


# ---- a pull that is cut off


def test_a_pull_that_dies_looks_like_nothing_and_goes_on(
    server: FakeModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = server.make(NAME)
    path = save(tmp_path / "run", 1)
    put(repo, path)
    monkeypatch.setattr(hub, "PULL_RETRY_SEC", 0.0)
    server.faults = [Fault("/storage/.*", "reset", 0), Fault("HEAD .*/optimizer.safetensors", "reset", 100)]
    with pytest.raises(remote.Unreachable):
        pull(tmp_path)
    assert nothing_there(tmp_path)
    (left,) = (tmp_path / "pulled").iterdir()
    assert checkpoint.LEFTOVER.fullmatch(left.name) and (left / "model.safetensors").exists()
    with pytest.raises(UserError):
        checkpoint.find(tmp_path / "pulled")
    server.faults.clear()
    before = len(server.log)
    found, _ = pull(tmp_path)
    assert found is not None and contents(found) == contents(path)
    digest = hashlib.sha256(contents(path)["model.safetensors"]).hexdigest()
    assert not [line for line in server.log[before:] if digest in line]  # not fetched again


@pytest.mark.parametrize(
    "stage", [r"/commits/|LATEST", "manifest.json", "paths-info", "HEAD", "/storage/", "config.json"]
)
def test_a_network_that_fails_now_and_then(stage: str, server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    path = save(tmp_path / "run", 1)
    put(repo, path)
    server.faults = [Fault(stage, kind, 2) for kind in ("503", "reset", "429 wait", "half")]
    found, _ = pull(tmp_path)
    assert found is not None and contents(found) == contents(path)
    assert all(fault.times == 0 for fault in server.faults if fault.kind != "half")


@pytest.mark.parametrize("stage", ["LATEST", "manifest.json", "paths-info", "config.json"])
def test_a_history_squashed_while_it_is_read(stage: str, server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    put(repo, save(tmp_path / "run", 1))
    newer = save(tmp_path / "run", 2)

    def squash(line: str) -> None:
        if stage in line:
            server.on_request = lambda line: None
            put(repo, newer)
            del repo.commits[:-1]

    server.on_request = squash
    found, notes = pull(tmp_path)
    assert found is not None and contents(found) == contents(newer)
    assert any("squashed while it was read" in note for note in notes)


def test_no_room(server: FakeModelHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(server.make(NAME), save(tmp_path / "run", 1))
    usage = hub.shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="too little room for step 1"):
        pull(tmp_path)
    assert server.asked("HEAD") == 0 and nothing_there(tmp_path)


# ---- hostile repositories

HOSTILE = (
    "../escaped", "a/../../escaped", "/tmp-escaped", "..", ".", "", "a/b", "a\\..\\escaped", "C:\\escaped", ".hidden",
    "nul.json", "a\x00b", "caf\u0065\u0301", "a\nb", "x" * 300, "LPT1", "name.", "~root", "%2e%2e%2fescaped", "-rf",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leads_out_of_the_folder(name: str, server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    path = save(tmp_path / "run", 1)
    files = put(repo, path)
    manifest = json.loads(files["manifest.json"])
    manifest["files"][name] = {"bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    change = another_manifest(files, json.dumps(manifest).encode())
    damage(repo, lambda files: {**change, name: b"evil"})
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError):
        pull(tmp_path)
    assert set(tmp_path.rglob("*")) == before and server.asked("HEAD") == 0


def test_lists_without_end_are_refused_at_once(server: FakeModelHub, tmp_path: Path) -> None:
    started = time.monotonic()
    repo = server.make(NAME)
    files = put(repo, save(tmp_path / "run", 1))
    entry = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    many = json.dumps({"schema": 1, "step": 1, "files": {f"f{i}": entry for i in range(hub.MOST_FILES + 1)}})
    damage(repo, lambda _: another_manifest(files, many.encode()))
    with pytest.raises(CheckpointError, match="no intact"):
        pull(tmp_path)
    bomb = b'{"files": [' + b"[]," * 5_000_000 + b"[]]}"
    damage(repo, lambda _: another_manifest(files, bomb))
    with pytest.raises(CheckpointError, match="no intact"):
        pull(tmp_path)
    huge = b"{" + b" " * foreign.MAX_JSON_BYTES + b"}"
    damage(repo, lambda _: another_manifest(files, huge))
    with pytest.raises(CheckpointError, match="no intact"):
        pull(tmp_path)
    damage(repo, lambda _: {"LATEST.json": huge})
    with pytest.raises(CheckpointError, match="larger than"):
        hub.newest(NAME)
    entry = {"bytes": 2**62, "sha256": "0" * 64}
    damage(repo, lambda _: another_manifest(files, json.dumps({"step": 1, "files": {"a": entry, "A": entry}}).encode()))
    with pytest.raises(CheckpointError, match="no intact"):
        pull(tmp_path)
    assert server.asked("HEAD") == 0 and nothing_there(tmp_path) and time.monotonic() - started < 20


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": True}, {"step": 10**8}, {"step": "1"}, {"run": 5}, {"manifest_sha256": "x"},
        {"manifest_sha256": None}, {"schema": 2}, {"writer": []},
    ],
    ids=str,
)  # fmt: skip
def test_a_latest_that_is_none(change: dict[str, Any], server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    files = put(repo, save(tmp_path / "run", 1))
    damage(repo, lambda _: {"LATEST.json": json.dumps({**json.loads(files["LATEST.json"]), **change}).encode()})
    with pytest.raises(CheckpointError, match="is none of this program"):
        hub.newest(NAME)


# ---- a model for generate.py


def test_a_model_without_what_only_training_needs(server: FakeModelHub, tmp_path: Path) -> None:
    repo = server.make(NAME)
    files = put(repo, save(tmp_path / "run", 1))
    damage(repo, lambda _: {"evil.py": b"x", "pytorch_model.bin": b"x", "../model.safetensors": b"x", "a/b": b"x"})
    folder = hub.download_model(NAME)
    assert contents(folder) == {name: files[name] for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert folder.name == repo.head.sha and checkpoint.find(folder) == folder
    assert checkpoint.load(folder).keys() == {"a.weight"}
    first = repo.head.sha
    put(repo, save(tmp_path / "run", 2))
    assert hub.download_model(f"{NAME}@{first}") == folder != hub.download_model(NAME)
    for gone, said in (("config.json", "no config.json"), ("model.safetensors", "no weights")):
        damage(repo, lambda _, gone=gone: {gone: None})
        with pytest.raises(UserError, match=said):
            hub.download_model(NAME)
    with pytest.raises(UserError, match="no such repository on the Hub"):
        hub.download_model("me/nothing")
    with pytest.raises(UserError, match="no such revision"):
        hub.download_model(f"{NAME}@v9")


# ---- before training


def test_the_plan_in_figures() -> None:
    text = hub.plan(6 * 2**30, HubConfig(repo_id="me/m", every_minutes=60, keep=3))
    assert text == (
        "hub: me/m (private): a state of 6.00 GiB at most every 60 minutes, up to 24 pushes and 144 GiB a day; "
        "6.00 to 18.00 GiB stay there, plus one while it is pushed"
    )
    one = hub.plan(2**29, HubConfig(repo_id="me/m", every_minutes=30, keep=1, public=True))
    assert "(public)" in one and "up to 48 pushes and 24 GiB a day; 0.50 GiB stay there" in one


def test_the_section() -> None:
    assert HubConfig() == HubConfig(repo_id=None, every_minutes=30, public=False, keep=2)
    with pytest.raises(ValidationError):
        HubConfig(every_minutes=4)  # not above 12 commits an hour
    for key in ("hub.token", "hub.hub_token", "hub_token", "hub.api_key"):
        with pytest.raises(UserError, match=r"HF_TOKEN|token") as caught:
            config.load("quickstart", [f"{key}=" + "hf_" + "Canary" * 5])
        assert "hf_" not in str(caught.value) and "Canary" not in str(caught.value)
    with pytest.raises(UserError, match=r"hub\.repo_id = .* holds a secret") as caught:
        config.load("quickstart", ["hub.repo_id=" + "hf_" + "Canary" * 5])
    assert "Canary" not in str(caught.value)


def test_the_client_does_not_wait_for_ever(server: FakeModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_model_hub.impatient(monkeypatch):
        assert huggingface_hub.get_session().timeout.read is None
        hub.connect(NAME)
        assert huggingface_hub.get_session().timeout.read == 0.3
        server.faults = [Fault(".", "stall")]
        with pytest.raises(remote.Unreachable):
            hub.newest(NAME)
