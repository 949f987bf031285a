"""tokenizer.py: any text survives, special tokens cannot be spelled, transformers loads what is saved."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

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
        assert ids[-1] == 0 and min(ids[:-1], default=1) > 0 and max(ids) < len(tok)
        assert tok.decode(ids[:-1]) == text


def test_a_document_cannot_spell_eos(tok):
    text = f"before {tokenizer.END_OF_TEXT} after"
    ids = tokenizer.Encoder(tok)([text])[0]
    assert ids.count(0) == 1 and ids[-1] == 0
    assert tok.decode(ids[:-1]) == text


def test_training_is_deterministic_and_bounded(tok):
    assert tokenizer.fingerprint(tokenizer.train_bpe(iter(TEXTS), 300)) == tokenizer.fingerprint(tok)
    assert tokenizer.fingerprint(tokenizer.train_bpe(TEXTS, 290)) != tokenizer.fingerprint(tok)
    assert len(tokenizer.train_bpe(["ab"], 257)) == 257
    with pytest.raises(UserError, match="at least 257"):
        tokenizer.train_bpe(TEXTS, 256)


def test_the_encoder_travels(tok):
    encoder = tokenizer.Encoder(tok)
    encoder(TEXTS)
    assert pickle.loads(pickle.dumps(encoder))(TEXTS) == encoder(TEXTS)


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
