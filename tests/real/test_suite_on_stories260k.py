"""Benchmarks on a real pre-trained model: lm_eval's own tasks on local items, and the same items as local tasks."""

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from cpt.eval.cache import Outcome, read_outcome
from cpt.eval.suite import LocalTask, NamedTask

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS, EVALS = SHARED / "weights/stories260K", SHARED / "evals"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"{WEIGHTS} is absent; set CPT_SHARED_DATA")
LIMIT = 60


@pytest.fixture(scope="module")
def found(outside_a_job: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Results by name."""
    from cpt.eval.harness_process import Request, run

    blimp, arc = EVALS / "blimp/determiner_noun_agreement_1.jsonl", EVALS / "arc_easy/test.jsonl"
    mmlu = {"test": EVALS / "mmlu/anatomy_test.jsonl", "fewshot": EVALS / "mmlu/anatomy_dev.jsonl"}
    arc_like: dict[str, Any] = {
        "prompt": "Question: {{question}}\nAnswer:",
        "choices": "{{choices.text}}",
        "answer": "{{choices.label.index(answerKey)}}",
    }
    entries = (
        NamedTask(task="blimp_determiner_noun_agreement_1", name="blimp", data={"test": blimp}, limit=LIMIT),
        LocalTask(name="own_blimp", file=blimp, kind="minimal_pairs", subset_field="linguistics_term", limit=LIMIT),
        NamedTask(task="arc_easy", data={"test": arc}, limit=LIMIT),
        LocalTask(name="own_arc", file=arc, kind="multiple_choice", limit=LIMIT, **arc_like),
        NamedTask(task="mmlu_anatomy", name="mmlu", data=mmlu, num_fewshot=5, limit=10),
    )
    scratch = tmp_path_factory.mktemp("stories")
    plain: dict[str, Any] = {"dtype": "fp32", "device": "cpu", "batch_size": 16, "seed": 1234, "copying": False}
    numbers: list[int] = []
    run(Request(model=WEIGHTS, entries=entries, scratch=scratch, **plain), lambda told: numbers.append(told["done"]))
    outcomes = [read_outcome(scratch / "outcomes" / str(number)) for number in numbers]
    return {outcome.tasks[0].name: outcome for outcome in outcomes if outcome is not None}


@pytest.mark.parametrize("pair", [("blimp", "own_blimp"), ("arc_easy", "own_arc")])
def test_a_local_task_scores_like_lm_evals_own(found: dict[str, Outcome], pair: tuple[str, str]) -> None:
    named, local = (found[name] for name in pair)
    for column in ("item", "line", "score", "margin", "chosen", "truncated"):
        assert named.items[column].to_pylist() == local.items[column].to_pylist()
    assert named.tasks[0].metrics["acc"] == local.tasks[0].metrics["acc"]


def test_a_model_of_stories_knows_grammar(found: dict[str, Outcome]) -> None:
    accuracy = found["blimp"].tasks[0].metrics["acc"]
    assert accuracy.value is not None and accuracy.stderr is not None
    assert accuracy.value - 2 * accuracy.stderr > 0.5
    assert set(found["own_blimp"].texts["subset"].to_pylist()) == {"determiner_noun_agreement"}


def test_prompts_of_five_examples_do_not_fit_and_are_counted(found: dict[str, Outcome]) -> None:
    mmlu = found["mmlu"]
    assert mmlu.tasks[0].few_shot == 5 and sum(mmlu.items["truncated"].to_pylist()) == 10
