"""The tokenizer: load a Hugging Face fast tokenizer or make one from texts, save it, encode documents with it.

Documents are encoded without special tokens: the data stream puts EOS between them itself, and a document that contains
the characters of a special token gets ordinary tokens for them. transformers is imported only where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import remote
from config import UserError
from remote import Unreachable, hub_commit, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<|unknown|>"
MIN_BPE_VOCAB = 257  # every byte and END_OF_TEXT: whatever the text, it encodes
_HUB_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w./-]+))?")
_INSTEAD = "a folder (data.tokenizer=DIR) or data.tokenizer=bpe needs no Hub, --config quickstart no network at all"


def load(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer in folder `name`, or of the Hub repository `name` = "owner/name[@revision]".

    Raises UserError where it cannot be found, reached or read, is no fast tokenizer, or has no end-of-text token.
    """
    try:
        folder = Path(os.path.expanduser(name))
        if folder.is_dir():
            return _from_pretrained(name, str(folder), None, offline=True)
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise UserError(f"tokenizer {name!r}: {error.strerror}") from None
    match = _HUB_NAME.fullmatch(name)
    if not match:
        raise UserError(f"tokenizer {name!r}: no such folder, and no Hub name (owner/name[@revision]); {_INSTEAD}")
    try:
        commit = hub_commit("model", match["repo"], match["revision"], instead=_INSTEAD)
    except Unreachable as unreachable:
        try:
            return _from_pretrained(name, match["repo"], match["revision"], offline=True)
        except UserError:
            raise unreachable from None
    return _from_pretrained(name, match["repo"], commit, offline=False)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's splitting) of at most `vocab_size` tokens; END_OF_TEXT is token 0, both bos and eos.

    The same texts in the same order give the same tokenizer. Few texts give fewer tokens than asked for.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise UserError(f"vocab_size {vocab_size}: a byte-level BPE needs at least {MIN_BPE_VOCAB} (256 bytes and EOS)")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def make(kind: str, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer made from `texts` ("bpe", "chars") or from nothing ("bytes"), of at most `vocab_size` tokens."""
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    tok = train_bpe((), MIN_BPE_VOCAB) if kind == "bytes" else _characters(texts)
    if len(tok) > vocab_size:
        raise UserError(f"model.vocab_size = {vocab_size}: {kind} take {len(tok)} tokens here")
    return tok


def _characters(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A token for each character of the texts, in Unicode's order, after END_OF_TEXT and UNKNOWN for all others."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found: set[str] = set()
    for text in texts:
        found.update(text)
    vocab = {token: number for number, token in enumerate((END_OF_TEXT, UNKNOWN, *sorted(found)))}
    chars = Tokenizer(models.WordLevel(vocab, unk_token=UNKNOWN))
    chars.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    chars.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=chars, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, unk_token=UNKNOWN
    )


def save(tok: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write the tokenizer's files into `folder`, such that `AutoTokenizer` of transformers 4 and 5 loads them."""
    tok.save_pretrained(str(folder))
    path = Path(folder, "tokenizer_config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how it was loaded: the bytes shall not depend on that
        settings.pop(key, None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a class that 4 does not know
    path.write_text(json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def fingerprint(tok: PreTrainedTokenizerFast) -> str:
    """Hex digest of everything that decides which ids a text gets."""
    return hashlib.sha256(f"{tok.eos_token_id}\n{tok.backend_tokenizer.to_str()}".encode()).hexdigest()


# ---- encoding documents

LONG_CHARACTERS = 200_000  # some tokenizers take quadratic time in one long text
# What tokenizers stumble over, and where two implementations could part.
HARD_TEXTS = (
    "", " ", "  \n\n \t ", "a  b   c\n\n\nd\r\ne\tf ", "I'm you'll HE'S they'Ve don\u2019t", " leading", "trailing ",
    "3 1415926 2,000.50 1e-9 \u0664\u0662", "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "e\u0301 \u00e9 \u1e9b\u0323 \ufb01 \u0130",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f", "<|endoftext|> <s> [PAD]",
    "\x00\x01\x1b[31m\x7f\x85\u2028\ufeff", "x" * 300, "=-" * 100, "_a_b__C", "\u00a0\u3000\u2003wide",
    "def f(x):\n    return x**2  # \u00e4\n", "https://example.org/a?b=c&d=%20",
)  # fmt: skip


class Encoder:
    """Documents to token ids, without EOS. Small to send to another process, and no transformers there.

    `backend` is "tokenizers", or "fastokens" where `fastest` found that it gives the same ids; `reason` says why not.
    """

    def __init__(self, tok: PreTrainedTokenizerFast):
        assert isinstance(tok.eos_token_id, int)  # `load` and `make` see to it
        self.eos: int = tok.eos_token_id
        self.backend = "tokenizers"
        self.reason = ""
        self._json: str = tok.backend_tokenizer.to_str()
        self._slow: Tokenizer | None = None
        self._fast: Any = None

    @classmethod
    def fastest(cls, tok: PreTrainedTokenizerFast, sample: Iterable[str]) -> Encoder:
        """With fastokens where that is installed and gives the same ids for `HARD_TEXTS` and all of `sample`."""
        plain, fast = cls(tok), cls(tok)
        fast.backend = "fastokens"
        spelled = [f"a{token.content}b {token.content}" for token in tok.added_tokens_decoder.values()]
        try:
            fast._ids("a")  # not by way of tokenizers where it fails
            for text in (*HARD_TEXTS, *spelled, *sample):
                (wanted,), (found,) = plain([text]), fast([text])
                if not np.array_equal([] if wanted is None else wanted, [] if found is None else found):
                    raise ValueError(f"fastokens gives other ids for {text[:40]!r}")
        except ImportError:
            plain.reason = "fastokens is not installed"
        except BaseException as error:
            if not _refused(error):
                raise
            plain.reason = one_line(error)
        else:
            return fast
        return plain

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_slow": None, "_fast": None}

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """(n,) int32 for each text; None for one that the tokenizer cannot take."""
        if self.backend == "fastokens":
            return [self._encode_fast(text) for text in texts]
        if all(len(text) <= LONG_CHARACTERS for text in texts):
            try:
                encodings = self._tokenizers().encode_batch_fast(list(texts), add_special_tokens=False)
                return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            except BaseException as error:  # one of them
                if not _refused(error):
                    raise
        return [self._encode_slow(text) for text in texts]

    def _encode_slow(self, text: str) -> np.ndarray | None:
        ids: list[int] = []
        try:
            for part in cut_long(text):
                (encoding,) = self._tokenizers().encode_batch_fast([part], add_special_tokens=False)
                ids += encoding.ids
        except BaseException as error:
            if not _refused(error):
                raise
            return None
        return np.array(ids, dtype=np.int32)

    def _encode_fast(self, text: str) -> np.ndarray | None:
        try:
            return np.concatenate([self._ids(part) for part in cut_long(text)])
        except BaseException as error:  # what it gives up on, tokenizers may take
            if not _refused(error):
                raise
            return self._encode_slow(text)

    def _tokenizers(self) -> Tokenizer:
        if self._slow is None:
            from tokenizers import Tokenizer

            self._slow = Tokenizer.from_str(self._json)
            self._slow.encode_special_tokens = True  # a document that spells a special token gets ordinary tokens
            self._slow.no_truncation()
            self._slow.no_padding()
        return self._slow

    def _ids(self, text: str) -> np.ndarray:
        if self._fast is None:
            from fastokens import Tokenizer

            self._fast = Tokenizer.from_json_str(self._json)
            self._fast.no_truncation()
        # A buffer, where `encode` gives a list.
        raw, _ = self._fast.encode_batch_flat([text], split_special_tokens=True)
        return np.frombuffer(raw, dtype="<u4").astype(np.int32)


def _refused(error: BaseException) -> bool:
    """Whether it is about a text. Both libraries are Rust, whose panics are no Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


# Where every byte-level tokenizer we know cuts anyway: not after a punctuation mark, which some keep with its newline.
_LAST_CUT = re.compile(r"[\s\S]*[^\W_](?=[ \n][^\W_])")


def cut_long(text: str) -> Iterator[str]:
    """The text in pieces of at most LONG_CHARACTERS, cut where byte-level tokenizers cut anyway if that can be had."""
    start = 0
    while len(text) - start > LONG_CHARACTERS:
        found = _LAST_CUT.match(text, start, start + LONG_CHARACTERS + 2)
        end = found.end() if found else start + LONG_CHARACTERS
        yield text[start:end]
        start = end
        remote.beat()  # a document may be gigabytes
    yield text[start:]


def _from_pretrained(name: str, path: str, revision: str | None, *, offline: bool) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tok = AutoTokenizer.from_pretrained(
            path, revision=revision or "main", local_files_only=offline, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001  # a broken tokenizer.json raises a bare Exception
        raise UserError(f"tokenizer {name!r} cannot be loaded: {one_line(error)}") from None
    if not tok.is_fast:
        raise UserError(f"tokenizer {name!r} has no fast version (tokenizer.json); {_INSTEAD}")
    if tok.eos_token_id is None:
        raise UserError(f"tokenizer {name!r} has no end-of-text token (eos_token), which separates documents")
    return tok
