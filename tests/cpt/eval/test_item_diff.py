"""What was lost and what was gained, counted and shown, from small tables."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.eval.item_diff import diff_items, diff_suites
from cpt.eval.results import (
    ITEMS,
    TEXTS,
    Measured,
    SuiteRecord,
    SuiteResults,
    TaskResult,
    items_file,
    texts_file,
    write_items,
    write_texts,
)


def items(scores: dict[tuple[str, int], float], margins: dict[tuple[str, int], float] | None = None) -> pa.Table:
    margins = margins or {}
    rows = [
        {"task": task, "item": item, "score": score, "weight": 1.0, "margin": margins.get((task, item), math.nan)}
        | {"chosen": f"answer {score}", "truncated": False, "overlap": item == 7}
        for (task, item), score in scores.items()
    ]
    return pa.Table.from_pylist(rows, schema=ITEMS)


def texts(*rows: tuple[str, int, str | None]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"task": task, "item": item, "subset": subset, "prompt": f"{task} {item}?", "gold": "yes"}
            | {"choices": ["yes", "no"]}
            for task, item, subset in rows
        ],
        schema=TEXTS,
    )


def test_what_was_lost_and_gained_is_counted_by_task_and_subset() -> None:
    before = items({("arc", 0): 1, ("arc", 1): 1, ("arc", 2): 0, ("piqa", 0): 1})
    after = items({("piqa", 0): 1, ("arc", 2): 1, ("arc", 1): 0, ("arc", 0): 0})
    found = diff_items(
        before, after, texts(("arc", 0, "easy"), ("arc", 1, "hard"), ("arc", 2, "hard")), tasks=["arc", "piqa"]
    )
    counts = [(d.task, d.subset, d.items, d.right_before, d.right_after, d.lost, d.gained) for d in found]
    assert counts == [
        ("arc", "easy", 1, 1, 0, 1, 0),  # most net losses first
        ("arc", "hard", 2, 1, 1, 1, 1),
        ("piqa", "", 1, 1, 1, 0, 0),
    ]


def test_an_example_shows_the_item_and_both_answers() -> None:
    before, after = items({("arc", 7): 1}, {("arc", 7): 2.5}), items({("arc", 7): 0}, {("arc", 7): -0.5})
    (subset,) = diff_items(before, after, texts(("arc", 6, None), ("arc", 7, None)), tasks=["arc"])
    (example,) = subset.lost_examples
    assert (example.item, example.prompt, example.gold, example.choices) == (7, "arc 7?", "yes", ("yes", "no"))
    assert (example.chosen_before, example.chosen_after) == ("answer 1", "answer 0")
    assert (example.margin_before, example.margin_after, example.overlap) == (2.5, -0.5, True)
    assert subset.gained_examples == ()
    assert subset.to_dict()["lost_examples"][0]["item"] == 7


def test_examples_are_those_whose_margin_changed_most() -> None:
    keys = [("arc", item) for item in range(6)]
    before = items(dict.fromkeys(keys, 1.0), dict(zip(keys, [1.0, 9.0, 2.0, math.nan, 5.0, 1.0], strict=True)))
    after = items(dict.fromkeys(keys, 0.0), dict.fromkeys(keys, -1.0))
    (subset,) = diff_items(before, after, None, tasks=["arc"], examples=3)
    assert [example.item for example in subset.lost_examples] == [1, 4, 2]
    assert subset.lost == 6
    (every,) = diff_items(before, after, None, tasks=["arc"], examples=9)
    assert every.lost_examples[-1].margin_before is None  # items without a margin come last


def test_items_of_one_side_unscored_items_and_other_tasks_are_left_out() -> None:
    before = items({("arc", 0): 1, ("arc", 1): 1, ("arc", 2): math.nan, ("wiki", 0): 1})
    after = items({("arc", 0): 1, ("arc", 2): 1, ("arc", 3): 1, ("wiki", 0): 0})
    (subset,) = diff_items(before, after, None, tasks=["arc"])
    assert (subset.task, subset.items, subset.lost, subset.gained) == ("arc", 1, 0, 0)


def test_nothing_in_common_is_no_difference() -> None:
    assert diff_items(items({}), items({("arc", 0): 1}), None, tasks=["arc"]) == ()
    assert diff_items(items({("arc", 0): 1}), items({("arc", 1): 1}), texts(), tasks=["arc"]) == ()


answers = st.dictionaries(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 8)), st.sampled_from([0.0, 1.0, math.nan]), max_size=18
)


@settings(max_examples=30)
@given(answers, answers)
def test_what_is_lost_and_gained_explains_the_change(before: dict[Any, float], after: dict[Any, float]) -> None:
    there, back = (
        diff_items(items(x), items(y), None, tasks=["a", "b"]) for x, y in ((before, after), (after, before))
    )
    for diff in there:
        assert diff.right_after - diff.right_before == diff.gained - diff.lost
        assert len(diff.lost_examples) == min(diff.lost, 5)
    swapped = {(diff.task, diff.gained, diff.lost) for diff in back}
    assert {(diff.task, diff.lost, diff.gained) for diff in there} == swapped
    shared = [key for key in before.keys() & after.keys() if math.isfinite(before[key]) and math.isfinite(after[key])]
    assert sum(diff.items for diff in there) == len(shared)


def results(folder: Path, step: int, scores: dict[tuple[str, int], float], **hashes: str) -> SuiteResults:
    write_items(items_file(folder, step), items(scores))
    tasks = {
        name: TaskResult(
            **{"group": "general", "kind": "cloze", "metric": "bits_per_byte" if name == "wiki" else "acc"},
            **{"higher_is_better": True, "value": 0.5, "stderr": 0.1, "metrics": {"acc": Measured(0.5, 0.1)}},
            **{"items": 2, "truncated": 0, "overlapping": 0, "value_without_overlap": None},
            **{"stderr_without_overlap": None, "few_shot": 0, "task_hash": hashes.get(name, "1"), "seconds": 1.0},
        )
        for name in sorted({task for task, _ in scores})
    }
    return SuiteResults(SuiteRecord("s", "0", step, step, None, "t", "fp32", "lm_eval", tasks, {}), folder)


def test_checkpoints_are_compared_on_tasks_with_answers_that_are_defined_alike(tmp_path: Path) -> None:
    scores = {("arc", 0): 1.0, ("wiki", 0): 1.0, ("changed", 0): 1.0}
    before = results(tmp_path, 0, scores)
    after = results(tmp_path, 500, {**dict.fromkeys(scores, 0.0), ("new", 0): 1.0}, changed="2")
    assert [(diff.task, diff.lost) for diff in diff_suites(before, after)] == [("arc", 1)]
    assert diff_suites(before, after)[0].lost_examples[0].prompt == ""  # no texts were kept
    write_texts(texts_file(tmp_path), texts(("arc", 0, "easy")))
    assert diff_suites(before, after)[0].lost_examples[0].prompt == "arc 0?"


def test_a_missing_table_of_items_is_told(tmp_path: Path) -> None:
    before, after = (results(tmp_path, step, {("arc", 0): 1.0}) for step in (0, 500))
    items_file(tmp_path, 0).unlink()
    with pytest.raises(ValueError, match=r"step_00000000\.items\.parquet"):
        diff_suites(before, after)
