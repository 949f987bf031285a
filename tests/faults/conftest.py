"""The fault matrix: a laboratory for runs that die, and the count of what was tried and survived."""

from __future__ import annotations

import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Driver, Lab


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if sys.platform == "linux":
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="forks, and asks /proc: Linux only"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty documents of a hundred words that are no words."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 8))) for _ in range(200)]
    documents = [" ".join(draw.choices(words, k=100)) for _ in range(20)]
    path = tmp_path_factory.mktemp("text") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, text: Path, driver: Driver) -> Lab:
    """One for all tests of a process: they share the reference runs, and each names its own."""
    return Lab(tmp_path_factory.mktemp("lab"), text, driver)


class Row:
    """What was tried of a fault, and what was survived."""

    def __init__(self) -> None:
        self.tried, self.failures = 0, []
        self.figures: dict[str, Any] = {}

    def check(self, failure: object, case: object = "") -> None:
        """One case; `failure` is what went wrong, empty or None for nothing."""
        self.tried += 1
        if failure:
            self.failures.append(f"{case}: {failure}")

    def expect(self, survived: bool, case: object = "") -> None:
        self.check("" if survived else "did not hold", case)


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Callable[[str], Any]:
    """`with row("F1") as row:` counts cases, reports them to scripts/fault_matrix.py and fails if one failed."""

    @contextlib.contextmanager
    def counting(fault: str) -> Iterator[Row]:
        row = Row()
        completed = False
        try:
            yield row
            completed = True
        finally:
            survived = row.tried - len(row.failures)
            result = {"tried": row.tried, "survived": survived, "completed": completed, "figures": row.figures}
            record_property(fault, json.dumps(result))
        assert row.tried, f"{fault}: nothing was tried"
        shown = "\n".join(row.failures[:5])
        assert not row.failures, f"{fault}: {len(row.failures)} of {row.tried} failed\n{shown}"

    return counting
