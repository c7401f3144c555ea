"""From a source's stream of tokens to rows of fixed length with document boundaries.

Owns the packing rules and what a row carries. ``concat`` cuts the stream every ``seq_len`` tokens; row r is pure
arithmetic, no index exists. A row reads one token more than it holds, because its last token predicts the next row's
first: over one epoch every token but a document's first is predicted exactly once. Only a tail of fewer than
``seq_len`` predictions at the end of a store is left over. Refuses: a store with too few tokens for one row, and a
read that comes back short.

Worked example: seq_len 6, documents ``a b c #`` / ``d e #`` / ``f g h i j #`` (# is EOS), 13 tokens, two rows:

    row 0   input_ids  a b c # d e    labels  b c # . e #    positions  0 1 2 3 0 1    segments  0 0 0 0 1 1
    row 1   input_ids  # f g h i j    labels  . g h i j #    positions  0 0 1 2 3 4    segments  0 1 1 1 1 1

A dot is IGNORE_INDEX: the next token opens another document. Row 1 starts in the middle of the second document; that
piece is its segment 0 and its positions start at 0.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError

IGNORE_INDEX = -100


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
class Packing:
    """A packing rule: ``num_rows(num_tokens, seq_len)`` and ``row(store, row, seq_len)``."""

    num_rows: Callable[[int, int], int]
    row: Callable[[TokenReader, int, int], PackedRow]


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
    window = store.read(start, start + seq_len + 1)
    if len(window) != seq_len + 1:
        raise DataError(
            f"tokens {start} to {start + seq_len + 1} were asked for, {len(window)} came back; "
            "the store is cut short, tokenize it again"
        )
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


PACKINGS: Mapping[str, Packing] = {"concat": Packing(concat_num_rows, concat_row)}


def packing_named(name: str) -> Packing:
    """Raises DataError for a name outside the table."""
    if name not in PACKINGS:
        raise DataError(f"packing is {name!r}; it must be one of {', '.join(PACKINGS)}")
    return PACKINGS[name]
