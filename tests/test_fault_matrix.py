"""The table of scripts/fault_matrix.py: which tests belong to a fault, and how their counts add up."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement

import fault_matrix
import pytest
from fault_matrix import FAULTS, main, members_of, row_of


def case(name: str, *, failed: bool = False, **counted: dict[str, Any]) -> Element:
    """A test case as pytest writes it."""
    file, _, function = name.partition("::")
    made = Element("testcase", file=file, name=function, time="1.5")
    for fault, values in counted.items():
        SubElement(SubElement(made, "properties"), "property", name=fault, value=json.dumps(values))
    if failed:
        SubElement(made, "failure")
    return made


def counts(tried: int, survived: int, **figures: object) -> dict[str, Any]:
    return {"tried": tried, "survived": survived, "figures": figures}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_tests(fault: str) -> None:
    assert members_of(fault)


def test_counts_and_figures_add_up() -> None:
    tests = ["tests/a.py::test_one", "tests/a.py::test_two"]
    cases = [
        case("tests/a.py::test_one[x]", F1=counts(3, 3, kills=3, seconds=0.5, fewest=3)),
        case("tests/a.py::test_one[y]", F1=counts(2, 2, kills=2, seconds=0.7, fewest=2), F2=counts(9, 9)),
        case("tests/a.py::test_other", F2=counts(9, 9)),
    ]
    row = row_of("F1", tests, cases)
    assert (row["tried"], row["survived"], row["tests"], row["failed"], row["seconds"]) == (5, 5, 2, [], 3.0)
    assert row["figures"] == {"kills": 5, "seconds": 0.7, "fewest": 2}


def test_a_failure_is_never_a_survival() -> None:
    """Also where a test ended before it had counted what failed, and where each test is a case."""
    tests = ["tests/a.py::test_one", "tests/a.py::test_two"]
    row = row_of("F1", tests, [case("tests/a.py::test_one", failed=True, F1=counts(3, 3))])
    assert (row["tried"], row["survived"], row["failed"]) == (3, 2, ["tests/a.py::test_one"])
    row = row_of("F23", tests, [case("tests/a.py::test_one"), case("tests/a.py::test_two", failed=True)])
    assert (row["tried"], row["survived"]) == (2, 1)


def test_the_table_and_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """pytest is not run again within pytest; what it would have written is there."""

    def run(command: list[str], **_: object) -> None:
        name = next(word for word in command if "::" in word)
        suite = Element("testsuite")
        suite.append(case(name, failed="F3" in given, F3=counts(5, 5)))
        result = next(word for word in command if word.startswith("--junit-xml=")).partition("=")[2]
        fault_matrix.xml.etree.ElementTree.ElementTree(suite).write(result)

    monkeypatch.setattr(subprocess, "run", run)
    given = "F10"
    out = tmp_path / "out.json"
    assert main(["--only", "F3", "--out", str(out)]) == 0
    assert "F3     SIGKILL during retention  5      5" in capsys.readouterr().out
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored["rows"][0]["tried"] == 5 and stored["command"].startswith("python scripts/fault_matrix.py --only F3")
    given = "F3"
    assert main(["--only", "F3"]) == 1
    assert "failed: F3 tests/faults/" in capsys.readouterr().out


def test_a_fault_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "F1,F99"]) == 2
    assert "F99" in capsys.readouterr().err
