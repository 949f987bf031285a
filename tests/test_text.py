"""text.py: what reaches a terminal, prompts to ids, tokens to text as they come."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

import tokenizer
from config import UserError
from text import TextStream, prompt_ids, safe_text


@pytest.fixture(scope="module")
def tok() -> PreTrainedTokenizerFast:
    return tokenizer.train_bpe(["the cat sat on the mat, the cat sat"], 280)


@pytest.fixture(scope="module")
def llama_like() -> PreTrainedTokenizerFast:
    """A decoder that drops the first token's leading space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<s>": 0, "▁a": 1, "▁b": 2, "c": 3}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")


def test_nothing_a_terminal_obeys_gets_through() -> None:
    hostile = "\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\r\u202eevil\u2066\u2069\x00\ud800"
    assert safe_text(hostile) == (
        r"\x1b[2J\x1b]0;title\x07\x9b31m\x08\x7f\r\u202eevil\u2066\u2069\x00\ud800"
    )  # fmt: skip
    every = "".join(map(chr, range(0x3000)))
    bad = [*range(9), *range(11, 32), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    assert not set(safe_text(every)) & {*map(chr, bad), "\u061c", "\u200e", "\u200f"}
    for fine in ("tab\tand\nnewline", "Grüße, 早上好 🦜 \\x1b", "שלום", "\u0645\u06cc\u200c\u062e\u0648 👩\u200d🔬"):
        assert safe_text(fine) == fine


def test_prompts_as_the_tokenizer_reads_them(tok: PreTrainedTokenizerFast) -> None:
    assert prompt_ids(tok, "the cat") == tok("the cat")["input_ids"]
    assert prompt_ids(tok, "") == [tok.bos_token_id]
    with pytest.raises(UserError, match="not valid UTF-8"):
        prompt_ids(tok, "caf\udce9")


def test_eos_starts_an_empty_prompt_where_there_is_no_bos(llama_like: PreTrainedTokenizerFast) -> None:
    assert prompt_ids(llama_like, "") == [0]


def test_no_half_character_is_shown(tok: PreTrainedTokenizerFast) -> None:
    text = "the 🦜 cät\x1b 早"
    ids = tok(text)["input_ids"]
    assert len(ids) > len(text)  # the unseen characters are bytes
    stream = TextStream(tok)
    pieces = [stream.feed(token) for token in ids]
    assert "".join(pieces) == safe_text(text) and "\ufffd" not in "".join(pieces)
    assert pieces.count("") == 3 + 1 + 2  # all but the last byte of each character
    assert stream.feed(end=True) == ""


def test_broken_characters_show_at_last(tok: PreTrainedTokenizerFast) -> None:
    parrot, word = tok("🦜")["input_ids"], tok("the")["input_ids"]
    stream = TextStream(tok)
    assert [stream.feed(token) for token in parrot[:2]] == ["", ""]
    assert stream.feed(*word) == "\ufffdthe"
    assert stream.feed(*parrot[:3]) == "" and stream.feed(end=True) == "\ufffd" and stream.feed(end=True) == ""


def test_a_leading_space_after_the_prompt_stays(llama_like: PreTrainedTokenizerFast) -> None:
    assert llama_like.decode([2]) == "b"
    stream = TextStream(llama_like, [1])
    assert [stream.feed(token) for token in (2, 3, 1)] == [" b", "c", " a"]
    assert TextStream(llama_like, [1]).feed(2, 3, 1, end=True) == " bc a"


def test_special_tokens_are_no_text(tok: PreTrainedTokenizerFast) -> None:
    ids = tok("the")["input_ids"]
    assert TextStream(tok, [0]).feed(*ids, 0, *ids, end=True) == "thethe"
