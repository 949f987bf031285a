"""Tokenise a configuration's sources once, into a folder of checksummed token shards that training maps into memory.

    python scripts/prepare_data.py --config mini --out shards/fineweb-edu [--tokens N] [--workers N]
    python train.py --config mini data.sources=shards/fineweb-edu data.tokenizer=shards/fineweb-edu/tokenizer

Training on the shards sees the same rows as training on the sources. Started again after any end, it goes on and comes
to the same bytes; on a finished folder it checks every shard.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import signal
import sys
import time
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import config as configuration
import environment
import shards
from config import UserError
from documents import Unit, read_unit
from options import Parser
from text import report
from tokenizer import Encoder, save
from tracker import duration

if TYPE_CHECKING:
    from dataset import Dataset


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
    tokenizer: str
    vocab_size: int


_encoder: Encoder | None = None  # of this process


def begin(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops


def make_shard(job: Job) -> Counts:
    """Write a shard unless it is there, whole and of the same unit."""
    assert _encoder is not None
    path = Path(job.folder, shards.file_name(job.number))
    if path.is_file():
        with contextlib.suppress(UserError):
            return _count(path, job.number, old=True)
    documents = read_unit(job.unit)
    packed = shards.pack(documents, _encoder(documents.items))
    data = shards.to_bytes(job.number, job.unit, packed, tokenizer=job.tokenizer, vocab_size=job.vocab_size)
    shards.write_file(path, data)
    return _count(path, job.number, old=False)


def _count(path: Path, number: int, *, old: bool) -> Counts:
    size = path.stat().st_size
    read = shards.read(Unit("tokens", str(path), number, number + 1, size, ""))
    lengths = [len(ids) for ids in read.items]
    kept = sum(length > 0 for length in lengths)
    tokens, text_bytes = sum(lengths) + kept, int(read.num_bytes.sum())
    return Counts(kept, tokens, text_bytes, size, read.skipped, len(lengths) - kept, old)


def made(jobs: list[Job], encoder: Encoder, workers: int) -> Generator[Counts, None, None]:
    """The counts of each job, in order; `workers` processes run ahead."""
    if workers == 1:
        begin(encoder)
        yield from map(make_shard, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, begin, (encoder,)) as pool:
        waiting = [pool.submit(make_shard, job) for job in jobs[: 4 * workers]]
        try:
            for number in range(len(jobs)):
                yield waiting.pop(0).result()
                if number + 4 * workers < len(jobs):
                    waiting.append(pool.submit(make_shard, jobs[number + 4 * workers]))
        except BrokenProcessPool:
            raise UserError("a tokenising process died (out of memory?); the same command goes on") from None
        finally:
            pool.shutdown(cancel_futures=True)


def prepare(given: argparse.Namespace) -> None:
    from dataset import open_dataset  # imports torch, which the processes do without

    config = configuration.load(given.config, given.overrides)
    environment.prepare()
    out = Path(given.out).expanduser()
    known = shards.Index.read(out) if (out / shards.INDEX).is_file() else None
    if known is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is no folder of token shards; choose another")
    if known is not None and (out / "tokenizer").is_dir():  # made from the sources, perhaps: not to be made again
        overrides = [*given.overrides, f"data.tokenizer={out / 'tokenizer'}"]
        mine = open_dataset(configuration.load(given.config, overrides), note=print)
    else:
        mine = open_dataset(config, note=print)
    units = mine.manifest.units
    if any(unit.kind == "tokens" for unit in units):
        raise UserError("data.sources: these are token shards already")
    index = shards.Index.of(mine.manifest, mine.tokenizer, mine.fingerprint, complete=False)
    if known is not None and (known.identities, known.tokenizer) != (index.identities, index.tokenizer):
        raise UserError(f"--out {out}: holds shards of other sources or another tokenizer; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob("*.tmp-*"):  # of a run that was killed
        left.unlink(missing_ok=True)
    if not (out / "tokenizer" / "tokenizer.json").is_file():
        (out / "tokenizer").mkdir(exist_ok=True)
        save(mine.tokenizer, out / "tokenizer")
    if known is None:
        index.write(out)
    jobs = [Job(str(out), number, unit, mine.fingerprint, len(mine.tokenizer)) for number, unit in enumerate(units)]
    total = run(jobs, mine, given)
    there = sorted(out.glob("unit-*.safetensors"))
    for extra in there[total.units :]:  # made ahead of the end that --tokens set
        extra.unlink()
    shards.Index.of(mine.manifest, mine.tokenizer, mine.fingerprint, complete=total.units == len(units)).write(out)
    print(total.describe(out))
    print(f"next: python train.py --config {given.config} data.sources={out} data.tokenizer={out / 'tokenizer'}")


class Total:
    def __init__(self) -> None:
        self.units = self.documents = self.tokens = self.text_bytes = self.shard_bytes = 0
        self.skipped = self.refused = self.old = 0

    def add(self, counts: Counts) -> None:
        self.units += 1
        for name in Counts._fields:
            setattr(self, name, getattr(self, name) + getattr(counts, name))

    def describe(self, out: Path) -> str:
        return (
            f"{out}: {self.units:,} shards ({self.old:,} were there, and are whole), {self.documents:,} documents, "
            f"{self.tokens:,} tokens, {self.text_bytes / max(1, self.tokens):.3f} bytes per token, "
            f"{self.shard_bytes / 2**30:.3f} GiB; {self.skipped:,} documents unreadable, {self.refused:,} refused"
        )


def run(jobs: list[Job], mine: Dataset, given: argparse.Namespace) -> Total:
    """Make the shards up to `--tokens`, with a line of progress."""
    total, start, told = Total(), time.monotonic(), 0.0
    terminal = sys.stderr.isatty()
    with contextlib.closing(made(jobs, mine.encoder, given.workers)) as counts:
        for found in counts:
            total.add(found)
            spent = time.monotonic() - start
            if spent - told >= (0.2 if terminal else 30):
                told = spent
                share = max(total.units / len(jobs), total.tokens / given.tokens if given.tokens else 0)
                line = (
                    f"{total.units:,} of {len(jobs):,} units, {total.tokens:,} tokens, "
                    f"{total.tokens / spent:,.0f} tokens/s, {duration(spent / share - spent)} left"
                )
                print(
                    f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True
                )
            if given.tokens and total.tokens >= given.tokens:
                break
    if terminal:
        print("\r\x1b[K", end="", file=sys.stderr)
    return total


def _number(text: str) -> int:
    if not text.replace("_", "").isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="prepare_data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="PATH|NAME", help="as for train.py")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the shards: new, or one to go on with")
    parser.add_argument("--tokens", type=_number, metavar="N", help="stop after the unit that reaches N tokens")
    parser.add_argument("--workers", type=_number, default=1, metavar="N", help="processes that tokenise (1)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        prepare(parser.parse_intermixed_args(arguments))
    except (UserError, OSError) as error:
        return report(error)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
