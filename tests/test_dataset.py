"""dataset.py: what the data section comes to, and what is said where it comes to nothing."""

import itertools

import numpy as np
import prepare_data
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import config as configuration
import dataset
import sources
from config import NAMED_SOURCES, UserError
from dataset import open_dataset
from remote import Unreachable
from stream import Cursor
from tokenizer import Encoder


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [f"document {i} about the number {i * i}" for i in range(200)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=40)
    return path


def load(corpus, *overrides):
    return configuration.load("quickstart", [f"data.sources={corpus}", "model.vocab_size=400", *overrides])


@pytest.mark.parametrize("kind", ["bpe", "chars", "bytes"])
def test_tokenizers_made_from_the_sources(corpus, kind):
    told = []
    made = open_dataset(load(corpus, f"data.tokenizer={kind}"), note=told.append)
    assert told == [f"making a tokenizer ({kind}, at most 400 tokens) from the sources"]
    assert not made.fallback and made.threshold > 0
    text = "document 3 about the number 9"
    (ids,) = made.encoder([text])
    assert made.tokenizer.decode(ids) == text and (kind == "bpe") == (len(ids) < len(text))
    config = load(corpus, f"data.tokenizer={kind}")
    batch = next(made.feed(config, Cursor()).batches())
    assert batch.tokens.shape == (config.rows_per_step, config.data.seq_len + 2) and batch.tokens.max() < 400
    assert made.validation(config).num_documents > 0


def test_a_vocabulary_that_is_too_small(corpus):
    with pytest.raises(UserError, match=r"model.vocab_size = 5: chars take \d+ tokens here"):
        open_dataset(load(corpus, "data.tokenizer=chars", "model.vocab_size=5"))
    with pytest.raises(UserError, match=r"must be at least 257 with data.tokenizer = bytes"):
        load(corpus, "data.tokenizer=bytes", "model.vocab_size=256")


def test_shards_bring_their_tokenizer(corpus, tmp_path, capsys):
    out = tmp_path / "shards"
    arguments = ["--config", "quickstart", "--out", str(out), f"data.sources={corpus}", "model.vocab_size=400"]
    assert prepare_data.main(arguments) == 0
    streamed = open_dataset(load(corpus))
    mapped = open_dataset(load(out, f"data.tokenizer={out / 'tokenizer'}"))
    assert mapped.fingerprint == streamed.fingerprint and mapped.threshold == streamed.threshold
    config = load(corpus)
    batches = [itertools.islice(made.feed(config, Cursor()).batches(), 20) for made in (streamed, mapped)]
    for left, right in zip(*batches, strict=True):
        assert np.array_equal(left.tokens, right.tokens) and left.cursor == right.cursor
    with pytest.raises(
        UserError, match=r"token shards have no text to make it from; theirs is data.tokenizer=.*tokenizer"
    ):
        open_dataset(load(out))
    other = open_dataset(load(corpus, "data.tokenizer=bytes"))
    dataset.tokenizers.save(other.tokenizer, tmp_path / "other")
    with pytest.raises(UserError, match="were made with another one"):
        open_dataset(load(out, f"data.tokenizer={tmp_path / 'other'}"))


def test_why_tokenising_is_slow_is_told(corpus, tmp_path, capsys):
    fast, slow = (open_dataset(load(corpus, f"data.tokenizer={kind}")) for kind in ("bpe", "chars"))
    assert fast.encoder.backend == "fastokens" and fast.notes == []
    assert slow.notes == [
        "tokenising without fastokens, several times slower: model error: unsupported model type: WordLevel"
    ]
    out = tmp_path / "shards"
    assert prepare_data.main(
        ["--config", "quickstart", "--out", str(out), f"data.sources={corpus}", "data.tokenizer=chars"]
    ) == 0  # fmt: skip
    assert slow.notes[0] + "\n" in capsys.readouterr().out
    assert open_dataset(load(out, f"data.tokenizer={out / 'tokenizer'}")).notes == []  # nothing is tokenised


def test_the_faster_encoder_is_tried_on_the_start_of_a_huge_document(corpus, monkeypatch):
    """A line of 50 MB took a minute of every start."""
    seen = []
    monkeypatch.setattr(dataset, "SAMPLE_BYTES", 10)
    monkeypatch.setattr(Encoder, "fastest", lambda tok, sample: seen.extend(sample) or Encoder(tok))
    open_dataset(load(corpus, "data.tokenizer=bytes"))
    assert [len(text) for text in seen] == [10]


# ---- data.fallback


@pytest.fixture
def no_hub(monkeypatch):
    """Sources on the Hub cannot be reached."""
    real = sources.resolve

    def resolve(listed, cache=None):
        if any(source.path.startswith("owner/") for source in listed):
            raise Unreachable("Hub dataset 'owner/set': the Hugging Face Hub could not be reached")
        return real(listed, cache)

    monkeypatch.setattr(sources, "resolve", resolve)


def test_a_fallback_is_announced_and_kept(corpus, no_hub):
    config = configuration.load(
        "quickstart", ["data.sources=owner/set", f"data.fallback={corpus}", "model.vocab_size=400"]
    )
    told = []
    made = open_dataset(config, note=told.append)
    assert made.fallback and "could not be reached; training on data.fallback" in told[0]
    again = open_dataset(config, fallback=True, note=told.append)
    assert again.manifest == made.manifest and len(told) == 3  # nothing new is announced
    with pytest.raises(Unreachable):  # a run that began on the first sources does not change them
        open_dataset(config, fallback=False)
    with pytest.raises(Unreachable):
        open_dataset(configuration.load("quickstart", ["data.sources=owner/set"]))


def test_other_mistakes_are_no_reason_for_a_fallback(corpus, tmp_path):
    config = configuration.load("quickstart", [f"data.sources={tmp_path}/none", f"data.fallback={corpus}"])
    with pytest.raises(UserError, match="no such file"):
        open_dataset(config)


# ---- ready sources


@pytest.mark.parametrize("name", NAMED_SOURCES)
def test_named_sources(name):
    config = configuration.load("30m", [f"data.sources={name}"])
    assert len(config.data.sources) == len(NAMED_SOURCES[name])
    weights = [source.weight for source in config.data.sources]
    assert len(weights) == 1 or sum(filter(None, weights)) == pytest.approx(1)
    assert configuration.load("30m", [f"data.sources=[{name}]"]).data.sources == config.data.sources


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources=[{path: a, weight: 1}, {path: b}]", "data.sources[1].weight = null: give every source a weight"),
        ("data.sources=[{path: a, epochs: 1}, {path: b}]", "must have the same epochs"),
        ("data.fallback=[{path: a}, {path: b, weight: 2}]", "data.fallback[0].weight = null"),
        ("data.sources=[{path: a, weight: 0}]", "a number > 0"),
        ("data.sources=[{path: a, epochs: 0}]", "an integer >= 1"),
        ("data.cross_targets=true", "goes with data.packing = best_fit"),
        ("data.packing=bestfit", "one of concat, best_fit"),
        ("data.max_skipped=1.5", "a number >= 0 and <= 1"),
    ],
)
def test_contradictions_are_told_before_anything_is_read(override, said):
    with pytest.raises(UserError) as caught:
        configuration.load("quickstart", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value)
