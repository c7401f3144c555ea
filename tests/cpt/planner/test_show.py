"""`cpt plan show`: both files that are called plan.json, told apart by what they hold."""

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cpt.plan import PlanSource, StageWish, build_plan, write_plan
from cpt.planner.show import render, show_facts
from cpt.recommendation import Recommendation, write_recommendation
from cpt.rundir import DataError

Recommend = Callable[..., Recommendation]


def shown(path: Path) -> tuple[dict[str, Any], str]:
    """The facts as JSON has them, and the table's words in one line."""
    facts = json.loads(json.dumps(show_facts(path), allow_nan=False))
    console = Console(width=140, record=True, file=StringIO())
    console.print(render(facts))
    return facts, " ".join(console.export_text().split())


def test_a_recommendation_is_shown_with_stages_promise_and_warnings(tmp_path: Path, recommend: Recommend) -> None:
    advice = recommend(tokens=20_000, share=0.25, warnings=("two model sizes only",), interval=(0.2, 0.31))
    write_recommendation(tmp_path / "plan.json", advice)
    facts, text = shown(tmp_path / "plan.json")
    assert facts["kind"] == "recommendation" and facts["fingerprint"] == advice.fingerprint
    assert facts["share_general"] == 0.25 and facts["tokens"] == 20_000
    assert f"recommendation {advice.fingerprint}: share_general 25.0% (90% interval 20.0% to 31.0%)" in text
    assert "for 8,000,000,000 parameters, peak_lr 0.01; usage tolerance; laws: general cmr, domain dcpt" in text
    assert "2.920 to 2.980" in text and "base: general 2.800, domain 3.500" in text
    assert "warning: two model sizes only" in text


def test_shares_by_source_are_shown_where_no_general_share_is_stated(tmp_path: Path, recommend: Recommend) -> None:
    write_recommendation(tmp_path / "plan.json", recommend(share=None, weights={"web": 0.25, "med": 0.75}, promise=()))
    _, text = shown(tmp_path / "plan.json")
    assert "web 25.0%, med 75.0%" in text and "held-out" not in text


def test_a_runs_frozen_plan_is_shown_with_its_sources(tmp_path: Path) -> None:
    sources = [PlanSource("web", "general", 90, 720, "w"), PlanSource("med", "domain", 90, 720, "m")]
    plan, _ = build_plan(sources, [StageWish(640, 0.25)], seed=1, seq_len=8, global_batch_rows=4, max_epochs=4)
    write_plan(tmp_path / "plan.json", plan)
    facts, text = shown(tmp_path / "plan.json")
    assert facts["kind"] == "frozen plan" and facts["share_general"] == 0.25
    assert f"plan {plan.fingerprint}: 20 steps, 640 tokens" in text and "med" in text and "75.0%" in text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not a complete JSON file"),
        ("[1]", "neither a recommendation"),
        ('{"kind": "fit"}', "neither a recommendation"),
        ('{"kind": "cpt-recommendation"}', "format_version is None"),
    ],
)
def test_what_is_neither_is_refused_with_its_name(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=says) as caught:
        show_facts(tmp_path / "x.json")
    assert "x.json" in str(caught.value)


def test_a_folder_or_nothing_is_refused_with_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is a folder; give a file in it, such as .*plan\.json"):
        show_facts(tmp_path)
    with pytest.raises(DataError, match=r"No such file.*cpt plan recommend writes"):
        show_facts(tmp_path / "gone.json")
