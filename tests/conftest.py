"""Settings that must stand before torch is imported, why GPU tests are skipped, and the count of faults survived."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from fake_model_hub import FakeModelHub

# Waiting OpenMP threads otherwise spin, and on busy cores tiny tests take many times as long. Subprocesses inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only cost time at these sizes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns when a process that used it forks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not on_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeModelHub]:
    """A Hub of model repositories on this machine, which this process's huggingface_hub talks to."""
    import fake_model_hub

    with fake_model_hub.served(monkeypatch, tmp_path) as hub:
        yield hub


class Row:
    """What was tried of a fault, and what was survived."""

    def __init__(self) -> None:
        self.tried, self.failures = 0, []
        self.figures: dict[str, Any] = {}

    def check(self, failure: object, case: object = "") -> None:
        """One case; `failure` is what went wrong, empty or None for nothing."""
        self.tried += 1
        if failure:
            self.failures.append(f"{case}: {failure}")

    def expect(self, survived: bool, case: object = "") -> None:
        self.check("" if survived else "did not hold", case)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Callable[[str], Any]:
    """`with row("F1") as row:` counts cases, reports them to scripts/fault_matrix.py and fails if one failed."""

    @contextlib.contextmanager
    def counting(fault: str) -> Iterator[Row]:
        row = Row()
        completed = False
        try:
            yield row
            completed = True
        finally:
            survived = row.tried - len(row.failures)
            result = {"tried": row.tried, "survived": survived, "completed": completed, "figures": row.figures}
            record_property(fault, json.dumps(result))
        assert row.tried, f"{fault}: nothing was tried"
        shown = "\n".join(row.failures[:5])
        assert not row.failures, f"{fault}: {len(row.failures)} of {row.tried} failed\n{shown}"

    return counting
