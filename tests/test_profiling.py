"""The trace and table of one step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from profiling import DEAREST, TABLE, TRACE, Profiler


def steps(folder: Path, number: int) -> list[str]:
    notes: list[str] = []
    profiler = Profiler(folder, torch.device("cpu"), notes.append)
    for step in range(number):
        matrix = torch.ones(step + 2, step + 2)
        matrix @ matrix
        matrix.exp().sum().log().sqrt().sin().cos().tan().abs().neg().floor().ceil()
        profiler.step()
    profiler.stop()
    return notes


def test_the_third_step_is_traced(tmp_path: Path) -> None:
    (note,) = steps(tmp_path, 5)
    table = (tmp_path / TABLE).read_text(encoding="utf-8")
    assert table in note and TRACE in note
    rows = [line for line in table.splitlines() if line.lstrip().startswith(("aten::", "ProfilerStep"))]
    assert len(rows) == DEAREST
    events = json.loads((tmp_path / TRACE).read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 1  # one step's


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_that_is_too_short_says_so_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    (note,) = steps(tmp_path, number)
    assert f"made {number}" in note and not list(tmp_path.iterdir())
