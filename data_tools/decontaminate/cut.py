"""Take overlaps out of a text: GPT-3's rule (Brown et al. 2020, appendix C), with cuts moved to white space."""

from collections.abc import Iterable

MARGIN = 200  # characters that go with an overlap on each side
SHORTEST_PIECE = 200  # characters; shorter remains go too
MOST_PIECES = 10  # a document that falls into more is dropped: it is mostly overlap
_LOOK_FOR_SPACE = 60


def cut(text: str, spans: Iterable[tuple[int, int]]) -> list[str]:
    """What remains: pieces of at least ``SHORTEST_PIECE`` characters, none where there are more than ``MOST_PIECES``.

    ``spans``: overlaps as (start, end) in characters, ordered by start.
    """
    pieces = []
    position = 0
    for start, end in spans:
        if start - MARGIN > position:
            pieces.append(text[position : _space_before(text, start - MARGIN, position)])
        position = max(position, _space_after(text, end + MARGIN))
    pieces.append(text[position:])
    kept = [piece.strip() for piece in pieces if len(piece.strip()) >= SHORTEST_PIECE]
    return kept if len(kept) <= MOST_PIECES else []


def _space_before(text: str, place: int, least: int) -> int:
    for at in range(place, max(place - _LOOK_FOR_SPACE, least), -1):
        if text[at].isspace():
            return at
    return place


def _space_after(text: str, place: int) -> int:
    for at in range(place, min(place + _LOOK_FOR_SPACE, len(text))):
        if text[at].isspace():
            return at
    return place
