"""The fault matrix: a laboratory for runs that die."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

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
