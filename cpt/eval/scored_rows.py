"""Packed rows that ask a model about continuations: several questions in one row, each a document of its own. No torch.

Owns which tokens lie where. A question is what lm_eval asks of a language model: given some tokens, how likely are the
next ones? Questions that read the same tokens share a document, so four answers of one letter to one prompt cost one
prompt. Documents are packed by best fit; what is left of a row is token 0 in a segment of its own, and nothing is
asked about it. Refuses nothing: a question that does not fit a row is our bug.

Worked example, prompt ``a b`` with the answers ``c d`` and ``e``, prompt ``f`` with the answer ``g``; rows of 6:

    questions   read a b c, wanted c d      read a b, wanted e      read f, wanted g
    row 0       a b c a b f                 segments 0 0 0 1 1 2    positions 0 1 2 0 1 0
    asked       after place 1: c (wanted token 0), after 2: d (1), after 4: e (2), after 5: g (3)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cpt.data.best_fit import best_fit
from cpt.data.packing import IGNORE_INDEX, PackedRow

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Question:
    """``read``: tokens that the model reads; the predictions after the last ones of them are compared with ``wanted``,
    one token each.
    """

    read: tuple[int, ...]
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class AskingRow:
    """One row, and what is asked about it: after ``places``, how likely are ``tokens``. ``numbers`` counts them among
    the wanted tokens of all questions in order. All three (Q,), int64.
    """

    row: PackedRow
    places: IntArray
    tokens: IntArray
    numbers: IntArray


def question(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Question:
    """Of a context and a continuation, cut from the left to what the model can read, as lm_eval does.

    The continuation's last token is predicted and never read, so ``max_length + 1`` tokens fit.
    """
    whole = (*context, *continuation)[-(max_length + 1) :]
    return Question(whole[:-1], tuple(continuation))


def row_length(questions: Sequence[Question], seq_len: int, *, shared_by: int = 1) -> int:
    """Tokens of a row: ``seq_len``, or more where a question reads more; ranks that share rows divide it."""
    longest = max((len(each.read) for each in questions), default=0)
    return max(seq_len, -(-longest // shared_by) * shared_by)


def asking_rows(questions: Sequence[Question], seq_len: int) -> list[Callable[[], AskingRow]]:
    """What makes the rows of ``seq_len`` tokens that ask every question once, the longest ones first; the same for the
    same list. A rank makes its own rows, one pass at a time: all of them would be gigabytes for 10^5 items.
    """
    asked_by: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}  # number of the first wanted token
    number = 0
    for each in questions:
        assert 0 < len(each.wanted) <= len(each.read) <= seq_len, f"{each!r:.200} does not fit a row of {seq_len}"
        asked_by.setdefault(each.read, []).append((number, each.wanted))
        number += len(each.wanted)
    documents = list(asked_by)
    if not documents:
        return []
    order, row_starts = best_fit(np.array([len(document) for document in documents], dtype=np.int64), seq_len)
    rows: list[Callable[[], AskingRow]] = []
    for first, last in zip(row_starts[:-1].tolist(), row_starts[1:].tolist(), strict=True):
        chosen = [documents[index] for index in order[first:last].tolist()]
        rows.append(partial(_row, chosen, [asked_by[document] for document in chosen], seq_len))
    return rows


def blank_row(seq_len: int) -> AskingRow:
    """A row that asks nothing: ranks with no row left take it, so that all make the same number of passes."""
    return _row([], [], seq_len)


def _row(
    documents: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, tuple[int, ...]]]], seq_len: int
) -> AskingRow:
    lengths = [len(document) for document in documents]
    lengths.append(seq_len - sum(lengths))  # what is left, in a segment of its own
    segments = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)
    input_ids = np.zeros(seq_len, dtype=np.int64)
    input_ids[: seq_len - lengths[-1]] = [token for document in documents for token in document]
    row = PackedRow(
        input_ids=input_ids,
        labels=np.full(seq_len, IGNORE_INDEX, dtype=np.int64),
        positions=np.arange(seq_len, dtype=np.int64) - starts[segments],
        segments=segments,
    )
    ends = (int(start) + length for start, length in zip(starts, lengths, strict=True))
    triples = [triple for end, those in zip(ends, asked, strict=False) for triple in _triples(end, those)]
    places, tokens, numbers = np.array(triples, dtype=np.int64).reshape(-1, 3).T
    return AskingRow(row, places, tokens, numbers)


def _triples(end: int, asked: Sequence[tuple[int, tuple[int, ...]]]) -> Iterator[tuple[int, int, int]]:
    """(place, token, its number) of a document that ends before ``end``."""
    for first, wanted in asked:
        for index, token in enumerate(wanted):
            yield end - len(wanted) + index, token, first + index
