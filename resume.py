"""What a run goes on from: which checkpoint, whether the configuration still fits it, and the state beside the weights."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import checkpoint
from config import Config, UserError

SCHEMA = 1
STATE_FILE = "training_state.json"
# Keys that may change on resume: they decide how long, how visibly and how comfortably a run goes on, not what it learns.
FREE_SECTIONS = ("run", "log", "eval", "sample", "checkpoint")
FREE_KEYS = {
    "data.workers", "train.steps", "train.tokens_per_active_param", "train.micro_batch", "train.recompute", "train.init_from",
    "train.precision", "data.sources",  # these two are compared by what they resolve to
}  # fmt: skip


@dataclass
class TrainState:
    """Everything but tensors that the next step depends on. No time, host or path."""

    config: dict[str, Any]  # the sections that must not change
    sources: str  # fingerprint of the documents
    tokenizer: str  # fingerprint
    precision: str  # as resolved for the device
    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    cursor: dict[str, int] = field(default_factory=dict)
    loss_scale: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> TrainState:
        if not (path / STATE_FILE).exists():
            raise UserError(
                f"--resume {path}: a model without training state; to start from its weights: train.init_from={path}"
            )
        values = checkpoint.read_json(path / STATE_FILE)
        if values.pop("schema", None) != SCHEMA:
            raise UserError(f"{path / STATE_FILE}: not of schema {SCHEMA}; written by another version of this program")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"{path / STATE_FILE}: {error}") from None


def learned(config: Config) -> dict[str, Any]:
    """The part of a configuration that a checkpoint is bound to."""
    return json.loads(config.model_dump_json(exclude=set(FREE_SECTIONS)))


def pick(run_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to go on from: the newest intact one (`auto`), none (`never`) or the one given.

    `never` moves an earlier run of this name aside; nothing is lost.
    """
    checkpoints = run_dir / "checkpoints"
    newest = checkpoint.latest(checkpoints)
    if wanted == "never":
        if run_dir.exists() and any(run_dir.iterdir()):
            number = next(n for n in range(1, 10**6) if not run_dir.with_name(f"{run_dir.name}.{n}").exists())
            os.rename(run_dir, run_dir.with_name(f"{run_dir.name}.{number}"))
        return None
    if wanted == "auto":
        damaged = [path.name for path in checkpoints.glob("step_*")] if newest is None else []
        if damaged:
            raise UserError(
                f"{checkpoints}: no intact checkpoint among {', '.join(sorted(damaged))}; restore one, or start afresh "
                "with --resume never (which keeps this folder under another name)"
            )
        return newest
    chosen = checkpoint.find(wanted)
    if newest is not None and newest.parent.resolve() == chosen.parent.resolve() and newest.name > chosen.name:
        raise UserError(
            f"--resume {wanted}: {run_dir} has a later checkpoint, {newest.name}; give another run.name=... to branch off"
        )
    if newest is not None and newest.parent.resolve() != chosen.parent.resolve():
        raise UserError(
            f"--resume {wanted}: {run_dir} has checkpoints of its own; give another run.name=... to branch off"
        )
    return chosen


def check(saved: TrainState, config: Config, *, sources: str, tokenizer: str, precision: str) -> None:
    """Raise UserError naming the first key that must not change and has, with both values."""
    before, now = _flat(saved.config), _flat(learned(config))
    for key in sorted(before.keys() | now.keys()):
        free = key in FREE_KEYS or key.startswith("data.sources")
        if not free and before.get(key) != now.get(key):
            raise _mismatch(key, before.get(key), now.get(key))
    if saved.sources != sources:
        old, new = saved.config["data"]["sources"], learned(config)["data"]["sources"]
        if old == new:
            raise UserError("data.sources: the documents are not those the checkpoint was trained on; " + _REMEDY)
        raise _mismatch("data.sources", old, new)
    if saved.tokenizer != tokenizer:
        raise UserError(f"data.tokenizer: {config.data.tokenizer!r} is not the checkpoint's tokenizer any more; " + _REMEDY)
    if config.train.precision != "auto" and saved.precision != precision:
        raise _mismatch("train.precision", saved.precision, precision)


_REMEDY = "set it back, or start another run: run.name=..."


def _mismatch(key: str, before: Any, now: Any) -> UserError:
    return UserError(f"{key}: the checkpoint was trained with {before!r}, the configuration says {now!r}; {_REMEDY}")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
