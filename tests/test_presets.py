"""The presets: their true sizes, the table that states them, and the claims in their first lines."""

from __future__ import annotations

import functools
import re
import shutil
from pathlib import Path

import config_table
import pytest
from config_table import Figures

import config

PRESETS = ["quickstart", "30m", "100m", "mini", "1b", "2b", "5b", "10b", "16b", "20b", "671b"]

# Derived by hand from the dimensions, apart from this code (formulas: DeepSeek-V3 report, section 2): total, MTP,
# active, active with head, KV bytes per token, GFLOP per token without MTP; with the digits that were worked out.
EXPECTED = {
    "quickstart": ("1.96M", "0.83M", "0.84M", "1.23M", 1280, "0.0137"),
    "30m": ("30.0M", "3.50M", "8.59M", "14.9M", 3840, "0.127"),
    "100m": ("107.4M", "8.10M", "22.9M", "48.6M", 5120, "0.342"),
    "mini": ("531.8M", "41.9M", "78.2M", "116.9M", 7680, "0.852"),
    "1b": ("1.029B", "56.1M", "151.0M", "202.5M", 11520, "1.441"),
    "2b": ("2.067B", "104.3M", "369.6M", "434.0M", 12800, "2.98"),
    "5b": ("4.956B", "243M", "659M", "858M", 12800, "5.65"),
    "10b": ("9.799B", "427M", "1.24B", "1.51B", 14720, "9.62"),
    "16b": ("15.71B", "593M", "2.24B", "2.45B", 31104, "15.56"),
    "20b": ("20.37B", "832M", "1.72B", "1.98B", 16000, "12.54"),
    "671b": ("671.03B", "11.61B", "35.70B", "36.63B", 70272, "235.1"),
}

figures = functools.cache(config_table.figures)


def like(number: float, text: str) -> str:
    """`number` in the unit and with the digits of `text`, such as 1.03B."""
    unit = text.lstrip("0123456789.")
    digits = len(text.removesuffix(unit).partition(".")[2])
    return f"{number / {'M': 1e6, 'B': 1e9, '': 1}[unit]:.{digits}f}{unit}"


def test_all_presets_are_there() -> None:
    assert {path.stem for path in config.CONFIGS.glob("*.yaml")} == set(PRESETS) == set(EXPECTED)


@pytest.mark.parametrize("preset", PRESETS)
def test_sizes(preset: str) -> None:
    row = figures(preset)
    *counts, kv_bytes, flops = EXPECTED[preset]
    assert [like(number, text) for number, text in zip(row[:4], counts, strict=True)] == counts
    assert row.kv_bytes == kv_bytes
    assert like(row.flops / 1e9, flops) == flops


def test_exact_sizes() -> None:
    mini, full = figures("mini"), figures("671b")
    assert (mini.total, mini.total + mini.mtp) == (531_803_904, 573_718_784)
    assert full.total == 671_026_404_352
    assert [like(figures(name).flops_with_mtp / 1e9, "0.000") for name in ("mini", "1b")] == ["1.143", "1.826"]
    assert like(full.flops_with_mtp / 1e9, "0.0") == "245.0"


@pytest.mark.parametrize("preset", PRESETS)
def test_the_first_line_tells_the_truth(preset: str) -> None:
    text, row = config_table.purpose(preset), figures(preset)
    stated = re.search(r"([\d.]+[MB]) parameters \(([\d.]+[MB]) active\)", text)
    if stated:
        assert [like(row.total, stated[1]), like(row.active_with_head, stated[2])] == [stated[1], stated[2]]
    assert stated or preset in ("quickstart", "671b")
    memory = re.search(r"about (\d+) GB", text)  # AdamW in fp32: weights, gradients and two moments
    if memory:
        assert round(16 * (row.total + row.mtp) / 1e9) == int(memory[1])


def test_the_table_is_up_to_date() -> None:
    text = config_table.README.read_text(encoding="utf-8")
    assert config_table.replaced(text, config_table.BEGIN, config_table.table()) == text, (
        "run: python scripts/config_table.py --write"
    )


def test_the_table_is_printed_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copy(config_table.README, tmp_path))
    before = copy.read_bytes()
    monkeypatch.setattr(config_table, "README", copy)
    monkeypatch.setattr(config_table, "figures", lambda preset: Figures(1234, 2, 3, 4, 5, 6e9, 7e9))
    assert config_table.main([]) == 0
    printed = capsys.readouterr().out
    assert "| mini | 1,234 | 2 | 3 | 4 | 5 | 6 | 7 |" in printed
    assert copy.read_bytes() == before

    assert config_table.main(["--write"]) == 0
    text = copy.read_bytes().decode("utf-8")
    assert printed in text
    assert "\r" not in text
    head, tail = (before.decode("utf-8").partition(mark) for mark in (config_table.BEGIN, config_table.END))
    assert text.startswith(head[0])
    assert text.endswith(tail[2])

    copy.write_text("no table", encoding="utf-8")
    assert config_table.main(["--write"]) == 2
    assert "is missing" in capsys.readouterr().err and copy.read_text(encoding="utf-8") == "no table"


def test_a_mistake_on_the_tables_command_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert config_table.main(["--wrote"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --wrote; did you mean --write?\n"
