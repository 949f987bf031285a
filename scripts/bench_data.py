"""The suite of `bench.py` for the supply of data: mapped shards, streamed text, packing, resume, the wait of a run."""

from __future__ import annotations

import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import numpy as np
from duels import Bench, Rows, interleaved, summary

import config as configuration
import data
import shards
import sources
import tokenizer as tokenizers
from config import SourceConfig
from data import Loader
from documents import Documents, Manifest, Stream, Unit, fingerprint, read_unit
from stream import Batch, Cursor, Feed, Place
from tokenizer import Encoder

ROOT = Path(__file__).resolve().parent.parent
SEQ_LEN, ROWS, VOCAB = 2048, 64, 16384  # 131,072 tokens a step, as `mini` has
MAPPED_UNITS, UNIT_DOCUMENTS = 48, 1000
RUN_STEPS = 30


def web_like(count: int, seed: int) -> np.ndarray:
    """Tokens of documents: log-normal around 600, an assumption about the web, not measured."""
    return np.clip(np.random.default_rng(seed).lognormal(6.4, 1.0, count), 2, 100_000).astype(np.int64)


def synthetic_shards(folder: Path, tok: Any) -> Manifest:
    """Random ids in documents of web-like lengths."""
    draw, units = np.random.default_rng(0), []
    for number in range(MAPPED_UNITS):
        lengths = web_like(UNIT_DOCUMENTS, number)
        items = [draw.integers(1, VOCAB, length, dtype=np.int64) for length in lengths]
        found = Documents(
            items, np.arange(len(items), dtype=np.uint32), draw.integers(0, 2**63, len(items), dtype=np.uint64),
            (4 * lengths).astype(np.uint32), 0,
        )  # fmt: skip
        unit = Unit("jsonl", "synthetic", number, number + 1, 0, "text")
        corpus = fingerprint(["synthetic"])
        made = shards.to_bytes(number, unit, found, corpus=corpus, tokenizer="", vocab_size=VOCAB)
        shards.write_file(folder / shards.file_name(number), made)
        units.append(unit)
    source = Manifest((Stream(("synthetic",), tuple(units)),), ("synthetic",))
    shards.Index.of(source, tok, "", complete=True).write(folder)
    return sources.resolve([SourceConfig(path=str(folder))])


def feed(manifest: Manifest, encoder: Encoder, **changes: Any) -> Feed:
    settings: dict[str, Any] = {
        "manifest": manifest, "encoder": encoder, "seq_len": SEQ_LEN, "extra": 2, "rows": ROWS, "seed": 1,
        "cursor": Cursor(), "threshold": 0, "shuffle_window": 8,
    }  # fmt: skip
    return Feed(**settings | changes)


def taking(batches: Iterator[Batch], steps: int) -> Callable[[], None]:
    """The next steps, each time it is called."""

    def run() -> None:
        for _ in islice(batches, steps):
            pass

    return run


def anew(encoder: Encoder, texts: list[str]) -> None:
    """Without the words that it has seen before."""
    copy.copy(encoder)(texts)


def seconds_to_first(wanted: Feed) -> float:
    shards._map.cache_clear()  # as a new process would find it
    start = time.perf_counter()
    next(wanted.batches())
    return time.perf_counter() - start


def wait_of_the_quickstart() -> dict[str, Any]:
    """The share of its time that a run waits for data, after the first lines."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"run.dir={folder}/run", f"train.steps={RUN_STEPS}", "log.every_steps=10", "eval.tokens=1000"]
        command = [sys.executable, str(ROOT / "train.py"), "--config", "quickstart", *settings]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [json.loads(line) for line in lines][-1]
    share = last["data_wait_sec"] * last["steps_per_sec"]
    return {"name": f"quickstart, steps {RUN_STEPS - 9} to {RUN_STEPS}: share of the time waiting", "share": share}


def bench_data(bench: Bench) -> Rows:
    text = sources.resolve(configuration.load("quickstart").data.sources)
    texts = list(data.training_texts(text, 0))
    tok = tokenizers.train_bpe(texts, VOCAB)
    plain, fast = Encoder(tok), Encoder.fastest(tok, texts[:20])
    loaders = []
    with tempfile.TemporaryDirectory() as place:
        mapped = synthetic_shards(Path(place), tok)

        def processes(workers: int) -> Iterator[Batch]:
            loaders.append(Loader(feed(text, fast), workers))
            return loaders[-1]

        contenders = {
            "mapped, end to end": (feed(mapped, plain).batches(), 60),
            "mapped, best fit": (feed(mapped, plain, packing="best_fit").batches(), 30),
            "streamed, tokenizers, this process": (feed(text, plain).batches(), 6),
            f"streamed, {fast.backend}, this process": (feed(text, fast).batches(), 20),
            f"streamed, {fast.backend}, feeding process": (processes(1), 20),
            f"streamed, {fast.backend}, 2 tokenising processes": (processes(2), 20),
        }
        runs = {name: taking(batches, steps) for name, (batches, steps) in contenders.items()}
        timed = interleaved(runs, bench.device, repeats=bench.repeats, hopeless=float("inf"))
        rows: Rows = []
        for name, seconds in timed.items():
            tokens = contenders[name][1] * ROWS * SEQ_LEN
            rows.append({"name": name, **summary(seconds), "tokens_per_sec": tokens / statistics.median(seconds)})
        for loader in loaders:
            loader.close()
        size = sum(len(part.encode()) for part in texts)
        alone = {f"{encoder.backend} alone": functools.partial(anew, encoder, texts) for encoder in (plain, fast)}
        for name, seconds in interleaved(alone, bench.device, repeats=bench.repeats, hopeless=float("inf")).items():
            rows.append({"name": name, **summary(seconds), "mb_per_sec": size / 1e6 / statistics.median(seconds)})
        packed = next(islice(feed(mapped, plain, packing="best_fit").batches(), 60, None)).tally
        lengths = np.concatenate([web_like(UNIT_DOCUMENTS, number) + 1 for number in range(MAPPED_UNITS)])
        floor = np.maximum(lengths - SEQ_LEN, 0).sum() / lengths.sum()
        rows.append({"name": "best fit: positions used", "share": 1 - packed.padding / packed.positions})
        rows.append({"name": "best fit: tokens cropped", "share": packed.cropped / packed.tokens})
        rows.append({"name": "tokens past a row in these documents", "share": float(floor)})
        middle = Cursor(0, (Place(0, 3, 20, 100),))
        first = {
            "mapped, end to end": feed(mapped, plain, cursor=middle),
            "mapped, best fit": feed(mapped, plain, packing="best_fit", cursor=Cursor(0, (Place(0, 3, 1, 9),))),
            f"streamed, {fast.backend}": feed(text, fast, cursor=Cursor(0, (Place(2, 1, 0, 100),))),
        }
        rows += [
            {"name": f"first batch after a resume, {name}", "sec": seconds_to_first(f)} for name, f in first.items()
        ]
        state = len(json.dumps(next(feed(mapped, plain).batches()).cursor.to_dict()))
        rows.append({"name": "cursor of one stream", "bytes": state})
        bench.checks["rows of shards that differ from streamed ones"] = differing(
            text, tok, fast, Path(place) / "austen"
        )
    return [*rows, wait_of_the_quickstart()]


def differing(text: Manifest, tok: Any, encoder: Encoder, folder: Path) -> float:
    """Of 200 steps, the rows that come out otherwise from shards of the same text."""
    folder.mkdir()
    fingerprint = tokenizers.fingerprint(tok)
    for number, unit in enumerate(text.units):
        read = read_unit(unit)
        packed = shards.pack(read, encoder(read.items))
        made = shards.to_bytes(number, unit, packed, corpus=text.fingerprint, tokenizer=fingerprint, vocab_size=VOCAB)
        shards.write_file(folder / shards.file_name(number), made)
    shards.Index.of(text, tok, fingerprint, complete=True).write(folder)
    mapped = sources.resolve([SourceConfig(path=str(folder))])
    pairs = zip(feed(text, encoder).batches(), feed(mapped, encoder).batches(), strict=False)
    return float(sum(int((a.tokens != b.tokens).any(1).sum()) for a, b in islice(pairs, 200)))
