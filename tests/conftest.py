"""Settings that must stand before torch is imported, and the reason for skipping GPU tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

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
