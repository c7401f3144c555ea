"""What a run tells: windows add up exactly, every line of metrics.jsonl is JSON, nothing collected is lost at the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cpt.train.hooks import Hook
from cpt.train.metrics import ConsoleSink, JsonlSink, MetricsHook, Throughput
from cpt.train.phases import PHASES
from cpt.train.stepinfo import StepInfo


class Kept:
    """A sink that keeps its records."""

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self.closed = False

    def write(self, record: Mapping[str, Any]) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def step_info(step: int, *, sums: dict[str, float], counted: dict[str, int], **changed: Any) -> StepInfo:
    values = {"lr": 1e-3 * step, "grad_norm": 0.5, "step_seconds": 2.0, "seconds": {"data": 0.25}} | changed
    return StepInfo(step, step * 100, sums, counted, **values)


def hook(*sinks: Any, every: int = 2, peak_flops: float | None = None, **changed: Any) -> MetricsHook:
    throughput = Throughput(100, flops_per_token=6.0, flops_per_pair=2.0, peak_flops=peak_flops, num_devices=2)
    return MetricsHook(list(sinks), every, throughput, lambda step: {"a": step * 75, "b": step * 25}, **changed)


def test_a_windows_record_equals_the_hand_computation() -> None:
    kept = Kept()
    metrics = hook(kept, peak_flops=3000.0, clock=iter([100.0, 108.0]).__next__)
    pairs = {"attended_pairs": 300}
    metrics(step_info(1, sums={"a": 30.0, "b": 10.0}, counted={"a": 10, "b": 2}, step_seconds=1.0, **pairs))
    assert kept.records == []
    second = {"data": 0.75, "evaluation": 4.0}  # the evaluation after step 1, which is no part of any step
    metrics(step_info(2, sums={"a": 60.0, "b": 0.0}, counted={"a": 20, "b": 0}, step_seconds=3.0, seconds=second))
    (record,) = kept.records
    shown = {key: record[key] for key in record.keys() - {"memory_bytes", "memory", "time"}}
    assert shown == {
        "step": 2,
        "steps": 2,
        "tokens_seen": 200,
        "loss": 100.0 / 32,
        "loss_by_source": {"a": 3.0, "b": 5.0},
        "tokens_by_source": {"a": 150, "b": 50},
        "lr": 2e-3,
        "grad_norm": 0.5,
        "tokens_per_second": 200 / 4.0,
        "tokens_per_second_per_device": 200 / 4.0 / 2,
        "tokens_per_second_overall": 200 / 8.0,
        "flops_per_second": (200 * 6.0 + 300 * 2.0) / 4.0,
        "mfu": (200 * 6.0 + 300 * 2.0) / 4.0 / 3000.0,
        "step_seconds": 2.0,
        "phase_seconds": dict.fromkeys(PHASES, 0.0) | {"data": 0.5, "evaluation": 2.0},
    }
    assert record["memory_bytes"] > 2**20 and record["time"] > 1.7e9
    assert 2**20 < record["memory"]["host"] <= record["memory"]["host_peak"]


def test_a_window_counts_the_time_since_the_one_before() -> None:
    kept = Kept()
    metrics = hook(kept, every=1, clock=iter([0.0, 2.0, 12.0]).__next__)
    for step in (1, 2):
        metrics(step_info(step, sums={"a": 1.0}, counted={"a": 1}))
    assert [record["tokens_per_second_overall"] for record in kept.records] == [100 / 2.0, 100 / 10.0]
    assert [record["tokens_per_second"] for record in kept.records] == [50.0, 50.0]


def test_windows_do_not_leak_into_each_other() -> None:
    kept = Kept()
    metrics = hook(kept)
    for step in range(1, 5):
        metrics(step_info(step, sums={"a": float(step)}, counted={"a": 1}))
    assert [record["loss"] for record in kept.records] == [1.5, 3.5]


def test_a_source_without_counted_tokens_has_no_loss_rather_than_zero() -> None:
    kept = Kept()
    hook(kept, every=1)(step_info(1, sums={"a": 2.0, "b": 0.0}, counted={"a": 1, "b": 0}))
    assert kept.records[0]["loss_by_source"] == {"a": 2.0, "b": None} and kept.records[0]["mfu"] is None


def test_what_is_left_of_a_window_is_written_when_the_run_ends() -> None:
    kept = Kept()
    metrics = hook(kept, every=10)
    for step in (1, 2, 3):
        metrics(step_info(step, sums={"a": 3.0}, counted={"a": 1}))
    metrics.close()
    assert [record["step"] for record in kept.records] == [3] and kept.closed
    metrics.flush()
    assert len(kept.records) == 1


def test_nan_and_infinity_become_null_in_the_file(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1, "loss": float("nan"), "loss_by_source": {"a": float("inf"), "b": 1.5}})
    sink.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert record == {"step": 1, "loss": None, "loss_by_source": {"a": None, "b": 1.5}}


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write({"step": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_line_that_a_killed_run_left_cut_off_is_not_glued_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    sink = JsonlSink(path)
    sink.write({"step": 2})
    sink.close()
    assert path.read_text().splitlines() == ['{"step": 1}', '{"step": 2, "lo', '{"step": 2}']


def test_a_resumed_run_appends_without_an_empty_line(tmp_path: Path) -> None:
    for step in (1, 2):
        sink = JsonlSink(tmp_path / "metrics.jsonl")
        sink.write({"step": step})
        sink.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_without_a_terminal_each_record_is_one_plain_line(capsys: pytest.CaptureFixture[str]) -> None:
    console = ConsoleSink(num_steps=8, title="demo")
    hook(console)(step_info(2, sums={"a": 6.0, "b": 0.0}, counted={"a": 2, "b": 0}))
    console.close()
    line = capsys.readouterr().out
    assert line == "step 2/8  loss 3.000  a 3.000  lr 2.00e-03  norm 0.50  50 tok/s\n"


@pytest.mark.parametrize(
    ("every", "at", "due"),
    [
        (3, frozenset(), [3, 6]),
        (None, frozenset({0, 5}), [0, 5]),
        (4, frozenset({0, 7}), [0, 4, 7]),
        (None, frozenset(), []),
    ],
)
def test_a_hook_is_due_every_n_steps_and_at_named_ones(every: int | None, at: frozenset[int], due: list[int]) -> None:
    hook = Hook(print, every=every, at=at)
    assert [step for step in range(8) if hook.is_due(step)] == due
