"""Who is to blame for a bad step, where a run goes back to, and what is said when it gives up."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt import run_guard
from cpt.data.skipping import SkippedRows
from cpt.run_guard import Recovery, RowLoss, _undo_after, to_blame
from cpt.rundir import RunDir, step_name
from cpt.train.guard import BadStep, NonFiniteError
from cpt.train.metrics import MetricsHook, Throughput
from cpt.train.stepinfo import StepInfo


def rows(source: str, *means: float) -> list[RowLoss]:
    return [RowLoss(source, number, mean * 100, 100) for number, mean in enumerate(means)]


def test_rows_that_are_not_finite_are_to_blame_whatever_else_is_high() -> None:
    found = [*rows("web", 2.0, math.nan, 9.0), *rows("law", 1.0, math.inf, 1.1)]
    bad = NonFiniteError(7, ["nan"], {"web": math.inf, "law": math.inf})
    assert [(row.source, row.row) for row in to_blame(found, bad, sigma=8.0)] == [("web", 1), ("law", 1)]


def test_where_most_rows_are_not_finite_all_are_left_out() -> None:
    found = rows("web", math.nan, math.nan, 2.0)
    assert to_blame(found, NonFiniteError(7, ["nan"], {"web": math.inf}), sigma=8.0) == found


def test_rows_far_above_the_others_are_to_blame_for_a_spike_of_their_source() -> None:
    found = [*rows("web", 2.0, 2.1, 1.9, 2.2), *rows("law", 1.0, 1.1, 9.0, 1.05, 0.9)]
    (row,) = to_blame(found, BadStep(7, ["spike"], {"law": 1.5}), sigma=8.0)
    assert (row.source, row.row, row.mean) == ("law", 2, 9.0)


def test_where_the_rest_is_too_high_as_well_the_outlier_explains_nothing() -> None:
    found = [*rows("web", 2.0, 2.1), *rows("law", 3.0, 3.1, 19.0, 3.05, 2.9)]
    assert to_blame(found, BadStep(7, ["spike"], {"law": 1.5}), sigma=8.0) == found


@given(st.lists(st.floats(0.1, 5.0), min_size=1, max_size=20))
def test_for_a_gradient_no_row_stands_out(means: list[float]) -> None:
    found = rows("web", *means)
    assert to_blame(found, BadStep(7, ["the gradient norm"]), sigma=8.0) == found


@given(st.lists(st.sampled_from([2.0, 2.1, 1.9, 30.0, math.nan]), min_size=1, max_size=12))
def test_at_least_one_row_is_always_to_blame(means: list[float]) -> None:
    """Or the same step would be met again, the same as it was."""
    bad = BadStep(7, ["spike"], {"web": 2.5})
    blamed = to_blame(rows("web", *means), bad, sigma=8.0)
    assert blamed and len({row.row for row in blamed}) == len(blamed)


@pytest.mark.parametrize("limits", [{}, {"law": 1.0}])
def test_a_source_without_rows_to_blame_leaves_the_whole_step_out(limits: dict[str, float]) -> None:
    found = rows("web", 2.0, 30.0, 2.0)
    assert to_blame(found, BadStep(7, ["spike"], limits), sigma=8.0) == found


def test_what_undone_updates_left_is_taken_away_and_nothing_else(tmp_path: Path) -> None:
    rundir: Any = RunDir(tmp_path)
    rundir.evals.mkdir()
    for step in (0, 4, 8):
        (rundir.checkpoints / step_name(step)).mkdir(parents=True)
        (rundir.checkpoint(step) / "COMPLETE").touch()
        rundir.eval_file(step).touch()
    (rundir.evals / "step_00000008.documents.parquet").touch()
    for name in ("claims", "failed"):
        (rundir.evals / "law" / name).mkdir(parents=True)
    for name in ("texts.parquet", "step_00000004.json", "step_00000008.json", "step_00000008.items.parquet",
                 "failed/step_00000008.json", "claims/step_00000008.lock"):  # fmt: skip
        (rundir.evals / "law" / name).touch()
    _undo_after(SimpleNamespace(rundir=rundir), 4)  # type: ignore[arg-type]
    assert sorted(path.name for path in rundir.checkpoints.iterdir()) == [step_name(0), step_name(4)]
    assert sorted(path.stem for path in rundir.evals.glob("step_*")) == [step_name(0), step_name(4)]
    left = {path.relative_to(rundir.evals / "law").as_posix() for path in rundir.evals.rglob("law/**/*.*")}
    assert left == {"texts.parquet", "step_00000004.json", "claims/step_00000008.lock"}  # which may be held


def test_attempts_are_counted_anew_after_a_checkpoint_behind_the_last_bad_step() -> None:
    nothing: Any = None
    recovery = Recovery(nothing, nothing)

    def counts(bad_step: int, newest: int) -> tuple[int, int, int]:
        recovery._count(bad_step, newest=newest)
        return recovery._attempts, recovery._tries, recovery._first_bad

    assert [counts(12, 10), counts(12, 10)] == [(1, 1, 12), (2, 2, 12)]
    assert counts(40, 10) == (3, 1, 40)  # elsewhere, but without progress
    assert counts(40, 30) == (4, 2, 40)
    assert counts(50, 45) == (1, 1, 50)  # a checkpoint of step 45: the steps before are behind it


class Kept:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Any] = []

    def write(self, record: Any) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def info(step: int) -> StepInfo:
    return StepInfo(step, 8 * step, {"web": 8.0 * step}, {"web": 8}, 1e-3, math.exp(step), 0.1, {})


def test_what_was_collected_of_undone_updates_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a window counts them twice."""
    sink = Kept()
    metrics = MetricsHook([sink], 10, Throughput(8, 0.0, 0.0, None), lambda step: {"web": 8 * step})
    for step in (5, 6, 7):
        metrics(info(step))
    limits = SimpleNamespace(spike_sigma=None, max_rollbacks=3)
    run: Any = SimpleNamespace(
        prepared=SimpleNamespace(plan=SimpleNamespace(global_batch_tokens=8)),
        config=SimpleNamespace(guard=limits, data=SimpleNamespace(packing="best_fit")),
        topology=SimpleNamespace(rank=0, world_size=1),
        rundir=RunDir(tmp_path),
        skipped=SkippedRows(),
        metrics=metrics,
        saver=SimpleNamespace(wait=lambda: None),
        event=lambda *arguments, **named: None,
    )
    monkeypatch.setattr(run_guard, "_row_losses", lambda *arguments: rows("web", 1.0, math.nan, 1.0))
    monkeypatch.setattr(run_guard, "_saved_steps", lambda run: [5])
    monkeypatch.setattr(Recovery, "_go_back", lambda self, at_most: at_most)
    loader: Any = SimpleNamespace(global_rows=lambda step: [])
    back = Recovery(run, loader)(NonFiniteError(8, ["nan"], {"web": math.inf}), [])
    assert (back.step, back.tokens_seen) == (5, 40)
    metrics(info(6))
    metrics.close()
    (record,) = sink.records
    assert (record["step"], record["steps"], record["loss"]) == (6, 2, 5.5)
