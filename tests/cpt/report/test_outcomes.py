"""Benchmarks and documents in the report: what is told of them, and that damaged or missing files are warnings."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_stories import TWO_GROUPS, Exam, Story, evaluated_steps, write_document_losses, write_exam, write_run
from typer.testing import CliRunner

from cpt.eval.comparison_rows import Row
from cpt.eval.results import items_file, record_file
from cpt.eval.significance import Difference
from cpt.report.benchmark_views import stability_table
from cpt.report.collect import collect_run
from cpt.report.lost_views import example_blocks
from cpt.report.outcomes import Outcomes, read_outcomes
from cpt.report.render import build_report, report_data
from cpt.report.verdict import Overview, _accuracy_clause, overview
from cpt.rundir import RunDir

SUITE = TWO_GROUPS.suite


@pytest.fixture
def examined(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with results of a suite and losses by document."""

    def make(exam: Exam = TWO_GROUPS, **changes: object) -> Path:
        story = Story(**changes)  # type: ignore[arg-type]
        root = write_run(tmp_path / "runs", story)
        write_exam(root, exam, evaluated_steps(story))
        write_document_losses(root, story)
        return root

    return make


def read(*roots: Path) -> tuple[Overview, Outcomes]:
    runs = [collect_run(root) for root in roots]
    outcomes = read_outcomes(runs)
    return overview(runs, outcomes.headline), outcomes


def html_of(*roots: Path) -> str:
    return build_report(list(roots), roots[0].parent / "out").html.read_text()


def test_the_verdict_names_the_drop_and_calls_noise_noise(examined: Callable[..., Path]) -> None:
    view, outcomes = read(examined())
    told = " ".join(view.verdict)
    assert "95% interval 1." in told and "nats" in told
    assert "Benchmarks: domain accuracy 70.0% to 98.0% (+28.0 points, 95% interval" in told
    assert "of 3 tasks 1 drop, 1 gain, 1 within noise (dropped: blimp_agreement)." in told
    assert outcomes.warnings == ()


def test_an_interval_without_0_that_is_noise_all_the_same_says_why() -> None:
    change = Difference(0.818, 0.806, -0.0114, -0.0224, -0.0007, 0.0056, 0.045)
    row = Row("general", "general", "accuracy", True, change, corrected_p=0.09, word="within noise")
    assert "\u22122.2 to \u22120.1, within noise after the correction for many comparisons)" in _accuracy_clause(row)


def test_a_general_loss_that_moved_within_noise_is_called_that(examined: Callable[..., Path]) -> None:
    same, worse = examined(general_end=2.9801, bump=0.0), examined(name="worse", general_end=3.4)
    assert "within noise" in read(same)[0].verdict[0].split("General")[1]
    assert "within noise" not in read(worse)[0].verdict[0]


def test_an_interval_has_the_sign_of_the_sentence_that_it_stands_in(examined: Callable[..., Path]) -> None:
    better, worse = examined(general_end=2.5, bump=0.0), examined(name="worse", domain_end=4.4)
    general = read(better)[0].verdict[0].split("General loss fell by")[1]
    assert "95% interval 0.4" in general and "\u2212" not in general
    domain = read(worse)[0].verdict[0].split("General")[0]
    assert "Domain loss rose by 0.5" in domain and "95% interval 0.4" in domain and "\u2212" not in domain


def test_a_ratio_to_what_may_be_noise_is_not_told(examined: Callable[..., Path]) -> None:
    none = examined(name="none", share_general=0.0, general_end=3.58)
    view, _ = read(none, examined(general_end=2.9811, bump=0.0))
    assert "within noise (none: 0.5" in view.verdict[0] and "times as much" not in view.verdict[0]


def test_points_of_the_verdict_are_rounded_like_those_of_the_table(examined: Callable[..., Path]) -> None:
    root = examined(Exam({"blimp": ("general", 11 / 240, 0.0)}, items=240))
    assert "(\u22124.6 points" in " ".join(read(root)[0].verdict)
    assert ">\u22124.6<" in html_of(root)


def test_the_table_has_every_task_with_what_makes_it_believable(examined: Callable[..., Path]) -> None:
    html = html_of(examined(Exam(TWO_GROUPS.tasks, overlapping=10)))
    for words in ("Truncated", "Overlapping", "Without them", "p, corrected", "95% interval", "Items"):
        assert f">{words}<" in html if words != "Truncated" else "No prompt was longer than the context" in html
    assert "blimp_agreement" in html and "general, all tasks" in html and "copying" in html


def test_forgotten_items_come_with_examples_and_documents_with_their_beginning(examined: Callable[..., Path]) -> None:
    root = examined()
    view, outcomes = read(root)
    blocks = example_blocks(view.summaries, outcomes, SUITE)
    assert blocks[0].title.startswith("blimp_agreement") and "(30 forgotten" in blocks[0].title
    first = dict(blocks[0].lost[0].facts)
    assert first["right"] == "yes" and first["before"].startswith("yes") and first["now"].startswith("no")
    html = html_of(root)
    assert "Answers that changed" in html and "of blimp_agreement?" in html
    assert "Documents that changed most: replay" in html and "begins here" in html


def test_runs_from_random_weights_are_not_compared_with_their_start(examined: Callable[..., Path]) -> None:
    view, outcomes = read(examined(name="a"), examined(name="b", init_from=None))
    assert set(outcomes.headline) == {0} and set(outcomes.documents) == {0} and set(outcomes.diffs[SUITE]) == {0}
    assert view.summaries[1].compared is None


def test_results_of_another_version_are_left_out_with_a_warning(examined: Callable[..., Path]) -> None:
    root = examined()
    path = record_file(RunDir(root).evals / SUITE, 20)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 7}))
    _, outcomes = read(root)
    assert any("format version 7" in text for _, text in outcomes.warnings)
    assert 0 in outcomes.headline and 20 not in [point.step for point in outcomes.points[SUITE][0]]
    assert "format version 7" in html_of(root)


def test_a_last_result_that_cannot_be_read_is_a_warning_and_the_other_runs_are_compared(
    examined: Callable[..., Path],
) -> None:
    good, bad = examined(name="good"), examined(name="bad")
    items_file(RunDir(bad).evals / SUITE, 200).write_bytes(b"PAR1 cut")
    _, outcomes = read(good, bad)
    assert set(outcomes.headline) == {0}
    assert any(number == 1 and "Not compared with the base" in text for number, text in outcomes.warnings)
    assert "Benchmarks against the base" in html_of(good, bad)


def test_a_run_without_a_suite_stands_beside_one_that_has_it(
    examined: Callable[..., Path], make_run: Callable[..., Path]
) -> None:
    html = html_of(examined(name="a"), make_run(name="plain"))
    assert "Benchmarks against the base" in html and "plain" in html


def test_two_suites_have_a_table_each(examined: Callable[..., Path]) -> None:
    root = examined()
    write_exam(root, Exam({"cloze": ("general", 0.1, 0.0)}, suite="second"), [0, 200])
    html = html_of(root)
    assert "Benchmarks against the base: general_vs_law" in html and "Benchmarks against the base: second" in html
    assert "Accuracy on second" in html


def test_stability_has_the_worst_point_and_the_largest_fall(examined: Callable[..., Path]) -> None:
    markdown = build_report([examined()]).markdown.read_text()
    part = markdown.split("### Stability")[1].split("\n###")[0]
    assert (
        "min-ACC" in part and "WC-ACC" in part and "WF10" in part and "| general | 3.130 | 40 | 3.020 | 0.150 |" in part
    )


def test_a_group_of_perplexities_alone_leaves_the_accuracies_of_the_others_their_summary(
    examined: Callable[..., Path],
) -> None:
    view, outcomes = read(examined())
    points = {suite: own[0] for suite, own in outcomes.points.items()}
    without = stability_table(view.summaries[0], points)
    more = {
        suite: tuple(replace(each, groups={**each.groups, "texts": (math.nan, math.nan)}) for each in own)
        for suite, own in points.items()
    }
    assert without and stability_table(view.summaries[0], more) == without


def test_a_long_table_is_short_in_the_twin_for_pull_requests(examined: Callable[..., Path]) -> None:
    tasks = {f"task_{n}": ("general", 0.4 if n == 7 else 0.0, 0.0) for n in range(60)}
    markdown = build_report([examined(Exam(tasks, items=60))]).markdown.read_text()
    assert "task_7 " in markdown and "| task_8 " not in markdown and "the page has all of them" in markdown


def test_json_has_the_comparison_with_its_intervals(
    examined: Callable[..., Path], make_run: Callable[..., Path]
) -> None:
    data = json.loads(json.dumps(report_data([examined(), make_run(name="plain")]), allow_nan=False))
    first, second = (run["against_base"] for run in data["runs"])
    assert first["domain_gain"]["low"] < first["domain_gain"]["value"] < first["domain_gain"]["high"]
    assert {task["task"]: task["word"] for task in first["tasks"]}["blimp_agreement"] == "drop"
    assert second is None or second["tasks"] == []


def test_many_runs_are_one_sentence_a_line_each_and_the_rest_can_be_opened(make_run: Callable[..., Path]) -> None:
    roots = [make_run(name=f"r{n}", share_general=n / 10, general_end=3.5 - n / 20, domain_end=2.2 + n / 50, steps=20) for n in range(8)]  # fmt: skip
    view, _ = read(*roots)
    assert view.verdict[0].startswith("r7 forgot least (") and "r0 gained most" in view.verdict[0]
    assert view.verdict[1].startswith("8 of 8 runs end on the Pareto front") and "r3 and 4 more" in view.verdict[1]
    html = html_of(*roots)
    assert "more sentences, run by run" in html and 'data-noun="runs"' in html and "Comparison of 8 runs" in html
    assert "Settings that differ" in html and "replay.share_general" in html


def test_open_shows_the_page_and_a_machine_without_a_browser_says_where_it_is(
    make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cpt.cli import app

    shown: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: shown.append(address) or len(shown) == 1)
    root = make_run(steps=20)
    assert CliRunner().invoke(app, ["report", str(root), "--open"]).exit_code == 0
    assert shown == [(RunDir(root).report / "index.html").resolve().as_uri()]
    second = CliRunner().invoke(app, ["report", str(root), "--open"])
    assert second.exit_code == 0 and "no browser was found here" in second.output
    CliRunner().invoke(app, ["report", str(root)])
    assert len(shown) == 2
