"""One signal asks for the end, a second one is the end, and a wait is cut short."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import signals
from signals import StopFlag, Stopped


def test_a_signal_is_noted_and_the_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopFlag() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_wait_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SEC", 0.2)
    with StopFlag() as stop:
        start = time.monotonic()
        with pytest.raises(Stopped), stop.interrupting():
            _signalled_sleep(60)
        assert stop.requested and 0.2 <= time.monotonic() - start < 30
        with pytest.raises(Stopped), stop.interrupting():  # nobody waits who was told to stop
            pytest.fail("went on waiting")


def _signalled_sleep(seconds: float) -> None:
    signal.raise_signal(signal.SIGINT)
    time.sleep(seconds)


def test_what_comes_in_time_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_SEC", 0.1)
    with StopFlag() as stop:
        with stop.interrupting():
            signal.raise_signal(signal.SIGINT)
        time.sleep(0.3)  # nobody waits any more: nothing happens
        assert stop.requested


def test_a_second_signal_ends_the_process() -> None:
    code = """
import signal
from signals import StopFlag
with StopFlag() as stop:
    signal.raise_signal(signal.SIGINT)
    print("goes on", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "goes on\n" and "once more to stop at once" in done.stderr


def test_an_echo_of_the_first_one_is_none() -> None:
    """torchrun passes on a SIGTERM that its processes have had as well."""
    code = """
import signal, time, signals
signals.ECHO_SEC = 0.2
with signals.StopFlag() as stop:
    for _ in range(3):
        signal.raise_signal(signal.SIGTERM)
    print("goes on", flush=True)
    time.sleep(0.2)
    signal.raise_signal(signal.SIGTERM)
    print("never", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "goes on\n")


def test_a_reader_that_ctrl_c_has_ended_too_costs_no_step() -> None:
    """`train.py 2>&1 | tee log`"""
    code = """
import os, signal, sys
from signals import StopFlag
reader, writer = os.pipe()
os.dup2(writer, 2)
os.close(reader)
with StopFlag() as stop:
    signal.raise_signal(signal.SIGINT)
    print("goes on", stop.requested)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "goes on True\n")


@pytest.mark.parametrize(("raised", "told"), [("KeyboardInterrupt", ""), ("OSError('broken')", "OSError: broken")])
@pytest.mark.parametrize("then", ["", "import environment; environment.prepare(); "])
def test_ctrl_c_is_no_error_with_a_traceback(raised: str, told: str, then: str) -> None:
    code = f"import signals; signals.quiet(); {then}raise {raised}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.rpartition("\n")[0].rpartition("\n")[2] == told
    assert done.returncode == (1 if told else -signal.SIGINT)  # which shells call 130


@pytest.mark.parametrize("program", ["train.py", "generate.py"])
def test_ctrl_c_while_a_program_is_imported(program: str) -> None:
    """pydantic takes a while; here it is as if Ctrl-C came just then."""
    root = Path(signals.__file__).parent
    code = f"""
import runpy, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "pydantic":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
sys.path.insert(0, {str(root)!r})
runpy.run_path({str(root / program)!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


SCRIPTS = sorted(Path(signals.__file__).parent.glob("scripts/*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_quiet_before_they_import_anything_large(path: Path) -> None:
    code = path.read_text(encoding="utf-8")
    assert '"__main__"' not in code or re.search(
        r"\nsys\.path\.insert\(.*\n\nimport signals\n\nsignals\.quiet\(\)\n", code
    )
