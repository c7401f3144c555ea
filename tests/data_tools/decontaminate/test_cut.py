"""Cutting overlaps out of a document."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.decontaminate.cut import MARGIN, MOST_PIECES, SHORTEST_PIECE, cut

WORDS = "word " * 400  # 2,000 characters


def test_the_overlap_goes_with_200_characters_on_each_side_and_cuts_fall_on_spaces() -> None:
    text = WORDS + "SECRET " + WORDS
    before, after = cut(text, [(2000, 2006)])
    assert "SECRET" not in before + after
    assert before.endswith("word") and after.startswith("word")
    assert 2000 - MARGIN - 10 <= len(before) <= 2000 - MARGIN and 2000 - MARGIN - 10 <= len(after) <= 2000 - MARGIN + 1


def test_short_remains_go_too() -> None:
    assert cut("x" * (MARGIN + SHORTEST_PIECE - 1) + "SECRET", [(399, 405)]) == []
    assert cut("x" * (MARGIN + SHORTEST_PIECE) + "SECRET", [(400, 406)]) == ["x" * SHORTEST_PIECE]


def test_overlapping_spans_are_cut_as_one() -> None:
    assert len(cut(WORDS * 2, [(1000, 1010), (1005, 1100), (1100, 1200)])) == 2


def test_a_document_in_more_than_ten_pieces_is_given_up() -> None:
    text = WORDS * (MOST_PIECES + 1)
    spans = [(at, at + 5) for at in range(1000, len(text), 2000)]
    assert cut(text, spans) == [] and len(cut(text, spans[: MOST_PIECES - 1])) == MOST_PIECES


@settings(max_examples=60, deadline=None)
@given(st.text("ab \n", max_size=3000), st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), max_size=5))
def test_pieces_are_parts_of_the_text_in_order_and_hold_nothing_of_a_span(
    body: str, places: list[tuple[int, int]]
) -> None:
    spans = sorted((min(start, len(body)), min(start + size, len(body))) for start, size in places)
    marked = list(body)
    for start, end in spans:
        marked[start:end] = "#" * (end - start)
    position = 0
    text = "".join(marked)
    for piece in cut(text, spans):
        assert "#" not in piece and len(piece) >= SHORTEST_PIECE
        position = text.index(piece, position) + len(piece)
