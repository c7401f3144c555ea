"""The model in training, stories260K, and lm_eval's HFLM on its folder: one suite of real tasks, the same results."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
WEIGHTS = SHARED / "weights/stories260K"
pytestmark = pytest.mark.skipif(not WEIGHTS.is_dir(), reason=f"{WEIGHTS} is absent; set CPT_SHARED_DATA")
pytest.importorskip("lm_eval")
LIMIT = 40


def suite_file(folder: Path) -> Path:
    def local(task: str, file: str, **more: Any) -> dict[str, Any]:
        return {"task": task, "data": {"test": str(SHARED / "evals" / file)}, "limit": LIMIT, **more}

    subset = "anaphor_number_agreement"
    suite = {
        "name": "real",
        "groups": {
            "general": [
                local(f"blimp_{subset}", f"blimp/{subset}.jsonl"),
                local("arc_easy", "arc_easy/test.jsonl", num_fewshot=0),
                local("piqa", "piqa/validation.jsonl", num_fewshot=0),
                local("lambada_openai", "lambada_openai/test.jsonl"),
                {"name": "pages", "file": str(SHARED / "evals/wikitext2/test.jsonl"), "kind": "perplexity", "limit": 2},
            ]
        },
    }
    (folder / "suite.yaml").write_text(json.dumps(suite))
    return folder / "suite.yaml"


@pytest.mark.usefixtures("outside_a_job")
def test_a_suite_says_the_same_of_the_live_model_and_of_its_folder(tmp_path: Path) -> None:
    from cpt.config import ModelSection
    from cpt.data.place import Place
    from cpt.eval.harness_process import Request, open_model
    from cpt.eval.harness_tasks import score
    from cpt.eval.live_suite import open_live_suite
    from cpt.eval.scoring import Scorer, ScoringSpec
    from cpt.eval.suite import load_suite
    from cpt.model.build import Needs, build_model
    from cpt.train.loss_head import attach_loss_head

    suite = load_suite(suite_file(tmp_path))
    loaded = build_model(ModelSection(init_from=str(WEIGHTS)), Needs(512, 512, seed=1))
    attach_loss_head(loaded.model, "sdpa", vocab_size=512, device="cpu")
    spec = ScoringSpec(seq_len=256, micro_batch_size=4, backend="sdpa", device=torch.device("cpu"), place=Place())
    scorer = Scorer(loaded.model, spec, should_stop=lambda: False)
    live = open_live_suite(suite, WEIGHTS, loaded.model.config)
    found = scorer.lead(lambda: live.measure(scorer, loaded.model.config))
    assert found is not None
    shape = {"model": WEIGHTS, "dtype": "fp32", "device": "cpu", "batch_size": 8, "seed": suite.seed}
    request = Request.model_validate({**shape, "entries": (), "copying": False, "scratch": tmp_path})
    theirs = open_model(request)
    for one in live.found:
        theirs.truncated.clear()
        expected = score(one, theirs, seed=suite.seed, truncated=theirs.truncated)
        (task,) = expected.tasks
        own = found.tasks[task.name]
        for name, metric in task.metrics.items():
            assert own.metrics[name].value == pytest.approx(metric.value, rel=1e-4), (task.name, name)
        mine = [row for row in found.items.to_pylist() if row["task"] == task.name]
        for row, other in zip(mine, expected.items.to_pylist(), strict=True):
            assert (row["item"], row["chosen"], row["truncated"]) == (
                other["item"],
                other["chosen"],
                other["truncated"],
            )
            assert row["score"] == pytest.approx(other["score"], rel=1e-5)
            assert row["margin"] == pytest.approx(other["margin"], abs=1e-4, nan_ok=True)
    live.close()
