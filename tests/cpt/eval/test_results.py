"""A suite's files: what is written is read back, and what is damaged, older or of another shape is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.eval import results
from cpt.eval.results import (
    CopyingProbe,
    GroupScore,
    Measured,
    SuiteRecord,
    TaskResult,
    group_scores,
    is_accuracy,
    read_items,
    read_pieces,
    read_suite_record,
    read_suite_results,
    read_texts,
    record_file,
    write_items,
    write_pieces,
    write_suite_record,
    write_texts,
)
from cpt.rundir import DataError


def task(value: Any = 0.5, stderr: Any = 0.05, **changes: Any) -> TaskResult:
    fields: dict[str, Any] = {
        **{"group": "general", "kind": "multiple_choice", "metric": "acc", "higher_is_better": True},
        **{"metrics": {"acc": Measured(value, stderr)}, "items": 100, "truncated": 2, "overlapping": 1},
        **{"value_without_overlap": 0.49, "stderr_without_overlap": None, "few_shot": 5},
        **{"task_hash": "abc", "seconds": 1.5},
    }
    return TaskResult(value=value, stderr=stderr, **(fields | changes))


def record(step: int = 500, **tasks: TaskResult) -> SuiteRecord:
    return SuiteRecord(
        suite="general_vs_law",
        suite_hash="0123",
        step=step,
        tokens_seen=step * 1000,
        weights_hash="4567",
        tokenizer="89ab",
        dtype="fp32",
        harness="lm_eval 0.4.9",
        tasks=tasks,
        groups=group_scores(tasks),
        copying=CopyingProbe(0.5, 0.1, 0.9, 0.02, 64, 32),
        errors=("task x: no items",),
    )


def items(number: int = 3, **changes: Any) -> pa.Table:
    columns = {
        **{"task": ["arc"] * number, "item": list(range(number)), "score": [1.0] * number, "weight": [1.0] * number},
        **{"margin": [math.nan] * number, "chosen": ["a"] * number},
        **{"truncated": [False] * number, "overlap": [True] * number},
    }
    return pa.table(columns | changes)


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record(arc=task(), wiki=task(value=3.5, stderr=None, group="domain", metric="bits_per_byte"))
    write_suite_record(record_file(tmp_path, 500), written)
    assert read_suite_record(record_file(tmp_path, 500)) == written


numbers = st.one_of(st.none(), st.floats(), st.integers(-5, 5))


@given(value=numbers, stderr=numbers, number=st.integers(0, 10**9))
def test_any_number_survives_and_what_is_not_finite_is_null(
    tmp_path_factory: pytest.TempPathFactory, value: Any, stderr: Any, number: int
) -> None:
    path = record_file(tmp_path_factory.getbasetemp() / "survives", 500)
    written = record(arc=task(value=value, stderr=stderr, items=number))
    write_suite_record(path, written)
    raw = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read_suite_record(path) == written
    finite = value is not None and math.isfinite(value)
    assert raw["tasks"]["arc"]["value"] == (value if finite else None)


def test_numbers_of_numpy_are_taken_as_numbers() -> None:
    assert task(value=np.float32(0.5)).value == 0.5
    assert task(value=np.float64("nan")).value is None


def test_a_text_is_no_number() -> None:
    with pytest.raises(ValueError, match="value"):
        task(value="N/A")


def damaged(tmp_path: Path, change: Any) -> Path:
    path = record_file(tmp_path, 500)
    write_suite_record(path, record(arc=task()))
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return path


def of_an_older_version(raw: dict[str, Any]) -> None:
    raw["format_version"] = 0
    raw["old_field"] = raw.pop("tokenizer")  # what else differs is not what the user needs to hear


def test_results_of_another_version_say_so(tmp_path: Path) -> None:
    path = damaged(tmp_path, of_an_older_version)
    with pytest.raises(DataError, match=r"step_00000500.json: results of format version 0, .* reads version 1; delete"):
        read_suite_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw.pop("suite"), "suite: Field required"),
        (lambda raw: raw["tasks"]["arc"].pop("items"), "tasks.arc.items: Field required"),
        (lambda raw: raw["tasks"]["arc"].update(items="many"), "tasks.arc.items"),
        (lambda raw: raw.update(step=7), "holds the results of step 7"),
        (lambda raw: raw.update(surprise=1), "surprise"),
    ],
)
def test_a_damaged_record_is_refused_with_the_field(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_suite_record(damaged(tmp_path, change))


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"step": NaN}', "\x00"])
def test_what_is_no_record_at_all_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "step_00000500.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"step_00000500\.json: .*cpt eval"):
        read_suite_record(path)


def test_a_missing_record_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_suite_record(tmp_path / "step_00000500.json")


def test_the_last_record_is_found_and_that_of_a_step(tmp_path: Path) -> None:
    for step in (500, 0, 90):
        write_suite_record(record_file(tmp_path, step), record(step, arc=task()))
    (tmp_path / "step_00000500.items.parquet").write_bytes(b"not looked at")
    last, base = read_suite_results(tmp_path), read_suite_results(tmp_path, 0)
    assert last is not None and last.record.step == 500
    assert base is not None and base.record.step == 0
    assert read_suite_results(tmp_path, 91) is None
    assert read_suite_results(tmp_path / "none") is None


def test_a_group_is_the_unweighted_mean_of_its_accuracies() -> None:
    tasks = {
        "a": task(0.4, 0.03, items=10),
        "b": task(0.8, 0.04, items=1000),
        "wiki": task(3.0, 0.1, metric="bits_per_byte"),
        "law": task(0.7, 0.01, group="domain", metric="exact_match,strict-match"),
    }
    scores = group_scores(tasks)
    assert scores["general"].accuracy == pytest.approx(0.6)
    assert scores["general"].stderr == pytest.approx(0.05 / 2)
    assert (scores["general"].tasks, scores["general"].items) == (2, 1010)
    assert scores["domain"] == GroupScore(0.7, 0.01, 1, 100)


def test_a_group_with_an_unmeasured_task_has_no_accuracy() -> None:
    scores = group_scores({"a": task(0.4), "b": task(math.nan)})
    assert (scores["general"].accuracy, scores["general"].tasks, scores["general"].items) == (None, 2, 200)


def test_a_group_without_an_accuracy_has_none() -> None:
    assert group_scores({"wiki": task(3.0, metric="word_perplexity")})["general"] == GroupScore(None, None, 0, 0)
    assert not is_accuracy("word_perplexity") and is_accuracy("acc_norm")


def test_items_come_back_in_the_columns_of_the_format(tmp_path: Path) -> None:
    path = tmp_path / "evals" / "step_00000500.items.parquet"
    write_items(path, items(chosen=["x" * 500, "", None]).select(list(reversed(results.ITEMS.names))))
    table = read_items(path)
    assert table.schema.equals(results.ITEMS)
    assert table.column("item").to_pylist() == [0, 1, 2]
    assert table.column("chosen").to_pylist() == ["x" * 200, "", None]


def test_of_a_long_prompt_the_end_is_kept_where_its_question_stands(tmp_path: Path) -> None:
    texts = {"task": ["arc"], "item": [0], "subset": [None], "prompt": ["é" * 3000 + " Question?"]}
    write_texts(tmp_path / "texts.parquet", pa.table(texts | {"gold": ["g" * 999], "choices": [["a", "b"]]}))
    (row,) = read_texts(tmp_path / "texts.parquet").to_pylist()
    assert row["prompt"].endswith("é Question?") and len(row["prompt"]) == 2000
    assert (len(row["gold"]), row["choices"]) == (300, ["a", "b"])


def test_pieces_keep_their_order(tmp_path: Path) -> None:
    pieces = {
        "source": ["web", "law", "web"],
        "document": [2**40, 0, 1],
        "tokens": [5, 6, 7],
        "nats": [1.0, math.nan, 2],
    }
    write_pieces(tmp_path / "pieces.parquet", pa.table(pieces))
    table = read_pieces(tmp_path / "pieces.parquet")
    assert table.column("document").to_pylist() == [2**40, 0, 1]
    assert table.column("source").to_pylist() == ["web", "law", "web"]


def test_an_empty_table_is_a_table(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", items(0))
    assert len(read_items(tmp_path / "items.parquet")) == 0


def test_a_damaged_table_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "items.parquet"
    write_items(path, items())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"items\.parquet: not a table of task, item, score"):
        read_items(path)
    with pytest.raises(DataError, match="not a table"):
        read_items(tmp_path / "missing.parquet")


def test_a_table_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_items(tmp_path / "items.parquet", items())
    with pytest.raises(DataError, match="not a table of task, item, subset"):
        read_texts(tmp_path / "items.parquet")
