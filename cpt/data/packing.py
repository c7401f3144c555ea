"""From a source's stream of tokens to rows of fixed length with document boundaries.

Owns what a row carries and how it is made. ``concat`` cuts the stream every ``seq_len`` tokens; row r is pure
arithmetic, no index exists. A row reads one token more than it holds, because its last token predicts the next row's
first: over one epoch every token but a document's first is predicted exactly once. Only a tail of fewer than
``seq_len`` predictions at the end of a store is left over. ``best_fit`` makes a row of the pieces that an index names
(:mod:`cpt.data.pack_index`). Refuses: a store with too few tokens for one row, a read that comes back short, and pieces
that do not fit.

Worked example: seq_len 6, documents ``a b c #`` / ``d e #`` / ``f g h i j #`` (# is EOS), 13 tokens, two rows:

    row 0   input_ids  a b c # d e    labels  b c # . e #    positions  0 1 2 3 0 1    segments  0 0 0 0 1 1
    row 1   input_ids  # f g h i j    labels  . g h i j #    positions  0 0 1 2 3 4    segments  0 1 1 1 1 1

A dot is IGNORE_INDEX: the next token opens another document. Row 1 starts in the middle of the second document; that
piece is its segment 0 and its positions start at 0. Packed by best fit, the same documents in rows of 6 stay whole:

    row 0   input_ids  f g h i j #    labels  g h i j # .    positions  0 1 2 3 4 5    segments  0 0 0 0 0 0
    row 1   input_ids  a b c # # #    labels  b c # . . .    positions  0 1 2 3 0 1    segments  0 0 0 0 1 1
    row 2   input_ids  d e # # # #    labels  e # . . . .    positions  0 1 2 0 1 2    segments  0 0 0 1 1 1

What no piece fills is EOS without a label, in a segment of its own, so that nothing attends to it; in a store of more
than a few documents that is a thousandth of the tokens or less. A document longer than a row predicts across its cuts,
because a piece of a whole row reads one token more too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError

IGNORE_INDEX = -100
_CUT_SHORT = "the store is cut short, tokenize it again"


class TokenReader(Protocol):
    """What packing needs of a token store: the logical concatenation of one source's documents."""

    @property
    def num_tokens(self) -> int: ...

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Tokens ``[start, stop)``, any integer dtype."""
        ...

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Increasing positions p in ``[start, stop)`` at which a document starts."""
        ...


@dataclass(frozen=True)
class PackedRow:
    """One row of T = seq_len tokens; all arrays are int64 of shape (T,).

    ``labels[t]`` is the token after ``input_ids[t]``, or IGNORE_INDEX where that opens another document. ``positions``
    count from 0 in each document piece of the row; ``segments`` number the pieces from 0.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """A source as the loader sees it: ``num_rows`` rows of a store of ``num_tokens``, each made when asked for."""

    num_rows: int
    num_tokens: int
    row: Callable[[int], PackedRow]


def concat_num_rows(num_tokens: int, seq_len: int) -> int:
    """Whole rows of ``seq_len`` predictions: 13 tokens make 12 predictions, two rows of 6."""
    return max(0, (num_tokens - 1) // seq_len)


def concat_row(store: TokenReader, row: int, seq_len: int) -> PackedRow:
    """Row ``row`` of the stream cut every ``seq_len`` tokens.

    Raises:
        DataError: the store returned fewer tokens than the row needs.
    """
    assert 0 <= row < concat_num_rows(store.num_tokens, seq_len), f"row {row} is outside the store"
    start = row * seq_len
    window = _read_whole(store, start, start + seq_len + 1)
    boundaries = store.document_starts(start + 1, start + seq_len + 1) - start
    tokens = window.astype(np.int64)
    labels = tokens[1:].copy()
    labels[boundaries - 1] = IGNORE_INDEX
    inner = boundaries[boundaries < seq_len]
    segments = np.zeros(seq_len, dtype=np.int64)
    segments[inner] = 1
    np.cumsum(segments, out=segments)
    piece_starts = np.concatenate([np.zeros(1, dtype=np.int64), inner])
    positions = np.arange(seq_len, dtype=np.int64) - piece_starts[segments]
    return PackedRow(tokens[:-1], labels, positions, segments)


def concat_rows(store: TokenReader, seq_len: int) -> Rows:
    """All rows of a store under ``concat``."""
    num_rows = concat_num_rows(store.num_tokens, seq_len)
    return Rows(num_rows, store.num_tokens, lambda row: concat_row(store, row, seq_len))


def pieces_row(store: TokenReader, pieces: NDArray[np.int64], seq_len: int, *, pad_id: int) -> PackedRow:
    """One row of document pieces, ``(token start, tokens)`` each; what they leave is ``pad_id`` and predicts nothing.

    Raises:
        DataError: the pieces do not fit a row, or the store returned fewer tokens than they need.
    """
    starts, lengths = pieces.T
    inside = (lengths > 0) & (lengths <= seq_len) & (starts >= 0) & (starts <= store.num_tokens - lengths)
    if not (inside.all() and 0 < lengths.sum() <= seq_len):
        raise DataError(
            f"pieces of {lengths.tolist()!r:.80} tokens at {starts.tolist()!r:.80} make no row of {seq_len}; "
            "the index is damaged: run `cpt data pack` on the store again"
        )
    input_ids = np.full(seq_len, pad_id, dtype=np.int64)
    labels = np.full(seq_len, IGNORE_INDEX, dtype=np.int64)
    ends = np.cumsum(lengths)
    for start, length, end in zip(starts.tolist(), lengths.tolist(), ends.tolist(), strict=True):
        tokens = _read_whole(store, start, start + length)
        input_ids[end - length : end] = tokens
        labels[end - length : end - 1] = tokens[1:]
    if lengths[0] == seq_len:
        labels[-1] = _next_in_document(store, int(starts[0]) + seq_len)
    borders = ends[ends < seq_len]
    segments = np.zeros(seq_len, dtype=np.int64)
    segments[borders] = 1
    np.cumsum(segments, out=segments)
    positions = np.arange(seq_len, dtype=np.int64) - np.concatenate([np.zeros(1, np.int64), borders])[segments]
    return PackedRow(input_ids, labels, positions, segments)


def _read_whole(store: TokenReader, start: int, stop: int) -> NDArray[Any]:
    tokens = store.read(start, stop)
    if len(tokens) != stop - start:
        raise DataError(f"tokens {start} to {stop} were asked for, {len(tokens)} came back; {_CUT_SHORT}")
    return tokens


def _next_in_document(store: TokenReader, position: int) -> int:
    """The token at ``position`` where it goes on with the document before it: only a cut piece fills a whole row."""
    if position >= store.num_tokens or len(store.document_starts(position, position + 1)):
        return IGNORE_INDEX
    return int(_read_whole(store, position, position + 1)[0])
