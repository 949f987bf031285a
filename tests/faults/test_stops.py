"""Told to stop, or out of time: F9 and F10. One checkpoint, at most one step lost, and the exit code that says so."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
from lab import Lab, Result, checkpoints, children, differences, lines, losses, newest, same_end, torchrun

from tracker import RECORDS, SAMPLES, cut_short

PHASES = (
    "step", "forward", "accumulation", "backward", "optimizer", "eval", "sample", "save", "data", "workers",
)  # fmt: skip
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
AT = 3  # steps that are done when the signal comes
OPTIONS = ("train.steps=6", "checkpoint.every_steps=1000")
GRACE_SEC = 30  # torchrun's, before SIGKILL; here for all of the run


def options_for(phase: str) -> tuple[str, ...]:
    more = {
        "workers": ("data.workers=2",), "save": ("checkpoint.every_steps=3",), "accumulation": ("train.micro_batch=1",),
        "eval": ("eval.every_steps=1",), "sample": ("sample.every_steps=1",),
    }  # fmt: skip
    return (*OPTIONS, *more.get(phase, ()))


def stopped(
    lab: Lab, name: str, phase: str, number: int, *, to: str = "self", at: int = AT, ranks: int = 1, go_on: bool = True
) -> str:
    """What is wrong with a run that gets a signal in a phase, with what it has saved, and with its continuation."""
    options = options_for(phase)
    plain = options_for("accumulation" if phase == "accumulation" else "step")
    reference = lab[lab.reference(*plain, "checkpoint.every_steps=1", ranks=ranks)]
    where = "data" if phase == "workers" else phase
    fault = {"phase": where, "number": number, "step": at, "to": to, "root": str(lab[name])}
    if phase in ("eval", "sample"):
        fault["step"] = at - 1  # they come at the end of a step
    result = lab.run(name, *options, faults=[("signal_in", fault)], ranks=ranks)
    saved = 2 if phase == "save" else 1  # the one that was being written, and that of the last step
    problem = judged(lab, name, result, number, at, ranks, saved)
    problem = problem or (differences(lab[name], reference) if at else "")
    return problem or (continued(lab, name, options, reference, ranks) if go_on else "")


def judged(lab: Lab, name: str, result: Result, number: int, at: int, ranks: int, saved: int) -> str:
    if result.codes != [128 + number] * ranks:
        return f"exit codes, not {128 + number}: {result}"
    if "Traceback" in result.err():
        return f"a traceback: {result}"
    found = newest(lab[name])
    done = int(found.name[5:]) if found is not None else 0
    if not at <= done <= at + 1:
        return f"step {done} is saved, {at} were done when the signal came"
    told = len(lines(lab[name]))
    if told != done:
        return f"step {done} is saved, {told} were taken"
    if len(checkpoints(lab[name])) not in ((1, saved) if done else (0,)):
        return f"{checkpoints(lab[name])}"
    return f"{result.seconds} s" if max(result.seconds) > GRACE_SEC else ""


def continued(lab: Lab, name: str, options: tuple[str, ...], reference: Any, ranks: int) -> str:
    again = lab.run(name, *options, ranks=ranks)
    return same_end(lab[name], reference) if again.codes == [0] * ranks else str(again)


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_a_phase(lab: Lab, row: Callable[[str], Any], phase: str) -> None:
    number = SIGNALS[PHASES.index(phase) % len(SIGNALS)]
    if phase == "workers":
        number = signal.SIGINT  # Ctrl-C reaches all of them
    with row("F9") as case:
        to = "group" if phase in ("workers", "data") else "self"
        problem = stopped(lab, f"signal-{phase}", phase, number, to=to, go_on=phase == "save")
        case.check(problem, f"{signal.Signals(number).name} in {phase}")


def test_a_signal_in_the_first_step(lab: Lab, row: Callable[[str], Any]) -> None:
    """Nothing is done yet, so nothing is saved; the same command begins again."""
    with row("F9") as case:
        case.check(stopped(lab, "signal-first", "forward", signal.SIGTERM, at=0))


def test_what_was_cut_short_is_made_up_for(lab: Lab, row: Callable[[str], Any]) -> None:
    """Evaluation and samples, in the middle of a run, and at its end, where nothing else is left to do."""
    options = ("train.steps=4", "train.micro_batch=1", "eval.every_steps=2", "log.every_steps=3")
    options += ("sample.every_steps=2",)
    name, reference = "signal-made-up-for", lab[lab.reference(*options)]
    with row("F9") as case:
        for phase, done, cut in (("eval", 2, [*RECORDS]), ("eval", 4, [*RECORDS]), ("sample", 4, [SAMPLES])):
            fault = {"phase": phase, "number": signal.SIGTERM, "step": done - 1 if phase == "eval" else 0}
            result = lab.run(name, *options, faults=[("signal_in", fault)])
            found = cut_short(lab[name], done)
            case.check("" if result.code == 143 and found == cut else (result, found), (phase, done))
        result = lab.run(name, *options)
        case.check("" if result.code == 0 and losses(lab[name], 4) == losses(reference, 4) else result, "again")
        case.check(same_end(lab[name], reference), "the end")
        mine, theirs = ((run / SAMPLES).read_text(encoding="utf-8") for run in (lab[name], reference))
        case.check("" if mine == theirs else (mine, theirs), "samples")
        result = lab.run(name, *options)
        case.check("" if "nothing was changed" in result.out() else result, "finished")


def test_a_second_signal_ends_at_once(lab: Lab, row: Callable[[str], Any]) -> None:
    fault = {"phase": "forward", "number": signal.SIGINT, "step": AT, "twice": True}
    with row("F9") as case:
        result = lab.run("signal-twice", *OPTIONS, faults=[("signal_in", fault)])
        case.check("" if result.code == 130 and not checkpoints(lab["signal-twice"]) else result)


@pytest.mark.dist
def test_a_signal_to_one_of_two_ranks(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F9") as case:
        fault = {"phase": "accumulation", "number": signal.SIGUSR1, "step": AT, "only_rank": 1}
        options, name = options_for("accumulation"), "signal-rank"
        result = lab.run(name, *options, faults=[("signal_in", fault)], ranks=2)
        # Rank 0 was not told by which signal.
        case.check("" if result.codes[0] > 128 and result.codes[1] == 128 + signal.SIGUSR1 else result, "exit codes")
        found = newest(lab[name])
        case.check("" if found is not None and int(found.name[5:]) in (AT, AT + 1) else found, "saved")
        reference = lab[lab.reference(*options, "checkpoint.every_steps=1", ranks=2)]
        case.check(differences(lab[name], reference), "what is saved")


@pytest.mark.slow
def test_every_signal_in_every_phase_to_everyone(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F9") as case:
        for phase, number, to in itertools.product(PHASES, SIGNALS, ("self", "group")):
            name = f"signal-{phase}-{number}-{to}"
            case.check(stopped(lab, name, phase, number, to=to), name)
        for phase, number in itertools.product(PHASES, SIGNALS):
            name = f"signal-two-{phase}-{number}"
            case.check(stopped(lab, name, phase, number, to="group", ranks=2), name)


@pytest.mark.slow
def test_a_hundred_sigterms(lab: Lab, row: Callable[[str], Any]) -> None:
    """At random, from the first step on: exit code 143, at most one step lost, and in the end the same bits."""
    options = ("train.steps=30", "eval.every_steps=3", "checkpoint.every_steps=4", "sample.every_steps=5")
    reference = lab[lab.reference(*options)]
    draw, sent, chain, begun = random.Random(5), 0, 0, False
    with row("F9") as case:
        while sent < 100:
            name = f"terms-{chain}"
            running = lab.start(name, *options)
            before = len(lines(lab[name]))
            while "validation:" not in running.out() and time.monotonic() < running.started + 20:
                time.sleep(0.002)
            time.sleep(draw.uniform(0.02, 0.7))
            done = len(lines(lab[name]))
            os.kill(running.pids[0], signal.SIGTERM)
            result = running.wait()
            ended = (newest(lab[name]) or lab[name]).name == "step_00000030"
            if result.code == 0 or (result.code == -signal.SIGTERM and ended):  # it had come to its end before
                case.failures += [problem for problem in (same_end(lab[name], reference),) if problem]
                chain, begun = chain + 1, False
                continue
            sent += 1
            found = newest(lab[name])
            step = int(found.name[5:]) if found is not None else 0
            case.check(
                "" if result.code == 143 and step >= max(done, before if begun else 0) else result, f"{sent}: {step}"
            )
            case.check("" if step == len(lines(lab[name])) else f"{step} saved, {len(lines(lab[name]))} taken", sent)
            begun = True
            case.figures["slowest stop, s"] = max(case.figures.get("slowest stop, s", 0), round(result.seconds[0], 1))
        case.check(continued(lab, name, options, reference, 1), "the end")
        case.figures["SIGTERMs at random"] = sent


@pytest.mark.slow
@pytest.mark.dist
def test_a_signal_to_torchrun(lab: Lab, row: Callable[[str], Any]) -> None:
    """It passes it on to both ranks and grants them 30 seconds; also where they had it, as Slurm sends it to all."""
    with row("F9") as case:
        for number, to_all in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGTERM, True)):
            name = f"torchrun-{number}-{to_all}"
            options = ("train.steps=2000", "checkpoint.every_steps=100000", "sample.every_steps=100000")
            with torchrun(lab, name, *options, "eval.every_steps=100000") as (process,):
                deadline = time.monotonic() + 60
                while len(lines(lab[name])) < AT and time.monotonic() < deadline:
                    time.sleep(0.05)
                for pid in (*(children(process.pid) if to_all else ()), process.pid):
                    os.kill(pid, number)
                began = time.monotonic()
                process.communicate(timeout=60)
                case.figures["torchrun's end, s"] = round(time.monotonic() - began, 1)
            found = newest(lab[name])
            case.check("" if found is not None and int(found.name[5:]) == len(lines(lab[name])) else found, number)
            case.check("" if case.figures["torchrun's end, s"] < 30 else "too late", number)


# ---- time


@pytest.mark.slow
def test_a_deadline_is_kept(lab: Lab, row: Callable[[str], Any]) -> None:
    """The run has ended, its checkpoint on the disk, when its minutes are over; where saving takes 2 seconds, too."""
    with row("F10") as case:
        for name, minutes, sync_sec in (("slow-disk", 0.12, 0.2),):
            name = f"deadline-{name}"
            options = ("train.steps=100000", "checkpoint.every_steps=20", f"train.max_minutes={minutes}")
            slow = ("slow_files", {"root": str(lab[name]), "seconds": sync_sec})
            result = lab.run(name, *options, faults=[("slow_steps", {"seconds": 0.05}), slow])
            case.check("" if result.code == 3 else result, "exit code")
            found = newest(lab[name])
            taken = len(lines(lab[name]))
            case.check("" if found is not None and int(found.name[5:]) == taken else f"{found} of {taken} steps", name)
            # A second for the process's own beginning and end, on busy cores.
            case.check("" if result.seconds[0] < 60 * minutes + 1 else f"{result.seconds[0]:.1f} s", "in time")
            case.figures[f"{name}, s of {60 * minutes:.1f}"] = round(result.seconds[0], 1)
