"""See what a run is, or will be, trained on.

    python scripts/inspect_data.py doctor --config mini          can it be read, does it fit, does validation leak?
    python scripts/inspect_data.py stats  --config quickstart    documents, tokens, characters, lengths
    python scripts/inspect_data.py peek   --config quickstart    rows as the model gets them, as text
    python scripts/inspect_data.py trace  --config runs/quickstart --step 57    the documents behind a step

`--config` is that of train.py, or a run's folder. `section.key=value` changes keys, as there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import numpy as np

import checkpoint
import config as configuration
import counts
import environment
import model
import remote
import resume
import shards
from config import Config, UserError
from dataset import Dataset, open_dataset
from documents import Unit, read_unit
from options import Parser
from stream import PADDING, Chunk, Cursor, Mixed, Place, Row, Tally
from text import clean, report, safe_text

# The near duplicates that FineWeb's authors look for: word 5-grams, 14 bands of 8 hashes (arXiv 2406.17557).
GRAM, NUM_PERM, NUM_BANDS = 5, 112, 14
SIMILAR = 0.7  # Jaccard; candidates are compared exactly
HELD_BYTES = 4 << 30  # of text, more than which a feeding process should not hold
MANY_EPOCHS = 4  # repeated more often, data are worth clearly less (arXiv 2305.16264)


# ---------------------------------------------------------------------------------------------------------------- rows


class Part(NamedTuple):
    """A document's tokens in a row."""

    unit: Unit
    row: int  # of the document in its unit
    ids: np.ndarray  # with the EOS after it, where the row has that
    offset: int  # tokens of the document before these


def parts_of(row: Row, units: tuple[Unit, ...]) -> Iterator[Part]:
    for chunk, start, stop in row.parts:
        first = int(np.searchsorted(chunk.ends, start, side="right"))
        while start < stop:
            begin, end = _bounds(chunk, first)
            taken = min(stop, end)
            yield Part(units[chunk.units[first]], int(chunk.rows[first]), chunk.ids[start:taken], start - begin)
            start, first = taken, first + 1


def _bounds(chunk: Chunk, document: int) -> tuple[int, int]:
    return int(chunk.ends[document - 1]) if document else 0, int(chunk.ends[document])


def rows_from(dataset: Dataset, config: Config, cursor: Cursor) -> Iterator[tuple[int, Row, list[Part]]]:
    """(number in the global order, row, its documents) from `cursor` on."""
    feed = dataset.feed(config, cursor)
    streams = dataset.manifest.streams
    places = list(cursor.places) or [Place()] * len(streams)
    mixed = Mixed(feed, places, lambda chunks: map(feed.encoder, chunks), Tally())
    number = cursor.row
    while (taken := mixed.next(number)) is not None:
        stream, row = taken
        yield number, row, list(parts_of(row, streams[stream].units))
        number += 1


def cursor_before(config: Config, dataset: Dataset, step: int) -> tuple[int, Cursor]:
    """The last logged step before `step` in the run's metrics, and where its data ended; else the start.

    Raises UserError where the run in run.dir has other data. Without a checkpoint it will begin again, as this does.
    """
    saved = checkpoint.latest(Path(config.run.dir, "checkpoints"))
    if saved is None:
        return 0, Cursor()
    sources, tokenizer = dataset.manifest.fingerprint, dataset.fingerprint
    resume.check_order(resume.TrainState.read(saved), config, sources=sources, tokenizer=tokenizer)
    path = Path(config.run.dir, "metrics.jsonl")
    best: tuple[int, Cursor] = (0, Cursor())
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that a killed run did not finish
            entry = json.loads(line)
            if best[0] < entry["step"] < step:
                best = entry["step"], Cursor.from_dict(entry["cursor"])
    return best


def where(unit: Unit, row: int) -> str:
    return f"{safe_text(shards.provenance(unit))}, document {row}"


# ------------------------------------------------------------------------------------------------------------ commands


def trace(config: Config, dataset: Dataset, step: int) -> int:
    """The documents behind a step, in the order of its rows."""
    logged, cursor = cursor_before(config, dataset, step)
    per_step = config.rows_per_step
    rows = islice(rows_from(dataset, config, cursor), (step - 1 - logged) * per_step, (step - logged) * per_step)
    found = 0
    for number, row, parts in rows:
        found += 1
        inputs = int((row.tokens[: config.data.seq_len] != PADDING).sum())
        print(f"row {number - (step - 1) * per_step} of step {step}: {inputs} tokens")
        for part in parts:
            start = dataset.tokenizer.decode(part.ids[:16].tolist())
            print(
                f"  tokens {part.offset}-{part.offset + len(part.ids)} of {clean(where(part.unit, part.row))}: "
                f"{safe_text(' '.join(str(start).split()))!r}"
            )
    if not found:
        raise UserError(f"--step {step}: the sources' last epoch ends before it")
    return 0


def peek(config: Config, dataset: Dataset, count: int, step: int | None) -> int:
    """Rows as text, from the start or a step on, each document under a line that names it."""
    logged, cursor = (0, Cursor()) if step is None else cursor_before(config, dataset, step)
    step = step or 1
    skipped = (step - 1 - logged) * config.rows_per_step
    found = 0
    for number, row, parts in islice(rows_from(dataset, config, cursor), skipped, skipped + count):
        found += 1
        padding = int((row.tokens[: config.data.seq_len] == PADDING).sum())
        print(f"==== row {number}: {config.data.seq_len} tokens, {padding} of them padding")
        for part in parts:
            whole = "" if part.offset == 0 else f", from token {part.offset}"
            print(clean(f"---- {where(part.unit, part.row)}{whole}"))
            print(safe_text(str(dataset.tokenizer.decode(part.ids.tolist()))))
    if not found:
        raise UserError(f"--step {step}: the sources' last epoch ends before it")
    return 0


def stats(config: Config, dataset: Dataset, count: int) -> int:
    """Counts over the first `count` documents in the sources' order."""
    tally: Counter[str] = Counter()
    lengths: list[int] = []
    characters: set[str] = set()
    hashes: set[int] = set()
    for unit in dataset.manifest.units:
        read = read_unit(unit)
        tally["skipped"] += read.skipped
        items = read.items[: count - tally["documents"]]
        encoded = [dataset.encoder([item])[0] if isinstance(item, str) else item for item in items]
        for item, ids, value, size in zip(items, encoded, read.hashes.tolist(), read.num_bytes.tolist(), strict=False):
            if ids is None:
                tally["refused by the tokenizer"] += 1
                continue
            tally["documents"] += 1
            tally["tokens"] += len(ids) + 1
            tally["bytes"] += size
            tally["exact repetitions"] += value in hashes
            tally["held out"] += value < dataset.threshold
            hashes.add(value)
            lengths.append(len(ids))
            if isinstance(item, str):
                tally["characters"] += len(item)
                tally["lines"] += item.count("\n") + 1
                characters |= set(item)
        if tally["documents"] >= count:
            break
    if not lengths:
        raise UserError(f"data.sources: no document can be read; {tally['skipped']} are unreadable")
    quantiles = np.percentile(lengths, (0, 5, 50, 95, 99, 100)).astype(int).tolist()
    for name in ("documents", "tokens", "bytes", "characters", "lines"):
        print(f"{name:26}{tally[name]:>16,}" + (" (with EOS)" if name == "tokens" else ""))
    print(f"{'unique characters':26}{len(characters):>16,}")
    print(f"{'bytes per token':26}{tally['bytes'] / tally['tokens']:>16.3f}")
    for name in ("held out", "exact repetitions", "skipped", "refused by the tokenizer"):
        print(f"{name:26}{tally[name]:>16,}")
    names = ("least", "5%", "median", "95%", "99%", "most")
    print("tokens of a document      " + ", ".join(f"{n} {q:,}" for n, q in zip(names, quantiles, strict=True)))
    longer = sum(max(0, length + 1 - config.data.seq_len) for length in lengths) / tally["tokens"]
    print(
        f"past data.seq_len = {config.data.seq_len}: {longer:.1%} of the tokens, which data.packing=best_fit would drop"
    )
    return 0


# -------------------------------------------------------------------------------------------------------------- doctor


class Doctor:
    """Checks before a GPU is paid for; each is a line: ok, warn or FAIL."""

    def __init__(self, config: Config, dataset: Dataset, count: int):
        self.config, self.dataset, self.failed = config, dataset, False
        self.units = dataset.manifest.units
        # Units spread over the sources: the first ones of a crawl are not like the others.
        order = np.random.default_rng(0).permutation(len(self.units))
        self.training: list[Any] = []
        self.held_out: list[Any] = []
        self.read = self.skipped = self.tokens = self.text_bytes = 0
        self.seconds = 0.0
        for number in order.tolist():
            documents = read_unit(self.units[number])
            self.read += 1
            self.skipped += documents.skipped
            start = time.perf_counter()
            for item, value, size in zip(documents.items, documents.hashes, documents.num_bytes.tolist(), strict=True):
                ids = dataset.encoder([item])[0] if isinstance(item, str) else item
                self.tokens += 0 if ids is None else len(ids) + 1
                self.text_bytes += size
                (self.held_out if value < dataset.threshold else self.training).append((item, ids))
            self.seconds += time.perf_counter() - start
            if len(self.training) + len(self.held_out) >= count:
                break

    def run(self) -> int:
        checks = (self.revisions, self.documents, self.supply, self.tokens_fit, self.split, self.leakage, self.disk)
        for check in checks:
            check()
        return int(self.failed)

    def say(self, verdict: str, what: str) -> None:
        self.failed |= verdict == "FAIL"
        print(f"{verdict:5}{safe_text(what)}", flush=True)

    def revisions(self) -> None:
        used = self.config.data.fallback if self.dataset.fallback else self.config.data.sources
        paths = {unit.path for unit in self.units}
        for source in used:
            commits = {
                found[1]
                for path in paths
                if (found := re.match(rf"{remote.PREFIX}datasets/{source.path}@(\w+)/", path))
            }
            if commits and not re.fullmatch(r"[0-9a-f]{40}", source.revision or ""):
                self.say("warn", f"{source.path} is not pinned: set revision: {commits.pop()}")
            else:
                self.say("ok", f"{source.path} is {'pinned' if commits else 'local'}")

    def documents(self) -> None:
        found = len(self.training) + len(self.held_out)
        share = self.skipped / max(1, found + self.skipped)
        verdict = "FAIL" if not found or share > self.config.data.max_skipped else "warn" if share > 0.001 else "ok"
        self.say(
            verdict, f"{found:,} documents in {self.read} of {len(self.units):,} units read, {share:.2%} unreadable"
        )
        window = self.config.data.shuffle_window
        held = self.text_bytes / max(1, self.read) * min(len(self.units), 2 * window)
        if held > HELD_BYTES:
            self.say(
                "warn",
                f"two shuffle windows of {window} units take over {held / 2**30:.1f} GiB of memory in each rank; lower "
                "data.shuffle_window, or write smaller row groups",
            )
        windows = -(-len(self.units) // window)
        processes = max(1, self.config.data.workers) * int(os.environ.get("WORLD_SIZE", 1))
        self.say(
            "ok" if len(self.units) >= processes else "warn",
            f"{len(self.units):,} units (row groups) in {windows:,} shuffle windows, for {processes} process(es)",
        )

    def supply(self) -> None:
        if not self.seconds or not self.tokens:
            return
        steps = counts.num_steps(self.config, counts.count_parameters(model.meta_model(self.config.model)))
        wanted = steps * self.config.train.batch_tokens
        there = self.tokens / self.read * len(self.units)
        epochs = wanted / there
        verdict = "warn" if epochs > MANY_EPOCHS else "ok"
        self.say(verdict, f"about {there:,.0f} tokens there, {wanted:,} asked for: {epochs:.2f} epochs")
        rate = self.tokens / self.seconds
        self.say("ok", f"{rate:,.0f} tokens/s tokenised by one process ({self.dataset.encoder.backend})")

    def tokens_fit(self) -> None:
        vocab, size = self.config.model.vocab_size, len(self.dataset.tokenizer)
        highest = max((int(ids.max()) for _, ids in self.training if ids is not None and len(ids)), default=-1)
        verdict = "FAIL" if highest >= vocab else "ok"
        bits = 16 if size <= 65536 else 32
        self.say(
            verdict, f"tokens up to {highest:,} of {size:,} fit model.vocab_size = {vocab:,}; shards take {bits} bit"
        )
        texts = [item for item, _ in self.training[:200] if isinstance(item, str)]
        changed = [text for text in texts if self.dataset.tokenizer.decode(self._ids(text)) != text]
        if texts:
            verdict = "warn" if changed else "ok"
            self.say(
                verdict, f"{len(texts) - len(changed)} of {len(texts)} documents come back from their tokens unchanged"
            )

    def _ids(self, text: str) -> list[int]:
        ids = self.dataset.encoder([text])[0]
        return [] if ids is None else ids.tolist()

    def split(self) -> None:
        found = self.dataset.validation(self.config)
        verdict = "ok" if found.num_documents >= 5 else "warn"
        self.say(verdict, f"validation: {found.num_documents:,} held-out documents, {found.num_tokens:,} tokens")

    def leakage(self) -> None:
        """Held-out documents that a training document of the sample nearly repeats. Equal ones are on one side."""
        training, held_out = (
            [item if isinstance(item, str) else str(self.dataset.tokenizer.decode(item.tolist())) for item, _ in items]
            for items in (self.training, self.held_out)
        )
        exact = len(set(held_out) & set(training))
        self.say("FAIL" if exact else "ok", f"{exact} held-out documents are also trained on")
        near = near_duplicates(held_out, training)
        share = len(near) / max(1, len(held_out))
        self.say(
            "warn" if near else "ok",
            f"{len(near)} of {len(held_out):,} held-out documents ({share:.1%}) nearly repeat one of {len(training):,} "
            f"training documents (Jaccard of word {GRAM}-grams >= {SIMILAR})",
        )
        for mine, theirs, jaccard in near[:3]:
            start = " ".join(held_out[mine][:60].split())
            self.say("", f"  {jaccard:.2f}: {start!r} and {' '.join(training[theirs][:60].split())!r}")

    def disk(self) -> None:
        config = self.config
        total = counts.count_parameters(model.meta_model(config.model))
        # Weights, and as much again and again for AdamW, or once for Muon; one more while it is written.
        per = (total.total + total.mtp) * 4 * (2.2 if config.optim.name == "muon" else 3)
        wanted = {config.run.dir: per * (config.checkpoint.keep + 1)}
        if config.data.cache is not None:
            bytes_per_token = 2 if len(self.dataset.tokenizer) <= 65536 else 4
            there = self.tokens / max(1, self.read) * len(self.units) * bytes_per_token
            wanted[config.data.cache] = wanted.get(config.data.cache, 0) + there
        for folder, need in wanted.items():
            place = Path(os.path.expanduser(folder)).absolute()
            free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
            verdict = "ok" if free > need else "FAIL"
            self.say(verdict, f"{folder}: about {need / 2**30:.1f} GiB needed, {free / 2**30:.1f} GiB free")


def near_duplicates(held_out: list[str], training: list[str]) -> list[tuple[int, int, float]]:
    """(held-out document, the training document most like it, their Jaccard similarity), for those above SIMILAR."""
    rensa: Any = importlib.import_module("rensa")  # its types lack what it has

    grams = [[_grams(text) for text in texts] for texts in (held_out, training)]
    index = rensa.RMinHashLSH(threshold=SIMILAR, num_perm=NUM_PERM, num_bands=NUM_BANDS)
    for number, found in enumerate(grams[1]):
        if found:
            index.insert(number, _minhash(rensa, found))
    near = []
    for number, found in enumerate(grams[0]):
        candidates = index.query(_minhash(rensa, found)) if found else []
        scored = [(len(found & grams[1][c]) / len(found | grams[1][c]), c) for c in candidates]
        if scored and max(scored)[0] >= SIMILAR:
            near.append((number, max(scored)[1], max(scored)[0]))
    return near


def _grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + GRAM]) for i in range(max(1, len(words) - GRAM + 1))} if words else set()


def _minhash(rensa: Any, grams: Iterable[str]) -> Any:
    made = rensa.RMinHash(num_perm=NUM_PERM, seed=1)
    made.update(sorted(grams))
    return made


# ------------------------------------------------------------------------------------------------------------- program


def _open(given: argparse.Namespace) -> tuple[Config, Dataset]:
    path = Path(given.config)
    name = str(path / "config.yaml") if path.is_dir() else given.config
    config = configuration.load(name, given.overrides)
    environment.prepare()
    saved = fallback = None
    if path.is_dir():  # it may have been moved since, and another run may have its name
        config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(path)})})
        saved = checkpoint.latest(path / "checkpoints")
    if saved is not None:
        fallback = resume.TrainState.read(saved).fallback
    return config, open_dataset(config, saved, fallback=fallback, note=lambda text: print(clean(text), file=sys.stderr))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="inspect_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("doctor", "stats", "peek", "trace"), help="what to see")
    parser.add_argument("--config", required=True, metavar="PATH|NAME", help="as for train.py, or a run's folder")
    parser.add_argument("--documents", type=_count, metavar="N", help="doctor, stats: documents to read (5000, 10000)")
    parser.add_argument("--rows", type=_count, default=2, metavar="N", help="peek: rows to show (2)")
    parser.add_argument("--step", type=_count, metavar="S", help="trace: the step, from 1 on; peek: the first one (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        given = parser.parse_intermixed_args(arguments)
        if given.command == "trace" and given.step is None:
            raise UserError("trace needs --step S")
        config, dataset = _open(given)
        if given.command == "doctor":
            return Doctor(config, dataset, given.documents or 5000).run()
        if given.command == "stats":
            return stats(config, dataset, given.documents or 10_000)
        if given.command == "peek":
            return peek(config, dataset, given.rows, given.step)
        return trace(config, dataset, given.step)
    except BrokenPipeError:  # `| head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # or its flush at the end complains
        return 0
    except (UserError, OSError) as error:
        return report(error)


if __name__ == "__main__":
    sys.exit(main())
