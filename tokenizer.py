"""The tokenizer: load a Hugging Face fast tokenizer or train a byte-level BPE, save it, encode documents with it.

Documents are encoded without special tokens: the data stream puts EOS between them itself, and a document that contains
the characters of a special token gets ordinary tokens for them. transformers is imported only where it is needed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config import UserError
from remote import Unreachable, hub_commit, one_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_BPE_VOCAB = 257  # every byte and END_OF_TEXT: whatever the text, it encodes
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_INSTEAD = "a folder (data.tokenizer=DIR) or data.tokenizer=bpe needs no Hub, --config quickstart no network at all"


def load(name: str) -> PreTrainedTokenizerFast:
    """The fast tokenizer in folder `name`, or of the Hub repository `name` = "owner/name[@revision]".

    Raises UserError where it cannot be found, reached or read, is no fast tokenizer, or has no end-of-text token.
    """
    try:
        folder = Path(name).expanduser()
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


class Encoder:
    """Documents to token ids, each ending in EOS. Small to send to another process, and no transformers there."""

    def __init__(self, tok: PreTrainedTokenizerFast):
        assert isinstance(tok.eos_token_id, int)  # `load` and `train_bpe` see to it
        self.eos: int = tok.eos_token_id
        self._json: str = tok.backend_tokenizer.to_str()
        self._backend: Tokenizer | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": None}

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_str(self._json)
            self._backend.encode_special_tokens = True  # a document that spells a special token gets ordinary tokens
            self._backend.no_truncation()
            self._backend.no_padding()
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [[*encoding.ids, self.eos] for encoding in encodings]


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
