"""The README's table of presets and cards is what the script says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import card_table
import pytest

import config as configuration
import memory
from ops import DTYPES

TABLE = card_table.README.read_text(encoding="utf-8").partition(card_table.BEGIN)[2].partition(card_table.END)[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.strip().splitlines()[2:]]


def test_every_preset_and_card_has_a_row() -> None:
    predicted = [tuple(row[:2]) for row in ROWS if row[-1] == "predicted"]
    assert predicted == [(preset, card) for preset in card_table.PRESETS for card in card_table.CARDS]
    files = sorted((card_table.ROOT / "benchmarks").glob("quickstart-*.json"))
    assert [row for row in ROWS if row[-1] == "measured"] == [
        list(card_table.measured(json.loads(path.read_text(encoding="utf-8")))) for path in files
    ]


def test_speeds_and_hours() -> None:
    for preset, card, rows, _, speed, hours, kind in ROWS:
        if kind == "predicted" and rows != "none fits":
            config = configuration.load(preset)
            exact = card_table.tokens_per_sec(config, card)
            assert float(speed.replace(",", "")) == pytest.approx(exact, rel=0.05)
            assert float(hours.replace(",", "")) == pytest.approx(card_table.hours(config, exact), rel=0.05)


@pytest.mark.parametrize(("preset", "card"), [("30m", "T4")])
def test_memory(preset: str, card: str) -> None:
    """One trace a row: that the next more rows do not fit is `memory.largest_micro_batch`'s own test."""
    (row,) = [row for row in ROWS if row[:2] == [preset, card]]
    dtype = DTYPES[card_table.CARDS[card].precision]
    peak = memory.peak(configuration.load(preset), dtype=dtype, rows=int(row[2])).total / 2**30
    assert float(row[3]) == pytest.approx(peak, abs=0.06) and peak <= card_table.CARDS[card].gib


def test_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(card_table, "predicted", lambda preset, card: (preset, card, "4", "1.0", "2", "3", "predicted"))
    assert card_table.main([]) == 0
    printed = capsys.readouterr().out.strip()
    copy = tmp_path / "README.md"
    copy.write_text(f"before\n{card_table.BEGIN}\nold\n{card_table.END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(card_table, "README", copy)
    assert card_table.main(["--write"]) == 0
    assert copy.read_text(encoding="utf-8") == f"before\n{printed}\nafter\n"
    assert re.search(r"\| mini \| T4 \|", printed)
    copy.write_text(f"before\n{card_table.BEGIN}\nold\nafter\n", encoding="utf-8")
    assert card_table.main(["--write"]) == 2 and copy.read_text(encoding="utf-8").endswith("after\n")
