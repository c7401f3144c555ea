"""What exactly was forgotten: items right before and wrong now, and back, by task and subset, with examples.

Reads two tables of items and the texts they share; no torch. Says nothing about how sure a change is: that is for
``cpt.eval.comparing``. Refuses tasks without right and wrong answers, such as perplexity: it leaves them out.
Texts are as the files have them: whoever shows them in HTML escapes them.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cpt.eval.pairing import BoolArray, FloatArray, IntArray, Matched, keys_of, match_rows
from cpt.eval.results import SuiteResults, is_accuracy, items_file, read_items, read_texts, texts_file

EXAMPLES = 5
RIGHT = 0.5  # a score from here on is a right answer


@dataclass(frozen=True)
class Example:
    """One item that changed; margins in nats, None where the task has none. Without texts, the three are empty."""

    item: int
    prompt: str
    gold: str
    choices: tuple[str, ...]
    chosen_before: str
    chosen_after: str
    margin_before: float | None
    margin_after: float | None
    overlap: bool


@dataclass(frozen=True)
class SubsetDiff:
    """One subset of a task ("" where it has none). ``lost``: right before, wrong after; ``gained``: the other way.

    Examples are those whose margin changed most, items without margins in their order.
    """

    task: str
    subset: str
    items: int
    right_before: int
    right_after: int
    lost: int
    gained: int
    lost_examples: tuple[Example, ...]
    gained_examples: tuple[Example, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Sides:
    """Both tables, row by row the same items; for each the row of its text, -1 where there is none, and by how much
    its margin moved, 0 where it has none.
    """

    before: pa.Table
    after: pa.Table
    moved: FloatArray
    texts: pa.Table | None
    text_rows: IntArray


def diff_suites(before: SuiteResults, after: SuiteResults, *, examples: int = EXAMPLES) -> tuple[SubsetDiff, ...]:
    """Of the tasks with an accuracy that are defined alike in both; most net losses first.

    Raises:
        DataError: a table is missing or damaged. Texts may be missing.
    """
    old, new = before.record.tasks, after.record.tasks
    tasks = [
        name
        for name, task in new.items()
        if name in old
        and is_accuracy(task.metric)
        and (old[name].metric, old[name].task_hash) == (task.metric, task.task_hash)
    ]
    tables = [read_items(items_file(side.folder, side.record.step)) for side in (before, after)]
    path = texts_file(after.folder)
    texts = read_texts(path) if path.is_file() else None
    return diff_items(tables[0], tables[1], texts, tasks=tasks, examples=examples)


def diff_items(
    before: pa.Table, after: pa.Table, texts: pa.Table | None, *, tasks: Collection[str], examples: int = EXAMPLES
) -> tuple[SubsetDiff, ...]:
    """Tables of ITEMS and TEXTS; items that both scored, of ``tasks`` only. Most net losses first."""
    matched = match_rows(before, after)
    rows = before.take(matched.before), after.take(matched.after)
    scores = [_numbers(table, "score") for table in rows]
    moved = np.nan_to_num(np.abs(_numbers(rows[1], "margin") - _numbers(rows[0], "margin")))
    sides = _Sides(*rows, moved, texts, _text_rows(texts, matched))
    owners = np.repeat(np.arange(len(matched.tasks)), np.diff(matched.bounds))
    subsets, names = _subsets(sides)
    wanted = np.array([task in tasks for task in matched.tasks], dtype=np.bool_)
    counted = np.isfinite(scores[0]) & np.isfinite(scores[1]) & (wanted[owners] if len(owners) else True)
    found = []
    for owner, subset in np.unique(np.stack([owners[counted], subsets[counted]]), axis=1).T.tolist():
        own = np.flatnonzero(counted & (owners == owner) & (subsets == subset))
        right = scores[0][own] >= RIGHT, scores[1][own] >= RIGHT
        found.append(_subset_diff((matched.tasks[owner], names[subset]), own, right, sides, examples))
    return tuple(sorted(found, key=lambda diff: (diff.gained - diff.lost, diff.task, diff.subset)))


def _text_rows(texts: pa.Table | None, matched: Matched) -> IntArray:
    """Row of each matched item's text, -1 where there is none."""
    if texts is None or not len(texts):
        return np.full(len(matched.numbers), -1, dtype=np.int64)
    keys = keys_of(texts, matched.tasks)
    order = np.argsort(keys, kind="stable")
    place = np.searchsorted(keys[order], matched.keys)
    row = order[np.minimum(place, len(order) - 1)]
    return np.where(keys[row] == matched.keys, row, -1)


def _subsets(sides: _Sides) -> tuple[IntArray, list[str]]:
    """Number of each item's subset, and the subsets' names."""
    if sides.texts is None:
        return np.zeros(len(sides.text_rows), dtype=np.int64), [""]
    words = [name or "" for name in sides.texts.column("subset").to_pylist()]
    names = sorted({*words, ""})
    place = {name: number for number, name in enumerate(names)}
    numbers = np.array([place[word] for word in words] + [place[""]], dtype=np.int64)  # row -1 is the last one
    return numbers[sides.text_rows], names


def _subset_diff(
    name: tuple[str, str], rows: IntArray, right: tuple[BoolArray, BoolArray], sides: _Sides, examples: int
) -> SubsetDiff:
    lost, gained = rows[right[0] & ~right[1]], rows[right[1] & ~right[0]]
    return SubsetDiff(
        *name,
        items=len(rows),
        right_before=int(right[0].sum()),
        right_after=int(right[1].sum()),
        lost=len(lost),
        gained=len(gained),
        lost_examples=_examples(lost, sides, examples),
        gained_examples=_examples(gained, sides, examples),
    )


def _examples(rows: IntArray, sides: _Sides, number: int) -> tuple[Example, ...]:
    """Of the items in ``rows`` those whose margin changed most."""
    order = np.argsort(-sides.moved[rows], kind="stable")[:number]
    return tuple(_example(int(row), sides) for row in rows[order])


def _numbers(table: pa.Table, column: str) -> FloatArray:
    found: FloatArray = table.column(column).to_numpy().astype(np.float64)
    return found


def _example(row: int, sides: _Sides) -> Example:
    text: dict[str, Any] = {}
    if sides.texts is not None and sides.text_rows[row] >= 0:
        text = sides.texts.slice(int(sides.text_rows[row]), 1).to_pylist()[0]
    old, new = (table.slice(row, 1).to_pylist()[0] for table in (sides.before, sides.after))
    return Example(
        item=old["item"],
        prompt=text.get("prompt") or "",
        gold=text.get("gold") or "",
        choices=tuple(text.get("choices") or ()),
        chosen_before=old["chosen"] or "",
        chosen_after=new["chosen"] or "",
        margin_before=_known(old["margin"]),
        margin_after=_known(new["margin"]),
        overlap=bool(old["overlap"] or new["overlap"]),
    )


def _known(margin: float | None) -> float | None:
    return margin if margin is not None and math.isfinite(margin) else None
