"""The table of scripts/fault_matrix.py: which tests belong to a fault, and how their counts add up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fault_matrix
import pytest
from fault_matrix import FAULTS, Case, main, members_of, row_of


def case(name: str, *, failed: bool = False, **counted: dict[str, Any]) -> Case:
    return Case(name, not failed, 1.5, [(fault, json.dumps(values)) for fault, values in counted.items()])


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


class Reports:
    """In place of pytest, which is not run again within pytest: every test ends, and `failing` may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.failing, self.cut_off = False, False
        monkeypatch.setattr(pytest, "main", self.main)
        monkeypatch.chdir(Path(__file__).parent)

    def main(self, words: list[str], plugins: list[Any]) -> pytest.ExitCode:
        tests = [word for word in words if "::" in word]
        for number, name in enumerate(tests):
            if self.cut_off and number:
                raise KeyboardInterrupt
            fault = "F12" if "test_exact" in name else "F3"
            for when in ("setup", "call", "teardown"):
                plugins[0].pytest_runtest_logreport(SimpleNamespace(
                    nodeid=name, when=when, duration=0.5, passed=not self.failing, skipped=False,
                    user_properties=[(fault, json.dumps(counts(5, 5)))],
                ))  # fmt: skip
        return pytest.ExitCode.OK


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Reports:
    return Reports(monkeypatch)


def test_the_table_and_its_file(reports: Reports, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["--only", "F3", "--out", str(out)]) == 0
    assert "F3     SIGKILL during retention  5      5" in capsys.readouterr().out
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored["rows"][0]["tried"] == 5 and stored["rows"][0]["seconds"] == 1.5
    assert stored["commands"] == [f"python scripts/fault_matrix.py --only F3 --out {out}"]
    reports.failing = True
    assert main(["--only", "F3"]) == 1
    assert "failed: F3 tests/faults/" in capsys.readouterr().out


def test_what_was_measured_before_stays(reports: Reports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a run that is cut off, and those of a file that is added to."""
    out = tmp_path / "out.json"
    reports.cut_off = True
    with pytest.raises(KeyboardInterrupt):
        main(["--only", "F3,F12", "--out", str(out)])
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["fault"], row["unfinished"]) for row in stored["rows"]] == [("F3", True)]
    reports.cut_off = False
    monkeypatch.setattr(fault_matrix, "overhead", lambda: {"percent": 0.5})
    assert main(["--only", "F12,overhead", "--out", str(out), "--add"]) == 0
    assert main(["--only", "F3", "--out", str(out), "--add"]) == 0
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert [row["fault"] for row in stored["rows"]] == ["F3", "F12"] and len(stored["commands"]) == 3
    assert not any("unfinished" in row for row in stored["rows"]) and stored["overhead"] == {"percent": 0.5}


def test_a_file_of_another_machine_is_not_added_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    assert main(["--only", "F3", "--out", str(out), "--add"]) == 2
    out.write_text(json.dumps({"hardware": "an abacus", "versions": {}, "rows": [], "commands": []}), encoding="utf-8")
    assert main(["--only", "F3", "--out", str(out), "--add"]) == 2
    assert "an abacus" in capsys.readouterr().err


def test_a_fault_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "F1,F99"]) == 2
    assert "F99" in capsys.readouterr().err
