"""A run held to what its recommendation promised: what is compared, what is said, and that nothing is said without one."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cpt.recommendation import BaseLoss, PromisePoint, Recommendation, write_recommendation
from cpt.report.collect import collect_run
from cpt.report.promise import compare, doubts, in_words, promise_chart, promise_data, promised_at
from cpt.report.render import build_report, report_data
from cpt.report.summary import Summary
from cpt.report.verdict import overview
from cpt.rundir import RunDir

RunWriter = Callable[..., Path]
Recommend = Callable[..., Recommendation]
TOKENS = 819_200  # of the runs that make_run writes: 200 steps


def promise(general: float = 3.03, domain: float = 2.30, width: float = 0.02) -> tuple[PromisePoint, ...]:
    """The same losses from 10% of the budget to its end."""
    ends = (general - width, general + width), (domain - width, domain + width)
    return tuple(PromisePoint(tokens, general, ends[0], domain, ends[1]) for tokens in (TOKENS / 10, TOKENS))


@pytest.fixture
def promised(make_run: RunWriter, recommend: Recommend) -> Callable[..., Path]:
    """A run folder with a recommendation in it; ``run`` changes the run's story, the rest the recommendation."""

    def write(run: dict[str, Any] | None = None, **changes: Any) -> Path:
        root = make_run(**(run or {}))
        fields = {"tokens": TOKENS, "share": 0.25, "promise": promise(), "base_loss": BaseLoss(2.98, 3.90)}
        write_recommendation(RunDir(root).recommendation, recommend(**{**fields, **changes}))
        return root

    return write


def summary(root: Path) -> Summary:
    return overview([collect_run(root)]).summaries[0]


def test_promises_are_linear_in_log_tokens_and_end_with_their_range() -> None:
    points = [
        PromisePoint(0, 9.0, (9.0, 9.0), 9.0, (9.0, 9.0)),
        PromisePoint(100, 4.0, (3.0, 5.0), 8.0, (8.0, 8.0)),
        PromisePoint(10_000, 2.0, (1.5, 2.5), 6.0, (6.0, 6.0)),
    ]
    found = promised_at(points, np.array([50.0, 100.0, 1000.0, 10_000.0, 10_050.0, 10_200.0]), "general")
    assert found[[1, 2, 3], 0] == pytest.approx([4.0, 3.0, 2.0])
    assert found[2] == pytest.approx([3.0, 2.25, 3.75])
    assert found[4] == pytest.approx([2.0, 1.5, 2.5])  # within 1% of the end: a run is cut to whole steps
    assert np.isnan(found[[0, 5]]).all()


def test_a_run_that_keeps_its_promise_is_told_so(promised: Callable[..., Path]) -> None:
    item = summary(promised({"bump": 0.0}, promise=promise(width=1.0)))
    text = in_words(item)
    assert "The final general loss lies inside the promised interval (3.020, promised 2.030 to 4.030)." in text
    assert text.endswith("All 6 evaluations after the base lie inside the promised intervals.")
    assert doubts(item) == []


def test_the_step_at_which_a_run_leaves_its_promise_is_named_and_the_end_is_judged_by_itself(
    promised: Callable[..., Path],
) -> None:
    item = summary(promised({"bump": 0.12}))
    text = in_words(item)
    assert "The final general loss lies inside the promised interval (3.020, promised 3.010 to 3.050)." in text
    assert "The run left the promised interval of the general loss at step 20 (3.077, promised 3.010 to 3.050)" in text
    assert "3 of 5 evaluations before the last lie outside it, at a learning rate that is not annealed yet." in text
    general, domain = compare(item)
    assert [point.inside for point in general.points] == [False, False, False, True, True, True]
    assert general.final and general.final.inside and domain.left


def test_a_broken_promise_at_the_end_is_said_and_a_better_loss_is_called_better(promised: Callable[..., Path]) -> None:
    text = in_words(summary(promised({"bump": 0.0}, promise=promise(general=2.9, domain=2.5))))
    assert "The final general loss lies outside the promised interval (3.020, promised 2.880 to 2.920)." in text
    assert "(2.301, promised 2.480 to 2.520, better than promised)" in text


def test_only_evaluations_in_the_promises_range_count_and_the_others_are_numbered(
    promised: Callable[..., Path],
) -> None:
    root = promised()
    assert [point.step for point in compare(summary(root))[0].points] == [20, 40, 70, 100, 150, 200]
    assert "so not compared: 1 evaluation." in build_report([root]).markdown.read_text()


def test_a_promise_for_another_budget_compares_nothing_and_says_so(promised: Callable[..., Path]) -> None:
    far = tuple(replace(point, tokens=point.tokens * 1000) for point in promise())
    item = summary(promised(promise=far))
    assert in_words(item).startswith("No evaluation lies in the range of tokens that recommendation ")
    assert promise_chart(item, 0, alone=True) is None


def test_an_unfinished_run_has_no_final_judgement(promised: Callable[..., Path]) -> None:
    root = promised({"bump": 0.0}, promise=promise(width=1.0))
    RunDir(root).eval_file(200).unlink()
    data = promise_data(summary(root))
    assert data and data["general"]["final_inside"] is None
    assert in_words(summary(root)) == "All 5 evaluations after the base lie inside the promised intervals."


def test_another_base_and_another_share_are_warned_of(promised: Callable[..., Path]) -> None:
    texts = doubts(summary(promised(share=0.4, base_loss=BaseLoss(2.98, 3.50))))
    assert texts[0].startswith("The base's domain loss is 3.900, the pilots' base had 3.500 (11.4% apart)")
    assert "for a general share of 40.0%, the run was planned with 25.0%" in texts[1]


def test_a_base_that_nobody_measured_is_no_doubt(promised: Callable[..., Path]) -> None:
    assert doubts(summary(promised(base_loss=BaseLoss(None, None)))) == []


def test_the_report_shows_figure_table_and_sentence_and_json_has_the_same(promised: Callable[..., Path]) -> None:
    root = promised()
    made = build_report([root])
    html, markdown = made.html.read_text(), made.markdown.read_text()
    assert (made.html.parent / "figures" / "promise_1.svg").exists()
    for text in (html, markdown):
        assert "The run left the promised interval of the general loss at step 20" in text
        assert "Promise against measurement: replay" in text and "no, above" in text and "step 200 (last)" in text
    data = json.loads(json.dumps(report_data([root]), allow_nan=False))
    told = data["runs"][0]["promise"]
    assert told["general"]["left_at_step"] == 20 and told["general"]["final_inside"] is True
    assert told["general"]["evaluations"][0]["interval"] == pytest.approx([3.01, 3.05])
    assert any("left the promised interval" in sentence for sentence in data["verdict"])


def test_each_of_several_runs_is_held_to_its_own_promise(
    promised: Callable[..., Path], make_run: RunWriter, tmp_path: Path
) -> None:
    runs = [promised(), make_run(name="plain", share_general=0.0), promised({"name": "other"})]
    html = build_report(runs, tmp_path / "out").html.read_text()
    assert "Promise against measurement: other" in html and "other: The final general loss" in html
    assert "plain: The final" not in html
    assert {"promise_1.svg", "promise_3.svg"} <= {file.name for file in (tmp_path / "out" / "figures").iterdir()}


def test_a_run_without_a_recommendation_has_no_promise(make_run: RunWriter) -> None:
    root = make_run()
    assert "romise" not in build_report([root]).html.read_text()
    assert report_data([root])["runs"][0]["promise"] is None


def test_a_recommendation_that_is_broken_lost_or_another_ones_is_a_warning(
    promised: Callable[..., Path], recommend: Recommend
) -> None:
    paths = RunDir(promised())
    config = yaml.safe_load(paths.config.read_text())
    paths.config.write_text(yaml.safe_dump(config | {"plan": {"path": "plan.json", "fingerprint": "f" * 16}}))
    assert any("but the run follows ffffffffffffffff" in text for text in collect_run(paths.root).warnings)
    paths.recommendation.write_bytes(paths.recommendation.read_bytes()[:-40])
    assert any("recommendation.json cannot be read" in text for text in collect_run(paths.root).warnings)
    paths.recommendation.unlink()
    run = collect_run(paths.root)
    assert any("recommendation.json is missing" in text for text in run.warnings) and run.recommendation is None


def test_an_extended_run_is_held_to_its_promise_at_the_end_it_had_first(promised: Callable[..., Path]) -> None:
    root = promised()
    raw = yaml.safe_load(RunDir(root).config.read_text())
    past = {"until_step": 100, "tokens": TOKENS // 2, "peak_lr": 1e-3, "schedule": {"name": "constant"}}
    RunDir(root).config.write_text(yaml.safe_dump({**raw, "train": {**raw["train"], "past": [past]}}))
    finals = {point.step for kept in compare(summary(root)) for point in kept.points if point.final}
    assert finals == {100}
