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


class Line(str):
    """Counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, key):
        found = Line(super().__getitem__(key))
        Line.copied += len(found)
        return found


def test_a_book_in_one_line_is_cut_at_spaces_in_one_go():
    """A line of 100 MB took minutes when what was left of it was copied with each piece."""
    line = Line("word and " * 60_000)
    pieces = list(documents._cut_long([line]))
    assert "".join(pieces) == line and max(map(len, pieces)) <= documents.BLOCK_DOCUMENT_BYTES
    assert all(piece.endswith(" ") for piece in pieces if piece) and Line.copied == len(line)
