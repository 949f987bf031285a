"""The checkpoints of a run: which there are, whether they are intact, and deleting what is not needed.

    python scripts/checkpoints.py list runs/mini
    python scripts/checkpoints.py verify runs/mini
    python scripts/checkpoints.py prune runs/mini --keep 2 [--damaged]

`verify` reads every byte; its exit code is 1 where something is damaged. `prune` never goes below two intact ones.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import checkpoint
from checkpoint import CheckpointError
from config import UserError
from options import Parser
from resume import STATE_FILE, TrainState
from text import report, safe_text


def folder_of(path: Path) -> Path:
    """Where the checkpoints lie that a user means: of a run, or the folder itself."""
    path = Path(os.path.expanduser(path))
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not root.is_dir():
        raise UserError(f"{path}: no such directory; give a run (runs/NAME) or its checkpoints folder")
    return root


def entries(root: Path) -> list[Path]:
    """Checkpoints and what was moved aside, newest first."""
    named = [path for path in root.iterdir() if path.is_dir() and checkpoint.STEP.match(path.name)]
    return sorted(named, key=lambda path: path.name, reverse=True)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def listing(root: Path) -> int:
    """A line per checkpoint: step, size, tokens, age; what its name says where it is none."""
    found = entries(root)
    if not found:
        raise UserError(f"{root}: no checkpoint here; give a run (runs/NAME) or its checkpoints folder")
    for path in found:
        told = f"{path.name}  {size(path) / 2**20:10.1f} MiB"
        kind = path.name[14:].partition("-")[0]
        if kind:
            meaning = {"tmp": "a save that died", "old": "replaced", "trash": "a deletion that died", "bad": "damaged"}
            told += f"  {meaning.get(kind, 'held for the Hub' if kind == 'hub' else 'unknown')}"
        else:
            try:
                state = TrainState.read(path)
                told += f"  step {state.step}, {state.tokens:,} tokens"
            except UserError as error:
                told += f"  {error}" if (path / STATE_FILE).exists() else "  weights only"
            told += time.strftime("  %Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        print(safe_text(told))
    return 0


def verify(root: Path) -> int:
    """Every byte of every checkpoint; 1 where one is damaged or there is none."""
    found = [path for path in entries(root) if checkpoint.STEP.fullmatch(path.name)] or (
        [root] if (root / checkpoint.MANIFEST).is_file() else []
    )
    damaged = 0
    for path in found:
        try:
            manifest = checkpoint.verify(path)
            print(f"{path.name}  intact: {len(manifest['files'])} files, {size(path) / 2**20:.1f} MiB")
        except CheckpointError as error:
            damaged += 1
            print(safe_text(f"{path.name}  damaged: {error}"))
    if not found:
        raise UserError(f"{root}: no checkpoint here")
    return int(damaged > 0)


def prune(root: Path, keep: int, damaged: bool) -> int:
    """Delete all but the newest intact ones, under the run's lock."""
    run = root.parent if root.name == "checkpoints" else root
    with checkpoint.locked(run):
        before = entries(root)
        checkpoint.prune(root, keep)
        for path in entries(root) if damaged else ():
            if checkpoint.BAD.fullmatch(path.name):
                shutil.rmtree(path)
        left = entries(root)
    for path in before:
        if path not in left:
            print(f"{path.name}  gone from its place")
    print(f"{len(left)} left: {', '.join(path.name for path in left)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="checkpoints.py", description="List, verify or delete the checkpoints of a run.")
    parser.add_argument("what", choices=("list", "verify", "prune"), help="what to do")
    parser.add_argument("path", type=Path, metavar="PATH", help="a run, or its checkpoints folder")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="with prune: how many stay, at least 2 (3)")
    parser.add_argument(
        "--damaged", action="store_true", help="with prune: also those that were moved aside as damaged"
    )
    try:
        given: argparse.Namespace = parser.parse_args(arguments)
        if given.keep < checkpoint.LEAST_KEPT:
            raise UserError(f"--keep {given.keep}: at least {checkpoint.LEAST_KEPT} stay")
        root = folder_of(given.path)
        if given.what == "list":
            return listing(root)
        return verify(root) if given.what == "verify" else prune(root, given.keep, given.damaged)
    except (UserError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
