import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.data.place import Place


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_the_ranks_of_a_group_read_the_same_rows_and_together_hold_each_position_once(
    readers: int, shared: int, held: int
) -> None:
    places = [Place(rank, readers * shared, shared) for rank in range(readers * shared)]
    seq_len = shared * held
    for reader in range(readers):
        group = [place for place in places if place.reader == reader]
        assert [place.rank for place in group] == list(range(reader * shared, (reader + 1) * shared))
        assert [t for place in group for t in range(seq_len)[place.positions(seq_len)]] == list(range(seq_len))
    assert {place.num_readers for place in places} == {readers}


def test_ranks_that_make_no_whole_groups_and_rows_that_make_no_whole_parts_are_our_bug() -> None:
    with pytest.raises(AssertionError, match="6 ranks are no whole groups of 4"):
        Place(0, 6, 4)
    with pytest.raises(AssertionError, match="10 positions for 4 ranks"):
        Place(0, 4, 4).positions(10)
