"""Goodput: seconds by cause from the lines of a run's two files, whatever the clock did."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.report.goodput import CAUSES, Goodput, measure
from cpt.report.goodput_views import goodput_chart, goodput_data, goodput_table, in_words
from cpt.report.render import build_report, report_data
from cpt.report.verdict import overview

Line = dict[str, Any]


def event(time: float, kind: str, step: int = 0, **details: Any) -> Line:
    return {"time": time, "step": step, "event": kind, **details}


def record(time: float, step: int, *, steps: int = 10, seconds: float = 1.0, **phases: float) -> Line:
    return {"time": time, "step": step, "steps": steps, "step_seconds": seconds, "phase_seconds": phases}


def crashed_and_resumed() -> Goodput:
    """The example at the top of the module, with a start-up of 5 and a wait of 20 seconds."""
    events = [
        event(105, "start", startup_seconds=5, world_size=2),
        event(122, "checkpoint", 15, seconds=0.1),
        event(131, "restart", 22, waited=2.0),
        event(151, "resume", 15, startup_seconds=5, world_size=1),
        event(163, "finish", 25, phase_seconds={"checkpoint": 1.0}),
    ]
    records = [record(115, 10), record(127, 20, checkpoint=0.2), record(156, 20, steps=5), record(161, 25, steps=5)]
    return measure(events, records)


def test_steps_that_were_trained_again_are_undone_and_the_crash_and_the_wait_are_an_interruption() -> None:
    found = crashed_and_resumed()
    first, second = found.attempts
    assert first.seconds == {
        "training": 15.0,
        "undone": 5.0,
        "start_up": 5.0,
        "checkpoint": 2.0,
        "evaluation": 0.0,
        "interrupted": 19.0,  # 127 to 151, of which 5 are the start-up of the next
        "other": 0.0,
    }
    assert second.seconds["training"] == 10.0 and second.seconds["checkpoint"] == 1.0 and second.seconds["other"] == 1.0
    assert (first.ended, first.processes, first.last_step) == ("crashed", 2, 20)
    assert (second.ended, second.processes, second.first_step) == ("finished", 1, 15)
    assert (found.interruptions, found.longest_gap) == (1, 19.0)
    assert found.steps_repeated == 5 + 2  # 16 to 20, and two that only the heartbeat knew of
    assert found.wall_seconds == 163 - 100 and found.fraction == pytest.approx(25 / 63)


def test_a_run_that_nothing_happened_to_loses_only_its_start_and_its_pauses() -> None:
    events = [event(102, "start", startup_seconds=2), event(103, "eval", 0), event(115, "finish", 10)]
    found = measure(events, [record(114, 10, evaluation=0.1)])
    assert found.seconds == dict.fromkeys(CAUSES, 0.0) | {
        "training": 10.0,
        "start_up": 2.0,
        "evaluation": 1.0,
        "other": 2.0,
    }
    assert in_words(found) == "66.7% of 15.0 s of wall time went into steps that counted; no interruption."


def test_the_week_after_a_stop_on_request_is_no_loss() -> None:
    week = 7 * 86400
    events = [event(0, "start"), event(10, "sigterm", 10), event(week, "resume", 10), event(week + 10, "finish", 20)]
    found = measure(events, [record(10, 10), record(week + 10, 20)])
    assert found.fraction == 1.0 and found.interruptions == 0 and found.attempts[0].ended == "stopped"


def test_a_rollback_undoes_steps_without_an_interruption() -> None:
    events = [event(0, "start"), event(20, "rollback", 20), event(40, "finish", 20)]
    found = measure(events, [record(10, 10), record(20, 20), record(30, 20, steps=8), record(40, 22, steps=2)])
    assert (found.rollbacks, found.interruptions, found.steps_repeated) == (1, 0, 8)
    assert found.seconds["training"] == 22.0 and found.seconds["undone"] == 8.0


def test_without_phases_the_events_say_how_long_a_checkpoint_and_an_evaluation_took() -> None:
    events = [event(0, "start"), event(13, "eval", 10, seconds=3.0), event(15, "checkpoint", 10, seconds=2.0)]
    found = measure(events, [{"time": 10, "step": 10, "steps": 10, "step_seconds": 1.0}])
    assert (found.seconds["evaluation"], found.seconds["checkpoint"], found.seconds["other"]) == (3.0, 2.0, 0.0)


def test_a_clock_that_is_set_back_by_an_hour_makes_no_time_negative() -> None:
    events = [event(3600, "start"), event(11, "checkpoint", 10, seconds=0.0), event(21, "finish", 20)]
    found = measure(events, [record(3610, 10), record(20, 20)])
    assert found.seconds["training"] == 20.0 and found.wall_seconds == pytest.approx(20, abs=2)


def test_files_without_a_usable_line_give_no_time_and_no_fraction() -> None:
    found = measure([{"event": "start"}], [{"loss": 1.0}, {"step": None}])
    assert found.wall_seconds == 0.0 and str(found.fraction) == "nan"
    assert measure([], []).attempts == ()


lines = st.lists(
    st.fixed_dictionaries(
        {"time": st.one_of(st.none(), st.floats(-1e6, 1e6)), "step": st.integers(0, 50)},
        optional={"seconds": st.floats(-10, 10), "startup_seconds": st.floats(-5, 50), "waited": st.floats(0, 9)},
    ),
    max_size=12,
)
kinds = st.sampled_from(["start", "resume", "restart", "hang", "checkpoint", "eval", "sigterm", "finish", "odd"])


@given(lines, st.lists(kinds, min_size=12, max_size=12), lines, st.lists(st.floats(-1, 5), min_size=12, max_size=12))
def test_whatever_the_files_hold_no_time_is_negative_and_the_fraction_is_one(
    said: list[Line], names: list[str], logged: list[Line], seconds: list[float]
) -> None:
    events = [{**line, "event": name} for line, name in zip(said, names, strict=False)]
    records = [{**line, "steps": 3, "step_seconds": s} for line, s in zip(logged, seconds, strict=False)]
    found = measure(events, records)
    assert all(value >= 0 for attempt in found.attempts for value in attempt.seconds.values())
    assert not found.wall_seconds or 0 <= found.fraction <= 1
    assert found.steps_repeated >= 0 and found.longest_gap >= 0
    json.dumps(goodput_data(found), allow_nan=False)


def test_the_report_shows_goodput_as_a_table_a_bar_and_json(make_run: Any, tmp_path: Path) -> None:
    from cpt.report.collect import collect_run

    folder = make_run(name="troubled")
    events = folder / "events.jsonl"
    start = json.loads(events.read_text().splitlines()[0])["time"]
    crash = [event(start + 900, "restart", 30, waited=2.0), event(start + 1000, "resume", 20, world_size=1)]
    with events.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in crash)
    (item,) = overview([collect_run(folder)]).summaries
    table, chart = goodput_table(item), goodput_chart([item])
    assert table is not None and [row.cells[0] for row in table.rows] == ["1", "2", "Share"]
    assert (
        chart is not None
        and "steps that counted" in chart.caption
        and "<svg" in chart.svg
        and ">steps that counted<" in chart.svg
    )
    paths = build_report([folder], tmp_path / "out")
    for page in (paths.html, paths.markdown):
        assert "Goodput: troubled" in page.read_text() and "interrupted" in page.read_text().lower()
    assert (tmp_path / "out/figures/goodput.svg").is_file()
    (told,) = report_data([folder])["runs"]
    assert set(told["goodput"]["seconds"]) == set(CAUSES) and len(told["goodput"]["attempts"]) == 2
