"""Death and power: F1 at every boundary of a save, F2 at random, F3 in retention, F4 power loss."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, checkpoints, differences, newest, same_end

SINCE = r"step_00000004\.tmp-"  # the second save of a run
FAST = ("train.steps=6", "checkpoint.keep=2")
TWO = {"ranks": 2}


def findings(lab: Lab, function: str, folder: Path, *options: Any) -> dict[str, Any]:
    result = lab.call(function, str(folder / "work"), str(folder / "report.json"), *options)
    assert result.code == 0, result
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ---- a save alone


def test_a_save_killed_at_every_boundary(lab: Lab, tmp_path: Path, row: Callable[[str], Any]) -> None:
    with row("F1") as case:
        found = findings(lab, "boundaries:kill_everywhere", tmp_path)
        case.tried += found["cases"]
        case.failures += found["failures"]
        case.figures["boundaries of a save alone"] = len(found["operations"])
    kinds = {line.split()[0] for line in found["operations"]}
    assert {"mkdir", "create", "write", "sync", "syncdir", "rename", "unlink", "rmdir"} <= kinds


def test_a_save_in_place_would_be_noticed(lab: Lab, tmp_path: Path) -> None:
    assert findings(lab, "boundaries:in_place", tmp_path)["failures"]


def test_retention_killed_at_every_boundary(lab: Lab, tmp_path: Path, row: Callable[[str], Any]) -> None:
    with row("F3") as case:
        for name, function, options in (
            ("many", "boundaries:kill_everywhere", (2, 4, "syncdir ..")),
            ("damaged", "boundaries:damaged_neighbours", ()),
        ):
            (tmp_path / name).mkdir()
            found = findings(lab, function, tmp_path / name, *options)
            case.tried += found["cases"]
            case.failures += found["failures"]
            case.figures["fewest intact checkpoints"] = min(
                found["least"], case.figures.get("fewest intact checkpoints", 99)
            )


# ---- a run that is killed during a save


def boundaries(lab: Lab, options: tuple[str, ...], ranks: int = 1) -> list[str]:
    """What a run's save of step 4 does, the retention after it included."""
    name = f"listed-{ranks}"
    log = lab[f"{name}.log"]
    if not log.exists():  # the lab is one for several tests
        fault = ("log_operations", {"root": str(lab[name]), "path": str(log), "since": SINCE})
        result = lab.run(name, *options, faults=[fault], ranks=ranks)
        assert result.codes == [0] * ranks, result
    lines = log.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if "step_00000006" in line), len(lines))
    return [line for line in lines[:end] if "metrics.jsonl" not in line]


def sampled(lines: list[str], *more: str) -> list[tuple[int, bool]]:
    """One boundary of each sort: (number, torn)."""
    wanted = ("sync .*optimizer", "write .*manifest", "rename ", "syncdir checkpoints$", *more)
    found = [next(n for n, line in enumerate(lines) if re.match(pattern, line)) for pattern in wanted]
    return [(number, "write" in lines[number]) for number in found]


def killed_and_resumed(
    lab: Lab, name: str, options: tuple[str, ...], boundary: int, torn: bool, ranks: int, group: bool = False
) -> str:
    """What is wrong with a run that is killed in its save of step 4 and started again."""
    reference = lab[lab.reference(*options, ranks=ranks)]
    fault = ("kill_at", {"root": str(lab[name]), "boundary": boundary, "since": SINCE, "torn": torn, "group": group})
    killed = lab.run(name, *options, faults=[fault], ranks=ranks)
    if killed.codes[0] != -signal.SIGKILL:
        return f"was not killed: {killed}"
    found = newest(lab[name])
    if found is None or found.name < "step_00000002":
        return f"{found} is the newest of {checkpoints(lab[name])}"
    if problem := differences(lab[name], reference):
        return problem
    again = lab.run(name, *options, ranks=ranks)
    if again.codes != [0] * ranks:
        return str(again)
    left = [path for path in checkpoints(lab[name]) if len(path) != len("step_00000000")]
    return f"{left} is left over" if left else same_end(lab[name], reference)


@pytest.mark.slow
def test_a_run_killed_during_a_save(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F1") as case:
        for number, (boundary, torn) in enumerate(sampled(boundaries(lab, FAST))):
            case.check(killed_and_resumed(lab, f"kill-{number}", FAST, boundary, torn, 1), boundary)
        case.figures["runs killed during a save"] = case.tried


@pytest.mark.slow
def test_a_run_killed_at_every_boundary_of_a_save(lab: Lab, row: Callable[[str], Any]) -> None:
    lines = boundaries(lab, FAST)
    with row("F1") as case:
        for boundary, line in enumerate(lines):
            for torn in (False, *(True,) * line.startswith("write")):
                case.check(
                    killed_and_resumed(lab, f"kill-{boundary}-{torn}", FAST, boundary, torn, 1), f"{boundary} {line}"
                )
        case.figures["boundaries of a run's save"] = len(lines)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_killed_at_every_boundary_of_a_save(lab: Lab, row: Callable[[str], Any]) -> None:
    lines = boundaries(lab, FAST, ranks=2)
    with row("F1") as case:
        torn_writes = [(number, torn) for number, torn in sampled(lines, "write .*model") if torn]
        for boundary, torn in [*((number, False) for number in range(len(lines))), *torn_writes]:
            name, group = f"kill-two-{boundary}-{torn}", not torn  # a rank that is left alone takes seconds to end
            case.check(killed_and_resumed(lab, name, FAST, boundary, torn, 2, group), f"{boundary} {lines[boundary]}")
        case.figures["2 ranks killed during a save"] = case.tried


# ---- at random


def random_kills(lab: Lab, name: str, kills: int, ranks: int, case: Any, *options: str) -> None:
    """Start a run again and again, kill it at a random time, at last let it end. Kills of nothing do not count."""
    reference = lab[lab.reference(*options, ranks=ranks)]
    draw, longest, steps = random.Random(name), 0.0, []
    done = 0
    while done < kills:
        running = lab.start(name, *options, ranks=ranks)
        time.sleep(draw.uniform(0.05, max(longest, 1.0) * 1.1))
        for pid in running.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                break
        result = running.wait()
        found = newest(lab[name])
        steps.append(int(found.name[5:]) if found is not None else 0)
        if result.codes[0] == 0:  # it came to its end before: another run
            longest = result.seconds[0]
            case.failures += [f"{name}: {problem}" for problem in (same_end(lab[name], reference),) if problem]
            os.rename(lab[name], lab[f"{name}-ended-{len(steps)}"])
            continue
        done += 1
        problem = differences(lab[name], reference) if found is not None else ""
        case.check(problem if result.codes[0] == -signal.SIGKILL else result, f"{name}, kill {done}")
    ended = lab.run(name, *options, ranks=ranks)
    case.check(same_end(lab[name], reference) if ended.code == 0 else ended, f"{name}, the end")
    left = [path for path in checkpoints(lab[name]) if len(path) != len("step_00000000")]
    case.check(f"{left} is left over" if left else "", name)


def test_random_kills(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F2") as case:
        random_kills(lab, "random", 5, 1, case, "train.steps=16", "checkpoint.every_steps=1", "checkpoint.keep=2")
        case.figures["kills"] = 5


@pytest.mark.slow
def test_many_random_kills(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F2") as case:
        for number, (kills, ranks, workers) in enumerate([(120, 1, 0), (100, 1, 1), (55, 1, 0), (25, 2, 0)]):
            options = ("train.steps=24", "checkpoint.every_steps=1", "checkpoint.keep=2", f"data.workers={workers}")
            random_kills(lab, f"random-{number}", kills, ranks, case, *options)
        case.figures["kills"] = 300


# ---- power loss


def power(lab: Lab, folder: Path, log: Path, most: int = 10**9) -> dict[str, Any]:
    """The states of a disk that holds `runs`, and below it what a run wrote."""
    report = folder / "power.json"
    arguments = [str(log), "runs/run/checkpoints", str(folder), str(report), ["runs"], most]
    result = lab.call("power:check", *arguments, timeout=900)
    assert result.code == 0, result
    return json.loads(report.read_text(encoding="utf-8"))


def logged_saves(lab: Lab, folder: Path, mutation: str = "") -> Path:
    """The log of three saves, of which two stay."""
    log = folder / "power.log"
    (folder / "runs").mkdir()
    fault = ("record", {"root": str(folder), "path": str(log), "mutation": mutation})
    result = lab.call("power:save_some", str(folder), 2, 3, faults=[fault])
    assert result.code == 0, result
    return log


def test_power_lost_during_saves(lab: Lab, tmp_path: Path, row: Callable[[str], Any]) -> None:
    with row("F4") as case:
        log = logged_saves(lab, tmp_path)
        found = power(lab, tmp_path, log)
        case.tried += found["states"]
        case.failures += found["failures"]
        case.figures["states of the disk"] = found["states"]
    assert found["points"] > 100


@pytest.mark.parametrize("mutation", ["sync", "syncdir", "flush"])
def test_a_save_that_does_not_sync_would_be_noticed(lab: Lab, tmp_path: Path, mutation: str) -> None:
    log = logged_saves(lab, tmp_path, mutation)
    assert power(lab, tmp_path, log, most=1)["failures"]


@pytest.mark.slow
def test_power_lost_during_a_run(lab: Lab, tmp_path: Path, row: Callable[[str], Any]) -> None:
    with row("F4") as case:
        log = tmp_path / "power.log"
        root = lab["power"]
        root.mkdir()
        (root / "runs").mkdir()
        fault = ("record", {"root": str(root), "path": str(log)})
        result = lab.run("power", *FAST, f"run.dir={root / 'runs' / 'run'}", faults=[fault])
        assert result.code == 0, result
        found = power(lab, tmp_path, log)
        case.tried += found["states"]
        case.failures += found["failures"]
        case.figures["states of the disk, whole run"] = found["states"]
