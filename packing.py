"""Best-fit packing: documents into rows of equal length, every row starting at a document (arXiv 2404.10830).

A document takes its tokens and the EOS before them, which starts it as BOS would. Longer ones than a row are cropped to
it. Best fit decreasing puts each where the least room is left; what finds no room is cropped into the largest gaps.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

MAY_DROP = 0.001  # of the tokens: less is left out rather than given a row that is mostly padding


class Piece(NamedTuple):
    """The first `length` positions of document `document`, its EOS included, in a row."""

    document: int
    length: int


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Rows of pieces whose lengths sum to at most `capacity` each; a document that is cropped comes last in its row.

    Args:
        lengths: positions each document wants, its EOS included. capacity: positions of a row.
    """
    wanted = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    total = sum(min(length, capacity) for length in lengths)
    num_rows, rest = divmod(total, capacity)
    if rest > MAY_DROP * total:
        num_rows += 1
    rows: list[list[Piece]] = [[] for _ in range(num_rows)]
    free = [(capacity, row) for row in range(num_rows)]  # sorted by the room left
    left: list[int] = []
    for document in wanted:
        length = min(lengths[document], capacity)
        place = bisect_left(free, (length, -1))
        if place == len(free):
            left.append(document)
            continue
        room, row = free.pop(place)
        rows[row].append(Piece(document, length))
        insort(free, (room - length, row))
    for room, row in reversed(free):  # all that is left is longer than any gap
        if not left or room < 2:  # an EOS alone says nothing
            break
        rows[row].append(Piece(left.pop(), room))
    return [row for row in rows if row]
