"""Make a tokenizer from the training documents of a configuration's sources; held-out documents are not looked at.

    python scripts/train_tokenizer.py --config 30m --out tokenizers/stories [--kind bpe|chars|bytes] [--vocab-size N]

`train.py` with `data.tokenizer=bpe` does the same by itself; a folder is for several runs that share one.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules lie beside this folder

import signals

signals.quiet()

import config as configuration
import data
import environment
import sources
import tokenizer as tokenizers
from config import UserError
from options import Parser
from text import report

JUDGED_DOCUMENTS = 200  # held-out ones, on which bytes per token are counted


def shown(texts: Iterable[str], limit_bytes: int) -> Iterator[str]:
    """The texts, with a line on standard error every 8 MiB."""
    done = told = 0
    for text in texts:
        yield text
        done += len(text.encode("utf-8"))
        if done - told >= 8 << 20:
            told = done
            print(f"read {done >> 20} of at most {limit_bytes >> 20} MiB", file=sys.stderr, flush=True)


def make(given: argparse.Namespace) -> None:
    out = Path(os.path.expanduser(given.out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty directory; choose another")
    config = configuration.load(given.config, given.overrides)
    environment.prepare()
    vocab_size = given.vocab_size or config.model.vocab_size
    manifest = sources.resolve(config.data.sources, config.data.cache)
    if any(unit.kind == "tokens" for unit in manifest.units):
        raise UserError("data.sources: token shards have no text to make a tokenizer from; name what they were made of")
    threshold = data.split_threshold(manifest, config.data.val_fraction)
    limit_bytes = given.megabytes << 20
    texts = shown(data.training_texts(manifest, threshold, limit_bytes), limit_bytes)
    tok = tokenizers.make(given.kind, texts, vocab_size)
    out.mkdir(parents=True, exist_ok=True)
    tokenizers.save(tok, out)
    print(f"{out}: {len(tok):,} tokens ({given.kind}), end of text is {tok.eos_token_id}")
    encoder = tokenizers.Encoder.fastest(tok, data.training_texts(manifest, threshold, 1 << 20))
    held_out = data.walk(manifest, data.SPLIT_SCAN_BYTES, lambda value: value < threshold)
    judged = [document.item for document in islice(held_out, JUDGED_DOCUMENTS) if isinstance(document.item, str)]
    taken = [(text, ids) for text, ids in zip(judged, encoder(judged), strict=True) if ids is not None and len(ids)]
    if taken:
        rate = sum(len(text.encode()) for text, _ in taken) / sum(len(ids) for _, ids in taken)
        print(f"{rate:.3f} bytes per token on {len(taken)} held-out documents")
    else:
        print("no held-out documents to count bytes per token on")
    print(f"encoded with {encoder.backend}" + (f": {encoder.reason}" if encoder.reason else ""))
    ours = {"data.tokenizer": str(out), "model.vocab_size": str(-(-len(tok) // 64) * 64)}
    kept = [override for override in given.overrides if override.partition("=")[0] not in ours]
    changed = [*kept, *(f"{key}={value}" for key, value in ours.items())]
    print(f"next: {shlex.join(['python', 'train.py', '--config', given.config, *changed])}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="train_tokenizer.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", required=True, metavar="PATH|NAME", help="as for train.py: its data.sources are read"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--kind", choices=("bpe", "chars", "bytes"), default="bpe", help="byte-level BPE is the default"
    )
    parser.add_argument("--vocab-size", type=_count, metavar="N", help="most tokens (default: model.vocab_size)")
    parser.add_argument("--megabytes", type=_count, default=64, metavar="N", help="text to read at most, MiB (64)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change keys of the configuration")
    try:
        make(parser.parse_intermixed_args(arguments))
    except (UserError, OSError) as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
