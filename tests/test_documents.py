"""documents.py: how fast it reads. What it reads of each format is in test_sources.py, beside how it is listed."""

import time

import pyarrow as pa
import pyarrow.parquet as pq

import documents
import sources
from config import SourceConfig


def test_equal_texts_have_equal_hashes_and_others_spread_evenly():
    hashes = [documents.document_hash(f"text {i}") for i in range(4000)]
    assert documents.document_hash("text 7") == hashes[7] and len(set(hashes)) == 4000
    assert 900 < sum(value < 2**62 for value in hashes) < 1100  # a quarter


def test_blank_documents_keep_their_rows():
    found = documents.text_documents(["a", None, " \n", "", "ä"], skipped=2)
    assert found.items == ["a", "ä"] and found.rows.tolist() == [0, 4] and found.num_bytes.tolist() == [1, 2]
    assert found.skipped == 2
    assert documents.text_documents([]).hashes.shape == (0,)


def test_reading_keeps_up_with_several_encoders(tmp_path):
    """One process reads for all that tokenise: 20 MB/s would do for one, several times that is asked for."""
    texts = [f"{i} " + "some words of no importance " * 140 for i in range(5000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=1000)
    manifest = sources.resolve([SourceConfig(path=str(tmp_path / "a.parquet"))])
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        size = sum(int(documents.read_unit(unit).num_bytes.sum()) for unit in manifest.units)
        best = max(best, size / (time.perf_counter() - start))
    assert size > 15_000_000 and best > 40e6
