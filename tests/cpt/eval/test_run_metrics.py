"""Every figure a gate may ask for has its name, its interval, or the reason why it is not known."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cpt.eval.comparing import compare_runs
from cpt.eval.gate import Measurement
from cpt.eval.results import pieces_file, read_pieces, record_file, write_pieces
from cpt.eval.run_metrics import run_metrics
from cpt.rundir import RunDir


@pytest.fixture
def run(tmp_path: Path, evaluations: Any) -> Path:
    """General text went from 2.0 over 2.5 to 2.2 nats, the domain from 3.0 to 2.4; 80 of 100 pairs were right, 60 are."""
    folder = tmp_path / "run"
    for step, web, law in ((0, 2.0, 3.0), (5, 2.5, 2.7), (10, 2.2, 2.4)):
        evaluations.losses(folder, step, web=web, law=law)
    evaluations.suite(folder, 0, 80)
    evaluations.suite(folder, 10, 60)
    return folder


def metrics_of(run: Path) -> dict[str, Measurement]:
    return run_metrics(run, compare_runs([run], resamples=200))


def test_gain_and_forgetting_are_there_with_their_intervals_and_over_the_base(run: Path) -> None:
    found = metrics_of(run)
    gain, forgetting = found["domain_gain"], found["general_forgetting"]
    assert (gain.value, forgetting.value) == (pytest.approx(0.6), pytest.approx(0.2))
    assert gain.low is not None and gain.low <= 0.6 <= (gain.high or 0)
    assert found["relative_domain_gain"].value == pytest.approx(0.6 / 3.0, rel=1e-2)
    assert found["relative_general_forgetting"].value == pytest.approx(0.2 / 2.0, rel=1e-2)
    assert found["relative_domain_gain"].low == pytest.approx(gain.low / 3.0, rel=1e-2)


def test_the_worst_of_all_evaluations_has_a_value_and_no_interval(run: Path) -> None:
    worst = metrics_of(run)["worst_general_forgetting"]
    assert worst.value == pytest.approx(0.5) and worst.high is None and "no interval" in worst.why


def test_levels_and_changes_of_sources_groups_and_tasks_have_names(run: Path) -> None:
    found = metrics_of(run)
    assert found["web.loss"].value == pytest.approx(2.2) and found["web.loss.change"].value == pytest.approx(0.2)
    assert found["web.loss"].high == pytest.approx(2.2 + 1.96 * 0.01, abs=1e-4)
    assert found["general.accuracy"].value == pytest.approx(0.6)
    for name in ("general.accuracy.change", "pairs.acc.change"):
        change = found[name]
        assert change.value == pytest.approx(-0.2) and change.high is not None and change.high < 0
    assert found["pairs.acc"].low == pytest.approx(0.6 - 1.96 * math.sqrt(0.24 / 99), abs=1e-3)
    assert found["pairs.other"].value == 0.5 and "standard error" in found["pairs.other"].why
    assert found["pairs.other.change"].value is None and "primary" in found["pairs.other.change"].why


def test_without_a_base_levels_are_known_and_changes_say_why_not(run: Path) -> None:
    RunDir(run).eval_file(0).unlink()
    record_file(RunDir(run).evals / "suite", 0).unlink()
    found = metrics_of(run)
    assert found["general.accuracy"].value == pytest.approx(0.6) and found["web.loss"].value == pytest.approx(2.2)
    for name in ("domain_gain", "relative_domain_gain", "general_forgetting", "worst_general_forgetting"):
        assert found[name].value is None and found[name].why
    assert found["general.accuracy.change"].value is None and "baseline" in found["general.accuracy.change"].why


def test_a_loss_that_is_not_finite_is_no_figure(run: Path, evaluations: Any) -> None:
    evaluations.losses(run, 10, web=None, law=2.4)
    found = metrics_of(run)
    assert found["web.loss"].value is None and found["general_forgetting"].value is None
    assert "not a finite number" in found["general_forgetting"].why
    assert found["domain_gain"].value == pytest.approx(0.6)


def test_what_is_finite_and_cannot_be_compared_is_not_called_otherwise(run: Path) -> None:
    path = pieces_file(RunDir(run).evals, 10)
    rows = [{**each, "tokens": 8} for each in read_pieces(path).to_pylist()]
    write_pieces(path, pa.Table.from_pylist(rows))
    gain = metrics_of(run)["domain_gain"]
    assert gain.value is None and "tokenised in another way" in gain.why and "finite" not in gain.why


def test_losses_of_an_older_version_have_values_and_no_intervals(tmp_path: Path, evaluations: Any) -> None:
    for step, web in ((0, 2.0), (10, 2.2)):
        evaluations.losses(tmp_path, step, web=web, law=3.0, pieces=False)
    found = metrics_of(tmp_path)["general_forgetting"]
    assert found.value == pytest.approx(0.2) and found.high is None


def test_against_another_run_the_worst_point_is_not_told(run: Path, tmp_path: Path, evaluations: Any) -> None:
    other = tmp_path / "other"
    for step in (0, 10):
        evaluations.losses(other, step, web=2.1, law=2.5)
    found = run_metrics(run, compare_runs([run], baseline=other, resamples=200))
    assert found["general_forgetting"].value == pytest.approx(0.1)
    assert found["worst_general_forgetting"].value is None and "base" in found["worst_general_forgetting"].why


def test_usual_benchmarks_that_were_not_run_are_known_and_not_measured(run: Path) -> None:
    found = metrics_of(run)
    for name in ("domain.accuracy", "copying.exact_match", "copying.token_accuracy.change"):
        assert found[name].value is None and "--suite" in found[name].why
