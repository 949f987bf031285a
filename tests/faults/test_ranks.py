"""Ranks that die, hang, are slow or have no more data: F20 and F21."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from lab import Lab, checkpoints, children, differences, lines, newest, same_end, torchrun

pytestmark = pytest.mark.dist
HANG_SEC = 3.0
OPTIONS = (f"train.hang_minutes={HANG_SEC / 60}", "train.steps=8", "checkpoint.every_steps=2")


def lost(lab: Lab, name: str, what: str, rank: int, case: Any, *, resumed: bool = True) -> None:
    """A rank is gone, for good or without a word, as step 6 begins: the other says which, and ends; the rest is a
    resume."""
    reference = lab[lab.reference("train.steps=8", "checkpoint.every_steps=2", ranks=2)]
    fault = ("at_step", {"step": 5, "what": what, "only_rank": rank})
    began = time.time()
    result = lab.run(name, *OPTIONS, faults=[fault], ranks=2, linger=1.0)
    left = 1 - rank
    case.check("" if result.codes[left] in (1, 2) else result, f"{name}: exit code")
    case.check(
        "" if f"rank {rank} on " in result.err(left) and "last seen at" in result.err(left) else result,
        f"{name}: named",
    )
    took = began + result.seconds[left] - (lab[name] / "metrics.jsonl").stat().st_mtime  # from step 5 on
    case.check("" if took < HANG_SEC + 10 else f"{took:.1f} s", f"{name}: in time")
    case.figures[f"{what}: s until the other had ended"] = round(took, 1)
    found = newest(lab[name])
    least = "step_00000004" if rank else "step_00000002"  # rank 0 may die while it writes that of step 4
    case.check(differences(lab[name], reference) if found is not None and found.name >= least else found, name)
    if not resumed:
        return
    again = lab.run(name, *OPTIONS[1:], ranks=2)
    case.check(same_end(lab[name], reference) if again.codes == [0, 0] else again, f"{name}: started again")


def test_a_rank_that_is_killed(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F20") as case:
        lost(lab, "killed-1", "die", 1, case, resumed=False)


def test_a_rank_that_hangs(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F20") as case:
        lost(lab, "frozen-1", "freeze", 1, case, resumed=False)


@pytest.mark.slow
def test_rank_0_is_gone(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F20") as case:
        lost(lab, "killed-again", "die", 1, case)
        lost(lab, "killed-0", "die", 0, case)
        lost(lab, "frozen-0", "freeze", 0, case)


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(lab: Lab, row: Callable[[str], Any]) -> None:
    """Slower than the rest, but not longer than a rank may hang."""
    with row("F20") as case:
        fault = ("at_step", {"step": 5, "what": "slow", "only_rank": 1, "seconds": 0.6 * HANG_SEC})
        result = lab.run("slow-1", *OPTIONS, faults=[fault], ranks=2)
        reference = lab[lab.reference("train.steps=8", "checkpoint.every_steps=2", ranks=2)]
        case.check(same_end(lab["slow-1"], reference) if result.codes == [0, 0] else result)


@pytest.mark.slow
@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_the_group_again(lab: Lab, row: Callable[[str], Any], machines: int) -> None:
    """One rank killed from outside: `--max-restarts` goes on from the checkpoint, to the same end."""
    name, options = f"again-{machines}", ("train.steps=40", "checkpoint.every_steps=2")
    reference = lab[lab.reference(*options, ranks=2)]
    with row("F20") as case:
        with torchrun(lab, name, *options, restarts=2, machines=machines) as processes:
            deadline = time.monotonic() + 60
            while not checkpoints(lab[name]) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(children(processes[-1].pid)[-1], signal.SIGKILL)
            errors = [process.communicate(timeout=180)[1] for process in processes]
        codes = [process.returncode for process in processes]
        case.check("" if codes == [0] * machines else (codes, errors), f"{machines} machines: exit codes")
        case.check(same_end(lab[name], reference), f"{machines} machines: the end")


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_without_data(lab: Lab, row: Callable[[str], Any], rank: int) -> None:
    """Both stop on the same step, which is saved."""
    with row("F21") as case:
        name = f"no-data-{rank}"
        fault = ("no_more_data", {"after": 3, "only_rank": rank})
        result = lab.run(name, "train.steps=8", "checkpoint.every_steps=1000", faults=[fault], ranks=2)
        case.check("" if result.codes == [2, 2] and max(result.seconds) < 30 else result, name)
        case.check("" if checkpoints(lab[name]) == ["step_00000003"] else checkpoints(lab[name]), name)
        case.check("" if len(lines(lab[name])) == 3 else len(lines(lab[name])), name)
        if rank:
            return
        again = lab.run(name, "train.steps=8", "checkpoint.every_steps=1000", ranks=2)
        reference = lab[lab.reference("train.steps=8", "checkpoint.every_steps=2", ranks=2)]
        case.check(same_end(lab[name], reference) if again.codes == [0, 0] else again, name)
