"""What a run survives, counted: the tests of tests/faults/ and their kin, one row per fault.

    python scripts/fault_matrix.py                        the short matrix, as plain `pytest` runs it
    python scripts/fault_matrix.py --long                 with what takes minutes each, an hour in all
    python scripts/fault_matrix.py --only F1,F4 --long    some faults
    python scripts/fault_matrix.py --only overhead        what surviving costs

Faults are injected: a shim before every file operation, signals, NaN, ranks that die, a Hub that lies. `tried` counts
cases, `survived` those in which nothing was lost that should not be.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

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


def run_tests(tests: list[str], *, long: bool, processes: int) -> list[xml.etree.ElementTree.Element]:
    """pytest's test cases, with what they have counted as properties."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.xml")
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-m", "" if long else "not slow",
            f"--junit-xml={result}", "-o", "junit_family=xunit1", *tests,
        ]  # fmt: skip
        subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if not result.exists():
            raise UserError("pytest wrote no result; its words are above")
        return list(xml.etree.ElementTree.parse(result).iter("testcase"))


def row_of(fault: str, tests: list[str], cases: list[xml.etree.ElementTree.Element]) -> dict[str, Any]:
    """The counts of a fault's tests, added up."""
    row: dict[str, Any] = {
        "fault": fault, "what": FAULTS[fault], "tried": 0, "survived": 0, "figures": {}, "tests": 0, "failed": [],
        "seconds": 0.0,
    }  # fmt: skip
    for case in cases:
        counted = [p.get("value") for p in case.iter("property") if p.get("name") == fault]
        name = f"{case.get('file')}::{case.get('name')}"
        if name.partition("[")[0] not in tests or case.find("skipped") is not None:
            continue
        passed = case.find("failure") is None and case.find("error") is None
        row["tests"] += 1
        row["seconds"] += float(case.get("time", 0))
        if not passed:
            row["failed"].append(name)
        values = [json.loads(value or "{}") for value in counted] or [{"tried": 1, "survived": int(passed)}]
        for value in values:
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

    Pairs of runs of the quickstart, one saving every EVERY steps, one not at all, the first of a pair by turns: a save
    costs the difference, and comes once in five minutes. Added is what a step's guards take, measured alone.
    """
    saves = (STEPS - 6) // EVERY
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    for pair in range(PAIRS):
        for which in ("on", "off") if pair % 2 else ("off", "on"):
            seconds[which].append(timed_run(EVERY if which == "on" else 10**6))
            print(f"{which}: {seconds[which][-1]:.2f} s", file=sys.stderr)
    costs = [(on - off) / saves for on, off in zip(seconds["on"], seconds["off"], strict=True)]
    step_sec = statistics.median(seconds["off"]) / (STEPS - 6)
    guards = guards_sec()
    return {
        "percent": round(100 * (statistics.median(costs) / CADENCE_SEC + guards / step_sec), 4),
        "a save costs, s": round(statistics.median(costs), 4),
        "spread of that, s": round(statistics.stdev(costs), 4),
        "guards of a step, s": round(guards, 7),
        "a step, s": round(step_sec, 4),
        "saves per run": saves,
        "runs": 2 * PAIRS,
    }


def timed_run(every: int) -> float:
    """Seconds of a quickstart's steps 6 to STEPS; the first are slower."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"run.dir={folder}/run", f"train.steps={STEPS + 1}", f"checkpoint.every_steps={every}", "log.every_steps=1",
            "eval.every_steps=1000000", "eval.tokens=1", "sample.every_steps=1000000", "sample.max_new_tokens=1",
            "checkpoint.every_minutes=null",
        ]  # fmt: skip
        command = [sys.executable, "train.py", "--config", "quickstart", *options]
        times: dict[int, float] = {}
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if step := re.match(r"step (\d+)/", line):
                    times[int(step[1])] = time.perf_counter()
        if process.returncode:
            raise UserError(f"{shlex.join(command)}: exit code {process.returncode}")
    return times[STEPS] - times[6]


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
    parser.add_argument("--out", metavar="FILE", help="write the result as JSON")
    given = parser.parse_args(arguments)
    given.wanted = given.only.split(",") if given.only else [*FAULTS, *["overhead"] * given.long]
    if unknown := set(given.wanted) - FAULTS.keys() - {"overhead"}:
        raise UserError(f"--only {given.only}: no fault {min(unknown)}; there are F1 to F30, Colab and overhead")
    return given


def matrix(given: argparse.Namespace) -> dict[str, Any]:
    start = time.monotonic()
    members = {fault: found for fault in given.wanted if fault in FAULTS and (found := members_of(fault))}
    chosen = list(dict.fromkeys(test for found in members.values() for test in found))
    cases = run_tests(chosen, long=given.long, processes=given.processes) if chosen else []
    result: dict[str, Any] = {
        "hardware": hardware(torch.device("cpu")), "versions": versions(), "long": given.long,
        "rows": [row_of(fault, found, cases) for fault, found in members.items()],
    }  # fmt: skip
    result["seconds"] = round(time.monotonic() - start, 1)
    if "overhead" in given.wanted:
        result["overhead"] = overhead()
    return result


def main(arguments: list[str] | None = None) -> int:
    try:
        given = parse(arguments)
        result = matrix(given)
        words = sys.argv[1:] if arguments is None else arguments
        result["command"] = shlex.join(["python", "scripts/fault_matrix.py", *words])
        print(table(list(shown(result["rows"]))))
        failed = [f"failed: {row['fault']} {name}" for row in result["rows"] for name in row["failed"]]
        told = [f"overhead: {result['overhead']}"] if "overhead" in result else []
        print(*failed, *told, sep="\n")
        if given.out:
            Path(given.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return int(bool(failed))
    except (UserError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
