"""Text between tokenizer and terminal: prompts to ids, tokens to text as they come, control characters made visible,
secrets out of sight."""

from __future__ import annotations

import atexit
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from options import UserError, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What a terminal would act upon or be deceived by: C0 without tab and newline, DEL, C1, every control of direction
# (marks, overrides, isolates); and lone surrogates, which no UTF-8 output takes.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

MAX_MESSAGE = 1000  # characters of a message: a name in a hostile file may have a million
HIDDEN = "[hidden]"
# Tokens of the Hub wherever they come from, and who one is in a URL: `https://name:password@host`.
_SECRET = re.compile(
    r"hf_(?:[A-Za-z0-9]{20,}|[A-Za-z0-9]+(?=\.\.\.))"  # also one that was cut short for a message
    r"|(?<=earer )[\w.~+/-]{8,}"  # an Authorization header
    r"|(?<!hf://)(?<=://)[^\s/?#'\"]+@"
)
_MIN_SECRET = 8  # a shorter value would take ordinary words with it
_known: set[str] = set()


def keep_secret(*values: str | None) -> None:
    """What `redact` hides from now on, besides what looks like a secret."""
    _known.update(value.strip() for value in values if value and len(value.strip()) >= _MIN_SECRET)


def redact(text: str) -> str:
    """The text without tokens, who one is in URLs, and the values given to `keep_secret`."""
    for value in sorted(_known, key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    return _SECRET.sub(lambda match: f"{HIDDEN}@" if match[0].endswith("@") else HIDDEN, text)


def safe_text(text: str) -> str:
    """The text with control characters as visible escapes (\\x1b), for a terminal or a log; newline and tab stay."""
    return _UNSAFE.sub(lambda match: repr(match[0])[1:-1], text)


def clean(text: str) -> str:
    """What may be told of a text from anywhere: no secret, no control character but newline and tab."""
    return safe_text(redact(text))


def report(error: UserError | OSError) -> int:
    """Say a user's mistake, or a file that cannot be had, in one line on standard error; the exit code."""
    told = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    line = " ".join(f"error: {clean(told[:MAX_MESSAGE])}".split())
    say(line if len(line) < MAX_MESSAGE else f"{line[: MAX_MESSAGE - 4]}...", out=sys.stderr)
    return 2


def say(text: str = "", end: str = "\n", out: TextIO | None = None) -> None:
    """Print at once. A reader that has seen enough (head, less) and a full disk cost lines, not the run."""
    stream = out or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except BrokenPipeError:
        silence(stream)
    except OSError:  # what is buffered is written once there is room
        atexit.unregister(silence)
        atexit.register(silence, stream)


def silence(out: TextIO) -> None:
    """Nothing is left for Python to flush, and to fail at, when it ends."""
    try:
        out.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def prompt_ids(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Ids as the tokenizer gives them; an empty text starts from BOS, or else EOS, as a document does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"prompt {shown(text)} is not valid UTF-8") from None
    ids = tok(text, verbose=False)["input_ids"]
    start = tok.eos_token_id if tok.bos_token_id is None else tok.bos_token_id
    return ids or [start]  # type: ignore[return-value]


class TextStream:
    """Tokens in, safe text out as soon as it is complete: half a UTF-8 character waits for the rest.

    Tokens are decoded together with those before them, since some tokenizers drop a leading space otherwise.
    """

    def __init__(self, tok: PreTrainedTokenizerFast, prompt: Sequence[int] = ()):
        self.tok = tok
        self.before, self.pending = list(prompt[-8:]), []

    def feed(self, *tokens: int, end: bool = False) -> str:
        """The text that became complete; at the `end` all of it, with U+FFFD for a broken character."""
        self.pending += tokens
        known, text = (
            str(self.tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (self.before, self.before + self.pending)
        )
        if text.endswith("\ufffd") and not end:
            return ""
        self.before, self.pending = self.pending or self.before, []
        return safe_text(text[len(known) :])
