"""What a run says at its beginning and end, beside what whole runs in test_train.py show."""

from __future__ import annotations

import shlex

import pytest
import torch

import journal
from config import Config, RunConfig
from parallel import Mesh


def test_what_bits_depend_on() -> None:
    found = journal.set_up(Mesh(0, 3, torch.device("cpu")))
    assert found == {"torch": torch.__version__, "device": "CPU", "world_size": 3}


@pytest.mark.parametrize(("directory", "other"), [("runs/a", "run.name"), ("else where", "run.dir")])
def test_what_to_do_next(directory: str, other: str, capsys: pytest.CaptureFixture[str]) -> None:
    journal.say_done(Config(run=RunConfig(name="a", dir=directory)))
    told = capsys.readouterr().out
    assert f"--checkpoint {shlex.quote(directory)} " in told and f"the same command with {other}=ANOTHER" in told


def test_a_slow_run_is_told_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    cpu = Mesh(0, 2, torch.device("cpu"))
    journal.warn_if_slow(cpu, "fp32", 1800)
    assert capsys.readouterr().out == ""
    journal.warn_if_slow(cpu, "fp32", 7200)
    told = capsys.readouterr().out
    assert "would take about 2h00m" in told and "--config quickstart" in told
