"""Saving, verifying and finding checkpoints: bytes, damage, crashes, retention, hostile files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

import checkpoint
import foreign
from checkpoint import CheckpointError
from config import UserError

FILES = {"config.json": b'{"model_type": "deepseek_v3"}', "training_state.json": b'{"step": 1}', "empty.txt": b""}


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    model = {f"layer.{i}.weight": torch.randn(5, 7, generator=rng) for i in range(4)}
    return {"model": model, "optimizer": {"layer.0.momentum": torch.randn(3, generator=rng).bfloat16()}}


def save(root: Path, step: int, *, seed: int | None = None, keep: int = 9, **kwargs: Any) -> Path:
    return checkpoint.save(root, step, tensors(step if seed is None else seed), FILES, keep=keep, **kwargs)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def equal(ours: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(
        ours[k].dtype == others[k].dtype and torch.equal(ours[k], others[k]) for k in ours
    )


# --------------------------------------------------------------------------------------------------------------- bytes


def test_round_trip_and_layout(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "step_00000012"
    assert names(tmp_path) == ["step_00000012"]
    assert names(path) == sorted([*FILES, "manifest.json", "model.safetensors", "optimizer.safetensors"])
    assert equal(checkpoint.load(path), tensors(12)["model"])
    assert equal(checkpoint.load(path, "optimizer"), tensors(12)["optimizer"])
    assert (path / "config.json").read_bytes() == FILES["config.json"]
    manifest = checkpoint.verify(path)
    assert manifest["step"] == 12
    assert set(manifest["files"]) == set(names(path)) - {"manifest.json"}


def test_the_format_is_that_of_the_safetensors_library(tmp_path: Path) -> None:
    """Every dtype, views, shared storage, gaps, scalars and empty tensors, with odd sizes so that alignment matters."""
    stacked = torch.randn(3, 4, 5)
    state = {str(dtype): torch.arange(7).to(dtype) for dtype in checkpoint.SAFETENSORS_DTYPES}
    state |= {
        "a": stacked,
        "b": stacked[1],
        "c": stacked.mT,
        "d": stacked[:, ::2, 1:3],
        "e": stacked[0, 0].expand(6, 5),
    }
    state |= {
        "every second": torch.arange(9.0)[::2],
        "scalar": torch.tensor(3.5),
        "none": torch.empty(0, 4),
        "grad": torch.ones(2, requires_grad=True),
    }
    state |= {"ünï\n": torch.ones(1, dtype=torch.bool)}
    path = checkpoint.save(tmp_path, 1, {"model": state, "optimizer": {}}, {}, keep=1)
    assert equal(safetensors.torch.load_file(path / "model.safetensors"), state)
    assert equal(checkpoint.load(path), state)
    assert checkpoint.load(path, "optimizer") == {}
    with safe_open(path / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    content = (path / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in state.items():
        assert header[name]["data_offsets"][0] % tensor.itemsize == 0  # aligned: readers map the file


def test_other_dtypes_on_the_way_out(tmp_path: Path) -> None:
    state = {"a": torch.randn(4), "b": torch.randn(4)}
    entries = checkpoint.write(tmp_path, {"model": state}, {}, dtypes={"a": torch.bfloat16})
    assert equal(checkpoint.load(tmp_path), {"a": state["a"].bfloat16(), "b": state["b"]})
    assert entries["model.safetensors"]["bytes"] == (tmp_path / "model.safetensors").stat().st_size


def test_bytes_depend_on_the_content_alone(tmp_path: Path) -> None:
    first = save(tmp_path / "one", 3, max_shard_bytes=300)
    reordered = {group: dict(reversed(state.items())) for group, state in reversed(tensors(3).items())}
    files = dict(reversed(FILES.items()))
    second = checkpoint.save(tmp_path / "elsewhere" / "two", 3, reordered, files, keep=1, max_shard_bytes=300)
    assert names(first) == names(second)
    for file in names(first):
        assert (first / file).read_bytes() == (second / file).read_bytes()


def test_shards(tmp_path: Path) -> None:
    path = save(tmp_path, 1, max_shard_bytes=300)  # a tensor has 140 bytes
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert set(shards) < set(names(path))
    assert "model.safetensors" not in names(path)
    index = json.loads((path / "model.safetensors.index.json").read_bytes())
    assert index["metadata"] == {"total_size": 4 * 140}
    assert set(index["weight_map"].values()) == set(shards)
    checkpoint.verify(path)
    assert equal(checkpoint.load(path), tensors(1)["model"])
    assert len(list(save(tmp_path, 2, max_shard_bytes=1).glob("model-*"))) == 4  # larger than a shard: one each


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "/x", ".hidden", "", "manifest.json", "model.safetensors"])
def test_names_of_files_are_plain_and_free(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a file"):
        checkpoint.save(tmp_path, 1, tensors(), {name: b"x"}, keep=1)
    assert names(tmp_path) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu(tmp_path: Path) -> None:
    state = {"a": torch.randn(9, 5), "b": torch.arange(3)}
    path = checkpoint.save(tmp_path, 1, {"model": {k: t.cuda() for k, t in state.items()}}, {}, keep=1)
    assert equal(checkpoint.load(path), state)


# -------------------------------------------------------------------------------------------------------------- damage


def damages(path: Path) -> list[tuple[str, Callable[[], object]]]:
    """(file, what to do to it) for cuts, additions, deletion, and flipped bits all over every file."""
    found: list[tuple[str, Callable[[], object]]] = []
    for file in path.iterdir():
        content = file.read_bytes()
        cuts = {0, 1, len(content) // 2, len(content) - 1} if content else set()
        changed = [content[:cut] for cut in cuts if cut < len(content)] + [content + b"\0"]
        stride = 13 if file.name == "manifest.json" else 97
        for bit in range(0, 8 * len(content), stride):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            changed.append(bytes(flipped))
        found += [(file.name, lambda file=file, bad=bad: file.write_bytes(bad)) for bad in changed]
        found.append((file.name, file.unlink))
    return found


def test_every_damage_is_found_and_named(tmp_path: Path) -> None:
    path = save(tmp_path, 20)
    backup = {file: file.read_bytes() for file in path.iterdir()}
    cases = damages(path)
    assert len(cases) > 400
    for name, damage in cases:
        damage()
        with pytest.raises(CheckpointError) as error:
            checkpoint.verify(path)
        assert name in str(error.value) or name == "manifest.json"  # which may then accuse another file
        (path / name).write_bytes(backup[path / name])
    checkpoint.verify(path)


def test_a_file_that_would_shadow_a_verified_one(tmp_path: Path) -> None:
    path = save(tmp_path, 1, max_shard_bytes=300)
    (path / "notes.txt").write_text("mine")
    checkpoint.verify(path)
    safetensors.torch.save_file({"evil": torch.ones(1)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not in the manifest"):
        checkpoint.verify(path)


def test_a_renamed_checkpoint_is_not_another_step(tmp_path: Path) -> None:
    os.rename(save(tmp_path, 1), tmp_path / "step_00000002")
    with pytest.raises(CheckpointError, match="says step 1"):
        checkpoint.verify(tmp_path / "step_00000002")
    os.rename(tmp_path / "step_00000002", tmp_path / "best")
    assert checkpoint.verify(tmp_path / "best")["step"] == 1


def test_unreadable_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "empty.txt").unlink()
    (path / "empty.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"empty\.txt"):
        checkpoint.verify(path)


def test_latest_falls_back_and_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert checkpoint.latest(tmp_path / "nothing") is None
    assert checkpoint.latest(tmp_path) is None
    good, middle, newest = (save(tmp_path, step) for step in (100, 200, 300))
    for other in ("my-step_00000900-bak", "step_00000900.tmp-0123abcd", "step_00000900.trash-0123abcd", "step_900"):
        shutil.copytree(good, tmp_path / other)
    (tmp_path / "step_00000900").write_text("a file")
    before = names(tmp_path)
    assert checkpoint.latest(tmp_path) == newest
    assert not caplog.records
    (newest / "optimizer.safetensors").unlink()
    (middle / "manifest.json").write_text("[]")
    assert checkpoint.latest(tmp_path) == good
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "optimizer.safetensors: missing" in caplog.text
    assert "not a JSON object" in caplog.text
    assert names(tmp_path) == before


# ----------------------------------------------------------------------------------------------- retention, same step


def test_keeps_the_newest(tmp_path: Path) -> None:
    (tmp_path / "my-step_00000001-bak").mkdir()
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["my-step_00000001-bak", "step_00000004", "step_00000005"]
    save(tmp_path, 3, keep=2)  # resumed from an older checkpoint: what was just written stays
    assert names(tmp_path) == ["my-step_00000001-bak", "step_00000003", "step_00000004", "step_00000005"]


def test_same_step_again(tmp_path: Path) -> None:
    path = save(tmp_path, 5)
    inode = path.stat().st_ino
    assert save(tmp_path, 5) == path
    assert path.stat().st_ino == inode
    save(tmp_path, 5, seed=99)
    assert equal(checkpoint.load(path), tensors(99)["model"])
    (path / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 5, seed=99)
    assert checkpoint.verify(path)
    assert names(tmp_path) == ["step_00000005"]


def test_a_failing_deletion_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if "trash" in target.name:
            raise PermissionError(errno.EACCES, "in use")
        rename(source, target)

    save(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        save(tmp_path, 3, keep=2)
    assert "cannot delete checkpoint" in caplog.text
    assert len(names(tmp_path)) == 3
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_00000003", "step_00000004"]


def test_never_below_two_intact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Damaged ones do not count, are moved aside, and each is read but once."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step_00000003" / "model.safetensors").write_bytes(b"damaged")
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step_00000002", "step_00000003.bad-damaged", "step_00000004"]
    assert "moved aside" in caplog.text
    known: checkpoint.Known = set()
    save(tmp_path, 5, keep=1, known=known)
    assert {name for name, _ in known} == {"step_00000004", "step_00000005"}
    read = []
    with pytest.MonkeyPatch.context() as patch:
        verify = checkpoint.verify
        patch.setattr(checkpoint, "verify", lambda path: read.append(path.name) or verify(path))
        save(tmp_path, 6, keep=1, known=known)
    assert read == ["step_00000006"]


def test_what_is_read_back_damaged_was_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses what it was given."""
    save(tmp_path, 1)
    rename = os.rename

    def lossy(source: Path, target: Path) -> None:
        rename(source, target)
        if target.name == "step_00000002":
            (target / "optimizer.safetensors").write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lossy)
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: 0 bytes"):
            save(tmp_path, 2)
    assert names(tmp_path) == ["step_00000001", "step_00000002.bad-damaged"]
    save(tmp_path, 2)
    assert checkpoint.latest(tmp_path) == tmp_path / "step_00000002"


def test_quarantine_needs_an_intact_one(tmp_path: Path) -> None:
    """Were all of them renamed, the next start would find nothing and begin anew."""
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    assert checkpoint.latest(tmp_path, quarantine=True) == tmp_path / "step_00000001"
    assert names(tmp_path) == ["step_00000001", "step_00000002.bad-no-manifest"]
    (tmp_path / "step_00000001" / "config.json").unlink()
    assert checkpoint.latest(tmp_path, quarantine=True) is None
    assert names(tmp_path) == ["step_00000001", "step_00000002.bad-no-manifest"]


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 1) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged in layer\.3\.weight"):
        checkpoint.verify(path.parent)


# ---------------------------------------------------------------------------------------------------------- beforehand


def test_preflight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checkpoint.preflight(tmp_path / "not" / "yet", 1000, keep=3) == []
    assert names(tmp_path) == []
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 2**30))
    (told,) = checkpoint.preflight(tmp_path, 2**30, keep=3)
    assert "checkpoint.keep = 3 needs 4.00 GiB more" in told and "3.00 GiB are free" in told
    assert checkpoint.preflight(tmp_path, 2**30, keep=2) == []
    os.truncate(save(tmp_path / "checkpoints", 1) / "config.json", 2**30)  # what is there need not be free
    assert checkpoint.preflight(tmp_path, 2**30, keep=3) == []
    assert checkpoint.preflight(tmp_path, 2**30, keep=3, afresh=True) == [told]  # moved aside, it stays
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"are free, a checkpoint of this run takes 1048576\.00 GiB"):
        checkpoint.preflight(tmp_path, 2**50)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        checkpoint.preflight(tmp_path / "file" / "run", 0)

    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(UserError, match="Read-only file system"):
        checkpoint.preflight(tmp_path, 0)


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/content/drive/MyDrive/run", "fuse.drive"), ("/content/drive2", None), ("/n f s/x", "nfs4"), ("/", None)],
)
def test_network_drives_are_known(tmp_path: Path, folder: str, kind: str | None) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "overlay / overlay rw 0 0\ndrive /content/drive fuse.drive rw 0 0\nserver:/x /n\\040f\\040s nfs4 rw 0 0\n"
    )
    assert checkpoint.network_drive(Path(folder), mounts) == kind
    assert checkpoint.network_drive(Path(folder), tmp_path / "nothing") is None


# ------------------------------------------------------------------------------------------------------------- crashes

BOUNDARIES = ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree"), (os, "unlink"), (os, "rmdir"))


def interrupt(patch: pytest.MonkeyPatch, at: int, act: Callable[[], object]) -> None:
    """Call `act` instead of the `at`-th I/O boundary."""
    calls = 0

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                act()
            return function(*args, **kwargs)

        return counted

    for module, name in BOUNDARIES:
        patch.setattr(module, name, wrap(getattr(module, name)))


def killed(at: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies, without any clean-up, at its `at`-th I/O boundary; whether it died."""
    child = os.fork()
    if child == 0:
        try:
            interrupt(pytest.MonkeyPatch(), at, lambda: os._exit(9))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("keep", "step", "seed"), [(2, 30, 30), pytest.param(1, 20, 77, marks=pytest.mark.slow)])
def test_killed_at_every_boundary(tmp_path: Path, keep: int, step: int, seed: int) -> None:
    """A new step with deletion of the oldest, and a step written anew with other content."""
    for at in range(1, 100):
        root = tmp_path / str(at)
        for old in (10, 20):
            save(root, old, keep=2)
        shutil.copytree(root / "step_00000010", root / "step_00000010.tmp-00000000")  # of an earlier dead save
        died = killed(at, lambda root=root: save(root, step, seed=seed, keep=keep))
        newest = checkpoint.latest(root)
        assert newest is not None
        if newest.name == "step_00000030":
            assert equal(checkpoint.load(newest), tensors(30)["model"])
        else:
            assert newest.name.startswith("step_00000020")
            assert any(equal(checkpoint.load(newest), tensors(content)["model"]) for content in (20, seed))
        save(root, 40, keep=keep)
        assert all(checkpoint.STEP.fullmatch(name) for name in names(root))
        assert len(names(root)) <= max(keep, checkpoint.LEAST_KEPT)
        assert checkpoint.latest(root) == root / "step_00000040"
        if not died:
            break
    else:
        pytest.fail("never completed")
    assert at > 10


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_failing_at_every_boundary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """An error leaves the older checkpoint, and no temporary directory on a disk that may be full."""

    failed: list[int] = []

    def fail() -> None:
        failed.append(at)
        raise error

    for at in range(1, 100):
        root = tmp_path / str(at)
        save(root, 10)
        with monkeypatch.context() as patch, contextlib.suppress(OSError, KeyboardInterrupt):
            interrupt(patch, at, fail)
            save(root, 20, keep=1)
        newest = checkpoint.latest(root)
        assert newest is not None
        assert newest.name in ("step_00000010", "step_00000020")
        if newest.name == "step_00000010":
            assert names(root) == ["step_00000010"]
        save(root, 30, keep=1)
        assert names(root)[-1] == "step_00000030"
        assert len(names(root)) == 2
        if at not in failed:
            break
    assert len(failed) > 10


def test_directories_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(code: int) -> Callable[[int], None]:
        def fsync(descriptor: int) -> None:
            raise OSError(code, "refused")

        return fsync

    monkeypatch.setattr(os, "fsync", refuse(errno.EINVAL))
    checkpoint.sync_directory(tmp_path)
    monkeypatch.setattr(os, "fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="refused"):
        checkpoint.sync_directory(tmp_path)
    monkeypatch.setattr(os, "name", "nt")
    checkpoint.sync_directory(tmp_path)
    monkeypatch.undo()


# ---------------------------------------------------------------------------------------------------------------- find


def test_find(tmp_path: Path) -> None:
    run = tmp_path / "run"
    old, new = save(run / "checkpoints", 1), save(run / "checkpoints", 2)
    for given in (run, run / "checkpoints", new, str(new)):
        assert checkpoint.find(given) == new
    assert checkpoint.find(old) == old
    (new / "config.json").unlink()
    assert checkpoint.find(run) == old
    with pytest.raises(CheckpointError, match=r"config\.json: missing"):
        checkpoint.find(new)
    (old / "config.json").unlink()
    with pytest.raises(UserError, match="2 checkpoints, all of them damaged"):
        checkpoint.find(run)


def test_find_model_directories(tmp_path: Path) -> None:
    for name in ("model.safetensors", "model.safetensors.index.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).touch()
        assert checkpoint.find(folder) == folder
    with pytest.raises(UserError, match="no such directory"):
        checkpoint.find(tmp_path / "nothing")
    with pytest.raises(UserError, match="no such directory"):
        checkpoint.find(tmp_path / "model.safetensors" / "model.safetensors")
    with pytest.raises(UserError, match=r"no model here; looked for model\.safetensors"):
        checkpoint.find(tmp_path)


# ------------------------------------------------------------------------------------------------------- foreign files


def foreign_index(path: Path, weight_map: object) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b", "a\\b", "C:\\x", "..", "", 7, None, "-x"]
)
def test_an_index_cannot_point_elsewhere(tmp_path: Path, file: object) -> None:
    foreign_index(tmp_path, {"a": file})
    with pytest.raises(CheckpointError, match="not the plain name"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "char 0"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no weight_map"),
        (b'{"weight_map": {}}', "no weight_map"),
        (b'{"a":' * 200_000, "recursion"),
        (b"\xff{}", "decode"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', r"gone\.safetensors: missing"),
    ],
)
def test_bad_indexes(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        checkpoint.load(tmp_path)


def test_an_index_larger_than_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "MAX_JSON_BYTES", 100)
    foreign_index(tmp_path, {"a": "b" * 100})
    with pytest.raises(CheckpointError, match="larger than 100 bytes"):
        checkpoint.load(tmp_path)


def test_bad_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        checkpoint.load(tmp_path)
    file = tmp_path / "model.safetensors"
    for content in (b"", b"\x80\x02}q\x00.", b"{}", bytes(8), (9).to_bytes(8, "little") + b"{" * 9):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            checkpoint.load(tmp_path)
    file.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="a header of 1099511627776 bytes"):
        checkpoint.load(tmp_path)
    huge = b'{"a":{"dtype":"F32","shape":[99999999999,999],"data_offsets":[0,4]}}'
    file.write_bytes(len(huge).to_bytes(8, "little") + huge + bytes(4))
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load(tmp_path)


def test_a_tensor_that_its_shard_lacks(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "part.safetensors")
    foreign_index(tmp_path, {"a": "part.safetensors", "b": "part.safetensors"})
    with pytest.raises(CheckpointError, match=r"part\.safetensors: .*b"):
        checkpoint.load(tmp_path)
    foreign_index(tmp_path, {"a": "part.safetensors"})
    assert equal(checkpoint.load(tmp_path), {"a": torch.ones(1)})


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no lock of a folder")
def test_a_folder_is_one_process_s(tmp_path):
    program = (
        "import sys, time, pathlib, checkpoint\n"
        "with checkpoint.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parent)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    with checkpoint.locked(tmp_path / "not there"):
        pass
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains this run"), checkpoint.locked(tmp_path):
            pass
        other.kill()
        other.wait()
    with checkpoint.locked(tmp_path):
        assert not list(tmp_path.iterdir())
    with checkpoint.locked(tmp_path), pytest.raises(UserError, match="another process"), checkpoint.locked(tmp_path):
        pass
