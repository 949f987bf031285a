"""`train.py --profile`: where the time of one optimizer step goes, as a trace and as a table of operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

DEAREST = 10
RECORDED = 3  # the step of a process that is traced
TRACE, TABLE = "profile.json", "profile.txt"


class Profiler:
    """Skips the first step of a process, warms up in the second and records the third; `step` is called after each."""

    def __init__(self, folder: Path, device: torch.device, note: Callable[[str], None]):
        self.folder, self.device, self.note = folder, device, note
        on_gpu = [ProfilerActivity.CUDA] if device.type == "cuda" else []
        self.profile = profile(
            activities=[ProfilerActivity.CPU, *on_gpu],
            schedule=schedule(wait=RECORDED - 2, warmup=1, active=1, repeat=1),
            on_trace_ready=self._write,
        )
        self.profile.start()

    def step(self) -> None:
        self.profile.step()

    def stop(self) -> None:
        if self.profile.step_num < RECORDED:  # torch would record what there was
            self.profile.on_trace_ready = None
            self.note(f"no profile: it is of step {RECORDED} of a process, and this one made {self.profile.step_num}")
        self.profile.stop()

    def _write(self, done: Any) -> None:
        key = f"self_{'cuda' if self.device.type == 'cuda' else 'cpu'}_time_total"
        table = done.key_averages().table(sort_by=key, row_limit=DEAREST, max_name_column_width=60)
        done.export_chrome_trace(str(self.folder / TRACE))
        (self.folder / TABLE).write_text(table, encoding="utf-8")
        self.note(f"{table}\nprofile of one step: {self.folder / TRACE} (for ui.perfetto.dev), {self.folder / TABLE}")
