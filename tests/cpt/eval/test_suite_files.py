"""The files of one step of a suite: written whole, never mixed with those of another suite."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from cpt.eval.harness import SuiteOutcome
from cpt.eval.results import ITEMS, TEXTS, Measured, TaskResult, read_items, read_suite_record, read_texts
from cpt.eval.suite import Suite, load_suite, suite_hash
from cpt.eval.suite_files import Evaluated, check_same_suite, keep_outcome
from cpt.problems import ConfigError

ABOUT = Evaluated(step=5, tokens_seen=640, weights_hash=None, tokenizer="f" * 8, dtype="fp32")


def write_suite(folder: Path, answer: str = "b") -> Suite:
    item = {"prompt": "a", "choices": ["b", "c"], "answer": answer}
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    task = {"name": "letters", "file": "items.jsonl", "kind": "multiple_choice"}
    (folder / "suite.yaml").write_text(json.dumps({"name": "tiny", "groups": {"general": [task]}}))
    return load_suite(folder / "suite.yaml")


def outcome(score: float = 1.0) -> SuiteOutcome:
    task = TaskResult(
        group="general", kind="multiple_choice", metric="acc", higher_is_better=True, value=score, stderr=None,
        metrics={"acc": Measured(score, None)}, items=1, truncated=0, overlapping=0, value_without_overlap=score,
        stderr_without_overlap=None, few_shot=0, task_hash="t", seconds=0.1,
    )  # fmt: skip
    items = {"task": "letters", "item": 0, "score": score, "margin": 0.5, "chosen": "b", "truncated": False}
    texts = {"task": "letters", "item": 0, "subset": "", "prompt": "a", "gold": "b", "choices": ["b", "c"]}
    return SuiteOutcome(
        tasks={"letters": task},
        items=pa.Table.from_pylist([{**items, "overlap": False}], schema=ITEMS),
        texts=pa.Table.from_pylist([texts], schema=TEXTS),
        errors=("one sentence",),
        harness="lm_eval 0",
        scored=1,
    )


def test_record_items_and_texts_lie_together_and_read_back(tmp_path: Path) -> None:
    suite, folder = write_suite(tmp_path), tmp_path / "evals/tiny"
    record = keep_outcome(folder, outcome(), suite, ABOUT)
    assert read_suite_record(folder / "step_00000005.json") == record
    assert (record.suite, record.suite_hash, record.tokens_seen) == ("tiny", suite_hash(suite), 640)
    assert record.groups["general"].accuracy == 1.0 and record.errors == ("one sentence",)
    assert read_items(folder / "step_00000005.items.parquet")["chosen"].to_pylist() == ["b"]
    assert read_texts(folder / "texts.parquet")["gold"].to_pylist() == ["b"]


def test_texts_are_written_once_for_all_steps(tmp_path: Path) -> None:
    suite, folder = write_suite(tmp_path), tmp_path / "evals/tiny"
    keep_outcome(folder, outcome(), suite, ABOUT)
    written = (folder / "texts.parquet").stat().st_mtime_ns
    keep_outcome(folder, outcome(), suite, Evaluated(6, 768, "hash", "f" * 8, "fp32"))
    assert (folder / "texts.parquet").stat().st_mtime_ns == written


def test_the_same_suite_may_go_on_and_another_one_of_its_name_may_not(tmp_path: Path) -> None:
    suite, folder = write_suite(tmp_path), tmp_path / "evals/tiny"
    check_same_suite(folder, suite, field="name")  # nothing is there
    keep_outcome(folder, outcome(), suite, ABOUT)
    check_same_suite(folder, suite, field="name")
    changed = write_suite(tmp_path, answer="c")
    with pytest.raises(ConfigError, match=r"name = 'tiny': another suite of this name.*evals/tiny"):
        check_same_suite(folder, changed, field="name")


def test_a_damaged_record_says_nothing_of_the_suite(tmp_path: Path) -> None:
    suite, folder = write_suite(tmp_path), tmp_path / "evals/tiny"
    folder.mkdir(parents=True)
    (folder / "step_00000005.json").write_text("{")
    check_same_suite(folder, suite, field="name")
