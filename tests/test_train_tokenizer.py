"""scripts/train_tokenizer.py: held-out documents are not looked at; what it makes is what training makes."""

import re
import types
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import train_tokenizer

import data
import dataset
import sources
import tokenizer
from config import load


@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_it_makes_what_training_makes(tmp_path, capsys, kind):
    out, source = tmp_path / "made", f"data.sources={tmp_path / 'few.parquet'}"
    pq.write_table(
        pq.read_table(Path(data.__file__).parent / "corpus" / "austen.parquet")[:30], tmp_path / "few.parquet"
    )
    arguments = ["--config", "quickstart", "--out", str(out), "--kind", kind, "--vocab-size", "600", source]
    assert train_tokenizer.main(arguments) == 0
    told = capsys.readouterr().out
    rate, judged = re.search(r"\n([\d.]+) bytes per token on (\d+) held-out documents\n", told).groups()
    assert f"({kind}), end of text is 0" in told and int(judged) >= 1
    assert 2 < float(rate) < 3 if kind == "bpe" else 1 <= float(rate) < 1.1
    backend = {"bpe": "fastokens", "chars": "tokenizers: model error: unsupported model type: WordLevel"}[kind]
    assert f"encoded with {backend}\n" in told
    assert f"next: python train.py --config quickstart {source} data.tokenizer={out} model.vocab_size=" in told
    config = load("quickstart", [source, f"data.tokenizer={kind}", "model.vocab_size=600"])
    assert tokenizer.fingerprint(tokenizer.load(str(out))) == dataset.open_dataset(config).fingerprint


def test_held_out_documents_are_not_looked_at(tmp_path, capsys):
    (tmp_path / "the texts").mkdir()
    for i in range(60):
        (tmp_path / "the texts" / f"{i}.txt").write_text(f"{chr(0x4E00 + i)} common words {i}", encoding="utf-8")
    arguments = ["--config", "quickstart", "--out", str(tmp_path / "made"), "--kind", "chars"]
    assert train_tokenizer.main([*arguments, f"data.sources={tmp_path / 'the texts'}", "data.val_fraction=0.2"]) == 0
    told = capsys.readouterr().out
    assert f"'data.sources={tmp_path / 'the texts'}' data.val_fraction=0.2 data.tokenizer={tmp_path / 'made'} " in told
    config = load("quickstart", [f"data.sources={tmp_path / 'the texts'}"])
    manifest = sources.resolve(config.data.sources)
    threshold = data.split_threshold(manifest, 0.2)
    known = set(tokenizer.load(str(tmp_path / "made")).get_vocab())
    held_out = [document for document in data.walk(manifest, 1 << 30) if document.hash < threshold]
    assert 3 < len(held_out) < 30
    for document in data.walk(manifest, 1 << 30):
        assert (document.item[0] in known) == (document.hash >= threshold)


def test_bytes_per_token_are_counted(tmp_path, capsys):
    """One token a byte, one a character: the figures are known."""
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"{i:02}\u4e2d\u4e2d", encoding="utf-8")  # 8 bytes, 4 characters
    for kind, rate in (("bytes", "1.000"), ("chars", "2.000")):
        arguments = ["--config", "quickstart", "--out", str(tmp_path / kind), "--kind", kind]
        assert train_tokenizer.main([*arguments, f"data.sources={tmp_path / 'texts'}", "data.val_fraction=0.2"]) == 0
        assert f"{rate} bytes per token on " in capsys.readouterr().out


def test_token_shards_have_no_text(tmp_path, capsys, monkeypatch):
    unit = types.SimpleNamespace(kind="tokens")
    monkeypatch.setattr(sources, "resolve", lambda *_: types.SimpleNamespace(units=[unit]))
    assert train_tokenizer.main(["--config", "quickstart", "--out", str(tmp_path / "x")]) == 2
    assert "token shards have no text" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_mistakes_are_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    cases = [
        (["--config", "quickstart", "--out", str(tmp_path / "full")], "exists and is not an empty directory"),
        (["--config", "quickstart", "--out", str(tmp_path / "x"), "--vocab-size", "200"], "at least 257"),
        (["--config", "quickstart", "--out", str(tmp_path / "x"), "data.sources=none.txt"], "no such file"),
        (["--config", "quikstart", "--out", str(tmp_path / "x")], "did you mean quickstart?"),
    ]
    for given, said in cases:
        assert train_tokenizer.main(given) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and said in told
    assert not (tmp_path / "x").exists()
