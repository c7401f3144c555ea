"""Questions in packed rows: each is asked once, at the right place, of the right tokens."""

from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.packing import IGNORE_INDEX
from cpt.eval.scored_rows import AskingRow, Question, asking_rows, blank_row, question, row_length

TOKENS = st.integers(1, 5)
QUESTIONS = st.lists(
    st.tuples(st.lists(TOKENS, min_size=1, max_size=6), st.lists(TOKENS, min_size=1, max_size=3)).map(
        lambda pair: question(*pair, max_length=8)
    ),
    max_size=30,
)


def rows_of(questions: list[Question], seq_len: int) -> list[AskingRow]:
    return [make() for make in asking_rows(questions, seq_len)]


def test_the_example_of_the_module_holds() -> None:
    a, b, c, d, e, f, g = range(1, 8)
    asked = [question([a, b], [c, d], 9), question([a, b], [e], 9), question([f], [g], 9)]
    (row,) = rows_of(asked, 6)
    assert row.row.input_ids.tolist() == [a, b, c, a, b, f]
    assert row.row.segments.tolist() == [0, 0, 0, 1, 1, 2]
    assert row.row.positions.tolist() == [0, 1, 2, 0, 1, 0]
    found = sorted(zip(row.numbers.tolist(), row.places.tolist(), row.tokens.tolist(), strict=True))
    assert found == [(0, 1, c), (1, 2, d), (2, 4, e), (3, 5, g)]


def test_what_is_too_long_is_cut_from_the_left_and_the_last_token_is_only_predicted() -> None:
    assert question([1, 2, 3, 4], [5, 6], max_length=3) == Question(read=(3, 4, 5), wanted=(5, 6))
    assert question([1, 2, 3, 4], [5, 6], max_length=5) == Question(read=(1, 2, 3, 4, 5), wanted=(5, 6))


def test_answers_to_one_prompt_share_it_where_all_of_them_are_one_token() -> None:
    rows = rows_of([question([1, 2, 3], [letter], 9) for letter in (4, 5, 6, 7)], 3)
    assert len(rows) == 1
    assert rows[0].places.tolist() == [2, 2, 2, 2] and sorted(rows[0].tokens.tolist()) == [4, 5, 6, 7]


def test_a_long_question_makes_the_rows_longer_and_ranks_that_share_rows_divide_them() -> None:
    asked = [question([1] * 10, [2], 99)]
    assert row_length(asked, 4) == 10
    assert row_length(asked, 4, shared_by=4) == 12
    assert row_length(asked, 64) == 64
    assert row_length([], 64) == 64


def test_a_blank_row_asks_nothing_and_no_token_of_any_row_counts_in_a_loss() -> None:
    blank = blank_row(5)
    assert len(blank.places) == 0 and blank.row.positions.tolist() == [0, 1, 2, 3, 4]
    for row in (blank, *rows_of([question([1], [2], 9)], 5)):
        assert set(row.row.labels.tolist()) == {IGNORE_INDEX}


@settings(deadline=None)
@given(QUESTIONS, st.integers(8, 20))
def test_every_question_is_asked_once_after_what_it_reads(asked: list[Question], seq_len: int) -> None:
    rows = rows_of(asked, seq_len)
    found: dict[int, tuple[AskingRow, int, int]] = {}
    for row in rows:
        for place, token, number in zip(row.places.tolist(), row.tokens.tolist(), row.numbers.tolist(), strict=True):
            assert number not in found
            found[number] = (row, place, token)
    assert sorted(found) == list(range(sum(len(each.wanted) for each in asked)))
    first = 0
    for each in asked:
        own_tokens = [found[number] for number in range(first, first + len(each.wanted))]
        first += len(each.wanted)
        row, places = own_tokens[0][0], [place for _, place, _ in own_tokens]
        assert [token for _, _, token in own_tokens] == list(each.wanted)
        assert all(other is row for other, _, _ in own_tokens)
        last = places[-1]
        assert places == list(range(last - len(each.wanted) + 1, last + 1))
        # The document that ends at the last place is what the question reads, and it begins at position 0.
        own = row.row.segments == row.row.segments[last]
        assert row.row.input_ids[own].tolist() == list(each.read)
        assert row.row.positions[own].tolist() == list(range(len(each.read)))
        assert own.nonzero()[0].max() == last


@settings(deadline=None)
@given(QUESTIONS, st.integers(8, 20))
def test_documents_are_packed_and_the_same_text_is_read_once(asked: list[Question], seq_len: int) -> None:
    rows = rows_of(asked, seq_len)
    distinct = sum(len(read) for read in {each.read for each in asked})
    if rows:
        assert len(rows) <= 2 * -(-distinct // seq_len)  # best fit leaves no two rows half empty
    assert [row.row.input_ids.tolist() for row in rows_of(asked, seq_len)] == [
        row.row.input_ids.tolist() for row in rows
    ]
