"""What lies on the disk is not what was written, or cannot be written: F5 to F8."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import Lab, checkpoints, lines, newest, same_end

import checkpoint

UNSAVED = 5  # the exit code of a run whose last checkpoint could not be written
Damage = tuple[str, Callable[[Path], None]]


@pytest.fixture
def pair(lab: Lab, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of a run, the older and the newer, whole, in a folder of their own."""
    source = lab[lab.reference()] / "checkpoints"
    for name in ("step_00000006", "step_00000008"):
        shutil.copytree(source / name, tmp_path / name)
    return tmp_path / "step_00000006", tmp_path / "step_00000008"


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size)


def append(content: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with open(path, "ab") as file:
            file.write(content)

    return apply


def flip(position: int, bit: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        with open(path, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1 << bit]))

    return apply


def lengths(path: Path) -> Iterator[Damage]:
    size = path.stat().st_size
    for name, length in (("0", 0), ("1", 1), ("half", size // 2), ("size - 1", size - 1)):
        yield f"cut to {name}", cut(length)
    yield "deleted", Path.unlink
    yield "a byte more", append(b"\n")
    yield "4096 zeros more", append(bytes(4096))


def flips(path: Path, positions: int) -> Iterator[Damage]:
    """Evenly over the file and at random, every bit of a byte in turn."""
    size, draw = path.stat().st_size, random.Random(path.name)
    count = min(size, positions)
    chosen = {number * size // count for number in range(count // 2)}
    while len(chosen) < count:
        chosen.add(draw.randrange(size))
    for number, position in enumerate(sorted(chosen)):
        yield f"bit {number % 8} of byte {position}", flip(position, number % 8)


def detected(older: Path, newer: Path, file: str) -> str:
    """What is wrong with how a damaged file of the newer checkpoint is answered."""
    try:
        checkpoint.verify(newer)
        return "not detected"
    except checkpoint.CheckpointError as error:
        if file not in str(error):
            return f"not named: {error}"
    found = checkpoint.latest(newer.parent)
    return "" if found == older else f"fell back to {found}"


def damage_all(pair: tuple[Path, Path], damages: Callable[[Path], Iterator[Damage]], case: Any) -> None:
    older, newer = pair
    assert checkpoint.latest(newer.parent) == newer
    files = sorted(path.name for path in newer.iterdir())
    assert len(files) >= 8 and checkpoint.MANIFEST in files
    for file in files:
        content = (newer / file).read_bytes()
        for name, apply in damages(newer / file):
            apply(newer / file)
            case.check(detected(older, newer, file), f"{file}, {name}")
            (newer / file).write_bytes(content)
    assert checkpoint.latest(newer.parent) == newer  # all of it was undone
    case.figures["files"] = len(files)


def test_every_file_cut_deleted_longer(pair: tuple[Path, Path], row: Callable[[str], Any]) -> None:
    with row("F5") as case:
        damage_all(pair, lengths, case)


def test_flipped_bits(pair: tuple[Path, Path], row: Callable[[str], Any]) -> None:
    with row("F6") as case:
        damage_all(pair, lambda path: flips(path, 24), case)
        case.figures["positions per file"] = 24


@pytest.mark.slow
def test_many_flipped_bits(pair: tuple[Path, Path], row: Callable[[str], Any]) -> None:
    with row("F6") as case:
        damage_all(pair, lambda path: flips(path, 200), case)
        case.figures["positions per file"] = 200
        assert case.tried >= 1000


def test_damage_that_is_not_looked_for_would_be_noticed(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_verify_file", lambda path, entry: None)
    flip(5000, 3)(pair[1] / "model.safetensors")
    assert detected(*pair, "model.safetensors") == "not detected"


def test_a_run_falls_back_and_ends_alike(lab: Lab, row: Callable[[str], Any]) -> None:
    """The newest damaged: it is moved aside, the one before is taken, and the end is that of the undamaged run."""
    reference = lab.reference()
    with row("F5") as case:
        for number, (file, apply) in enumerate((
            ("training_state.json", append(b" ")), ("manifest.json", Path.unlink),
        )):  # fmt: skip
            name = f"damaged-{number}"
            shutil.copytree(lab[reference], lab[name])
            apply(lab[name] / "checkpoints" / "step_00000008" / file)
            result = lab.run(name)
            case.check("" if result.code == 0 else result, name)
            case.check(same_end(lab[name], lab[reference]), name)
            bad = [path for path in checkpoints(lab[name]) if path.startswith("step_00000008.bad-")]
            case.check("" if len(bad) == 1 and "resumed from" in result.out() else checkpoints(lab[name]), name)


def test_nothing_intact_is_told(lab: Lab, row: Callable[[str], Any]) -> None:
    shutil.copytree(lab[lab.reference()], lab["all-damaged"])
    for path in (lab["all-damaged"] / "checkpoints").glob("step_*"):
        flip(100, 1)(path / "optimizer.safetensors")
    before = checkpoints(lab["all-damaged"])
    with row("F5") as case:
        result = lab.run("all-damaged")
        case.check("" if result.code == 2 and "no intact checkpoint" in result.err() else result)
        case.check("" if checkpoints(lab["all-damaged"]) == before else checkpoints(lab["all-damaged"]))


# ---- no room, no right


def test_a_full_disk_at_every_operation_of_a_save(lab: Lab, tmp_path: Path, row: Callable[[str], Any]) -> None:
    with row("F7") as case:
        result = lab.call("boundaries:refuse_everywhere", str(tmp_path / "work"), str(tmp_path / "report.json"), 2)
        assert result.code == 0, result
        found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        case.tried += found["cases"]
        case.failures += found["failures"]
        case.figures["operations that need room"] = len(found["operations"])


def test_a_temporary_folder_left_behind_would_be_noticed(lab: Lab, tmp_path: Path) -> None:
    result = lab.call("boundaries:untidy", str(tmp_path / "work"), str(tmp_path / "report.json"))
    assert result.code == 0, result
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["failures"]


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_a_run_whose_disk_is_full_for_a_while(lab: Lab, row: Callable[[str], Any], code: str) -> None:
    """The save of step 4 fails: training goes on, the one of step 2 stays, the one of step 6 works, nothing is left."""
    name = f"full-{code}"
    fault = ("disk", {"root": str(lab[name]), "code": code, "paths": r"step_00000004\.tmp-.*optimizer"})
    with row("F7") as case:
        result = lab.run(name, faults=[fault])
        case.check("" if result.code == 0 else result, "exit code")
        case.check(same_end(lab[name], lab[lab.reference()]), "end")
        case.check("" if "could not be written" in result.out() + result.err() else result, "told")
        wanted = ["step_00000002", "step_00000006", "step_00000008"]
        case.check("" if checkpoints(lab[name]) == wanted else checkpoints(lab[name]), "what is there")


def test_a_run_that_cannot_save_fails(lab: Lab, row: Callable[[str], Any]) -> None:
    """Full to the end: the exit code says so, and what was saved before stays."""
    name = "full-to-the-end"
    fault = ("disk", {"root": str(lab[name] / "checkpoints"), "code": "ENOSPC", "paths": r"step_0000000[468]\.tmp-"})
    with row("F7") as case:
        result = lab.run(name, faults=[fault])
        case.check("" if result.code == UNSAVED else result, "exit code")
        case.check("" if checkpoints(lab[name]) == ["step_00000002"] else checkpoints(lab[name]), "what is there")
        again = lab.run(name)
        case.check(same_end(lab[name], lab[lab.reference()]) if again.code == 0 else again, "started again")


def test_a_run_that_cannot_save_for_long_gives_up(lab: Lab, row: Callable[[str], Any]) -> None:
    """Six cadences without a checkpoint: it would be a waste to go on."""
    name = "hopeless"
    faults = [
        ("disk", {"root": str(lab[name] / "checkpoints"), "code": "ENOSPC", "paths": r"\.tmp-"}),
        ("slow_steps", {"seconds": 0.05}),
    ]
    with row("F7") as case:
        result = lab.run(name, "train.steps=400", "checkpoint.every_minutes=0.002", faults=faults)
        case.check("" if result.code == UNSAVED else result, "exit code")
        case.check("" if 0 < len(lines(lab[name])) < 200 else len(lines(lab[name])), "steps")


def test_a_folder_that_cannot_be_written(lab: Lab, row: Callable[[str], Any]) -> None:
    """Refused in a line, before a model is built. Tests may run as root, whom no mode stops: the shim does."""
    (lab.folder / "a-file").write_text("", encoding="utf-8")
    (lab["sealed"] / "checkpoints").mkdir(parents=True)
    cases: dict[str, tuple[Path, list[Any]]] = {
        "read-only": (lab["sealed"], [("disk", {"root": str(lab["sealed"]), "code": "EROFS"})]),
        "read-only parent": (lab["open"], [("disk", {"root": str(lab.folder), "code": "EROFS", "paths": "open|pref"})]),
        "a file": (lab.folder / "a-file", []),
        "below a file": (lab.folder / "a-file" / "run", []),
        "full": (lab["no-room"], [("little_room", {"num_bytes": 1000})]),
    }  # fmt: skip
    with row("F8") as case:
        for name, (folder, faults) in cases.items():
            built = lab.folder / f"built-{name}"
            result = lab.run("f8", f"run.dir={folder}", faults=[*faults, ("note_building", {"path": str(built)})])
            case.check("" if result.code == 2 else result, name)
            error = result.err()
            case.check(
                "" if error.startswith("error: ") and error.count("\n") == 1 and "run.dir" in error else error, name
            )
            case.check("a model was built" if built.exists() else "", name)
            case.check("" if result.seconds[0] < 5 else f"{result.seconds[0]:.1f} s", name)
            case.figures["slowest refusal, s"] = round(
                max(result.seconds[0], case.figures.get("slowest refusal, s", 0)), 2
            )
        made = lab.run("far", f"run.dir={lab.folder / 'not' / 'there' / 'yet'}", "train.steps=2")
        case.check("" if made.code == 0 and newest(lab.folder / "not" / "there" / "yet") else made, "missing parent")


def test_a_rename_that_is_refused(lab: Lab, row: Callable[[str], Any]) -> None:
    """EXDEV, as on some overlays, for a while: told, nothing is left of it, and a later checkpoint comes through."""
    with row("F28") as case:
        fault = (
            "disk",
            {"root": str(lab["exdev"]), "code": "EXDEV", "paths": r"step_00000004\.tmp-", "kinds": ["rename"]},
        )
        result = lab.run("exdev", faults=[fault])
        case.check("" if result.code == 0 and "could not be written" in result.out() else result, "told")
        wanted = ["step_00000002", "step_00000006", "step_00000008"]
        case.check("" if checkpoints(lab["exdev"]) == wanted else checkpoints(lab["exdev"]), "what is there")
        case.check(same_end(lab["exdev"], lab[lab.reference()]), "end")


def test_a_clock_that_jumps(lab: Lab, row: Callable[[str], Any]) -> None:
    """An hour back and a day on, between steps: cadence and deadline do not notice."""
    with row("F28") as case:
        result = lab.run("clock", "train.max_minutes=10", faults=[("jumping_clock", {})])
        case.check("" if result.code == 0 else result, "exit code")
        case.check(same_end(lab["clock"], lab[lab.reference()]), "end")
