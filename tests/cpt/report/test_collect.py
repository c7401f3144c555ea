import gc
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cpt.report.collect import Evaluation, change_of, collect_run
from cpt.rundir import DataError, RunDir

RunWriter = Callable[..., Path]


def evaluation(step: int, general: float, domain: float) -> Evaluation:
    return Evaluation(step=step, tokens_seen=step * 10.0, sources={}, groups={"general": general, "domain": domain})


def test_gain_and_forgetting_are_measured_from_step_0_and_the_worst_point_is_kept() -> None:
    points = [evaluation(0, 3.0, 4.0), evaluation(10, 3.5, 3.0), evaluation(20, 3.25, 2.5)]
    general, domain = change_of(points, "general"), change_of(points, "domain")
    assert general is not None and domain is not None
    assert (general.rise, general.worst_rise, general.worst_step) == (0.25, 0.5, 10)
    assert domain.fall == 1.5


@pytest.mark.parametrize("points", [[], [(0, 3.0)], [(5, 3.0), (9, 3.1)], [(0, math.nan), (5, 3.0), (9, 3.1)]])
def test_gain_and_forgetting_are_unknown_without_a_finite_base_and_result(points: list[tuple[int, float]]) -> None:
    assert change_of([evaluation(step, loss, loss) for step, loss in points], "general") is None


def test_a_finished_run_is_read_without_warnings(make_run: RunWriter) -> None:
    root = make_run(steps=40)
    run = collect_run(root)
    assert run.warnings == ()
    assert run.finished and run.steps_done == 40 and len(run.metrics) == 40
    assert run.checkpoint == RunDir(root).checkpoint(40)
    assert run.wall_seconds == 40
    assert run.plan is not None and run.plan.num_steps == 40


def test_a_metrics_line_cut_off_by_a_crash_is_left_out_and_said(make_run: RunWriter) -> None:
    path = RunDir(make_run(steps=20)).metrics
    path.write_bytes(path.read_bytes()[:-40])
    run = collect_run(path.parent)
    assert run.steps_done == 19
    assert any("last line (20) is cut off" in warning for warning in run.warnings)


def test_a_damaged_line_in_the_middle_is_named_by_number(make_run: RunWriter) -> None:
    path = RunDir(make_run(steps=20)).metrics
    lines = path.read_bytes().split(b"\n")
    lines[4] = b'{"step": \xff\x00'
    path.write_bytes(b"\n".join(lines))
    run = collect_run(path.parent)
    assert len(run.metrics) == 19
    assert any("1 line cannot be read and was left out (line 5)" in warning for warning in run.warnings)


def test_after_a_resume_the_later_values_win_and_abandoned_steps_go(make_run: RunWriter) -> None:
    path = RunDir(make_run(steps=3)).metrics
    steps = [(10, 1.0), (20, 2.0), (30, 3.0), (20, 4.0), (25, 5.0)]
    path.write_text(
        "".join(json.dumps({"step": step, "tokens_seen": step, "loss": loss}) + "\n" for step, loss in steps)
    )
    run = collect_run(path.parent)
    assert run.metrics.scalars["step"].tolist() == [10, 20, 25]
    assert run.metrics.scalars["loss"].tolist() == [1.0, 4.0, 5.0]
    assert any("2 logged steps repeated after a resume" in warning for warning in run.warnings)


def test_nan_and_null_losses_are_counted_in_both_spellings(make_run: RunWriter) -> None:
    path = RunDir(make_run(steps=3)).metrics
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": null}\n{"step": 3, "loss": 2.5}\n')
    run = collect_run(path.parent)
    assert np.isnan(run.metrics.scalars["loss"][:2]).all() and run.metrics.scalars["loss"][2] == 2.5
    assert any("not a finite number at 2 logged steps" in warning for warning in run.warnings)


def test_missing_evaluations_and_an_unfinished_run_are_said_with_the_fix(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    for file in paths.evals.iterdir():
        file.unlink()
    paths.events.write_text("")
    warnings = collect_run(paths.root).warnings
    assert any("No evaluation yet" in warning and "cpt eval" in warning for warning in warnings)
    assert any(
        "not finished: it stands at step 20 of 20" in warning and "cpt resume" in warning for warning in warnings
    )


def test_an_evaluation_file_that_is_cut_short_is_left_out_by_name(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    paths.eval_file(20).write_text('{"step": 20, "gro')
    run = collect_run(paths.root)
    assert run.evaluations[-1].step < 20
    assert "evals/step_00000020.json cannot be read and was left out." in run.warnings


def test_a_checkpoint_folder_without_its_event_is_not_offered(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    paths.checkpoint(30).mkdir()
    assert collect_run(paths.root).checkpoint == paths.checkpoint(20)


def test_time_spent_stopped_before_a_resume_is_not_counted(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=3))
    paths.metrics.write_text("")
    times = [(0, "start"), (50, "sigterm"), (1050, "resume"), (1060, "finish")]
    paths.events.write_text("".join(json.dumps({"time": at, "step": 1, "event": kind}) + "\n" for at, kind in times))
    assert collect_run(paths.root).wall_seconds == 60


def test_only_metrics_are_needed_and_everything_missing_is_listed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tokens_seen": 10, "loss": 3.0}\n')
    run = collect_run(tmp_path)
    assert run.name == tmp_path.name and run.plan is None and run.checkpoint is None
    for name in ("config.yaml", "plan.json", "environment.json", "events.jsonl"):
        assert any(warning.startswith(f"{name} is missing") for warning in run.warnings)


def test_a_broken_config_and_plan_are_warnings_not_crashes(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    paths.config.write_text("run: [unclosed")
    paths.plan.write_text("{")
    warnings = collect_run(paths.root).warnings
    assert any(warning.startswith("config.yaml cannot be read") for warning in warnings)
    assert any(warning.startswith("plan.json cannot be read") for warning in warnings)


@pytest.mark.parametrize(
    "text", ["a: 2024-99-99", "a: !!float x", "a: " + "[" * 5000, "a: &a {b: *a}", "a: &a [x]\nb: [*a, *a]", "a: \x00"]
)
def test_yaml_that_is_no_plain_config_is_a_warning(make_run: RunWriter, text: str) -> None:
    paths = RunDir(make_run(steps=20))
    paths.config.write_text(text)
    run = collect_run(paths.root)
    assert run.config == {} and any(warning.startswith("config.yaml cannot be read") for warning in run.warnings)


def test_an_evaluation_that_is_gone_or_no_file_is_left_out(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=20))
    paths.eval_file(5).mkdir()
    paths.eval_file(6).symlink_to(paths.root / "gone")
    run = collect_run(paths.root)
    assert not {5, 6} & {each.step for each in run.evaluations}
    assert sum("cannot be read and was left out" in warning for warning in run.warnings) == 2


def test_the_wait_after_a_crash_is_wall_time_the_same_that_goodput_is_a_share_of(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=3))
    paths.metrics.write_text("")
    times = [(0, "start"), (50, "checkpoint"), (150, "resume"), (160, "finish")]
    paths.events.write_text("".join(json.dumps({"time": at, "step": 1, "event": kind}) + "\n" for at, kind in times))
    run = collect_run(paths.root)
    assert run.wall_seconds == run.goodput.wall_seconds == 160


def test_a_missing_folder_and_a_folder_that_is_no_run_are_refused_with_the_path_and_the_fix(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such run folder; give the folder that `cpt train` wrote"):
        collect_run(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"not a run folder .*metrics\.jsonl.*give the folder"):
        collect_run(tmp_path)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Python's collector visits all that other tests have left in this process, again and again."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_twenty_times_as_many_lines_take_about_twenty_times_as_long(tmp_path: Path) -> None:
    line = '{"step": %d, "tokens_seen": %d, "loss": 2.5, "loss_by_source": {"a": 2.5}, "tokens_by_source": {"a": 5}}\n'
    seconds = []
    for num_lines in (5_000, 100_000):
        (tmp_path / "metrics.jsonl").write_text("".join(line % (step, step * 4096) for step in range(1, num_lines + 1)))
        start = time.process_time()
        assert len(collect_run(tmp_path).metrics) == num_lines
        seconds.append(time.process_time() - start)
    assert seconds[1] < 100 * seconds[0]  # quadratic: 400


def test_the_pause_before_an_extension_is_not_counted_and_the_end_it_had_before_is_none(make_run: RunWriter) -> None:
    paths = RunDir(make_run(steps=3))
    paths.metrics.write_text("")
    story = [(0, "start", 0), (50, "finish", 2), (1050, "extended", 2), (1070, "resume", 2), (1080, "eval", 2)]

    def tell(*more: tuple[int, str, int]) -> None:
        lines = [json.dumps({"time": at, "step": step, "event": kind}) + "\n" for at, kind, step in (*story, *more)]
        paths.events.write_text("".join(lines))

    tell()
    run = collect_run(paths.root)
    assert run.wall_seconds == 60 and not run.finished
    tell((1090, "finish", 3))
    assert collect_run(paths.root).finished
