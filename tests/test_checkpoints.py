"""scripts/checkpoints.py: what a user sees of a run's checkpoints, and what is deleted."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import pytest
import torch

import checkpoint


def save(root: Path, step: int) -> Path:
    return checkpoint.save(root, step, {"model": {"a": torch.full((9,), float(step))}}, {"x.json": b"{}"}, keep=99)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (1, 2, 3, 4):
        save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def test_list(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000002").rename(run / "checkpoints" / "step_00000002.bad-damaged")
    (run / "checkpoints" / "step_00000009.tmp-0123abcd").mkdir()
    assert checkpoints.main(["list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "step_00000009.tmp-0123abcd", "step_00000004", "step_00000003", "step_00000002.bad-damaged", "step_00000001",
    ]  # fmt: skip
    assert "a save that died" in lines[0] and "weights only" in lines[1] and lines[3].endswith("damaged")


def test_list_tells_steps_and_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    golden = Path(__file__).parent / "fixtures" / "checkpoint-v1"
    assert checkpoints.main(["list", str(golden)]) == 0
    assert "step 2, 512 tokens" in capsys.readouterr().out
    assert checkpoints.main(["verify", str(golden)]) == 0


def test_verify(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.main(["verify", str(run / "checkpoints")]) == 0
    assert capsys.readouterr().out.count("intact: 2 files") == 4
    (run / "checkpoints" / "step_00000003" / "model.safetensors").write_bytes(b"")
    assert checkpoints.main(["verify", str(run)]) == 1
    assert "step_00000003  damaged: " in capsys.readouterr().out
    assert checkpoints.main(["verify", str(run / "checkpoints" / "step_00000004")]) == 0


def test_prune(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"")
    assert checkpoints.main(["prune", str(run), "--keep", "2"]) == 0
    left = {path.name for path in (run / "checkpoints").iterdir()}
    assert left == {"step_00000002", "step_00000003", "step_00000004.bad-damaged"}
    assert checkpoints.main(["prune", str(run), "--keep", "2", "--damaged"]) == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step_00000002", "step_00000003"}
    with checkpoint.locked(run):
        assert checkpoints.main(["prune", str(run), "--keep", "2"]) == 2
    assert "another process trains this run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["list", "nowhere"], "no such directory"),
        (["prune", ".", "--keep", "1"], "--keep 1: at least 2 stay"),
        (["verify", "tests"], "no checkpoint here"),
        (["list", "tests"], "no checkpoint here"),
        (["lst", "."], "lst"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert checkpoints.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
