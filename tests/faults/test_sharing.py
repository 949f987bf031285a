"""Two runs, a writer that fails, a checkpoint of an earlier version: F25, F29, F30."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import ROOT, Lab, Running, checkpoints, lines, newest, same_end

GOLDEN = ROOT / "tests" / "fixtures" / "checkpoint-v1"


def wait_for_steps(lab: Lab, name: str, running: Running, steps: int) -> None:
    while len(lines(lab[name])) < steps and time.monotonic() < running.started + 30:
        time.sleep(0.01)
    assert len(lines(lab[name])) >= steps, running.out()


def test_two_runs_in_a_folder(lab: Lab, row: Callable[[str], Any]) -> None:
    """The second is refused at once and changes nothing; the first ends as if alone."""
    with row("F25") as case:
        first = lab.start("shared", faults=[("slow_steps", {"seconds": 0.15})])
        wait_for_steps(lab, "shared", first, 2)
        for extra in ((), ("--resume", "never")):
            second = lab.run("shared", *extra)
            told = "another process" in second.err() and second.err().count("\n") == 1
            case.check("" if second.code == 2 and told else second, "refused")
            case.check("" if second.seconds[0] < 5 else second.seconds, "in time")
            case.figures["s until refused"] = round(second.seconds[0], 2)
        result = first.wait()
        case.check(same_end(lab["shared"], lab[lab.reference()]) if result.code == 0 else result, "the first")
        case.check("" if not lab["shared.1"].exists() else "moved aside", "the folder")


def test_the_lock_of_a_dead_run(lab: Lab, row: Callable[[str], Any]) -> None:
    """It ends with the process that held it, even where its data processes live on for a moment."""
    name = "stale"
    with row("F25") as case:
        first = lab.start(name, "data.workers=1", faults=[("slow_steps", {"seconds": 0.15})])
        wait_for_steps(lab, name, first, 3)
        os.kill(first.pids[0], signal.SIGKILL)
        second = lab.run(name)
        case.check(same_end(lab[name], lab[lab.reference()]) if second.code == 0 else second, "taken over")
        case.check("" if first.wait().code == -signal.SIGKILL else "it was not killed")


def test_a_writer_that_fails(lab: Lab, row: Callable[[str], Any]) -> None:
    """Not for want of room, which is told and tried again: a bug. It ends the run within a step."""
    with row("F29") as case:
        faults = [("break_saving", {"step": 4}), ("slow_steps", {"seconds": 0.1})]
        result = lab.run("broken", "train.steps=20", faults=faults)
        case.check("" if result.code == 1 and "injected" in result.err() else result, "raised")
        case.check("" if 4 <= len(lines(lab["broken"])) <= 5 else len(lines(lab["broken"])), "within a step")
        case.check("" if checkpoints(lab["broken"]) == ["step_00000002"] else checkpoints(lab["broken"]), "kept")


def test_a_writer_that_fails_at_the_end(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F29") as case:
        result = lab.run("broken-end", faults=[("break_saving", {"step": 8})])
        case.check("" if result.code == 1 and "injected" in result.err() else result, "raised")


def golden(lab: Lab, folder: Path) -> list[str]:
    """A run of the earlier version, stopped after step 2 of 4; the command that goes on."""
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copytree(GOLDEN / "step_00000002", folder / "checkpoints" / "step_00000002")
    return ["--config", str(GOLDEN / "config.yaml"), f"data.sources={GOLDEN / 'text.txt'}", f"run.dir={folder}"]


@pytest.mark.slow  # its short form is in test_resume.py
def test_a_checkpoint_of_the_version_before(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F30") as case:
        command = golden(lab, lab["golden"])
        result = lab.call("train:main", command)
        case.check("" if result.code == 0 and "resumed from" in result.out() else result, "resumed")
        found = newest(lab["golden"])
        case.check("" if found is not None and found.name == "step_00000004" else found, "to the end")
        wanted = {line["step"]: line["loss"] for line in _lines(GOLDEN / "metrics.jsonl")}
        got = {line["step"]: line["loss"] for line in lines(lab["golden"])}
        close = all(abs(got[step] - wanted[step]) < 1e-4 for step in (3, 4))
        case.check("" if close else f"{got} is not {wanted}", "the losses it had there")


def test_a_checkpoint_of_a_version_to_come(lab: Lab, row: Callable[[str], Any]) -> None:
    """Refused with what it is, not guessed at."""
    with row("F30") as case:
        command = golden(lab, lab["future"])
        manifest = lab["future"] / "checkpoints" / "step_00000002" / "manifest.json"
        manifest.write_text(
            manifest.read_text(encoding="utf-8").replace('"schema": 1', '"schema": 99'), encoding="utf-8"
        )
        result = lab.call("train:main", command)
        case.check("" if result.code == 2 and "schema" in result.err() and "Traceback" not in result.err() else result)


def _lines(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
