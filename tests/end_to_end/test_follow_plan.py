"""The closed loop on a tiny model: a recommendation drives a run, goes with it, and the report holds the run to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
TOKENS = 256 * 12


def recommendation() -> Any:
    from cpt.recommendation import (
        BaseLoss,
        LawNames,
        ObservationsFile,
        PromisePoint,
        Recommendation,
        RecommendedStage,
    )

    # Domain loss is promised far too low, general loss so vaguely that any run keeps it.
    ends = [PromisePoint(part * TOKENS, 3.5, (0.5, 6.0), 0.5, (0.4, 0.6)) for part in (0.2, 1.0)]
    return Recommendation(
        usage="tolerance",
        base="",
        params=22_688,
        lr=1e-2,
        stages=(RecommendedStage(TOKENS, 0.4, 0.6),),
        interval=(0.3, 0.5),
        law=LawNames("cmr", "dcpt"),
        promise=tuple(ends),
        base_loss=BaseLoss(None, None),
        observations=ObservationsFile("observations.csv", "ab" * 32),
    )


def test_a_recommendation_drives_a_run_is_stored_in_it_outlives_its_file_and_is_held_against_it(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.recommendation import write_recommendation

    monkeypatch.chdir(workshop.root)
    workshop.stores()
    file = workshop.run_file("loop", {"replay.share_general": 0.25, "eval.every_steps": 3, "checkpoint.every_steps": 6})
    advice, plan = recommendation(), workshop.root / "plan.json"
    write_recommendation(plan, advice)
    done = workshop.cpt("train", file, "plan=plan.json")
    assert done.code == 0, done.text
    assert f"follows recommendation {advice.fingerprint}" in done.out
    assert "the run file said train.tokens 2048, replay.share_general 0.25" in done.out
    run_dir: Path = workshop.run_dir("loop")
    assert (run_dir / "recommendation.json").read_bytes() == plan.read_bytes()
    assert json.loads((run_dir / "plan.json").read_text())["stages"][0]["block_counts"] == [400, 600]

    plan.unlink()
    shutil.rmtree(run_dir / "checkpoints" / "step_00000012")
    done = workshop.cpt("resume", run_dir)
    assert done.code == 0 and "resumes after step 6 of 12" in done.out, done.text
    assert "which this run follows, is neither" not in done.text
    start, resume = (event for event in workshop.events("loop") if event["event"] in ("start", "resume"))
    assert start["recommendation"] == resume["recommendation"] == advice.fingerprint
    assert start["warnings"] == [] and resume["changed"] == []

    done = workshop.cpt("report", run_dir, "--json")
    assert done.code == 0, done.text
    told = json.loads(done.out)["runs"][0]["promise"]
    assert told["fingerprint"] == advice.fingerprint
    assert [point["step"] for point in told["domain"]["evaluations"]] == [3, 6, 9, 12]
    assert told["domain"]["left_at_step"] == 3 and told["domain"]["final_inside"] is False
    assert told["general"]["left_at_step"] is None and told["general"]["final_inside"] is True
