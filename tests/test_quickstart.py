"""What the quickstart is there to show, at length: `pytest -m slow tests/test_quickstart.py`, some minutes.

.ci/run trains the whole quickstart; tests/test_readme.py shortens it to two steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import train


def trained(folder: Path, *overrides: str) -> float:
    """Validation bits per byte after 40 of the quickstart's 120 steps."""
    arguments = ["--config", "quickstart", f"run.dir={folder}", "train.steps=40", "sample.every_steps=1000"]
    assert train.main([*arguments, *overrides]) == 0
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["val_bpb"]


@pytest.mark.slow
def test_muon_is_below_adamw_after_equal_tokens(tmp_path: Path) -> None:
    muon = trained(tmp_path / "muon")
    adamw = min(trained(tmp_path / lr, "optim.name=adamw", f"optim.lr={lr}") for lr in ("1.5e-3", "3e-3"))
    assert muon < adamw - 0.02, (muon, adamw)
