"""The trade-off picture, the bars, and the marks of what the guard did."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from run_stories import Story, write_document_losses

from cpt.recommendation import BaseLoss, PromisePoint, Recommendation, write_recommendation
from cpt.report.bars import Bar, Part, stacked_bars
from cpt.report.collect import collect_run
from cpt.report.figures import mixture
from cpt.report.guard_marks import MAX_MARKS, event_marks, told_marks
from cpt.report.outcomes import read_outcomes
from cpt.report.plots import Plot, Series
from cpt.report.summary import Summary
from cpt.report.trade_off import retention_plane
from cpt.report.verdict import overview
from cpt.rundir import RunDir

TOKENS = 819_200


def summaries(*roots: Path) -> tuple[Summary, ...]:
    runs = [collect_run(root) for root in roots]
    return overview(runs, read_outcomes(runs).headline).summaries


def plot_of(*roots: Path) -> Plot:
    chart = retention_plane(summaries(*roots))
    assert chart is not None
    return chart.plots[0]


def of_style(plot: Plot, style: str) -> list[Series]:
    return [item for item in plot.series if item.style == style]


def test_every_checkpoint_of_every_run_is_a_point_with_its_step(make_run: Callable[..., Path]) -> None:
    first, second = of_style(plot_of(make_run(name="a"), make_run(name="b", general_end=3.5)), "path")
    assert first.points[0].tolist() == [0.0, 0.0] and first.points[-1] == pytest.approx([0.04, 1.6], abs=0.01)
    assert first.steps is not None and first.steps.tolist() == [0, 8, 20, 40, 70, 100, 150, 200]
    assert second.points[-1, 0] == pytest.approx(0.52, abs=0.01)


def test_the_front_spans_all_runs(make_run: Callable[..., Path]) -> None:
    plot = plot_of(make_run(name="careful", general_end=2.98, domain_end=3.0, bump=0.0), make_run(name="bold", general_end=3.5, bump=0.0))  # fmt: skip
    (front,) = of_style(plot, "front")
    ends = [item.points[-1].tolist() for item in of_style(plot, "path")]
    assert ends[1] in front.points.tolist() and (np.diff(front.points, axis=0) > 0).all()


def test_the_planned_end_stands_in_the_picture_with_both_intervals(
    make_run: Callable[..., Path], recommend: Callable[..., Recommendation]
) -> None:
    root = make_run()
    point = PromisePoint(TOKENS, 3.03, (3.01, 3.05), 2.30, (2.25, 2.35))
    made = recommend(tokens=TOKENS, share=0.25, promise=(PromisePoint(TOKENS / 2, 3.1, (3.0, 3.2), 2.5, (2.4, 2.6)), point), base_loss=BaseLoss(2.98, 3.9))  # fmt: skip
    write_recommendation(RunDir(root).recommendation, made)
    (goal,) = of_style(plot_of(root), "goal")
    assert goal.points[0] == pytest.approx([0.05, 1.60])
    ends = [float(end[0]) for end in (goal.left, goal.right, goal.low, goal.high) if end is not None]
    assert ends == pytest.approx([0.03, 0.07, 1.55, 1.65])
    chart = retention_plane(summaries(root))
    assert chart is not None and "Open circle" in chart.caption and 'class="open"' in chart.svg


def test_the_end_of_a_path_has_the_paired_intervals(make_run: Callable[..., Path]) -> None:
    root = make_run()
    write_document_losses(root, Story())
    (path,) = of_style(plot_of(root), "path")
    assert path.left is not None and path.right is not None and path.low is not None and path.high is not None
    assert path.left[0] < 0.04 < path.right[0] and path.low[0] < 1.6 < path.high[0]
    (alone,) = of_style(plot_of(make_run(name="without")), "path")
    assert alone.left is None and alone.low is None


def test_runs_without_a_base_are_named_and_not_drawn(make_run: Callable[..., Path]) -> None:
    chart = retention_plane(summaries(make_run(name="a"), make_run(name="scratch", init_from=None)))
    assert chart is not None and chart.caption.endswith("nothing to forget: scratch.")
    assert retention_plane(summaries(make_run(name="alone", init_from=None))) is None


def test_events_are_marked_at_the_tokens_of_their_step_the_last_ones_of_many(make_run: Callable[..., Path]) -> None:
    root = make_run()
    lines = [{"event": "rollback", "step": step, "to": 1, "reasons": ["spike"]} for step in range(100, 150)]
    lines += [{"event": "hang", "step": None}, {"event": "checkpoint", "step": 3}, {"event": "resume", "step": 150}]
    with RunDir(root).events.open("a") as events:
        events.write("".join(json.dumps(line) + "\n" for line in lines))
    marks = event_marks(summaries(root))
    assert len(marks) == MAX_MARKS and marks[-1].symbol == "S" and marks[-1].x == 150 * 4096
    assert marks[-2].text == "replay: rollback by the guard, step 149, back to step 1 (spike)"
    assert told_marks(marks) == " Marked: R rollback by the guard, S started again."
    assert told_marks(()) == ""


def test_bars_are_as_long_as_their_shares_and_the_plan_lies_below() -> None:
    parts = {"a": Part("first", "general"), "b": Part("<second>", "domain", 0.5, hatched=True)}
    svg = stacked_bars("x", "T", parts, [Bar("run", {"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}, "12 M")])
    found = re.findall(r'<rect x="[^"]+" y="([^"]+)" width="([^"]+)" height="([^"]+)" style="fill:var', svg)
    wide = [float(width) for _, width, height in found if height == "16"]
    thin = [float(width) for _, width, height in found if height == "4"]
    assert wide[1] == pytest.approx(3 * wide[0], abs=0.2) and thin[0] == pytest.approx(thin[1], abs=0.2)
    assert sum(wide) == pytest.approx(sum(thin), abs=0.2)
    assert "<second>" not in svg and "&lt;second&gt;" in svg and "x-hatch" in svg


def test_the_mixture_is_what_was_trained_on_beside_what_was_planned(make_run: Callable[..., Path]) -> None:
    chart = mixture(summaries(make_run(share_general=0.25)))
    assert chart is not None
    assert "prose (general): 25.0%" in chart.svg and "python (domain): 75.0%" in chart.svg and "819 k" in chart.svg
