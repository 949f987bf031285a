"""Saving beside training: what is copied, what waits, what is told, what is raised."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import checkpoint
import saver as saver_module
from saver import PATIENCE, Contents, Saver, snapshot


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def contents(value: float) -> Contents:
    return {"model": {"a": torch.full((3,), value)}}, {"config.json": b"{}"}


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def saver(tmp_path: Path, told: list[str]):
    clock = Clock()
    saver = Saver(tmp_path / "checkpoints", keep=2, every_sec=300.0, note=told.append, clock=clock)
    yield saver
    saver.close()


def test_a_snapshot_shares_what_was_shared_and_nothing_else() -> None:
    stacked, half = torch.randn(3, 4, 5), torch.randn(4).bfloat16()
    state = {
        "model": {"all": stacked, "one": stacked[1].mT, "head": stacked.detach(), "scalar": torch.tensor(2.5)},
        "optimizer": {"half": half[::2], "none": torch.empty(0, 3), "grad": torch.ones(2, requires_grad=True)},
    }
    copies = snapshot(state)
    before = {name: tensor.detach().clone() for group in state.values() for name, tensor in group.items()}
    stacked.zero_()
    half.zero_()
    for group, tensors in copies.items():
        assert tensors.keys() == state[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype
            assert tensor.device.type == "cpu" and not tensor.requires_grad
    model = copies["model"]
    assert model["all"].data_ptr() == model["head"].data_ptr() != stacked.data_ptr()
    assert model["one"].untyped_storage().data_ptr() == model["all"].untyped_storage().data_ptr()


def test_training_goes_on_while_it_writes(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved is the state at the call, however it changes since; the next save waits for the writer."""
    free, save = threading.Event(), checkpoint.save

    def slow(*args: Any, **options: Any) -> Path:
        free.wait(10)
        return save(*args, **options)

    monkeypatch.setattr(checkpoint, "save", slow)
    state = torch.ones(3)
    saver.save(1, lambda: ({"model": {"a": state}}, {}))
    state.zero_()
    assert saver.busy and saver.newest is None and not saver.due()
    saver.check()
    free.set()
    saver.save(2, lambda: contents(2.0))
    assert saver.newest is not None and saver.newest.name == "step_00000001"
    assert torch.equal(checkpoint.load(saver.newest)["a"], torch.ones(3))
    assert saver.wait() and saver.newest.name == "step_00000002"
    assert {name for name, _ in saver.known} == {"step_00000001", "step_00000002"}


def test_due_by_the_clock(saver: Saver) -> None:
    clock: Any = saver.clock
    clock.now = 299.0
    assert not saver.due()
    clock.now = 300.0
    assert saver.due()
    saver.save(1, lambda: contents(1.0))
    saver.wait()
    clock.now = 599.0
    assert not saver.due()
    clock.now = 601.0
    assert saver.due()
    saver.every_sec = None
    assert not saver.due()


def test_a_full_disk_is_told_and_tried_again(saver: Saver, told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock: Any = saver.clock
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        saver.save(1, lambda: contents(1.0))
        assert not saver.wait()
        assert told == ["the checkpoint of step 1 could not be written: No space left; training goes on"]
        assert list(saver.root.iterdir()) == [] and not saver.hopeless
        clock.now = PATIENCE * 300.0 + 1
        assert not saver.hopeless  # it was tried but once
        for step in range(2, PATIENCE + 1):
            saver.save(step, lambda: contents(1.0))
            assert not saver.wait()
        assert saver.failing_since == 0.0 and saver.hopeless
    saver.save(9, lambda: contents(2.0))
    assert saver.wait() and not saver.hopeless
    assert saver.newest == saver.root / "step_00000009"


def test_any_other_failure_is_raised_at_the_next_step(saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "save", lambda *_, **__: 1 / 0)
    saver.save(1, lambda: contents(1.0))
    assert saver._thread is not None
    saver._thread.join()
    with pytest.raises(ZeroDivisionError):
        saver.check()
    saver.check()  # raised once


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_without_memory_for_a_copy_the_state_itself_is_written(
    saver: Saver, told: list[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise error

    state = torch.ones(3)
    with monkeypatch.context() as patch:
        patch.setattr(saver_module, "snapshot", full)
        saver.save(1, lambda: ({"model": {"a": state}}, {}))
    assert saver.live and saver.wait()
    assert torch.equal(checkpoint.load(saver.root / "step_00000001")["a"], state)
    assert told == ["too little memory to copy the state of step 1: training waits while it is written"]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        saver.save(2, lambda: contents(2.0))
        assert not saver.wait() and not saver.live
    assert told[1:] == ["the checkpoint of step 2 could not be written: out of memory; training goes on"]


def test_who_wants_to_know_hears_of_what_was_read_back(saver: Saver) -> None:
    heard: list[Path] = []
    saver.on_saved = lambda path: heard.append(path) if checkpoint.verify(path) else None
    saver.save(3, lambda: contents(3.0))
    saver.wait()
    assert heard == [saver.root / "step_00000003"]
