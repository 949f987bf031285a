"""What a run survives, counted: the tests of tests/faults/ and their kin, one row per fault.

    python scripts/fault_matrix.py                        the short matrix, as plain `pytest` runs it
    python scripts/fault_matrix.py --long                 with what takes minutes each
    python scripts/fault_matrix.py --only F1,F4 --long    some faults
    python scripts/fault_matrix.py --only overhead        what surviving costs: the guards, and the stall of a save
    python scripts/fault_matrix.py --only Colab,overhead --long --out FILE --add    measured again, into a FILE

Faults are injected: a shim before every file operation, signals, NaN, ranks that die, a Hub that lies. `tried` counts
cases, `survived` those in which nothing was lost that should not be. FILE is written after every test: what a run that
is cut off has measured stays, marked by its row's `unfinished`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import torch
from duels import hardware, table, versions

import parallel
import saver as saving
from options import Parser, UserError
from signals import StopFlag
from text import report

ROOT = Path(__file__).resolve().parent.parent
FAULTS = {
    "F1": "SIGKILL at every I/O boundary of a save", "F2": "SIGKILL at random", "F3": "SIGKILL during retention",
    "F4": "power loss", "F5": "files cut, deleted, longer", "F6": "flipped bits", "F7": "disk full",
    "F8": "folder that cannot be written", "F9": "signals", "F10": "deadline", "F11": "bit-exact resume",
    "F12": "chained resumes and crashes", "F13": "another number of ranks", "F14": "Hub that fails",
    "F15": "Hub read during a push", "F16": "two pushers", "F17": "stream that fails", "F18": "bad documents",
    "F19": "NaN and infinity", "F20": "rank killed, hanging, slow", "F21": "rank without data", "F22": "out of memory",
    "F23": "bad configurations", "F24": "no token, no network, no GPU", "F25": "two runs in a folder",
    "F26": "secrets", "F27": "hostile files", "F28": "renames refused", "F29": "background failures",
    "F30": "checkpoints of other versions", "Colab": "random deaths, empty disk, Hub only",
    "Pickles": "files of the code that read or write none",
}  # fmt: skip
# Faults whose tests lie with their modules, each test a case: in files so called, functions that hold one of the words.
ELSEWHERE: dict[str, tuple[tuple[str, str], ...]] = {
    "F14": (
        ("test_pusher*.py", "fault|silence|stage|mends|outage|flush_gives|hours|away|no_network"),
        ("test_hub.py", "fails_now|refuses|squashed|not_wait_for_ever"), ("test_mirror.py", "out_of_reach"),
    ),
    "F15": (("test_pusher*.py", "every_instant|dies|readers"), ("test_hub.py", "pull_that_dies")),
    "F16": (("test_pusher.py", "two_pushers|between_our|another_runs|started_again"),),
    "F17": (("test_remote.py", ""),),
    "F18": (("test_sources.py", "skips|utf8|damaged|bomb|whatever|becomes_another|goes_away|one_line_is_cut"),),
    "F23": (("test_bad_configs.py", ""),),
    "F24": (
        ("test_pusher*.py", "tokens_and_rights|no_network"), ("test_environment.py", "too_old"),
        ("test_parallel.py", "torch_cannot_use"), ("test_train.py", "hub_out_of_reach"),
        ("test_mirror.py", "out_of_reach"),
    ),
    "F26": (
        ("test_security.py", "secret"), ("test_pusher.py", "in_no_message"), ("test_card.py", "secret"),
        ("test_environment.py", "secrets"),
    ),
    "F27": (("test_foreign.py", ""), ("test_hub.py", "no_name_leads|without_end|latest_that_is_none")),
    "F30": (("test_resume.py", "version_before|another_kind"),),
}  # fmt: skip
CADENCE_SEC = 300.0  # checkpoint.every_minutes' default
PAIRS, STEPS, EVERY = 5, 26, 2  # of the overhead's runs: pairs, steps, steps between saves


# ---------------------------------------------------------------------------------------------------------------- rows


def members_of(fault: str) -> list[str]:
    """What pytest is to run: test functions that say `row("F1")`, and those of ELSEWHERE."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        words = next((words for name, words in ELSEWHERE.get(fault, ()) if path.match(name)), None)
        if words is None and f'row("{fault}")' not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                says = f'row("{fault}")' in (ast.get_source_segment(text, node) or "")
                if says or (words is not None and re.search(words, node.name)):
                    found.append(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return found


class Case(NamedTuple):
    """How a test ended."""

    name: str  # as pytest's node, with parameters
    passed: bool
    seconds: float
    counted: list[tuple[str, str]]  # faults, and what was counted of them as JSON

    @property
    def test(self) -> str:
        return self.name.partition("[")[0]


class Listener:
    """A plugin of pytest that hands over every test as it ends; skipped ones are none."""

    def __init__(self, ended: Callable[[Case], None]):
        self.ended, self.parts = ended, {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        parts = self.parts.setdefault(report.nodeid, [])
        parts.append(report)
        if report.when == "teardown" and not any(part.skipped for part in parts):
            counted = [(key, value) for key, value in report.user_properties if key in FAULTS]
            passed = all(part.passed for part in parts)
            self.ended(Case(report.nodeid, passed, sum(part.duration for part in parts), counted))


def run_tests(tests: list[str], ended: Callable[[Case], None], *, long: bool, processes: int) -> None:
    import pytest

    words = ["-q", "-n", str(processes), "--maxschedchunk=1", "-m", "" if long else "not slow"]
    os.chdir(ROOT)
    code = pytest.main([*words, *tests], plugins=[Listener(ended)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise UserError(f"pytest ended with {code!r}; its words are above")


def row_of(fault: str, tests: list[str], cases: list[Case], *, long: bool = False) -> dict[str, Any]:
    """The counts of a fault's tests, added up."""
    row: dict[str, Any] = {
        "fault": fault, "what": FAULTS[fault], "tried": 0, "survived": 0, "figures": {}, "tests": 0, "failed": [],
        "seconds": 0.0, "long": long,
    }  # fmt: skip
    for case in cases:
        if case.test not in tests:
            continue
        row["tests"] += 1
        row["seconds"] = round(row["seconds"] + case.seconds, 1)
        if not case.passed:
            row["failed"].append(case.name)
        counted = [json.loads(value) for key, value in case.counted if key == fault]
        for value in counted or [{"tried": 1, "survived": int(case.passed)}]:
            row["tried"] += value["tried"]
            row["survived"] += value["survived"]
            merge(row["figures"], value.get("figures", {}))
    # A test that ended before it had counted is a failure that no count shows.
    row["survived"] = min(row["survived"], row["tried"] - bool(row["failed"]))
    return row


def merge(figures: dict[str, Any], more: dict[str, Any]) -> None:
    """Of counts the sum, of times and differences the largest, of what must not fall the smallest."""
    for key, value in more.items():
        if key not in figures:
            figures[key] = value
        elif key.startswith("fewest"):
            figures[key] = min(figures[key], value)
        elif isinstance(value, int) and not key.endswith(("per file", "files")):
            figures[key] += value
        else:
            figures[key] = max(figures[key], value)


# ------------------------------------------------------------------------------------------------------------ overhead


def overhead() -> dict[str, Any]:
    """What checkpoints and guards take from tokens per second at a 5-minute cadence, in percent.

    Runs of the quickstart in turns: saving every EVERY steps; not at all; saving for a Hub that nobody can reach. A
    save costs the difference, and comes once in five minutes. Added is what a step's guards take, measured alone. The
    stall is what training has waited for saves, by its own count; it is within what a save costs.
    """
    saves = (STEPS - 6) // EVERY
    seconds: dict[str, list[float]] = {"on": [], "off": [], "no hub": []}
    stalls: list[float] = []
    for turn in range(PAIRS):
        order = list(seconds)
        for which in (*order[turn % 3 :], *order[: turn % 3]):
            took, waited = timed_run(10**6 if which == "off" else EVERY, hub=which == "no hub")
            seconds[which].append(took)
            stalls += waited
            print(f"{which}: {took:.2f} s", file=sys.stderr)
    costs = [(on - off) / saves for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    pushes = [(hub - on) / saves for hub, on in zip(seconds["no hub"], seconds["on"], strict=True)]
    step_sec = statistics.median(seconds["off"]) / (STEPS - 6)
    guards = guards_sec()
    return {
        "percent": round(100 * (statistics.median(costs) / CADENCE_SEC + guards / step_sec), 4),
        "a save costs, s": round(statistics.median(costs), 4),
        "spread of that, s": round(statistics.stdev(costs), 4),
        "guards of a step, s": round(guards, 7),
        "a step, s": round(step_sec, 4),
        "a Hub out of reach, percent more": round(100 * statistics.median(pushes) / CADENCE_SEC, 4),
        "a push that fails costs, s": round(statistics.median(pushes), 4),
        "spread of that cost, s": round(statistics.stdev(pushes), 4),
        "stall, percent": round(100 * statistics.mean(stalls) / CADENCE_SEC, 4),
        "stall of a save, s": round(statistics.median(stalls), 4),
        "95th percentile of that stall, s": round(statistics.quantiles(stalls, n=20)[-1], 4),
        "saves": len(stalls),
        "saves per run": saves,
        "runs": 3 * PAIRS,
    }


def timed_run(every: int, *, hub: bool) -> tuple[float, list[float]]:
    """Seconds of a quickstart's steps 6 to STEPS, the first being slower; and how long it waited for each save."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"run.dir={folder}/run", f"train.steps={STEPS + 5}", f"checkpoint.every_steps={every}", "log.every_steps=1",
            "eval.every_steps=1000000", "eval.tokens=1", "sample.every_steps=1000000", "sample.max_new_tokens=1",
            "checkpoint.every_minutes=null",
        ]  # fmt: skip
        environment = dict(os.environ)
        if hub:
            options += ["--resume", "never", "hub.repo_id=nobody/nothing"]
            environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "no-token"}  # where nothing listens
        command = [sys.executable, "train.py", "--config", "quickstart", *options]
        times: dict[int, float] = {}
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if step := re.match(r"step (\d+)/", line):
                    times[int(step[1])] = time.perf_counter()
                if STEPS in times:
                    process.kill()  # nobody waits for the last save, or for the Hub
                    break
        if STEPS not in times:
            raise UserError(f"{shlex.join(command)}: exit code {process.returncode}")
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    waited = [json.loads(line)["save_wait_sec"] for line in lines]
    return times[STEPS] - times[6], [after - before for before, after in itertools.pairwise(waited) if after > before]


def guards_sec() -> float:
    """What a step of one rank with two micro-batches spends on being stopped, agreed with, put back and saved."""
    mesh = parallel.Mesh(0, 1, torch.device("cpu"))
    watch, stop = parallel.Watch(mesh, 600.0), StopFlag()
    values = [1.0] * 6
    with tempfile.TemporaryDirectory() as folder:
        saver = saving.Saver(Path(folder), keep=2, every_sec=CADENCE_SEC, note=print)

        def guards() -> None:
            saver.check()
            mesh.any(False, False, False, saver.hopeless, saver.due())
            for number in range(2):
                mesh.any(stop.requested, False)
                watch.at(f"step 1, micro-batch {number}")
            mesh.any(not all(map(abs, values)))

        return _seconds(guards)


def _seconds(run: Callable[[], None], times: int = 2000) -> float:
    run()
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


# ------------------------------------------------------------------------------------------------------------- program


def shown(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        figures = ", ".join(f"{key} {value}" for key, value in row["figures"].items())
        yield {key: row[key] for key in ("fault", "what", "tried", "survived")} | {"figures": figures}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="fault_matrix.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="F1,F2", help="some of the faults, or overhead")
    parser.add_argument("--long", action="store_true", help="with the tests marked slow, and the overhead")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="tests at a time (2)")
    parser.add_argument(
        "--out", metavar="FILE", type=os.path.abspath, help="write the result as JSON, after every test"
    )
    parser.add_argument("--add", action="store_true", help="to the rows that FILE holds, of the same machine")
    given = parser.parse_args(arguments)
    given.wanted = given.only.split(",") if given.only else [*FAULTS, *["overhead"] * given.long]
    if given.add and not (given.out and Path(given.out).exists()):
        raise UserError("--add needs --out with a file that is there")
    if unknown := set(given.wanted) - FAULTS.keys() - {"overhead"}:
        raise UserError(
            f"--only {given.only}: no fault {min(unknown)}; there are F1 to F30, Colab, Pickles and overhead"
        )
    return given


def begun(given: argparse.Namespace, command: str) -> dict[str, Any]:
    """A result without rows, or with those that stand in the file to be added to."""
    result: dict[str, Any] = {
        "hardware": hardware(torch.device("cpu")), "versions": versions(), "commands": [], "rows": [],
    }  # fmt: skip
    if given.add:
        stored = json.loads(Path(given.out).read_text(encoding="utf-8"))
        if other := [key for key in ("hardware", "versions") if stored[key] != result[key]]:
            raise UserError(f"--add: {given.out} is of other {other[0]}: {stored[other[0]]}, not {result[other[0]]}")
        result = stored
    result["commands"].append(command)
    return result


def matrix(given: argparse.Namespace, result: dict[str, Any], store: Callable[[], None]) -> None:
    """Run the tests; `result` is brought up to date, and stored, after each."""
    members = {fault: found for fault in given.wanted if fault in FAULTS and (found := members_of(fault))}
    kept = [row for row in result["rows"] if row["fault"] not in members]
    cases: list[Case] = []

    def ended(case: Case) -> None:
        cases.append(case)
        update(unfinished=True)

    def update(unfinished: bool) -> None:
        rows = [row_of(fault, found, cases, long=given.long) for fault, found in members.items()]
        rows = [row | ({"unfinished": True} if unfinished else {}) for row in rows if row["tests"]]
        result["rows"] = sorted(kept + rows, key=lambda row: list(FAULTS).index(row["fault"]))
        store()

    if members:
        chosen = list(dict.fromkeys(test for found in members.values() for test in found))
        with contextlib.redirect_stdout(sys.stderr):
            run_tests(chosen, ended, long=given.long, processes=given.processes)
        update(unfinished=False)
    if "overhead" in given.wanted:
        result["overhead"] = overhead()
        store()


def main(arguments: list[str] | None = None) -> int:
    try:
        given = parse(arguments)
        words = sys.argv[1:] if arguments is None else arguments
        result = begun(given, shlex.join(["python", "scripts/fault_matrix.py", *words]))

        def store() -> None:
            if given.out:
                text = json.dumps(result, indent=1) + "\n"
                Path(f"{given.out}.tmp").write_text(text, encoding="utf-8")
                os.replace(f"{given.out}.tmp", given.out)

        matrix(given, result, store)
        print(table(list(shown(result["rows"]))))
        failed = [f"failed: {row['fault']} {name}" for row in result["rows"] for name in row["failed"]]
        told = [f"overhead: {result['overhead']}"] if "overhead" in result else []
        print(*failed, *told, sep="\n")
        return int(bool(failed))
    except (UserError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
