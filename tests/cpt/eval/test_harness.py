"""A suite in a process of its own, and the cache that makes the next call cheap."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("lm_eval")

from cpt.eval.harness import ModelOnDisk, SuiteOutcome, run_suite
from cpt.eval.suite import Suite, load_suite
from cpt.rundir import DataError

ITEMS = [{"prompt": "one two", "answer": "three", "choices": ["three", "four"], "text": "one two three four",
          "sentence_good": "one two", "sentence_bad": "two one", "kind": "numbers"}] * 3  # fmt: skip
KINDS = ("multiple_choice", "minimal_pairs", "cloze", "exact_match", "perplexity")


def suite_of(folder: Path, **changes: Any) -> Suite:
    """Every kind of task over the same items; ``changes`` are of the cloze."""
    (folder / "own").mkdir(exist_ok=True)
    (folder / "own" / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (folder / "seen.json").write_text(json.dumps({"own|items|1": ["a/train"]}))
    tasks = [{"name": kind, "file": "own/items.jsonl", "kind": kind, "max_new_tokens": 4} for kind in KINDS]
    tasks[2] |= changes
    raw = {"name": "kinds", "groups": {"general": tasks[:3], "domain": tasks[3:]}, "copying_probe": True,
           "overlaps": "seen.json"}  # fmt: skip
    (folder / "suite.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_suite(folder / "suite.yaml")


def model_at(folder: Path | None) -> ModelOnDisk:
    """``None``: one that must not be asked for."""

    def place(scratch: Path) -> Path:
        assert folder is not None, "everything is known"
        return folder

    return ModelOnDisk("weights", "tokenizer", "fp32", place)


@pytest.fixture(scope="module")
def cold(tiny_hf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SuiteOutcome, list[str]]:
    """(folder with suite and cache, results of the first call, labels that were told)."""
    folder, told = tmp_path_factory.mktemp("suite"), []
    suite, model = suite_of(folder), model_at(tiny_hf)
    found = run_suite(model, suite, device="cpu", cache=folder / "cache", on_entry=told.append)
    return folder, found, told


def test_every_kind_of_task_has_its_results(cold: tuple[Path, SuiteOutcome, list[str]]) -> None:
    _, found, told = cold
    assert told == list(KINDS) and found.scored == 5 and found.errors == ()
    assert found.harness.startswith("lm_eval ")
    assert {name: task.group for name, task in found.tasks.items()} == {
        **dict.fromkeys(KINDS[:3], "general"), **dict.fromkeys(KINDS[3:], "domain")
    }  # fmt: skip
    metrics = [found.tasks[kind].metric for kind in KINDS]
    assert metrics == ["acc", "acc", "acc", "exact_match", "bits_per_byte"]
    assert found.copying is not None and found.copying.passages > 0
    assert found.items.num_rows == found.texts.num_rows == 15


def test_known_overlaps_are_marked_and_reported_apart(cold: tuple[Path, SuiteOutcome, list[str]]) -> None:
    _, found, _ = cold
    assert found.items["overlap"].to_pylist() == [False, True, False] * 5
    task = found.tasks["perplexity"]
    assert (task.items, task.overlapping) == (3, 1)
    assert task.value is not None and task.value_without_overlap == pytest.approx(task.value)


def test_the_second_call_reads_what_is_known(cold: tuple[Path, SuiteOutcome, list[str]]) -> None:
    folder, before, _ = cold
    again = run_suite(model_at(None), suite_of(folder), device="cpu", cache=folder / "cache")
    assert again.scored == 0 and again.tasks == before.tasks and again.copying == before.copying
    assert again.items.equals(before.items) or again.items.to_pandas().equals(before.items.to_pandas())


def test_only_the_task_that_changed_is_scored(cold: tuple[Path, SuiteOutcome, list[str]], tiny_hf: Path) -> None:
    folder, before, _ = cold
    other = suite_of(folder, limit=1)
    again = run_suite(model_at(tiny_hf), other, device="cpu", cache=folder / "cache")
    assert again.scored == 1 and again.tasks["cloze"].items == 1
    assert {**again.tasks, "cloze": None} == {**before.tasks, "cloze": None}


def test_a_process_that_fails_says_at_what(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RuntimeError, match=r"ended with 1 at task multiple_choice; the end of what it said:\n"):
        run_suite(model_at(tmp_path / "empty"), suite_of(tmp_path), device="cpu", cache=tmp_path / "cache")


def test_faults_of_the_items_come_back_as_such(tiny_hf: Path, tmp_path: Path) -> None:
    suite = suite_of(tmp_path)
    (tmp_path / "own" / "items.jsonl").write_text(json.dumps(ITEMS[0]) + '\n{"prompt": "one"}\n')
    with pytest.raises(DataError, match=r"items\.jsonl: line 2: field 'answer' cannot be made"):
        run_suite(model_at(tiny_hf), suite, device="cpu", cache=tmp_path / "cache")


def test_the_asking_process_needs_neither_torch_nor_lm_eval() -> None:
    program = (
        "import sys, cpt.eval.harness, cpt.eval_checkpoints; print('torch' in sys.modules, 'lm_eval' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
