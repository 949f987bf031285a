"""documents.py: hashes and rows. What it reads of each format is in test_sources.py, beside how it is listed."""

import documents


def test_equal_texts_have_equal_hashes_and_others_spread_evenly():
    hashes = [documents.document_hash(f"text {i}") for i in range(4000)]
    assert documents.document_hash("text 7") == hashes[7] and len(set(hashes)) == 4000
    assert 900 < sum(value < 2**62 for value in hashes) < 1100  # a quarter


def test_blank_documents_keep_their_rows():
    found = documents.text_documents(["a", None, " \n", "", "ä"], skipped=2)
    assert found.items == ["a", "ä"] and found.rows.tolist() == [0, 4] and found.num_bytes.tolist() == [1, 2]
    assert found.skipped == 2
    assert documents.text_documents([]).hashes.shape == (0,)
