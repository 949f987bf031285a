"""What a run tells: the progress line, `metrics.jsonl`, `samples.md`; no secret, nothing a terminal would obey."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from text import clean, redact, say

LINE_EVERY_SEC = 0.2  # on a terminal
PLAIN_EVERY_SEC = 30.0  # elsewhere: a line during steps that take long
RECORDS = METRICS, SAMPLES = "metrics.jsonl", "samples.md"
CUT_SHORT = "cut_short"  # in a line of the metrics: a signal ended its evaluation
NO_SAMPLES = "A signal came before the end of these; they are made when the run goes on."


def duration(seconds: float) -> str:
    """5s, 1m05s, 2h03m, 3d04h."""
    seconds = round(seconds)
    for size, unit, rest, rest_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{unit}{seconds % size // rest:02d}{rest_unit}"
    return f"{seconds}s"


class Tracker:
    """Writes the run's files and the console. With `folder` None (ranks other than 0) it does nothing.

    A terminal gets one line that is rewritten; anything else gets plain lines, one per logged step and, when steps take
    long, one in between.
    """

    def __init__(self, folder: Path | None, *, total_steps: int, first_step: int, out: TextIO | None = None):
        self.folder, self.total_steps, self.first_step = folder, total_steps, first_step
        self.out = sys.stdout if out is None else out
        self.live = self.out.isatty()
        self.start = self.last_line = time.perf_counter()
        self.summary = ""
        self._torn: set[str] = set()  # files whose last line may be half there
        self.width = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            keep_until(folder, first_step)

    def note(self, text: str = "") -> None:
        """A line that stays."""
        if self.folder is not None:
            self._clear()
            self._print(clean(text))

    def progress(self, done: float, doing: str = "") -> None:
        """`done` steps of the whole run, with the fraction of the step under way."""
        now = time.perf_counter()
        if self.folder is None or now - self.last_line < (LINE_EVERY_SEC if self.live else PLAIN_EVERY_SEC):
            return
        self.last_line = now
        line = "  ".join(part for part in (self._where(done), self.summary, doing) if part)
        if not self.live:
            self._print(line)
            return
        line = line[: shutil.get_terminal_size().columns - 1]
        self._print("\r" + line.ljust(self.width), end="")
        self.width = len(line)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One object in `metrics.jsonl` and one line on the console, after `step` steps."""
        if self.folder is None:
            return
        self._append(METRICS, redact(json.dumps({"step": step, **metrics}, allow_nan=False)) + "\n")
        self.summary = "  ".join(
            f"{label} {metrics[key]:{form}}"
            for key, label, form in (
                ("loss", "loss", ".4f"), ("val_bpb", "val bits/byte", ".3f"), ("lr", "lr", ".2e"),
                ("tokens_per_sec", "tok/s", ",.0f"), ("mfu", "MFU", ".1%"),
            )
            if metrics.get(key) is not None
        )  # fmt: skip
        self.last_line = time.perf_counter()
        self._clear()
        self._print(f"{self._where(step)}  {self.summary}")

    def samples(self, step: int, prompts_and_texts: list[tuple[str, str]] | None) -> None:
        """A section of `samples.md`, in place of one that says that they were cut short; None is to say so."""
        if self.folder is None:
            return
        quoted = (_quote(clean(f"**{prompt}**{text}")) for prompt, text in prompts_and_texts or ())
        texts = [NO_SAMPLES] if prompts_and_texts is None else quoted
        if cut_short(self.folder, step, (SAMPLES,)):
            _replace(self.folder / SAMPLES, recorded(self.folder / SAMPLES, most=step - 1))
        self._append(SAMPLES, f"## Step {step}\n\n" + "".join(f"{text}\n\n" for text in texts))

    def _append(self, name: str, text: str) -> None:
        """A disk that is full costs lines, not the run; that is told once."""
        assert self.folder is not None
        try:
            with open(self.folder / name, "a", encoding="utf-8") as file:
                file.write("\n" * (name in self._torn) + text)
            self._torn.discard(name)
        except OSError as error:
            if name not in self._torn:
                self.note(f"{self.folder / name} cannot be written: {error.strerror}; training goes on")
            self._torn.add(name)

    def _where(self, done: float) -> str:
        elapsed, fresh = time.perf_counter() - self.start, done - self.first_step
        left = duration(elapsed / fresh * (self.total_steps - done)) if fresh > 0 else "?"
        return f"step {int(done)}/{self.total_steps}  {left} left"

    def _clear(self) -> None:
        if self.live and self.width:
            self._print("\r" + " " * self.width + "\r", end="")
            self.width = 0

    def _print(self, text: str, end: str = "\n") -> None:
        say(text, end, self.out)


def _quote(text: str) -> str:
    return "\n".join(f"> {line}" for line in text.splitlines())


def keep_until(folder: Path, step: int) -> None:
    """Drop metrics and samples of later steps: a resumed run makes them again. A half-written last line goes, too."""
    for name in RECORDS:
        if (folder / name).exists():
            _replace(folder / name, recorded(folder / name, most=step))


def recorded(path: Path, *, most: float = math.inf) -> str:
    """What `metrics.jsonl` or `samples.md` holds of the steps up to `most`; what is torn is left out."""
    return "".join(text for _, text in entries(path, most=most))


def entries(path: Path, *, most: float = math.inf) -> Iterator[tuple[float, str]]:
    """The same, entry by entry, each behind its step; what stands above the first samples is of step -inf."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return ((step, entry) for step, entry in _parts(path.name, text) if step <= most)


def add_missing(path: Path, step: int, theirs: bytes) -> None:
    """What somebody else has recorded of the steps after `step`, in place of what is there of these."""
    parts = _parts(path.name, theirs.decode(errors="replace"))
    _replace(path, recorded(path, most=step) + "".join(clean(text) for when, text in parts if when > step))


def cut_short(folder: Path, step: int, names: Sequence[str] = RECORDS) -> list[str]:
    """Which of the records lack what a signal cut short after `step`."""
    marks = {METRICS: lambda text: CUT_SHORT in json.loads(text), SAMPLES: lambda text: NO_SAMPLES in text.splitlines()}
    return [name for name in names if any(when == step and marks[name](text) for when, text in entries(folder / name))]


def score(folder: Path, step: int, scores: Mapping[str, Any]) -> None:
    """Write the scores of an evaluation that is made up for into the line of its step."""

    def scored(text: str) -> str:
        kept = {key: value for key, value in json.loads(text).items() if key != CUT_SHORT}
        return json.dumps({**kept, **scores}) + "\n"

    lines = entries(folder / METRICS, most=step)
    _replace(folder / METRICS, "".join(scored(text) if when == step else text for when, text in lines))


def logged(folder: Path, step: int) -> list[dict[str, Any]]:
    """The entries of `metrics.jsonl` up to a step."""
    return [json.loads(text) for _, text in entries(folder / METRICS, most=step)]


def _parts(name: str, text: str) -> Iterator[tuple[float, str]]:
    """The entries of a record, and of which step they are."""
    if name == METRICS:
        for line in text.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                step = json.loads(line)["step"]
                if type(step) is int:
                    yield step, f"{line}\n"
        return
    for part in re.split(r"(?m)^(?=## Step \d+$)", text):
        heading = re.match(r"## Step (\d+)$", part, re.MULTILINE)
        if part.strip():  # a line that was torn off must not swallow the next heading
            yield float(heading[1]) if heading else -math.inf, part.rstrip() + "\n\n"


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
