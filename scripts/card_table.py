"""Print the README's table of presets and cards, or with --write put it there.

    python scripts/card_table.py [--write]

Rows of a card are predicted: the micro-batch and the memory by `memory.py`, the speed as a stated share of the card's
peak. Rows from `benchmarks/quickstart-*.json` are measured. It takes minutes: each cell traces several training steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

from config_table import END, program

import config as configuration
import memory
from config import Config, UserError
from counts import count_parameters, flops_per_token, num_steps
from model import meta_model
from ops import DTYPES
from parallel import NOMINAL_TFLOPS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN = "<!-- table: scripts/card_table.py -->"
HEADER = ("preset", "on", "rows at a time", "GiB", "tokens/s", "hours", "")
PRESETS = ("30m", "100m", "mini", "1b")


class Card(NamedTuple):
    """`gib` that a process may use of the card's memory; `share` of the data sheet's peak that is assumed."""

    precision: str
    gib: float
    share: float


CARDS = {  # share: aims, see README
    "T4": Card("fp16", 14.6, 0.18),
    "RTX 3060": Card("bf16", 11.6, 0.3),
    "RTX 4070": Card("bf16", 11.6, 0.3),
    "H200": Card("bf16", 139.0, 0.3),
}


def tokens_per_sec(config: Config, card: str) -> float:
    flops = flops_per_token(config.model, count_parameters(meta_model(config.model)), config.data.seq_len)
    return CARDS[card].share * NOMINAL_TFLOPS[card] * 1e12 / flops


def hours(config: Config, speed: float) -> float:
    return num_steps(config, count_parameters(meta_model(config.model))) * config.train.batch_tokens / speed / 3600


def predicted(preset: str, name: str) -> tuple[str, ...]:
    config, card = configuration.load(preset), CARDS[name]
    dtype, available = DTYPES[card.precision], int(card.gib * 2**30)
    try:
        rows = memory.largest_micro_batch(config, dtype=dtype, available=available)
    except UserError:
        return preset, name, "none fits", "", "", "", "predicted"
    peak, speed = memory.peak(config, dtype=dtype, rows=rows).total / 2**30, tokens_per_sec(config, name)
    numbers = f"{rows}", f"{peak:.1f}", f"{float(f'{speed:.2g}'):,.0f}", f"{float(f'{hours(config, speed):.2g}'):,g}"
    return preset, name, *numbers, "predicted"


def measured(entry: dict[str, Any]) -> tuple[str, ...]:
    rows, gib, speed = entry["micro_batch"], entry["peak_memory_gib"], entry["tokens_per_sec"]
    numbers = f"{rows}", f"{gib:.1f}", f"{speed:,.0f}", f"{entry['wall_sec'] / 3600:.2g}"
    return entry["config"], entry["hardware"], *numbers, "measured"


def table() -> str:
    """Markdown, between the markers."""
    rows = [measured(json.loads(path.read_text())) for path in sorted((ROOT / "benchmarks").glob("quickstart-*.json"))]
    rows += [predicted(preset, card) for preset in PRESETS for card in CARDS]
    lines = ["| " + " | ".join(HEADER) + " |", "|---|---" + "|--:" * (len(HEADER) - 3) + "|---|"]
    return "\n".join([BEGIN, *lines, *("| " + " | ".join(row) + " |" for row in rows), END])


def main(arguments: list[str] | None = None) -> int:
    return program("card_table.py", README, BEGIN, table, arguments)


if __name__ == "__main__":
    sys.exit(main())
