from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpt.data import packing
from cpt.data.best_fit import best_fit, cut
from cpt.data.packing import IGNORE_INDEX, concat_num_rows, concat_row, pieces_row
from cpt.rundir import DataError


class MemoryStore:
    """A token store made of lists."""

    def __init__(self, documents: list[list[int]]) -> None:
        self.tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
        lengths = [len(document) for document in documents]
        self.starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        return self.tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        return self.starts[(self.starts >= start) & (self.starts < stop)]


def test_six_token_rows_are_cut_as_in_the_worked_example() -> None:
    store = MemoryStore([[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 0]])
    assert concat_num_rows(store.num_tokens, 6) == 2
    first, second = concat_row(store, 0, 6), concat_row(store, 1, 6)
    assert first.input_ids.tolist() == [1, 2, 3, 0, 4, 5]
    assert first.labels.tolist() == [2, 3, 0, IGNORE_INDEX, 5, 0]
    assert first.positions.tolist() == [0, 1, 2, 3, 0, 1]
    assert first.segments.tolist() == [0, 0, 0, 0, 1, 1]
    assert second.input_ids.tolist() == [0, 6, 7, 8, 9, 10]
    assert second.labels.tolist() == [IGNORE_INDEX, 7, 8, 9, 10, 0]
    assert second.positions.tolist() == [0, 0, 1, 2, 3, 4]
    assert second.segments.tolist() == [0, 1, 1, 1, 1, 1]


def test_a_row_that_starts_with_a_document_has_one_segment() -> None:
    store = MemoryStore([[1, 2, 0], [3, 4, 5, 0], [6, 0]])
    row = concat_row(store, 1, 3)
    assert (row.input_ids.tolist(), row.labels.tolist()) == ([3, 4, 5], [4, 5, 0])
    assert (row.positions.tolist(), row.segments.tolist()) == ([0, 1, 2], [0, 0, 0])


def test_a_document_of_one_token_predicts_nothing() -> None:
    row = concat_row(MemoryStore([[0], [0], [1, 0]]), 0, 3)
    assert row.labels.tolist() == [IGNORE_INDEX, IGNORE_INDEX, 0]
    assert row.segments.tolist() == [0, 1, 2]


def test_a_document_longer_than_a_row_continues_with_fresh_positions() -> None:
    store = MemoryStore([list(range(1, 14))])
    assert concat_row(store, 1, 6).positions.tolist() == [0, 1, 2, 3, 4, 5]
    assert concat_row(store, 0, 6).labels[-1] == concat_row(store, 1, 6).input_ids[0] == 7


def rows_of_pieces(store: MemoryStore, seq_len: int) -> list[packing.PackedRow]:
    """All rows by best fit, with 98 as padding."""
    lengths = np.diff([*store.starts.tolist(), store.num_tokens])
    pieces = cut(store.starts, lengths, seq_len)
    order, row_starts = best_fit(pieces.lengths, seq_len)
    spans = np.stack([pieces.starts, pieces.lengths], axis=1)[order]
    whole = [np.array([(start, seq_len)]) for start in pieces.whole.tolist()]
    found = [*whole, *(spans[low:high] for low, high in pairwise(row_starts.tolist()))]
    return [pieces_row(store, piece, seq_len, pad_id=98) for piece in found]


def test_a_document_of_two_rows_and_a_rest_predicts_across_its_cuts() -> None:
    first, second, rest = rows_of_pieces(MemoryStore([[1, 2, 3, 4, 5, 6, 7, 0]]), 3)
    assert (first.labels.tolist(), second.labels.tolist()) == ([2, 3, 4], [5, 6, 7])
    assert (rest.input_ids.tolist(), rest.labels.tolist()) == ([7, 0, 98], [0, IGNORE_INDEX, IGNORE_INDEX])
    assert (rest.positions.tolist(), rest.segments.tolist()) == ([0, 1, 0], [0, 0, 1])


def test_a_document_that_ends_with_its_row_predicts_nothing_behind_it() -> None:
    first, second = rows_of_pieces(MemoryStore([[1, 2, 0], [3, 4, 0]]), 3)
    assert (first.labels.tolist(), second.labels.tolist()) == ([2, 0, IGNORE_INDEX], [4, 0, IGNORE_INDEX])


documents = st.lists(
    st.lists(st.integers(1, 99), max_size=20).map(lambda tokens: [*tokens, 0]), min_size=1, max_size=20
)


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(1, 16))
def test_one_epoch_predicts_every_pair_inside_documents_exactly_once(texts: list[list[int]], seq_len: int) -> None:
    # unique tokens, so that a pair tells its place in the store
    flat = iter(range(10**4))
    unique = [[next(flat) for _ in text] for text in texts]
    store = MemoryStore(unique)
    num_rows = concat_num_rows(store.num_tokens, seq_len)
    rows = [concat_row(store, row, seq_len) for row in range(num_rows)]
    predicted = Counter(
        pair
        for row in rows
        for pair in zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
        if pair[1] != IGNORE_INDEX
    )
    inside = Counter(pair for text in unique for pair in pairwise(text) if pair[0] < num_rows * seq_len)
    assert predicted == inside
    assert store.num_tokens - 1 - num_rows * seq_len < seq_len  # the tail that no row holds


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(1, 16))
def test_by_best_fit_every_token_stands_once_and_all_but_a_documents_first_are_predicted(
    texts: list[list[int]], seq_len: int
) -> None:
    flat = iter(range(1000, 10**4))
    unique = [[next(flat) for _ in text] for text in texts]
    store = MemoryStore(unique)
    predicted: Counter[tuple[int, int]] = Counter()
    tokens: Counter[int] = Counter()
    for row in rows_of_pieces(store, seq_len):
        opens = row.positions == 0
        assert (np.cumsum(opens) - 1 == row.segments).all()
        assert set(row.input_ids[row.segments == row.segments[-1]].tolist()) == {98} or 98 not in row.input_ids
        assert all(array.dtype == np.int64 and array.shape == (seq_len,) for array in vars(row).values())
        tokens += Counter(row.input_ids[row.input_ids != 98].tolist())
        pairs = zip(row.input_ids.tolist(), row.labels.tolist(), strict=True)
        predicted += Counter(pair for pair in pairs if pair[1] != IGNORE_INDEX)
    assert tokens == Counter(token for text in unique for token in text)
    assert predicted == Counter(pair for text in unique for pair in pairwise(text))


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(1, 16))
def test_positions_restart_where_segments_change_and_nowhere_else(texts: list[list[int]], seq_len: int) -> None:
    store = MemoryStore(texts)
    for number in range(concat_num_rows(store.num_tokens, seq_len)):
        row = concat_row(store, number, seq_len)
        starts = set(store.starts.tolist())
        opens = [t == 0 or number * seq_len + t in starts for t in range(seq_len)]
        assert [position == 0 for position in row.positions.tolist()] == opens
        assert row.segments.tolist() == [sum(opens[: t + 1]) - 1 for t in range(seq_len)]
        assert all(array.dtype == np.int64 for array in vars(row).values())


def test_a_packing_without_rows_and_a_short_read_are_refused() -> None:
    assert [concat_num_rows(n, 6) for n in (0, 1, 6, 7, 12, 13)] == [0, 0, 0, 1, 1, 2]
    store = MemoryStore([[1, 2, 3, 0]])
    with pytest.raises(AssertionError, match="row 1 is outside"):
        concat_row(store, 1, 3)
    store.read = lambda start, stop: store.tokens[start : stop - 1]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="tokens 0 to 4 were asked for, 3 came back; the store is cut short"):
        concat_row(store, 0, 3)
    with pytest.raises(DataError, match="tokens 0 to 3 were asked for, 2 came back"):
        pieces_row(store, np.array([(0, 3)]), 3, pad_id=0)
    for pieces in ([(0, 3), (0, 1)], [(0, -1), (0, 2)], [(-1, 2)]):
        with pytest.raises(DataError, match="make no row of 3"):
            pieces_row(store, np.array(pieces), 3, pad_id=0)


def test_the_module_docstring_shows_what_the_code_does() -> None:
    names = "#abcdefghij"
    store = MemoryStore([[1, 2, 3, 0], [4, 5, 0], [6, 7, 8, 9, 10, 0]])
    concat = [concat_row(store, number, 6) for number in range(2)]
    best_fit = [pieces_row(store, np.array([piece]), 6, pad_id=0) for piece in [(7, 6), (0, 4), (4, 3)]]
    for number, row in [*enumerate(concat), *enumerate(best_fit)]:
        labels = ["." if label == IGNORE_INDEX else names[label] for label in row.labels.tolist()]
        parts = {
            "input_ids": [names[token] for token in row.input_ids.tolist()],
            "labels": labels,
            "positions": map(str, row.positions.tolist()),
            "segments": map(str, row.segments.tolist()),
        }
        line = "    ".join(f"{name}  {' '.join(values)}" for name, values in parts.items())
        assert f"row {number}   {line}" in (packing.__doc__ or "")
