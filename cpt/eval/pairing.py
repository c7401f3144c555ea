"""Which rows of two tables are the same item, or the same document, and what they scored. No torch.

Items are known by task and number, documents by source and number. What only one table has is left out and counted; so
are documents whose token counts differ, for then the text was tokenised in another way. Refuses nothing: NaN scores are
passed on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpt.eval.document_pieces import Pieces, by_document, by_source

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_SHIFT = 40  # key = the task's place << 40 | the item's number in it


@dataclass(frozen=True)
class Matched:
    """Rows of two tables that belong together, sorted by task and item.

    ``tasks`` are those of either table; rows ``bounds[i]`` to ``bounds[i + 1]`` of the other columns belong to task i.
    """

    tasks: tuple[str, ...]
    bounds: IntArray
    before: IntArray  # row numbers in the first table
    after: IntArray  # row numbers in the second table
    keys: IntArray  # as ``keys_of`` gives them

    @property
    def numbers(self) -> IntArray:
        """Of the items in their tasks."""
        return self.keys & ((1 << _SHIFT) - 1)


@dataclass(frozen=True)
class PairedItems:
    """One task's shared items; ``unshared`` stand in one table only, ``truncated`` and ``overlap`` in either."""

    numbers: IntArray
    before: FloatArray
    after: FloatArray
    weight: FloatArray
    truncated: BoolArray
    overlap: BoolArray
    unshared: int

    def only(self, kept: BoolArray | slice) -> "PairedItems":
        return PairedItems(
            numbers=self.numbers[kept],
            before=self.before[kept],
            after=self.after[kept],
            weight=self.weight[kept],
            truncated=self.truncated[kept],
            overlap=self.overlap[kept],
            unshared=self.unshared,
        )


@dataclass(frozen=True)
class PairedDocuments:
    """One source's shared documents: summed loss (nats) before and after, and counted tokens; ``unshared`` as above."""

    before: FloatArray
    after: FloatArray
    tokens: FloatArray
    unshared: int


def tasks_of(table: pa.Table) -> list[str]:
    """The different tasks in a table of ITEMS or TEXTS, sorted."""
    return sorted(table.column("task").unique().to_pylist())


def keys_of(table: pa.Table, tasks: Sequence[str]) -> IntArray:
    """One integer per row of ITEMS or TEXTS that says which item of which of ``tasks`` it is, -1 for any other task."""
    words = table.column("task").unify_dictionaries().combine_chunks()
    place = {word: index for index, word in enumerate(tasks)}
    codes = np.array([place.get(word, -1) for word in words.dictionary.to_pylist()], dtype=np.int64)
    owner = codes[words.indices.to_numpy(zero_copy_only=False)] if len(codes) else np.zeros(0, np.int64)
    keys = owner << _SHIFT | table.column("item").to_numpy().astype(np.int64)
    return np.where(owner < 0, -1, keys)


def match_rows(before: pa.Table, after: pa.Table) -> Matched:
    """Rows of two tables of ITEMS with the same task and number; of an item that stands twice, the first."""
    tasks = sorted({*tasks_of(before), *tasks_of(after)})
    shared, old, new = np.intersect1d(keys_of(before, tasks), keys_of(after, tasks), return_indices=True)
    bounds = np.searchsorted(shared, np.arange(len(tasks) + 1, dtype=np.int64) << _SHIFT)
    return Matched(tuple(tasks), bounds, old, new, shared)


def pair_items(before: pa.Table, after: pa.Table) -> dict[str, PairedItems]:
    """Tables of ITEMS -> task -> its shared items; tasks without one are there, too, with no items."""
    matched = match_rows(before, after)
    old, new = matched.before, matched.after
    sizes = [_sizes(table, matched.tasks) for table in (before, after)]
    every = PairedItems(
        numbers=matched.numbers,
        before=_numbers(before, "score")[old],
        after=_numbers(after, "score")[new],
        weight=_numbers(after, "weight")[new],
        truncated=_flags(before, "truncated")[old] | _flags(after, "truncated")[new],
        overlap=_flags(before, "overlap")[old] | _flags(after, "overlap")[new],
        unshared=0,
    )
    paired = {}
    for index, task in enumerate(matched.tasks):
        own = slice(*matched.bounds[index : index + 2].tolist())
        unshared = sizes[0][index] + sizes[1][index] - 2 * (own.stop - own.start)
        paired[task] = replace(every.only(own), unshared=unshared)
    return paired


def pair_documents(before: pa.Table, after: pa.Table) -> dict[str, PairedDocuments]:
    """Tables of PIECES -> source -> its shared documents; pieces of one document are added up first."""
    old, new = by_source(before), by_source(after)
    return {source: _shared_documents(old.get(source), new.get(source)) for source in sorted(old.keys() | new.keys())}


def _shared_documents(before: Pieces | None, after: Pieces | None) -> PairedDocuments:
    if before is None or after is None:
        none, pieces = np.zeros(0), before or after
        return PairedDocuments(none, none, none, len(np.unique(pieces.document)) if pieces else 0)
    old, new = by_document(before), by_document(after)
    _, place, counterpart = np.intersect1d(old.number, new.number, assume_unique=True, return_indices=True)
    same = old.tokens[place] == new.tokens[counterpart]
    place, counterpart = place[same], counterpart[same]
    unshared = len(old.number) + len(new.number) - 2 * len(place)
    return PairedDocuments(old.nats[place], new.nats[counterpart], old.tokens[place].astype(np.float64), unshared)


def _numbers(table: pa.Table, column: str) -> FloatArray:
    return np.asarray(table.column(column).to_numpy(), dtype=np.float64)


def _flags(table: pa.Table, column: str) -> BoolArray:
    return np.asarray(table.column(column).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _sizes(table: pa.Table, tasks: Sequence[str]) -> list[int]:
    counted = {entry["values"]: entry["counts"] for entry in table.column("task").value_counts().to_pylist()}
    return [counted.get(task, 0) for task in tasks]
