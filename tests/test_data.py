"""data.py: the split, validation, what the model is given of a row, and the loader."""

import itertools
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import data
import sources
import tokenizer
from config import SourceConfig
from documents import document_hash
from losses import IGNORE
from stream import PADDING, Cursor, Feed

SEQ_LEN, EOS = 16, 0


@pytest.fixture(scope="module")
def documents():
    unique = [f"n{i} alpha beta gamma {'delta ' * (i % 9)}" for i in range(300)]
    return unique + unique[:20]  # some texts twice


@pytest.fixture(scope="module")
def manifest(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.parquet"
    pq.write_table(pa.table({"text": documents}), path, row_group_size=25)
    return sources.resolve([SourceConfig(path=str(path))])


@pytest.fixture(scope="module")
def encoder(documents):
    return tokenizer.Encoder(tokenizer.train_bpe(documents, 400))


@pytest.fixture(scope="module")
def threshold(manifest):
    return data.split_threshold(manifest, 0.1)


def texts_of(manifest):
    return [document.item for document in data.walk(manifest, 1 << 40)]


# ---- the split and validation


def small(tmp_path, texts):
    pq.write_table(pa.table({"text": texts}), tmp_path / "s.parquet")
    return sources.resolve([SourceConfig(path=str(tmp_path / "s.parquet"))])


def test_split_threshold_of_small_corpora(tmp_path):
    texts = ["a", "b", "c", "a"]
    hashes = sorted({document_hash(text) for text in texts})
    manifest = small(tmp_path, texts)
    assert data.split_threshold(manifest, 0) == 0
    assert data.split_threshold(manifest, 1e-9) == hashes[0] + 1  # exactly one text
    assert data.split_threshold(manifest, (hashes[1] + 1) / 2**64) == int((hashes[1] + 1) / 2**64 * 2**64)
    assert data.split_threshold(manifest, 0.9999999) == hashes[-1]  # all but one
    assert data.split_threshold(small(tmp_path, ["a", "a"]), 0.4) == 0  # one text is trained on
    assert list(data.training_texts(small(tmp_path, ["a", "a"]), 0)) == ["a", "a"]


def test_training_texts_are_bounded_and_leave_validation_out(manifest, documents, threshold):
    texts = list(data.training_texts(manifest, threshold))
    assert texts == [text for text in documents if document_hash(text) >= threshold]
    some = list(data.training_texts(manifest, threshold, limit_bytes=200))
    assert some == texts[: len(some)] and 200 <= sum(map(len, some)) < 300


@pytest.mark.parametrize("extra", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 100, 10**6])
def test_validation_predicts_each_token_once(manifest, documents, encoder, threshold, extra, tokens):
    val = data.validation(manifest, threshold=threshold, encoder=encoder, seq_len=SEQ_LEN, extra=extra, tokens=tokens)
    held_out = [text for text in documents if document_hash(text) < threshold]
    taken = held_out[: val.num_documents]
    encoded = [[*ids.tolist(), encoder.eos] for ids in encoder(taken)]
    stream = list(itertools.chain([encoder.eos], *encoded))
    assert val.num_bytes == sum(len(text.encode()) for text in taken)
    assert val.num_tokens == len(stream) - 1 >= min(tokens, val.num_tokens)
    assert taken == held_out or len(stream) - 1 - len(encoded[-1]) < tokens <= len(stream) - 1
    assert val.tokens.shape == (math.ceil(val.num_tokens / SEQ_LEN), SEQ_LEN)
    assert val.targets.shape == (len(val.tokens), SEQ_LEN + extra - 1) and val.tokens.min() >= 0
    main = val.targets[:, :SEQ_LEN]
    assert main[main != IGNORE].tolist() == stream[1:]
    for depth in range(extra):  # MTP depth d predicts each token but the first d + 1 once
        targets = val.targets[:, depth : depth + SEQ_LEN]
        assert targets[targets != IGNORE].tolist() == stream[1 + depth :]
    flat = val.tokens.reshape(-1).tolist()
    assert flat[: val.num_tokens] == stream[:-1] and not any(flat[val.num_tokens :])


def test_validation_without_documents(tmp_path, encoder):
    val = data.validation(
        small(tmp_path, ["only one"]), threshold=0, encoder=encoder, seq_len=SEQ_LEN, extra=2, tokens=100
    )
    assert val.tokens.shape == (0, SEQ_LEN) and val.targets.shape == (0, SEQ_LEN + 1)
    assert (val.num_tokens, val.num_bytes, val.num_documents) == (0, 0, 0)


def test_searches_are_bounded(manifest, encoder, monkeypatch):
    monkeypatch.setattr(data, "SPLIT_SCAN_BYTES", 500)
    seen = [document.hash for document in data.walk(manifest, 500)]
    assert data.split_threshold(manifest, 1e-12) == min(seen) + 1
    val = data.validation(manifest, threshold=min(seen) + 1, encoder=encoder, seq_len=SEQ_LEN, extra=1, tokens=10**6)
    assert val.num_documents == 1


def test_the_bundled_corpus():
    manifest = sources.resolve([SourceConfig(path="corpus/austen.parquet")])
    texts = texts_of(manifest)
    assert len(texts) == len(set(texts)) == 270 and sum(len(text.encode()) for text in texts) == 4_012_498
    held_out = sum(document_hash(text) < data.split_threshold(manifest, 0.05) for text in texts)
    assert 5 <= held_out <= 25
    assert np.all([text == text.strip() and "\r" not in text and "\t" not in text for text in texts])


def test_no_document_of_the_bundled_corpus_nearly_repeats_another():
    """Over all pairs, so whichever are held out. The figures of corpus/README.md, by word 5-grams."""
    texts = pq.read_table(Path(__file__).parent.parent / "corpus" / "austen.parquet")["text"].to_pylist()
    vocabulary: dict[str, int] = {}
    listed = [re.findall(r"[a-z']+", text.lower().replace("\u2019", "'")) for text in texts]
    ids = [np.array([vocabulary.setdefault(word, len(vocabulary)) for word in words]) for words in listed]
    owners = np.repeat(np.arange(len(texts)), [len(words) - 4 for words in ids])
    a, b, c, d, e = (np.concatenate([words[start : len(words) - 4 + start] for words in ids]) for start in range(5))
    size = len(vocabulary)  # its cube fits 63 bits, its fifth power does not
    three = np.unique((a * size + b) * size + c, return_inverse=True)[1]
    grams = np.unique((three * size + d) * size + e, return_inverse=True)[1]
    grams, owners = np.divmod(np.unique(grams * len(texts) + owners), len(texts))  # of each text once, gram by gram
    sizes = np.bincount(owners).tolist()
    several = np.bincount(grams)[grams] > 1
    holders = np.split(owners[several], np.flatnonzero(np.diff(grams[several])) + 1)
    shared = Counter(pair for held in holders for pair in itertools.combinations(held.tolist(), 2))
    assert min(sizes) > 100 and shared
    jaccard = max(count / (sizes[a] + sizes[b] - count) for (a, b), count in shared.items())
    contained = max(count / min(sizes[a], sizes[b]) for (a, b), count in shared.items())
    assert round(jaccard, 4) == 0.0035 and round(contained, 3) == 0.009


# ---- what the model is given


def test_inputs_of_rows_laid_end_to_end():
    rows = torch.arange(40).view(2, 20)
    given = data.inputs(rows, 17, EOS, packed=False, isolated=False, crossing=False)
    assert torch.equal(given.tokens, rows[:, :17]) and torch.equal(given.targets, rows[:, 1:])
    assert given.positions is None and given.doc_ids is None


def test_inputs_of_packed_rows():
    row = torch.tensor([[EOS, 5, 6, EOS, 7, 8, 9, EOS, PADDING, PADDING]])
    given = data.inputs(row, 8, EOS, packed=True, isolated=False, crossing=False)
    assert given.tokens.tolist() == [[EOS, 5, 6, EOS, 7, 8, 9, EOS]]
    # The second EOS sees the first document: it does not predict the second one's start.
    assert given.targets.tolist() == [[5, 6, EOS, IGNORE, 8, 9, EOS, IGNORE, IGNORE]]
    crossing = data.inputs(row, 8, EOS, packed=True, isolated=False, crossing=True)
    assert crossing.targets.tolist() == [[5, 6, EOS, 7, 8, 9, EOS, IGNORE, IGNORE]]
    assert given.positions is None


def test_mtp_reads_what_follows_where_no_target_is(monkeypatch):
    """The second document's start is no target of the first; the MTP layer reads it all the same, as in sampling.

    So does Megatron's: it shifts inputs and loss mask apart (roll_tensor in multi_token_prediction.py).
    """
    from config import ModelConfig
    from model import DeepSeekV3, init_weights

    config = ModelConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, q_lora_rank=None, kv_lora_rank=4,
        qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=8, moe_intermediate_size=4,
        n_routed_experts=2, num_experts_per_tok=1, first_k_dense_replace=1, num_nextn_predict_layers=2,
    )  # fmt: skip
    model = DeepSeekV3(config)
    init_weights(model, 0)
    read = []
    for layer in model.mtp:
        layer.register_forward_pre_hook(lambda _, given: read.append(given[1]))
    monkeypatch.setattr(model, "_run", lambda block, *args: block(*args))
    row = torch.tensor([[EOS, 5, 6, EOS, 7, 8, 9, 10, 11, 12, 13]])
    out = {}
    for crossing in (False, True):
        given = data.inputs(row, 8, EOS, packed=True, isolated=False, crossing=crossing)
        out[crossing] = model(given.tokens, given.targets)
    assert read[0].tolist() == read[2].tolist() == [[5, 6, EOS, 7, 8, 9, 10, 11]]
    assert read[1].tolist() == read[3].tolist() == [[6, EOS, 7, 8, 9, 10, 11, 12]]
    assert out[False].num_targets.tolist() == [7, 6, 5] and out[True].num_targets.tolist() == [8, 8, 8]


@pytest.mark.parametrize("packed", [False, True])
def test_inputs_of_isolated_documents(packed):
    row = torch.tensor([[4, 5, EOS, 6, 7, 8, EOS, EOS, 9, 3]])
    given = data.inputs(row, 8, EOS, packed=packed, isolated=True, crossing=False)
    assert given.targets.tolist() == row[:, 1:].tolist()  # an EOS starts what follows, and may predict it
    assert given.positions.tolist() == [[0, 1, 0, 1, 2, 3, 0, 0]]
    assert given.doc_ids.tolist() == [[0, 0, 1, 1, 1, 1, 2, 3, 3, 3]]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_tensors(manifest, encoder, workers):
    feed = Feed(manifest, encoder, SEQ_LEN, 2, 3, 1, Cursor(), 0, 3)
    wanted = list(itertools.islice(feed.batches(), 5))
    loader = data.Loader(feed, workers)
    for batch in wanted:
        found = next(loader)
        assert found.tokens.dtype == torch.int64 and np.array_equal(found.tokens.numpy(), batch.tokens)
        assert found.cursor == batch.cursor
    assert (loader.depth is None) == (workers == 0) and loader.restarts == 0
    loader.close()
    loader.close()
    assert next(loader, None) is None
