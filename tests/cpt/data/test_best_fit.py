"""Best-fit packing: the published vectors, and the rule piece by piece as a check on the one in bulk."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data import best_fit as module
from cpt.data.best_fit import best_fit, best_fit_moves, cut, num_best_fit_rows

lengths_and_rows = st.integers(1, 40).flatmap(
    lambda seq_len: st.tuples(st.lists(st.integers(1, seq_len), max_size=60), st.just(seq_len))
)


def rows_of(lengths: list[int], seq_len: int) -> list[list[int]]:
    order, row_starts = best_fit(np.array(lengths, np.int64), seq_len)
    found = [[lengths[piece] for piece in order[low:high]] for low, high in pairwise(row_starts)]
    assert sorted(order.tolist()) == list(range(len(lengths)))  # every piece once
    return found


def piece_by_piece(lengths: list[int], seq_len: int) -> list[int]:
    """Room left in each row: every piece, longest first, into the fullest row where it fits."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else seq_len) - length)
    return rooms


def test_the_published_example_gives_four_rows() -> None:
    documents = np.array([14, 7, 5, 2, 3], np.int64)
    pieces = cut(np.cumsum(documents) - documents, documents, 8)
    assert (pieces.whole.tolist(), pieces.starts.tolist(), pieces.lengths.tolist()) == (
        [0],
        [8, 14, 21, 26, 28],
        [6, 7, 5, 2, 3],
    )
    assert rows_of(pieces.lengths.tolist(), 8) == [[7], [6, 2], [5, 3]]
    assert "rows [8] [7] [6 2] [5 3]" in (module.__doc__ or "")


def test_two_thousand_uniform_documents_need_1045_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 2000)
    assert num_best_fit_rows(lengths, 2048) == 1045 == len(rows_of(lengths.tolist(), 2048))
    assert -(-lengths.sum() // 2048) == 1026


@settings(max_examples=500, deadline=None)
@given(lengths_and_rows)
def test_in_bulk_every_row_is_filled_as_piece_by_piece(given: tuple[list[int], int]) -> None:
    lengths, seq_len = given
    rows = rows_of(lengths, seq_len)
    assert Counter(seq_len - sum(row) for row in rows) == Counter(piece_by_piece(lengths, seq_len))
    assert all(row == sorted(row, reverse=True) for row in rows)
    assert num_best_fit_rows(np.array(lengths, np.int64), seq_len) == len(rows)


@settings(max_examples=200, deadline=None)
@given(lengths_and_rows)
def test_rows_stay_within_eleven_ninths_of_the_least_number(given: tuple[list[int], int]) -> None:
    lengths, seq_len = given
    lower_bound = max(-(-sum(lengths) // seq_len), sum(2 * length > seq_len for length in lengths))
    rows = len(rows_of(lengths, seq_len))
    # rows <= 11/9 OPT + 1 (best fit decreasing); OPT >= lower_bound, and no row but one is at most half full
    assert rows >= lower_bound
    assert rows <= 11 / 9 * (best := least_rows(lengths, seq_len, rows)) + 1, (rows, best)


def least_rows(lengths: list[int], seq_len: int, known: int) -> int:
    """The optimum for a few pieces by search, else the known number, which asserts nothing."""
    if len(lengths) > 9:
        return known
    ordered = sorted(lengths, reverse=True)
    best = known

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best:
            return
        if index == len(ordered):
            best = len(rooms)
            return
        for row in range(len(rooms)):
            if rooms[row] >= ordered[index]:
                place(index + 1, [*rooms[:row], rooms[row] - ordered[index], *rooms[row + 1 :]])
        place(index + 1, [*rooms, seq_len - ordered[index]])

    place(0, [])
    return best


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 20))
def test_only_documents_longer_than_a_row_are_cut_and_every_token_is_kept(documents: list[int], seq_len: int) -> None:
    lengths = np.array(documents, np.int64)
    starts = np.cumsum(lengths) - lengths
    pieces = cut(starts, lengths, seq_len)
    spans = [(start, seq_len) for start in pieces.whole.tolist()]
    spans += zip(pieces.starts.tolist(), pieces.lengths.tolist(), strict=True)
    assert sorted(token for start, length in spans for token in range(start, start + length)) == list(
        range(lengths.sum())
    )
    starts_inside = [start for start, _ in spans if start not in set(starts.tolist())]
    assert len(starts_inside) == sum(-(-length // seq_len) - 1 for length in documents)
    assert (pieces.lengths < seq_len).all() and (pieces.lengths > 0).all()


@pytest.mark.parametrize("seq_len", [2048, 70_000])
def test_work_grows_with_distinct_lengths_not_with_pieces(seq_len: int) -> None:
    lengths = np.random.default_rng(1).integers(1, 2049, 200_000)
    counts = np.bincount(lengths, minlength=seq_len + 1)
    assert sum(1 for _ in best_fit_moves(counts, seq_len)) < 10 * 2048
    order, row_starts = best_fit(lengths, seq_len)
    sums = np.add.reduceat(lengths[order], row_starts[:-1])
    assert sums.max() <= seq_len and sums.sum() == lengths.sum()
    assert lengths.sum() / (len(sums) * seq_len) > 0.998
