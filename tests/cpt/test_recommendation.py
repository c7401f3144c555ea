"""A recommendation survives its file, and a file that somebody cut, edited or confused is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.plan import PlanSource, StageWish, build_plan, write_plan
from cpt.recommendation import (
    BaseLoss,
    LawNames,
    ObservationsFile,
    PromisePoint,
    Recommendation,
    RecommendedStage,
    read_recommendation,
    write_recommendation,
)
from cpt.rundir import DataError


def advice() -> Recommendation:
    return Recommendation(
        usage="tolerance",
        base="qwen",
        params=8.0e9,
        lr=3e-5,
        stages=(RecommendedStage(600, 0.2, 0.8), RecommendedStage(200, 0.4, 0.6)),
        interval=(0.15, 0.3),
        law=LawNames(general="cmr", domain="dcpt"),
        promise=(
            PromisePoint(0, 2.8, (2.8, 2.8), 2.5, (2.5, 2.5)),
            PromisePoint(800, 2.85, (2.83, 2.88), 2.0, (1.97, 2.02)),
        ),
        base_loss=BaseLoss(general=2.8, domain=None),
        observations=ObservationsFile("observations.csv", "ab" * 32),
        warnings=("two model sizes only",),
    )


def changed(**values: Any) -> bytes:
    """The file with top-level values exchanged, its fingerprint left as it was."""
    return json.dumps(json.loads(advice().to_json()) | values).encode()


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_recommendation(path)
    assert str(path) in str(caught.value) and "cpt plan recommend" in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_back_with_the_same_fingerprint(tmp_path: Path) -> None:
    write_recommendation(tmp_path / "plan.json", advice())
    again = read_recommendation(tmp_path / "plan.json")
    assert again == advice() and again.fingerprint == advice().fingerprint
    assert again.to_json() == (tmp_path / "plan.json").read_text()


def test_tokens_add_up_and_the_share_is_weighted_by_them() -> None:
    assert advice().tokens == 800 and advice().share_general == pytest.approx(0.25)
    weighted = replace(advice(), stages=(RecommendedStage(5, None, None, {"web": 0.25, "med": 0.75}),), interval=None)
    assert weighted.share_general is None


def test_numbers_of_numpy_and_whole_numbers_give_the_same_fingerprint() -> None:
    alike = replace(advice(), params=np.float64(8e9), interval=(np.float64(0.15), np.float64(0.3)))
    assert alike.fingerprint == advice().fingerprint == replace(advice(), params=8_000_000_000).fingerprint


@pytest.mark.parametrize("change", [{"lr": 4e-5}, {"base": ""}, {"warnings": ()}, {"interval": None}])
def test_any_changed_field_changes_the_fingerprint(change: dict[str, Any]) -> None:
    assert replace(advice(), **change).fingerprint != advice().fingerprint


def test_an_edited_file_is_refused(tmp_path: Path) -> None:
    assert "it was edited" in refused(tmp_path / "plan.json", changed(lr=4e-5))


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    whole = advice().to_json().encode()
    for length in range(0, len(whole) - 2, 97):
        assert "not a complete JSON file" in refused(tmp_path / "plan.json", whole[:length])


def test_a_missing_file_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json.*No such file"):
        read_recommendation(tmp_path / "nowhere.json")


def test_the_frozen_plan_of_a_run_in_its_place_is_told_apart(tmp_path: Path) -> None:
    sources = [PlanSource("web", "general", 9, 72, "w")]
    plan, _ = build_plan(sources, [StageWish(64, 1.0)], seed=1, seq_len=8, global_batch_rows=4, max_epochs=4)
    write_plan(tmp_path / "plan.json", plan)
    text = refused(tmp_path / "plan.json", (tmp_path / "plan.json").read_bytes())
    assert "a run's frozen plan" in text and "RUN_DIR/recommendation.json" in text


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kind": "fit"}, "kind is 'fit'"),
        ({"format_version": 2}, "format_version is 2; this version of cpt reads 1"),
        ({"usage": "guess"}, "usage is 'guess'; it must be one of tolerance, domain-tokens, flops"),
        ({"params": float("nan")}, "params is nan; it must be a finite number"),
        ({"params": True}, "params is True; it must be a finite number"),
        ({"params": 0}, "params is 0"),
        ({"lr": -1e-3}, "lr is -0.001; it must lie between 0 and 1"),
        ({"interval": [0.4, 0.2]}, "interval is [0.4, 0.2]; its low end lies above its high end"),
        ({"interval": [0.1]}, "interval is [0.1]; it must be [low, high]"),
        ({"stages": []}, "stages is empty"),
        ({"stages": {}}, "stages is {}; it must be a list"),
        ({"law": {"general": "cmr"}}, "law misses the field 'domain'"),
        ({"observations": {"path": "", "sha256": "x"}}, "observations: path is ''"),
        ({"base_loss": {"general": "2.8", "domain": None}}, "base_loss: general is '2.8'"),
        ({"warnings": "none"}, "warnings is 'none'; it must be a list of texts"),
        ({"warnings": [3]}, "warnings[0] is 3"),
        ({"extra": 1}, "recommendation has the unknown field 'extra'"),
    ],
)
def test_a_value_against_its_rule_is_refused_by_field(tmp_path: Path, values: dict[str, Any], says: str) -> None:
    assert says in refused(tmp_path / "plan.json", changed(**values))


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        ({"share_general": 0.3}, "stages[0]: share_general + share_domain is 1.1"),
        ({"share_general": None}, "stages[0]: share_general missing; state both shares, or weights"),
        ({"tokens": 1.5}, "stages[0]: tokens is 1.5; it must be an integer"),
        ({"weights": {"web": 0.3, "med": 0.6}}, "stages[0]: the sum of weights is 0.9"),
        ({"weights": {"web": float("inf")}}, "stages[0]: weights['web'] is inf"),
        ({"weights": [1]}, "weights is (1,); it must be an object"),
    ],
)
def test_a_stage_against_its_rule_is_refused_by_field(tmp_path: Path, stage: dict[str, Any], says: str) -> None:
    stages = json.loads(advice().to_json())["stages"]
    assert says in refused(tmp_path / "plan.json", changed(stages=[stages[0] | stage, stages[1]]))


def test_a_promise_that_goes_back_in_tokens_or_is_no_number_is_refused(tmp_path: Path) -> None:
    first, last = json.loads(advice().to_json())["promise"]
    assert "promise has tokens" in refused(tmp_path / "plan.json", changed(promise=[last, first]))
    broken = changed(promise=[first, last | {"loss_domain": float("nan")}])
    assert "promise[1]: loss_domain is nan" in refused(tmp_path / "plan.json", broken)
