"""Machines that come and go with nothing but the Hub between them: a simulated Colab; and a Hub that refuses (F29)."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_model_hub import TOKEN, FakeModelHub, Fault
from lab import Lab, Result, Running, lines, newest, tensors

from tracker import CUT_SHORT

REPO = "hub.repo_id=someone/model"
NOT_PUSHED = 6  # the exit code of a run whose newest checkpoint is not on the Hub
GOODPUT = 0.97


@pytest.fixture
def server() -> Iterator[FakeModelHub]:
    with FakeModelHub() as server:
        yield server


def at(server: FakeModelHub, lab: Lab, every_sec: float = 0.0) -> tuple[str, dict[str, Any]]:
    options = {"endpoint": server.endpoint, "token": TOKEN, "cache": str(lab.folder / "cache"), "every_sec": every_sec}
    return "hub_at", options


def session(lab: Lab, name: str, options: tuple[str, ...], fault: Any, last: int) -> tuple[Result, int]:
    """A machine with an empty disk trains until `last` more steps are seen, and dies; the steps it has taken."""
    shutil.rmtree(lab[name], ignore_errors=True)
    running = lab.start(name, *options, faults=[fault], timeout=1200)
    pid = running.pids[0]
    while os.path.exists(f"/proc/{pid}") and _steps(running) < last:
        if "Z" in _state(pid):
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
    return running.wait(), _steps(running)


def _steps(running: Running) -> int:
    """As the screen has them: the metrics hold those of sessions before, too."""
    return len(set(re.findall(r"(?m)^step (\d+)/", running.out())))


def _state(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def colab(lab: Lab, server: FakeModelHub, name: str, steps: int, mean: int, case: Any) -> None:
    """Sessions of `mean` steps on the average; a checkpoint every 5, pushed as soon as the one before is up."""
    options = (f"train.steps={steps}", "checkpoint.keep=2", "eval.every_steps=100000")
    alone = lab.run(f"{name}-alone", *options, "checkpoint.every_steps=100000", timeout=3600)
    assert alone.code == 0, alone
    draw, taken, deaths = random.Random(name), 0, 0
    while True:
        length = round(draw.uniform(0.5, 1.5) * mean)
        result, done = session(lab, name, (*options, "checkpoint.every_steps=5", REPO), at(server, lab), length)
        taken += done
        if result.code == 0:
            break
        deaths += 1
        case.check("" if result.code == -signal.SIGKILL else result, f"death {deaths}")
        assert deaths < 100, result
    ours, theirs = newest(lab[name]), newest(lab[f"{name}-alone"])
    assert ours is not None and theirs is not None
    case.check("" if ours.name == theirs.name and tensors(ours) == tensors(theirs) else "other weights", "the end")
    case.figures |= {"deaths": deaths, "goodput": round(steps / taken, 4), "steps": steps}


@pytest.mark.slow
def test_one_death_and_an_empty_disk(lab: Lab, server: FakeModelHub, row: Callable[[str], Any]) -> None:
    with row("Colab") as case:
        colab(lab, server, "colab-short", 24, 14, case)


@pytest.mark.slow
def test_a_simulated_colab(lab: Lab, server: FakeModelHub, row: Callable[[str], Any]) -> None:
    with row("Colab") as case:
        colab(lab, server, "colab", 8800, 400, case)  # were 5 steps its 5 minutes, a session would last 7 hours
        case.expect(case.figures["deaths"] >= 20, case.figures)
        case.check("" if case.figures["goodput"] >= GOODPUT else case.figures, "goodput")


def test_the_hub_hears_of_what_is_made_up_for(lab: Lab, server: FakeModelHub, row: Callable[[str], Any]) -> None:
    """An evaluation cut short after the last step, pushed without it: by an empty machine, where no step is left."""
    fault = {"phase": "eval", "number": signal.SIGTERM, "step": 3}
    options, name = ("train.steps=4", "train.micro_batch=1", REPO), "made-up-for"
    with row("F9") as case:
        for faults, code, key in (([("signal_in", fault)], 143, CUT_SHORT), ([], 0, "val_loss")):
            shutil.rmtree(lab[name], ignore_errors=True)
            result = lab.run(name, *options, faults=[*faults, at(server, lab)])
            case.check("" if result.code == code else result, "exit code")
            pushed = json.loads(server.repos["someone/model"].head.files["metrics.jsonl"].splitlines()[-1])
            case.check("" if pushed["step"] == 4 and key in pushed else pushed, "on the Hub")


@pytest.mark.slow
def test_a_hub_that_refuses(lab: Lab, server: FakeModelHub, row: Callable[[str], Any]) -> None:
    """Told with the next step that is logged, by metrics and exit code; the steps are all taken."""
    server.faults.append(Fault("POST .*/commit/", "403", 10**6))
    with row("F29") as case:
        faults = [at(server, lab), ("slow_steps", {"seconds": 0.2})]
        result = lab.run("refused", "train.steps=12", "checkpoint.every_steps=2", REPO, faults=faults)
        case.check("" if result.code == NOT_PUSHED else result, "exit code")
        errors = [line.get("hub_error") for line in lines(lab["refused"])]
        case.check("" if len(errors) == 12 and errors[-1] else errors, "told")
        case.check("" if any(errors[3:5]) else errors, "within a step of the first push")
        case.check("" if lines(lab["refused"])[-1]["hub_lag_steps"] >= 10 else lines(lab["refused"])[-1], "lag")
