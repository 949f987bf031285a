"""tokenizer.py: any text survives, special tokens cannot be spelled, transformers loads what is saved."""

import json
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import tokenizer
from config import UserError

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["The cat sat on the mat.\n\nIt's 1234 o'clock.", "Ein schöner Tag, 早上好!\t\u0000 end", "the the the cat cat"]


@pytest.fixture(scope="module")
def tok():
    return tokenizer.train_bpe(TEXTS, 300)


def test_any_text_survives_encoding(tok):
    encoder = tokenizer.Encoder(tok)
    assert len(tok) <= 300 and tok.bos_token_id == tok.eos_token_id == encoder.eos == 0
    unseen = ["🦜 \r\n  two  spaces \x7f", " leading", "", *TEXTS]
    for text, ids in zip(unseen, encoder(unseen), strict=True):
        assert ids.dtype == np.int32 and min(ids, default=1) > 0 and max(ids, default=1) < len(tok)
        assert tok.decode(ids) == text


def test_a_document_cannot_spell_eos(tok):
    text = f"before {tokenizer.END_OF_TEXT} after"
    ids = tokenizer.Encoder(tok)([text])[0]
    assert 0 not in ids and tok.decode(ids) == text


def test_training_is_deterministic_and_bounded(tok):
    assert tokenizer.fingerprint(tokenizer.train_bpe(iter(TEXTS), 300)) == tokenizer.fingerprint(tok)
    assert tokenizer.fingerprint(tokenizer.train_bpe(TEXTS, 290)) != tokenizer.fingerprint(tok)
    assert len(tokenizer.train_bpe(["ab"], 257)) == 257
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train_bpe(TEXTS, 256)


def test_the_encoder_travels(tok):
    encoder = tokenizer.Encoder(tok)
    encoder(TEXTS)
    for made in (encoder, tokenizer.Encoder.fastest(tok, TEXTS)):
        sent = pickle.loads(pickle.dumps(made))
        assert sent.backend == made.backend and equal(sent(TEXTS), encoder(TEXTS))


# ---- a faster encoder


def equal(left, right):
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def novels():
    return pq.read_table(ROOT / "corpus" / "austen.parquet")["text"].to_pylist()


@pytest.fixture(scope="module")
def larger(novels):
    return tokenizer.train_bpe(novels[::4], 4000)


def test_tiktoken_stands_in_where_its_ids_are_equal(larger, novels):
    fast = tokenizer.Encoder.fastest(larger, novels[:20])
    assert fast.backend == "tiktoken"
    assert equal(fast(novels[200:]), tokenizer.Encoder(larger)(novels[200:]))
    ours = larger.backend_tokenizer
    assert fast(novels[:1])[0].tolist() == ours.encode(novels[0], add_special_tokens=False).ids


def test_a_split_before_the_bytes_is_tiktoken_s_pattern(novels):
    """As Llama's, Qwen's and others' tokenizers have it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    pattern = Regex(r"(?i:'s|'t|'re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        novels[:40], trainers.BpeTrainer(vocab_size=1000, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    tok = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    fast = tokenizer.Encoder.fastest(tok, novels[:5])
    assert fast.backend == "tiktoken" and equal(fast(novels[50:60]), tokenizer.Encoder(tok)(novels[50:60]))


def test_another_order_of_merges_is_noticed(larger, novels):
    """tiktoken takes a token's id for its rank: two ids exchanged, and a text of the sample comes out otherwise."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(larger.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    first, last = "Ġt", max(vocab, key=vocab.get)
    vocab[first], vocab[last] = vocab[last], vocab[first]
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=tokenizer.END_OF_TEXT
    )
    fast = tokenizer.Encoder.fastest(tok, novels[:5])
    assert fast.backend == "tokenizers" and equal(fast(TEXTS), tokenizer.Encoder(tok)(TEXTS))


def test_what_tiktoken_cannot_express_is_left_to_tokenizers(tok):
    chars = tokenizer.make("chars", TEXTS, 1000)
    assert tokenizer.Encoder.fastest(chars, TEXTS).backend == "tokenizers"
    described = json.loads(tok.backend_tokenizer.to_str())
    for change in ({"normalizer": {"type": "NFC"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        assert tokenizer._byte_bpe(described | change) is None


def test_without_tiktoken(tok, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert tokenizer.Encoder.fastest(tok, TEXTS).backend == "tokenizers"


def test_a_text_that_tiktoken_gives_up_on(larger):
    fast = tokenizer.Encoder.fastest(larger, TEXTS)

    class GivesUp:
        def encode_ordinary(self, text):
            raise RuntimeError("BacktrackLimitExceeded")

    fast._fast = GivesUp()
    assert equal(fast(TEXTS), tokenizer.Encoder(larger)(TEXTS))


def test_a_text_that_no_tokenizer_takes_is_none(tok):
    found = tokenizer.Encoder(tok)(["good", "bad \ud800", "good"])
    assert found[1] is None and equal([found[0]], [found[2]])


@pytest.mark.parametrize("unit", ["word ", "x", "\u4e2d"])
def test_very_long_documents_are_cut_where_tokenizers_cut(larger, unit, monkeypatch):
    text = unit * (3_000_000 // len(unit.encode()))
    for encoder in (tokenizer.Encoder(larger), tokenizer.Encoder.fastest(larger, TEXTS)):
        started = time.monotonic()
        (ids,) = encoder([text])
        assert time.monotonic() - started < 30
        start = larger.decode(ids[:50]).rstrip("\ufffd")  # the end of half a character
        assert len(start) > 10 and text.startswith(start)
        assert "".join(tokenizer.cut_long(text)) == text
    monkeypatch.setattr(tokenizer, "LONG_CHARACTERS", 1000)
    draw = random.Random(0)
    mixed = "".join(draw.choice(["word ", "two\nlines ", "end.\n\n", "1234 ", "it's "]) for _ in range(2000))
    assert max(map(len, tokenizer.cut_long(mixed))) <= 1000
    assert equal(encoder([mixed]), [np.array(larger.backend_tokenizer.encode(mixed).ids)])


# ---- characters and bytes


@pytest.mark.parametrize("kind", ["chars", "bytes"])
def test_tokenizers_for_teaching(kind, tmp_path):
    made = tokenizer.make(kind, TEXTS, 300)
    tokenizer.save(made, tmp_path)
    tok = tokenizer.load(str(tmp_path))
    assert tokenizer.fingerprint(tok) == tokenizer.fingerprint(made) and tok.eos_token_id == 0
    for text, ids in zip(TEXTS, tokenizer.Encoder(tok)(TEXTS), strict=True):
        assert tok.decode(ids) == text and len(ids) == len(text if kind == "chars" else text.encode())
    unseen = "Ωmega"
    (ids,) = tokenizer.Encoder(tok)([unseen])
    assert tok.decode(ids) == (unseen if kind == "bytes" else "<|unknown|>mega")
    with pytest.raises(UserError, match=rf"model.vocab_size = 20: {kind} take \d+ tokens here"):
        tokenizer.make(kind, TEXTS, 20)


def test_saved_beside_a_model_config_autotokenizer_loads_it(tok, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save(tok, tmp_path)
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    for again in (AutoTokenizer.from_pretrained(tmp_path), tokenizer.load(str(tmp_path))):
        assert tokenizer.fingerprint(again) == tokenizer.fingerprint(tok)
        assert again(TEXTS[1]).input_ids == tok(TEXTS[1]).input_ids
    assert json.loads(first["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"
    other = tmp_path / "other"
    tokenizer.save(again, other)
    assert {file.name: file.read_bytes() for file in other.iterdir()} == first


def test_a_folder_without_a_usable_tokenizer(tok, tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        tokenizer.load(str(tmp_path))
    tok.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no end-of-text token"):
        tokenizer.load(str(tmp_path))
    with pytest.raises(UserError, match="no such folder"):
        tokenizer.load("runs/of/nothing")


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_the_hub_one_line_says_what_to_do(setting, tmp_path):
    code = "import tokenizer; tokenizer.load('openai-community/gpt2@607a30d')"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), **setting}
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert time.monotonic() - started < 30
    line = result.stderr.strip().splitlines()[-1]
    assert "Unreachable: Hub model 'openai-community/gpt2' at revision '607a30d'" in line
    assert "could not be reached" in line and "data.tokenizer=bpe" in line
