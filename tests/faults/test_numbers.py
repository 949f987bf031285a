"""Numbers that are none, and too little memory: F19 and F22."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from lab import Fault, Lab, checkpoints, differences, lines, same_end

MOST = 5  # skips in a row before a rollback
DIVERGED = 4  # the exit code


def skipped(
    lab: Lab, name: str, where: str, value: str, first: int, count: int, steps: int, *, ranks: int = 1,
    only_rank: int = -1, options: Sequence[str] = (),
) -> str:  # fmt: skip
    """A run of `steps` with `count` bad steps from `first` on: what is wrong with how it went on."""
    kept = lab.folder / f"{name}.skips"
    faults: list[Fault] = [
        ("poison", {"where": where, "first": first, "count": count, "value": value, "only_rank": only_rank}),
        ("watch_skips", {"path": str(kept)}),
    ]
    result = lab.run(name, f"train.steps={steps}", *options, faults=faults, ranks=ranks)
    if result.codes != [0] * ranks:
        return str(result)
    told = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()] if kept.exists() else []
    if [line["step"] for line in told] != list(range(first, first + count)):
        return f"steps {[line['step'] for line in told]} were skipped"
    if not all(line["same"] for line in told):
        return f"a skipped step changed a state: {told}"
    found = [line["skipped"] for line in lines(lab[name])]
    if found != [first <= step < first + count for step in range(steps)]:
        return f"skipped are {found}"
    return "" if lines(lab[name])[-1]["skipped_steps"] == count else "miscounted"


@pytest.mark.parametrize(
    ("where", "value", "first"),
    [("gradient", "nan", 0), ("loss", "inf", 3), ("loss", "nan", 3), ("muon", "nan", 3), ("gradient", "-inf", 5)],
)
def test_a_step_that_is_skipped(lab: Lab, row: Callable[[str], Any], where: str, value: str, first: int) -> None:
    with row("F19") as case:
        case.check(skipped(lab, f"skip-{where}-{value}-{first}", where, value, first, 1, 7))


def test_five_in_a_row_are_skipped(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F19") as case:
        case.check(skipped(lab, "skip-five", "gradient", "nan", 2, MOST, 9))


@pytest.mark.dist
def test_one_rank_s_numbers_are_skipped_by_both(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F19") as case:
        case.check(skipped(lab, "skip-rank", "loss", "nan", 2, 1, 5, ranks=2, only_rank=1))


@pytest.mark.slow
def test_steps_that_are_skipped_late_and_in_16_bits(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F19") as case:
        for where in ("gradient", "loss", "muon"):
            for value in ("nan", "inf", "-inf"):
                for first in (1, 10, 100):
                    case.check(skipped(lab, f"late-{where}-{value}-{first}", where, value, first, 1, first + 3), first)
            options = ("train.precision=bf16",)
            case.check(skipped(lab, f"late-{where}-bf16", where, "nan", 4, 2, 8, options=options), "bf16")
        for where in ("gradient", "loss"):
            case.check(skipped(lab, f"late-two-{where}", where, "inf", 10, 1, 14, ranks=2, only_rank=1), "2 ranks")


def test_an_unguarded_update_would_be_noticed(lab: Lab) -> None:
    """The same watch over an update that multiplies instead of branching: NaN reaches the state."""
    kept = lab.folder / "unguarded.skips"
    faults: list[Fault] = [
        ("unguarded", {}),
        ("poison", {"where": "gradient", "first": 2, "count": 1}),
        ("watch_skips", {"path": str(kept)}),
    ]
    lab.run("unguarded", "train.steps=4", faults=faults)
    assert not json.loads(kept.read_text(encoding="utf-8").splitlines()[0])["same"]


def test_six_in_a_row_go_back_to_a_checkpoint(lab: Lab, row: Callable[[str], Any]) -> None:
    """Back to the last checkpoint before them, with the data moved on; and to the end from there."""
    with row("F19") as case:
        fault = ("poison", {"where": "gradient", "first": 5, "count": MOST + 1})
        result = lab.run("back", "train.steps=12", "checkpoint.every_steps=2", faults=[fault])
        case.check("" if result.code == 0 and "back to step 4" in result.out() else result, "rolled back")
        found = lines(lab["back"])
        case.check("" if [line["step"] for line in found] == list(range(1, 13)) else found, "steps")
        case.check("" if not any(line["skipped"] for line in found) else "skipped steps are left", "metrics")
        plain = lines(lab[lab.reference("train.steps=12", "checkpoint.every_steps=2")])
        case.check("" if found[3]["loss"] == plain[3]["loss"] else "step 4", "before it")
        seen = [line["cursor"]["row"] for line in (found[3], found[4])]
        rows = plain[0]["cursor"]["row"]
        case.check("" if seen[1] - seen[0] == (1 + 1 + MOST + 1) * rows else seen, "the data move on")
        case.figures["rows passed over"] = seen[1] - seen[0] - rows


@pytest.mark.slow
def test_killed_after_going_back(lab: Lab, row: Callable[[str], Any]) -> None:
    """What was saved during the bad steps is not what a resume goes on from: the run ends as the one not killed."""
    options = ("train.steps=12", "checkpoint.every_steps=2")
    poison: Fault = ("poison", {"where": "gradient", "first": 5, "count": MOST + 1})
    with row("F19") as case:
        reference = lab[lab.reference(*options, faults=[poison])]
        # 4, six bad steps to 11, back to 4, and on: calls 11 and 12 make steps 5 and 6; dead in the one after.
        result = lab.run("back-killed", *options, faults=[poison, ("die_in_call", {"call": 14})])
        case.check("" if result.code == -9 else result, "killed")
        case.check(differences(lab["back-killed"], reference), "what is saved")
        result = lab.run("back-killed", *options)
        case.check(same_end(lab["back-killed"], reference) if result.code == 0 else result, "the end")


def test_going_back_again_and_again_ends(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F19") as case:
        fault = ("poison", {"where": "gradient", "first": 3, "count": 1000})
        result = lab.run("diverged", "train.steps=40", "checkpoint.every_steps=2", faults=[fault])
        case.check("" if result.code == DIVERGED else result, "exit code")
        dump = json.loads((lab["diverged"] / "diverged.json").read_text(encoding="utf-8"))
        case.check("" if dump["norms"] and dump["cursor"] else dump, "dump")
        case.check("" if "step_00000002" in checkpoints(lab["diverged"]) else checkpoints(lab["diverged"]), "kept")


def test_a_full_disk_while_going_back_costs_no_exit_code(lab: Lab, row: Callable[[str], Any]) -> None:
    """Neither the lines of the metrics, which are to go, nor the dump can be written."""
    poison: Fault = ("poison", {"where": "gradient", "first": 3, "count": 1000})
    root = str(lab["diverged-full"])
    metrics: Fault = (
        "disk", {"root": root, "code": "ENOSPC", "paths": r"metrics\.tmp", "kinds": ["rename"], "first": 1},
    )  # fmt: skip
    dump: Fault = ("disk", {"root": root, "code": "ENOSPC", "paths": r"diverged\.json"})
    with row("F19") as case:
        result = lab.run("diverged-full", "train.steps=40", faults=[poison, metrics, dump])
        case.check("" if result.code == DIVERGED and "diverged.json could not" in result.out() else result, "exit code")


# ---- memory

MORE = [("forward", 4), ("forward", 2), ("backward", 2)]


def out_of_memory(
    lab: Lab, name: str, times: int, case: Any, *more: str, ranks: int = 1, where: str = "forward"
) -> None:
    options = ("train.steps=6", "optim.ns_dtype=fp32", "optim.eps=1e-6", *more)
    reference = lab.reference(*options, ranks=ranks)
    fault = ("out_of_memory", {"step": 3, "times": times, "only_rank": ranks - 1, "where": where})
    result = lab.run(name, *options, faults=[fault], ranks=ranks)
    case.check("" if result.codes == [0] * ranks and "out of memory" in result.out() else result, name)
    mine, theirs = lines(lab[name]), lines(lab[reference])
    case.check("" if [x["tokens"] for x in mine] == [x["tokens"] for x in theirs] else "tokens", name)
    case.check("" if [x["cursor"] for x in mine] == [x["cursor"] for x in theirs] else "data", name)
    furthest = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(mine, theirs, strict=True))
    case.check("" if furthest < 1e-5 else f"{furthest:.1e}", name)
    case.figures["largest relative difference"] = max(furthest, case.figures.get("largest relative difference", 0.0))


def test_too_little_memory(lab: Lab, row: Callable[[str], Any]) -> None:
    """Half the rows at a time, the same step; twice halved it is a quarter."""
    with row("F22") as case:
        out_of_memory(lab, "memory", 2, case)


def test_memory_for_not_even_one_row(lab: Lab, row: Callable[[str], Any]) -> None:
    with row("F22") as case:
        fault = ("out_of_memory", {"step": 3, "times": 10**6})
        result = lab.run("memory-none", faults=[fault])
        case.check("" if result.code == 2 and "out of memory" in result.err() else result, "told")
        case.check(
            "" if "step_00000002" in checkpoints(lab["memory-none"]) else checkpoints(lab["memory-none"]), "kept"
        )


@pytest.mark.dist
@pytest.mark.parametrize(
    ("where", "rows"), [("backward", 4), *(pytest.param(*at, marks=pytest.mark.slow) for at in MORE)], ids=str
)
def test_too_little_memory_on_one_of_two_ranks(lab: Lab, row: Callable[[str], Any], where: str, rows: int) -> None:
    """With 4 rows at a time the step is one micro-batch, in which gradients are exchanged."""
    options = ("train.batch_tokens=128", f"train.micro_batch={rows}")
    with row("F22") as case:
        out_of_memory(lab, f"memory-rank-{where}-{rows}", 1, case, *options, ranks=2, where=where)
