"""What is refused of a suite before a run begins, and what to do instead."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cpt.config import ConfigError, RunConfig, load_config
from cpt.prepare import prepare, prepare_job
from cpt.suite_rules import suite_problems

Workshop = Any  # the fixtures of tests/conftest.py
TOKENIZER = Path("tokenizer.json")


def write_suite(folder: Path, *, kind: str = "multiple_choice") -> Path:
    item = {"prompt": "a", "choices": ["b", "c"], "answer": "b"}
    (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
    task = {"name": "letters", "file": "items.jsonl", "kind": kind}
    (folder / "suite.yaml").write_text(json.dumps({"name": "tiny", "groups": {"general": [task]}}))
    return folder / "suite.yaml"


@pytest.fixture
def config(workshop: Workshop) -> RunConfig:
    workshop.stores()
    write_suite(workshop.root)
    return load_config(workshop.run_file("run", {"eval.suite": str(workshop.root / "suite.yaml")}))


def told(config: RunConfig, tokenizer: Path | None = TOKENIZER) -> dict[str, str]:
    return {problem.field: str(problem) for problem in suite_problems(config, tokenizer)}


def test_a_suite_that_scores_given_answers_is_accepted(config: RunConfig) -> None:
    pytest.importorskip("lm_eval")
    assert told(config) == {}


def test_a_suite_that_generates_is_left_to_the_watcher(config: RunConfig, workshop: Workshop) -> None:
    write_suite(workshop.root, kind="exact_match")
    said = told(config)["eval.suite"]
    assert "does not generate, as letters asks" in said and "cpt eval watch" in said


def test_a_missing_suite_is_named(config: RunConfig, workshop: Workshop) -> None:
    (workshop.root / "suite.yaml").unlink()
    assert any("suite.yaml: no such file" in said for said in told(config).values())


def test_without_lm_eval_the_extra_is_named(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'cpt[eval]'" in told(config)["eval.suite"]


def test_without_a_tokenizer_no_run_begins_but_its_folder_can_still_be_read(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"model.tokenizer: eval.suite has texts to tokenize"):
        prepare_job(config, 1)
    assert prepare(config).plan.num_steps == 8


def test_without_a_suite_nothing_is_asked(config: RunConfig) -> None:
    without = config.model_copy(update={"eval": config.eval.model_copy(update={"suite": None})})
    assert told(without, None) == {}
