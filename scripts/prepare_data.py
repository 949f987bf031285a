"""Tokenise a configuration's sources once, into a folder of checksummed token shards that training maps into memory.

    python scripts/prepare_data.py --config mini --out shards/fineweb-edu [--tokens N] [--workers N]
    python train.py --config mini data.sources=shards/fineweb-edu data.tokenizer=shards/fineweb-edu/tokenizer

Training on the shards sees the same rows as training on the sources. Started again after any end, it goes on and comes
to the same bytes; on a finished folder it checks every shard. Sources with weights keep them and their epochs, and
share --tokens by their weights; a folder of sources without takes the weight and epochs that training gives it.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import config as configuration
import environment
import shards
import sources
import tokenizer as tokenizers
from config import UserError
from documents import Documents, Stream, Unit, read_unit
from options import Parser
from remote import one_line
from text import clean, report
from tokenizer import Encoder
from tracker import duration

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from dataset import Dataset

TEMPORARY = ("unit-*.safetensors.tmp-*", f"{shards.INDEX}.tmp-*", "tokenizer.tmp-*")


class Counts(NamedTuple):
    """What a shard holds."""

    documents: int
    tokens: int  # with an EOS for each document, as in training
    text_bytes: int
    shard_bytes: int
    skipped: int
    refused: int
    old: bool  # it was there


class Job(NamedTuple):
    """A shard to make."""

    folder: str
    number: int
    unit: Unit
    described: dict[str, Any]  # what `shards.to_bytes` is told of the folder


_encoder: Encoder | None = None  # of this process


def begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process alone decides when to stop, but its end is ours
    environment.tokenise_alone()

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def make_shard(job: Job) -> Counts:
    """Write a shard unless it is there, whole, of the same unit and tokenizer."""
    assert _encoder is not None
    folder = Path(job.folder)
    path = folder / shards.file_name(job.number)
    with contextlib.suppress(UserError):
        of = {key: job.described[key] for key in ("corpus", "tokenizer")}
        found = shards.find(folder, job.number, job.unit, **of)
        if found is not None:
            return _count(found, path, old=True)
    documents = read_unit(job.unit)
    packed = shards.pack(documents, _encoder(documents.items))
    data = shards.to_bytes(job.number, job.unit, packed, **job.described)
    shards.write_file(path, data)
    return _count(packed, path, old=False)


def _count(documents: Documents, path: Path, *, old: bool) -> Counts:
    sizes = list(zip(map(len, documents.items), documents.num_bytes.tolist(), strict=True))
    kept = [(length, size) for length, size in sizes if length]
    return Counts(
        documents=len(kept), tokens=sum(length + 1 for length, _ in kept), text_bytes=sum(size for _, size in kept),
        shard_bytes=path.stat().st_size, skipped=documents.skipped, refused=len(sizes) - len(kept), old=old,
    )  # fmt: skip


def made(jobs: list[Job], encoder: Encoder, workers: int) -> Generator[Counts, None, None]:
    """The counts of each job, in order; `workers` processes run ahead."""
    if workers == 1:
        begin(encoder)
        yield from map(make_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, begin, (encoder,)) as pool:
        try:
            with interrupts_later():  # the processes start here
                waiting = [pool.submit(make_shard, job) for job in jobs[: 4 * workers]]
            for number in range(len(jobs)):
                yield waiting.pop(0).result()
                if number + 4 * workers < len(jobs):
                    waiting.append(pool.submit(make_shard, jobs[number + 4 * workers]))
        except KeyboardInterrupt:  # whatever they are writing has a temporary name
            for process in multiprocessing.active_children():
                process.kill()
            raise
        except BrokenProcessPool:
            raise UserError("a tokenising process died (out of memory?); the same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def interrupts_later() -> Generator[None, None, None]:
    """Processes that start in here are deaf to Ctrl-C from their first instruction on; this one hears it afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def prepare(given: argparse.Namespace) -> None:
    from dataset import open_dataset  # imports torch, which the processes do without

    config = configuration.load(given.config, given.overrides)
    environment.prepare()
    out = Path(os.path.expanduser(given.out))
    for source in config.data.sources:
        sources.check_apart(source.path, given.out, "--out")
    known = shards.Index.read(out) if (out / shards.INDEX).is_file() else None
    if known is None and out.exists() and (not out.is_dir() or {*out.iterdir()} - _temporary(out)):
        raise UserError(f"--out {out}: exists and is no folder of token shards; choose another")
    if known is not None and known.complete and given.tokens:
        raise UserError(f"--out {out}: is complete; leave out --tokens, or choose another folder")
    mine = open_dataset(config, fallback=False, note=print)
    for line in mine.notes:
        print(clean(line))
    units = mine.manifest.units
    if any(unit.kind == "tokens" for unit in units):
        raise UserError("data.sources: these are token shards already")
    index = shards.Index.of(mine.manifest, mine.tokenizer, mine.fingerprint, complete=False)
    if known is not None and (known.identities, _weights(known)) != (index.identities, _weights(index)):
        raise UserError(f"--out {out}: holds shards of other sources, or with other weights; choose another folder")
    if known is not None and known.tokenizer != index.tokenizer:
        raise UserError(
            f"--out {out}: holds shards of another tokenizer; choose another folder, or go on with "
            f"data.tokenizer={out / 'tokenizer'}"
        )
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        write(out, mine, given, index, new=known is None)


@contextlib.contextmanager
def alone(out: Path) -> Generator[None, None, None]:
    """Nobody else writes to the folder: two would take each other's temporary files for left behind."""
    import checkpoint  # imports torch

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(checkpoint.locked(out))
        except UserError:
            raise UserError(
                f"--out {out}: another process writes to it; wait for it, or choose another folder"
            ) from None
        yield


def write(out: Path, mine: Dataset, given: argparse.Namespace, index: shards.Index, *, new: bool) -> None:
    units = mine.manifest.units
    for left in _temporary(out):  # of a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if new:
        index.write(out)  # first: it tells whose folder this is
    keep_tokenizer(mine.tokenizer, mine.fingerprint, out / "tokenizer")
    described = {
        "corpus": mine.manifest.fingerprint, "tokenizer": mine.fingerprint, "vocab_size": len(mine.tokenizer),
    }  # fmt: skip
    jobs = [Job(str(out), number, unit, described) for number, unit in enumerate(units)]
    total = run(jobs, mine, given)
    shards.Index.of(mine.manifest, mine.tokenizer, mine.fingerprint, complete=total.units == len(units)).write(out)
    for extra in {path.name for path in out.glob("unit-*.safetensors")} - total.names:
        (out / extra).unlink()  # made ahead of the end that --tokens set
    print(total.describe(out))
    print(f"next: python train.py {shlex.join(for_training(given, out))}")


def _weights(index: shards.Index) -> list[tuple[int, float, int | None]]:
    """What training takes from the folder. The names may change with the place of the sources."""
    if len(index.streams) == 1:
        return [(index.num_units, 1.0, None)]
    return [(part.units, part.weight, part.epochs) for part in index.streams]


def _temporary(out: Path) -> set[Path]:
    return {path for pattern in TEMPORARY for path in out.glob(pattern)}


def keep_tokenizer(tok: PreTrainedTokenizerFast, fingerprint: str, folder: Path) -> None:
    """Save it, unless it is there; what is there appeared as a whole, but may have been changed since."""
    if folder.is_dir():
        with contextlib.suppress(UserError):
            if tokenizers.fingerprint(tokenizers.load(str(folder))) == fingerprint:
                return
        shutil.rmtree(folder)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    try:
        temporary.mkdir()
        tokenizers.save(tok, temporary)
        temporary.rename(folder)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001  # a bare Exception is what tokenizers raises, of a full disk, too
        raise UserError(f"{folder}: cannot be written: {one_line(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing there after the rename


def for_training(given: argparse.Namespace, out: Path) -> list[str]:
    """train.py's arguments. A path of one part could be taken for the name of a ready list of sources."""
    place = f"./{out}" if len(out.parts) == 1 else str(out)
    others = [text for text in given.overrides if not text.startswith(("data.sources=", "data.tokenizer="))]
    return ["--config", given.config, f"data.sources={place}", f"data.tokenizer={place}/tokenizer", *others]


class Total:
    def __init__(self) -> None:
        self.units = self.documents = self.tokens = self.text_bytes = self.shard_bytes = 0
        self.skipped = self.refused = self.old = 0
        self.names: set[str] = set()

    def add(self, job: Job, counts: Counts) -> None:
        self.units += 1
        self.names.add(shards.file_name(job.number))
        for name in Counts._fields:
            setattr(self, name, getattr(self, name) + getattr(counts, name))

    def describe(self, out: Path) -> str:
        return (
            f"{out}: {self.units:,} shards ({self.old:,} were there, and are whole), {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {self.text_bytes / max(1, self.tokens):.3f} bytes per token, "
            f"{self.shard_bytes / 2**30:.3f} GiB; {self.skipped:,} documents unreadable, {self.refused:,} refused"
        )


def parts(jobs: list[Job], streams: Sequence[Stream], tokens: int | None) -> Iterator[tuple[list[Job], float]]:
    """The jobs of each stream and how many tokens they have to come to; all jobs in one go without --tokens."""
    if tokens is None:
        yield jobs, math.inf
        return
    first, weights = 0, sum(stream.weight for stream in streams)
    for stream in streams:
        yield jobs[first : first + len(stream.units)], tokens * stream.weight / weights
        first += len(stream.units)


def run(jobs: list[Job], mine: Dataset, given: argparse.Namespace) -> Total:
    """Make the shards up to `--tokens`, with a line of progress."""
    total, progress = Total(), Progress(len(jobs), given.tokens)
    for part, wanted in parts(jobs, mine.manifest.streams, given.tokens):
        wanted += total.tokens
        with contextlib.closing(made(part, mine.encoder, min(given.workers, len(part)))) as counts:
            for job, found in zip(part, counts, strict=False):
                total.add(job, found)
                progress.show(total, found)
                if total.tokens >= wanted:
                    break
    progress.end()
    return total


class Progress:
    """A line on standard error: what is done, how fast, and for how long it will go on."""

    def __init__(self, units: int, tokens: int | None):
        self.units, self.tokens = units, tokens
        self.start, self.told, self.terminal = time.monotonic(), 0.0, sys.stderr.isatty()
        self.new_tokens, self.known = 0, 0.0  # the share that was there took no tokenising

    def show(self, total: Total, found: Counts) -> None:
        spent = time.monotonic() - self.start
        share = max(total.units / self.units, total.tokens / self.tokens if self.tokens else 0)
        if found.old:
            self.known = share
        self.new_tokens += 0 if found.old else found.tokens
        if spent - self.told < (0.2 if self.terminal else 30):
            return
        self.told = spent
        left = duration(max(0.0, 1 - share) * spent / (share - self.known)) if share > self.known else "?"
        line = (
            f"{total.units:,} of {self.units:,} units, {total.tokens:,} tokens, "
            f"{self.new_tokens / spent:,.0f} tokens/s, {left} left"
        )
        print(
            f"\r{line}\x1b[K" if self.terminal else line, end="" if self.terminal else "\n", file=sys.stderr, flush=True
        )

    def end(self) -> None:
        if self.terminal:
            print("\r\x1b[K", end="", file=sys.stderr)


def _number(text: str) -> int:
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH|NAME", help="as for train.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards: new, or one to go on with")
    parser.add_argument("--tokens", type=_number, metavar="N", help="end with the unit that reaches N tokens")
    parser.add_argument("--workers", type=_number, default=1, metavar="N", help="processes that tokenise (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        prepare(parser.parse_intermixed_args(arguments))
    except (UserError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("\r\x1b[K" * sys.stderr.isatty() + "stopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
