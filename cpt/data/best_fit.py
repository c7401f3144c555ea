"""Best-fit packing of document pieces into rows: the rule alone, on arrays of lengths (arXiv 2404.10830).

A document longer than a row is cut into pieces of exactly ``seq_len`` tokens and a remainder. The pieces are taken by
length, longest first, and each goes into the fullest row in which it still fits; nothing is ever cut further. Example,
documents of 14 7 5 2 3 tokens in rows of 8: pieces 8 7 6 5 3 2, rows [8] [7] [6 2] [5 3].

The work is done per pair (length, room), not per piece, and is exactly the rule. A row with room r that takes a piece
of length l has room r - l; if l fits again, the row is fuller than before, so the next piece of length l goes there
too: it takes r // l of them in one move. Rows of equal room are equal to the rule, so all of them move together. Which
of them is taken first is all that is left open.

Refuses nothing: lengths between 1 and ``seq_len`` are the caller's promise.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Document pieces as token spans: ``whole`` starts those of exactly one row, the others have ``lengths`` below."""

    whole: IntArray
    starts: IntArray
    lengths: IntArray


@dataclass(frozen=True)
class Move:
    """``rows`` rows with ``room`` tokens left take ``each`` pieces of ``length``; room == seq_len means new rows."""

    length: int
    room: int
    rows: int
    each: int


def cut(starts: IntArray, lengths: IntArray, seq_len: int) -> Pieces:
    """Cut documents that do not fit a row; 14 tokens at 100 with rows of 8: whole [100], then 6 tokens at 108."""
    num_whole = lengths // seq_len
    before = np.cumsum(num_whole) - num_whole
    place = np.arange(int(num_whole.sum()), dtype=np.int64) - np.repeat(before, num_whole)
    rest = lengths - num_whole * seq_len
    kept = rest > 0
    return Pieces(
        whole=np.repeat(starts, num_whole) + place * seq_len,
        starts=(starts + num_whole * seq_len)[kept],
        lengths=rest[kept],
    )


def best_fit_moves(counts: NDArray[Any], seq_len: int) -> Iterator[Move]:
    """The rule's moves in order; ``counts[l]`` pieces of length l, index 0 to ``seq_len``."""
    rows_by_room = [0] * seq_len
    rooms = 0  # bit r is set where a row with room r exists
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            room = length + (fitting & -fitting).bit_length() - 1 if fitting else seq_len
            each = min(room // length, left)
            rows = left // each
            if fitting:
                rows = min(rows, rows_by_room[room])
                rows_by_room[room] -= rows
                rooms ^= (rows_by_room[room] == 0) << room
            rest = room - each * length
            if rest:
                rows_by_room[rest] += rows
                rooms |= 1 << rest
            left -= rows * each
            yield Move(length, room, rows, each)


def num_best_fit_rows(lengths: IntArray, seq_len: int) -> int:
    """Rows that pieces no longer than ``seq_len`` need."""
    counts = np.bincount(lengths, minlength=seq_len + 1)
    return sum(move.rows for move in best_fit_moves(counts, seq_len) if move.room == seq_len)


def best_fit(lengths: IntArray, seq_len: int) -> tuple[IntArray, IntArray]:
    """Pieces by row: (order, row_starts); row r holds pieces ``order[row_starts[r] : row_starts[r + 1]]``."""
    narrow = np.dtype(np.uint16 if seq_len < 1 << 16 else np.uint32)  # numpy sorts 16 bits by counting
    by_length = np.argsort((seq_len - lengths).astype(narrow), kind="stable")
    row = np.empty(len(lengths), np.int64)
    place = np.empty(len(lengths), np.int64)
    pieces_in = np.zeros(len(lengths), np.int64)
    rows_by_room: defaultdict[int, list[IntArray]] = defaultdict(list)
    done = num_rows = 0
    for move in best_fit_moves(np.bincount(lengths, minlength=seq_len + 1), seq_len):
        if move.room == seq_len:
            rows = np.arange(num_rows, num_rows + move.rows, dtype=np.int64)
            num_rows += move.rows
        else:
            rows = _take(rows_by_room[move.room], move.rows)
        placed = slice(done, done + move.rows * move.each)
        row[placed] = np.repeat(rows, move.each)
        place[placed] = (pieces_in[rows][:, None] + np.arange(move.each)).ravel()
        pieces_in[rows] += move.each
        rows_by_room[move.room - move.each * move.length].append(rows)
        done = placed.stop
    row_starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(pieces_in[:num_rows])])
    order = np.empty(len(lengths), np.int64)
    order[row_starts[row] + place] = by_length
    return order, row_starts


def _take(stack: list[IntArray], number: int) -> IntArray:
    """Remove ``number`` rows from a stack of arrays of rows."""
    taken = []
    while number:
        top = stack.pop()
        if len(top) > number:
            stack.append(top[number:])
            top = top[:number]
        taken.append(top)
        number -= len(top)
    return taken[0] if len(taken) == 1 else np.concatenate(taken)
