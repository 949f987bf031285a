"""The progress line on a terminal and elsewhere, and the run's files after a crash."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tracker
from tracker import Tracker, duration, keep_until


class Clock:
    """Stands in for `time`: it goes on only when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


class Terminal(io.StringIO):
    """What is written to it, and `screen`: what a person would see."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1

    @property
    def screen(self) -> list[str]:
        lines: list[list[str]] = [[]]
        column = 0
        for char in self.getvalue():
            if char == "\n":
                lines.append([])
            elif char != "\r":
                lines[-1][column : column + 1] = char
            column = 0 if char in "\r\n" else column + 1
        return ["".join(line).rstrip() for line in lines]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tracker, "time", clock)
    return clock


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The width of every terminal."""
    size = SimpleNamespace(columns=80)
    monkeypatch.setattr(shutil, "get_terminal_size", lambda fallback=(80, 24): size)
    return size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.4, "0s"), (5, "5s"), (59.4, "59s"), (59.6, "1m00s"), (65, "1m05s"), (3599, "59m59s"),
        (3599.9, "1h00m"), (2 * 3600 + 3 * 60 + 59, "2h03m"), (86399, "23h59m"), (86400, "1d00h"),
        (3 * 86400 + 4 * 3600, "3d04h"), (400 * 86400, "400d00h"),
    ],
)  # fmt: skip
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plain_lines_where_the_output_is_no_terminal(tmp_path: Path, clock: Clock) -> None:
    out = io.StringIO()
    run = Tracker(tmp_path, total_steps=4, first_step=0, out=out)
    run.note("hello")
    for micro_batch in range(1, 101):  # one step of 100 s
        clock.now += 1
        run.progress(micro_batch / 100, f"micro-batch {micro_batch}/100")
    run.log(1, {"loss": 2.5, "lr": 0.001, "tokens_per_sec": 1234.5, "mfu": 0.25, "val_bpb": None})
    assert out.getvalue().split("\n") == [
        "hello",
        "step 0/4  6m10s left  micro-batch 30/100",
        "step 0/4  5m40s left  micro-batch 60/100",
        "step 0/4  5m10s left  micro-batch 90/100",
        "step 1/4  5m00s left  loss 2.5000  lr 1.00e-03  tok/s 1,234  MFU 25.0%",
        "",
    ]


def test_short_steps_print_no_lines_in_between(tmp_path: Path, clock: Clock) -> None:
    """A logged line counts: the next line in between comes the whole interval after it."""
    out = io.StringIO()
    run = Tracker(tmp_path, total_steps=100, first_step=0, out=out)
    for step in range(5):
        for half in (1, 2):
            clock.now += tracker.PLAIN_EVERY_SEC / 2 - 1
            run.progress(step + half / 2)
        run.log(step + 1, {})
    assert [line.split()[1] for line in out.getvalue().splitlines()] == [f"{step}/100" for step in range(1, 6)]
    clock.now += tracker.PLAIN_EVERY_SEC
    run.progress(5.1, "saving")
    assert out.getvalue().splitlines()[-1].endswith("saving")


def test_time_left_counts_the_steps_of_this_process(tmp_path: Path, clock: Clock) -> None:
    """A resumed run knows nothing of how fast the one before was."""
    out = io.StringIO()
    run = Tracker(tmp_path, total_steps=100, first_step=90, out=out)
    clock.now += 31
    run.progress(90, "micro-batch 1/9")
    clock.now += 29
    run.log(92, {"loss": 1})
    run.log(100, {})
    assert out.getvalue().splitlines() == [
        "step 90/100  ? left  micro-batch 1/9",
        "step 92/100  4m00s left  loss 1.0000",
        "step 100/100  0s left  ",
    ]


def test_a_terminal_has_one_line_that_is_rewritten(tmp_path: Path, clock: Clock, columns: SimpleNamespace) -> None:
    out = Terminal()
    run = Tracker(tmp_path, total_steps=10, first_step=0, out=out)
    run.note("hello")
    clock.now += 1
    run.progress(0.5, "a long word about what it does")
    assert out.screen == ["hello", "step 0/10  19s left  a long word about what it does"]
    clock.now += 1
    run.progress(1.0, "less")
    assert out.screen == ["hello", "step 1/10  18s left  less"]  # nothing left of the longer line
    run.log(1, {"loss": 2})
    assert out.screen == ["hello", "step 1/10  18s left  loss 2.0000", ""]
    clock.now += 1
    run.progress(1.5)
    assert out.screen[-1] == "step 1/10  17s left  loss 2.0000"  # the last figures stay in view
    run.note("stopped")
    assert out.screen == ["hello", "step 1/10  18s left  loss 2.0000", "stopped", ""]
    assert out.getvalue().endswith("\rstopped\n")


@pytest.mark.parametrize(("width", "shown"), [(60, 59), (30, 29)])  # shutil says 80 where the terminal tells none
def test_a_terminal_line_never_wraps(
    tmp_path: Path, clock: Clock, columns: SimpleNamespace, width: int, shown: int
) -> None:
    """A line as wide as the terminal would wrap, and a carriage return does not go back over two lines."""
    columns.columns = width
    out = Terminal()
    run = Tracker(tmp_path, total_steps=10, first_step=0, out=out)
    clock.now += 1
    run.progress(0.5, "x" * 100)
    whole = "step 0/10  19s left  " + "x" * 100
    assert out.screen == [whole[:shown].rstrip()]


def test_a_terminal_is_rewritten_a_few_times_a_second_at_most(
    tmp_path: Path, clock: Clock, columns: SimpleNamespace
) -> None:
    out = Terminal()
    run = Tracker(tmp_path, total_steps=10, first_step=0, out=out)
    for number in range(1, 1001):
        clock.now += 0.001
        run.progress(number / 1000)
    assert 3 <= out.getvalue().count("\r") <= 1 / tracker.LINE_EVERY_SEC


def test_metrics_are_one_object_a_line(tmp_path: Path) -> None:
    run = Tracker(tmp_path, total_steps=2, first_step=0, out=io.StringIO())
    run.log(1, {"loss": 1.5, "note": "a\nb\u2028c", "grad_norm": None})
    run.log(2, {"loss": 1.25})
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.5, "note": "a\nb\u2028c", "grad_norm": None},
        {"step": 2, "loss": 1.25},
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [-float("inf")]])
def test_what_json_does_not_know_is_refused_and_leaves_no_half_line(tmp_path: Path, value: object) -> None:
    run = Tracker(tmp_path, total_steps=2, first_step=0, out=io.StringIO())
    run.log(1, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        run.log(2, {"loss": value})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_samples_are_sections_of_quotes(tmp_path: Path) -> None:
    """A generated heading is quoted, so that it cannot be taken for one of ours on resume."""
    run = Tracker(tmp_path, total_steps=9, first_step=0, out=io.StringIO())
    run.samples(3, [("Once", " upon\n\n## Step 1\nend"), ("", "x")])
    run.samples(6, [("Once", " more")])
    first = "## Step 3\n\n> **Once** upon\n> \n> ## Step 1\n> end\n\n> ****x\n\n"
    assert (tmp_path / "samples.md").read_text() == first + "## Step 6\n\n> **Once** more\n\n"
    keep_until(tmp_path, 5)
    assert (tmp_path / "samples.md").read_text() == first
    keep_until(tmp_path, 2)
    assert (tmp_path / "samples.md").read_text() == ""


def test_a_resumed_run_forgets_what_it_makes_again(tmp_path: Path) -> None:
    lines = ['{"step": 1}', '{"step": 2, "loss": 1.0}', '{"step": 3}', "", "12", "null", '{"loss": 2}', '{"step": "2"}']
    lines += ["[" * 10**5, '{"step": NaN}', f'{{"step": 1{"0" * 5000}}}']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join([*lines, '{"step": 2, "lo']).encode() + b"\xff\xe2")
    (tmp_path / "samples.md").write_text("## Step 1\n\n> a\n\n## Step 2\n\n> b\n\n## Step 10\n\n> c")
    Tracker(tmp_path, total_steps=10, first_step=2, out=io.StringIO()).log(3, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "loss": 1.0}\n{"step": 3}\n'
    assert (tmp_path / "samples.md").read_text() == "## Step 1\n\n> a\n\n## Step 2\n\n> b\n\n"
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "samples.md"}


def test_a_last_line_without_its_end_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}')
    Tracker(tmp_path, total_steps=2, first_step=1, out=io.StringIO()).log(2, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_is_made_and_a_new_one_is_empty(tmp_path: Path) -> None:
    Tracker(tmp_path / "a" / "b", total_steps=1, first_step=0, out=io.StringIO())
    assert not list((tmp_path / "a" / "b").iterdir())


def test_other_ranks_are_silent(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: SimpleNamespace
) -> None:
    monkeypatch.chdir(tmp_path)
    out = Terminal()
    run = Tracker(None, total_steps=2, first_step=0, out=out)
    clock.now += 100
    run.note("hello")
    run.progress(0.5)
    run.log(1, {"loss": float("nan")})
    run.samples(1, [("a", "b")])
    assert out.getvalue() == "" and not list(tmp_path.iterdir())


def test_torn_samples(tmp_path: Path) -> None:
    (tmp_path / "samples.md").write_text("a note of mine\n\n## Step 1\n\n> a\n\n## St")
    run = tracker.Tracker(tmp_path, total_steps=9, first_step=1, out=io.StringIO())
    run.samples(3, [("a", "b")])
    text = (tmp_path / "samples.md").read_text()
    assert text.startswith("a note of mine\n") and "\n## Step 3\n" in text


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_output_that_cannot_be_written_does_not_end_the_run() -> None:
    """`train.py >/dev/full`: nor does Python complain of it at its end."""
    code = "import sys, text; text.say('a'); text.say('b' * 9000); text.say('c'); print('done', file=sys.stderr)"
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE)
    assert (run.returncode, run.stderr) == (0, b"done\n")


def test_a_reader_that_left_does_not_end_the_run() -> None:
    """`train.py | head -1`"""
    code = """
import sys, pathlib, tempfile, time
from tracker import Tracker
tracker = Tracker(pathlib.Path(tempfile.mkdtemp()), total_steps=9, first_step=0)
for step in range(200):
    tracker.note("a line " * 1000)
print("done", file=sys.stderr)
"""
    first = "import sys; sys.stdin.readline()"
    with (
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run,
        subprocess.Popen([sys.executable, "-c", first], stdin=run.stdout) as head,
    ):
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b"done\n"
    assert run.returncode == head.returncode == 0


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    told = tracker.Tracker(tmp_path, total_steps=9, first_step=0, out=out)
    told.log(1, {"loss": 1.0})
    real = open

    def full(path: Any, mode: str = "r", **options: Any) -> Any:
        if "a" in mode:
            with real(path, mode, **options) as file:
                file.write('{"step": 2, "lo')  # what still went onto the disk
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", full)
        told.log(2, {"loss": 1.0})
        told.log(3, {"loss": 1.0})
        told.samples(3, [("a", "b")])
    told.log(4, {"loss": 1.0})
    assert out.getvalue().count("metrics.jsonl cannot be written: No space left on device; training goes on") == 1
    tracker.keep_until(tmp_path, 9)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 4]
