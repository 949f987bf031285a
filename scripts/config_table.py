"""Print the table of presets in configs/README.md, or with --write put it there.

    python scripts/config_table.py [--write]

Every number is counted on a model without storage (device `meta`); every purpose is the first line of a preset's file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import config
from counts import count_parameters, flops_per_token
from model import meta_model
from options import Parser
from text import report

README = config.CONFIGS / "README.md"
BEGIN, END = "<!-- table: python scripts/config_table.py --write -->", "<!-- end of table -->"
CONTEXT = 2048  # tokens of a row; a query sees half of them on average
HEADER = (
    "preset", "parameters", "MTP adds", "active", "active with head", "KV cache, bytes/token", "GFLOP/token",
    "GFLOP/token with MTP",
)  # fmt: skip


class Figures(NamedTuple):
    """What a preset comes to; parameters without MTP unless said otherwise."""

    total: int
    mtp: int  # all MTP layers, without the copies of embedding and head that a checkpoint holds
    active: int  # used for one token, without embedding and head
    active_with_head: int
    kv_bytes: int  # per token, bf16, without MTP
    flops: float  # of training, per token, forward and backward, at CONTEXT
    flops_with_mtp: float


def figures(preset: str) -> Figures:
    full = config.load(preset).model
    bare = full.model_copy(update={"num_nextn_predict_layers": 0})
    counts, bare_counts = count_parameters(meta_model(full)), count_parameters(meta_model(bare))
    return Figures(
        counts.total,
        counts.mtp,
        counts.active,
        counts.active_with_head,
        kv_bytes=2 * full.num_hidden_layers * (full.kv_lora_rank + full.qk_rope_head_dim),
        flops=flops_per_token(bare, bare_counts, CONTEXT, causal=True),
        flops_with_mtp=flops_per_token(full, counts, CONTEXT, causal=True),
    )


def purpose(preset: str) -> str:
    """The comment that a preset's file begins with."""
    with (config.CONFIGS / f"{preset}.yaml").open(encoding="utf-8") as lines:
        return next(lines).removeprefix("#").strip()


def table() -> str:
    """Markdown: numbers and purposes of all presets, smallest first, between the markers."""
    presets = {path.stem: figures(path.stem) for path in config.CONFIGS.glob("*.yaml")}
    ordered = sorted(presets.items(), key=lambda item: item[1].total)
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|--:" * (len(HEADER) - 1) + "|"]
    for name, row in ordered:
        numbers = [f"{number:,}" for number in row[:5]] + [f"{number / 1e9:.3g}" for number in row[5:]]
        lines.append(f"| {name} | " + " | ".join(numbers) + " |")
    lines += ["", *(f"- `{name}`: {purpose(name)}" for name, _ in ordered)]
    return "\n".join([BEGIN, *lines, END])


def replaced(text: str, begin: str, table: str) -> str:
    """The text with `table`, which starts with the marker `begin` and ends with `END`, in place of the one there."""
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise config.UserError(f"the line {begin if not found else END} is missing in README.md")
    return before + table + after


def program(name: str, readme: Path, begin: str, table: Callable[[], str], arguments: list[str] | None) -> int:
    """Print a table, or with --write put it into its file."""
    parser = Parser(prog=name, description=f"The table that {readme.name} has under {begin}")
    parser.add_argument("--write", action="store_true", help="write it there in place of printing it")
    try:
        write, now = parser.parse_args(arguments).write, table()
        if not write:
            print(now)
            return 0
        text = replaced(readme.read_text(encoding="utf-8"), begin, now)
    except config.UserError as error:
        return report(error)
    readme.write_text(text, encoding="utf-8", newline="\n")
    return 0


def main(arguments: list[str] | None = None) -> int:
    return program("config_table.py", README, BEGIN, table, arguments)


if __name__ == "__main__":
    sys.exit(main())
