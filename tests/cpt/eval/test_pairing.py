"""Which rows of two tables are the same item or document."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.eval.pairing import pair_documents, pair_items
from cpt.eval.results import ITEMS, PIECES


def items(*rows: tuple[str, int, float], **flags: Any) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"task": task, "item": item, "score": score, "weight": 1.0, "margin": None, "chosen": None}
            | ({"truncated": False, "overlap": False} | flags)
            for task, item, score in rows
        ],
        schema=ITEMS,
    )


def pieces(*rows: tuple[str, int, int, float]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(PIECES.names, row, strict=True)) for row in rows], schema=PIECES)


def test_items_are_paired_by_task_and_number_in_any_order() -> None:
    before = items(("piqa", 0, 1.0), ("arc", 1, 0.0), ("arc", 0, 1.0))
    paired = pair_items(before, items(("arc", 0, 0.0), ("arc", 1, 1.0), ("piqa", 0, 1.0)))
    assert list(paired) == ["arc", "piqa"]
    assert (paired["arc"].before.tolist(), paired["arc"].after.tolist()) == ([1.0, 0.0], [0.0, 1.0])
    assert paired["arc"].unshared == 0


def test_what_only_one_side_has_is_left_out_and_counted() -> None:
    paired = pair_items(
        items(("arc", 0, 1.0), ("arc", 1, 1.0)), items(("arc", 1, 0.0), ("arc", 2, 0.0), ("new", 0, 1.0))
    )
    assert (paired["arc"].numbers.tolist(), paired["arc"].unshared) == ([1], 2)
    assert (len(paired["new"].before), paired["new"].unshared) == (0, 1)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (False, False)])
def test_an_item_is_truncated_or_overlapping_if_it_is_on_either_side(sides: tuple[bool, bool]) -> None:
    tables = [items(("arc", 0, 1.0), truncated=flag, overlap=flag) for flag in sides]
    (paired,) = pair_items(*tables).values()
    assert paired.truncated.tolist() == paired.overlap.tolist() == [any(sides)]


def test_a_nan_score_is_passed_on() -> None:
    (paired,) = pair_items(items(("arc", 0, math.nan)), items(("arc", 0, 1.0))).values()
    assert math.isnan(paired.before[0])


def test_empty_tables_have_nothing_in_common() -> None:
    assert pair_items(items(), items()) == {}
    assert pair_documents(pieces(), pieces()) == {}


tables = st.dictionaries(st.tuples(st.sampled_from(["a", "b", "c"]), st.integers(0, 6)), st.integers(0, 1), max_size=20)


@settings(max_examples=30)
@given(tables, tables)
def test_pairing_equals_a_look_up_by_key(before: dict[tuple[str, int], int], after: dict[tuple[str, int], int]) -> None:
    paired = pair_items(*(items(*((task, item, score) for (task, item), score in t.items())) for t in (before, after)))
    found = {
        (task, int(number)): (old, new)
        for task, pair in paired.items()
        for number, old, new in zip(pair.numbers, pair.before, pair.after, strict=True)
    }
    assert found == {key: (before[key], after[key]) for key in before.keys() & after.keys()}
    assert sum(pair.unshared for pair in paired.values()) == len(before.keys() ^ after.keys())


def test_pieces_of_a_document_are_added_up() -> None:
    old = pieces(("web", 3, 5, 10.0), ("law", 0, 4, 8.0), ("web", 3, 6, 2.0), ("web", 9, 1, 1.0))
    new = pieces(("web", 9, 1, 2.0), ("web", 3, 11, 6.0), ("law", 0, 4, 4.0))
    paired = pair_documents(old, new)
    assert paired["web"].before.tolist() == [12.0, 1.0]
    assert paired["web"].after.tolist() == [6.0, 2.0]
    assert paired["web"].tokens.tolist() == [11.0, 1.0]
    assert paired["law"].unshared == 0


def test_a_document_with_other_tokens_is_not_the_same_text() -> None:
    paired = pair_documents(
        pieces(("web", 0, 5, 1.0), ("web", 1, 5, 1.0)), pieces(("web", 0, 7, 1.0), ("web", 1, 5, 1.0))
    )
    assert (paired["web"].tokens.tolist(), paired["web"].unshared) == ([5.0], 2)


def test_a_source_of_one_side_has_no_documents() -> None:
    paired = pair_documents(pieces(("web", 0, 5, 1.0), ("web", 0, 5, 1.0)), pieces())
    assert (len(paired["web"].tokens), paired["web"].unshared) == (0, 1)


@pytest.mark.parametrize("chunks", [1, 3])
def test_tables_of_several_parts_with_dictionaries_of_their_own_are_one_table(chunks: int) -> None:
    parts = [items((f"task {number}", number, 1.0)) for number in range(chunks)]
    paired = pair_items(pa.concat_tables(parts), pa.concat_tables(parts[::-1]))
    assert [pair.numbers.tolist() for pair in paired.values()] == [[number] for number in range(chunks)]
    assert all(np.array_equal(pair.before, pair.after) for pair in paired.values())
