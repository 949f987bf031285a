"""packing.py: rows that start at a document, hardly padded, losing little more than the ends of long documents."""

import random

import pytest

import packing


def lengths_like_the_web(count, seed=0):
    """Log-normal, median 600 tokens: the shape published for web documents, not measured here."""
    draw = random.Random(seed)
    return [min(100_000, max(2, int(draw.lognormvariate(6.4, 1.0)))) for _ in range(count)]


def measure(lengths, capacity):
    rows = packing.best_fit(lengths, capacity)
    used = sum(piece.length for row in rows for piece in row)
    floor = sum(max(0, length - capacity) for length in lengths) / sum(lengths)
    return used / (len(rows) * capacity), 1 - used / sum(lengths), floor


def check(lengths, capacity):
    rows = packing.best_fit(lengths, capacity)
    placed = [piece.document for row in rows for piece in row]
    assert len(placed) == len(set(placed)) and set(placed) <= set(range(len(lengths)))
    for row in rows:
        assert row and sum(piece.length for piece in row) <= capacity
        assert all(piece.length == lengths[piece.document] for piece in row[:-1])  # a cropped one is the last
        assert 0 < row[-1].length <= lengths[row[-1].document]
    return rows


@pytest.mark.parametrize("capacity", [8, 100, 2048])
@pytest.mark.parametrize("count", [1, 2, 7, 100, 2000])
def test_rows_hold_documents_once_and_fit(capacity, count):
    check(lengths_like_the_web(count, count), capacity)
    check([2] * count, capacity)
    check([capacity] * count, capacity)
    check([capacity + 1] * count, capacity)


def test_small_sets_lose_nothing_that_fits():
    assert check([5, 3, 2], 10) == [[(0, 5), (1, 3), (2, 2)]]
    for seed in range(200):
        draw = random.Random(seed)
        lengths = [draw.randrange(2, 30) for _ in range(draw.randrange(1, 12))]
        rows = check(lengths, 30)
        spare = 30 * len(rows) - sum(lengths)
        assert 0 <= spare < 30  # as many rows as needed, not one more
        cropped = sum(lengths) - sum(piece.length for row in rows for piece in row)
        assert cropped <= max(lengths)


def test_the_best_fit_is_taken():
    # 7 goes to the row with 8 left, not to the one with 10; 3 fills the 10 up to 7.
    rows = check([12, 10, 7, 3], 20)
    assert sorted(sorted(piece.document for piece in row) for row in rows) == [[0, 2], [1, 3]]


def test_utilisation_and_cropped_share_on_web_like_lengths():
    """D9: at least 99.9% of the positions used, and hardly more cropped than what no row can hold."""
    for seed in range(3):
        used, cropped, floor = measure(lengths_like_the_web(2048, seed), 2048)
        assert used >= 0.999
        assert floor <= cropped <= floor + 0.002
        assert cropped <= 0.235
