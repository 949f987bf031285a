"""Stopped and started again, not a bit is different: F11 to F13. On another number of ranks: the same order of data."""

from __future__ import annotations

import itertools
import random
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from lab import Fault, Lab, lines, same_end

SHAPES = {  # accumulation: rows at a time of the 4 of a step
    1: "train.micro_batch=4",
    4: "train.micro_batch=1",
}
FP32 = ("optim.ns_dtype=fp32", "optim.eps=1e-6")


def chain(
    lab: Lab, name: str, options: Sequence[str], stops: Sequence[int], *, ranks: int = 1, faults: Sequence[Fault] = ()
) -> str:
    """Stop a run after each of these steps, start it again each time; what is different at the end."""
    reference = lab.reference(*options, ranks=ranks, faults=list(faults))
    for stop in stops:
        result = lab.run(name, *options, faults=[*faults, ("stop_after", {"step": stop})], ranks=ranks)
        if result.codes != [128 + signal.SIGTERM] * ranks:
            return f"was not stopped after step {stop}: {result}"
    result = lab.run(name, *options, faults=faults, ranks=ranks)
    return same_end(lab[name], lab[reference]) if result.codes == [0] * ranks else str(result)


def combination(optimizer: str, precision: str, accumulation: int) -> tuple[list[str], list[Fault]]:
    """fp16 is what a T4 computes in; a CPU is slow at it, and refuses, but for tests."""
    asked = "auto" if precision == "fp16" else precision
    options = [f"optim.name={optimizer}", f"train.precision={asked}", SHAPES[accumulation]]
    return options, [("fp16", {})] if precision == "fp16" else []


FAST = [("adamw", "bf16", 4, 1), ("muon", "fp16", 1, 1)]
ALL = list(itertools.product(("muon", "adamw"), ("fp32", "bf16", "fp16"), (1, 4), (1, 2)))


@pytest.mark.parametrize("case", FAST, ids=lambda case: "-".join(map(str, case)))
def test_resume_is_exact(lab: Lab, row: Callable[[str], Any], case: tuple[str, str, int, int]) -> None:
    optimizer, precision, accumulation, ranks = case
    options, faults = combination(optimizer, precision, accumulation)
    with row("F11") as tried:
        name = "exact-" + "-".join(map(str, case))
        tried.check(chain(lab, name, [*options, "train.steps=6"], (2, 5), ranks=ranks, faults=faults), name)


@pytest.mark.slow
@pytest.mark.dist
def test_resume_of_two_ranks_is_exact(lab: Lab, row: Callable[[str], Any]) -> None:
    options, faults = combination("muon", "fp32", 4)
    with row("F11") as tried:
        tried.check(chain(lab, "exact-two", [*options, "train.steps=6"], (3,), ranks=2, faults=faults))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=lambda case: "-".join(map(str, case)))
def test_fifty_steps_stopped_ten_times(lab: Lab, row: Callable[[str], Any], case: tuple[str, str, int, int]) -> None:
    optimizer, precision, accumulation, ranks = case
    options, faults = combination(optimizer, precision, accumulation)
    # The dense layer, too: the other tests have MoE layers alone.
    options += ["train.steps=50", "model.num_hidden_layers=2", "model.first_k_dense_replace=1"]
    stops = sorted(random.Random(str(case)).sample(range(1, 50), 10))
    with row("F11") as tried:
        problem = chain(lab, "fifty-" + "-".join(map(str, case)), options, stops, ranks=ranks, faults=faults)
        tried.check(problem, case)
        tried.figures["combinations"] = 1
        tried.figures["stops"] = len(stops)


def test_one_bit_of_the_momentum_would_be_noticed(lab: Lab) -> None:
    """A resume that loses the last bit of one momentum ends otherwise."""
    result = lab.run("one-bit", faults=[("stop_after", {"step": 3})])
    assert result.code == 143, result
    result = lab.run("one-bit", faults=[("nudge_optimizer", {})])
    assert result.code == 0, result
    assert "tensors differ" in same_end(lab["one-bit"], lab[lab.reference()])


@pytest.mark.slow
def test_crash_resume_crash_before_a_save(lab: Lab, row: Callable[[str], Any]) -> None:
    """Killed twice between the same two checkpoints, then stopped, then killed again: each document once."""
    options = ("train.steps=10", "checkpoint.every_steps=4")
    with row("F12") as case:
        reference = lab[lab.reference(*options)]
        for number, (step, what) in enumerate(((6, "die"), (7, "die"), (6, "stop"), (9, "die"))):
            faults: list[Fault] = [("at_step", {"step": step, "what": "die", "only_rank": 0})]
            if what == "stop":
                faults = [("stop_after", {"step": step})]
            result = lab.run("chain", *options, faults=faults)
            wanted = -signal.SIGKILL if what == "die" else 128 + signal.SIGTERM
            case.check("" if result.code == wanted else result, f"link {number}")
        result = lab.run("chain", *options)
        case.check(same_end(lab["chain"], reference) if result.code == 0 else result, "the end")
        mine, theirs = ([line["cursor"] for line in lines(run)] for run in (lab["chain"], reference))
        case.check("" if mine == theirs and len(mine) == 10 else f"{mine} is not {theirs}", "the data's order")
        case.figures["links of the chain"] = 5


def same_order(lab: Lab, name: str, reference: str, case: Any) -> None:
    """The cursor after every step is the same, every loss within 1e-5."""
    mine, theirs = lines(lab[name]), lines(lab[reference])
    case.check("" if [x["cursor"] for x in mine] == [x["cursor"] for x in theirs] else "another order", f"{name}: data")
    pairs = [
        (line[key], other[key])
        for line, other in zip(mine, theirs, strict=True)
        for key in ("loss", "mtp_loss", "balance_loss", "grad_norm")
    ]
    furthest = max(abs(a - b) / abs(b) for a, b in pairs)
    case.check("" if furthest < 1e-5 else f"{furthest:.1e}", f"{name}: losses")
    case.figures["largest relative difference"] = max(furthest, case.figures.get("largest relative difference", 0.0))


def resized(lab: Lab, worlds: Sequence[int], steps: int, case: Any) -> None:
    """A run that goes on with another number of ranks, several times."""
    name = f"ranks-{steps}-" + "-".join(map(str, worlds))
    options = (f"train.steps={steps}", *FP32)
    reference = lab.reference(*options)
    for number, ranks in enumerate(worlds):
        stop = steps * (number + 1) // len(worlds)
        faults: list[Fault] = [("stop_after", {"step": stop})] if number + 1 < len(worlds) else []
        result = lab.run(name, *options, faults=faults, ranks=ranks)
        case.check("" if result.codes == [143 if faults else 0] * ranks else result, f"{name}, {ranks}")
    same_order(lab, name, reference, case)


@pytest.mark.dist
def test_another_number_of_ranks(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F13") as case:
        resized(lab, (2, 1), 40, case)  # the first twenty on two


@pytest.mark.slow
@pytest.mark.dist
def test_fifty_steps_on_several_numbers_of_ranks(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F13") as case:
        for worlds in ((2, 1), (1, 2), (2, 3), (3, 1, 2)):
            resized(lab, worlds, 50, case)
