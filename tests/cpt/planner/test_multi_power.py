"""The multi-power law: its sum over steps, its derivatives, what a fit recovers and predicts, and the verb's facts."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cpt.planner import predict_curve as verb
from cpt.planner.curve_figure import draw_curve
from cpt.planner.curves import LossCurve, rise_end
from cpt.planner.laws.curve_law import CurveFit, CurveLaw, Track, errors_of, fit_curves, track_of
from cpt.planner.laws.multi_power import MULTI_POWER, MULTI_POWER_TIED, TIED_GAMMA, TIED_POWER
from cpt.planner.picture_style import save_figure
from cpt.problems import ConfigError
from cpt.rundir import DataError

PEAK, WARMUP, TOTAL = 3e-4, 60, 1200
MPL = np.array([2.9, 0.4, 0.5, 300.0, 2.0, 0.6, 0.6])
TIED = np.array([2.9, 0.4, 0.5, 100.0, 0.6, 0.05])


def schedule(kind: str, total: int = TOTAL) -> np.ndarray:
    step = np.arange(total)
    past = np.clip((step - WARMUP) / (total - 1 - WARMUP), 0, 1)
    shapes = {
        "constant": np.ones(total),
        "cosine": 0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * past)),
        "drop": np.where(step < total // 3, 1.0, 0.3),
        "linear": np.minimum(1.0, np.maximum(0.0, (1 - past) / 0.3)),
    }
    return np.asarray(PEAK * np.minimum(1.0, step / WARMUP) * shapes[kind])


def naive(rates: np.ndarray, t: int, theta: np.ndarray, *, tied: bool) -> float:
    """The formula, step by step."""
    if tied:
        floor, a, alpha, b, c, kappa = theta
        beta, gamma, power = alpha, TIED_GAMMA, TIED_POWER
    else:
        (floor, a, alpha, b, c, beta, gamma), kappa, power = theta, 0.0, 1.0
    area = np.cumsum(rates)
    k = np.arange(1, t + 1)
    x = np.maximum(rates[k], 1e-12) ** -gamma * (area[t] - area[k - 1])
    drop = rates[k - 1] ** power - rates[k] ** power
    won = (drop * (1 - (1 + c * x) ** -beta)).sum()
    return float(floor + a * area[t] ** -alpha - b * area[t] ** -kappa * won)


def predict(law: CurveLaw, theta: np.ndarray, rates: np.ndarray, steps: np.ndarray) -> np.ndarray:
    return law.formula(theta[None, :], law.prepare(Track(rates, steps, rise_end(rates))))[0][0]


@pytest.mark.parametrize("kind", ["constant", "cosine", "drop", "linear"])
@pytest.mark.parametrize("law", [MULTI_POWER, MULTI_POWER_TIED], ids=lambda law: law.name)
def test_the_sum_over_blocks_is_the_sum_over_steps(law: CurveLaw, kind: str) -> None:
    rates, steps = schedule(kind, 3000), np.array([80, 400, 999, 1000, 1001, 1500, 2999])
    theta, tied = (TIED, True) if law is MULTI_POWER_TIED else (MPL, False)
    exact = [naive(rates, int(t), theta, tied=tied) for t in steps]
    np.testing.assert_allclose(predict(law, theta, rates, steps), exact, atol=5e-5)


@given(st.lists(st.floats(-0.4, 0.4), min_size=7, max_size=7), st.sampled_from(["cosine", "drop", "linear"]))
@settings(max_examples=25, deadline=None)
def test_derivatives_are_the_finite_differences(moves: list[float], kind: str) -> None:
    for law, middle in ((MULTI_POWER, MPL), (MULTI_POWER_TIED, TIED)):
        theta = middle * np.exp(moves[: len(middle)])
        view = law.prepare(Track(schedule(kind), np.array([70, 300, 401, 800, 1199]), WARMUP))
        _, slopes = law.formula(theta[None, :], view)
        for index, value in enumerate(theta):
            pair = np.stack([theta, theta])
            pair[0, index] -= 1e-6 * value
            pair[1, index] += 1e-6 * value
            losses, _ = law.formula(pair, view)
            numeric = (losses[1] - losses[0]) / (2e-6 * value)
            np.testing.assert_allclose(slopes[0, index], numeric, rtol=1e-5, atol=1e-6 / value)


def measured(law: CurveLaw, theta: np.ndarray, kind: str, total: int = TOTAL) -> LossCurve:
    rates, steps = schedule(kind, total), np.arange(WARMUP, total, 20)
    return LossCurve(kind, steps, predict(law, theta, rates, steps), rates, rise_end(rates))


def test_fitted_on_three_schedules_it_predicts_a_fourth_and_a_longer_one() -> None:
    for law, theta in ((MULTI_POWER, MPL), (MULTI_POWER_TIED, TIED)):
        fit = fit_curves(law, [measured(law, theta, kind) for kind in ("constant", "cosine", "drop")], num_starts=16)
        for unseen in (measured(law, theta, "linear"), measured(law, theta, "cosine", 3 * TOTAL)):
            assert errors_of(fit.predict(track_of(unseen)), unseen.losses).mae < 5e-4


def test_the_tied_law_recovers_its_parameters() -> None:
    curves = [measured(MULTI_POWER_TIED, TIED, kind) for kind in ("constant", "cosine", "drop")]
    fit = fit_curves(MULTI_POWER_TIED, curves, num_starts=16)
    np.testing.assert_allclose(list(fit.params.values()), TIED, rtol=0.02)


def test_a_schedule_that_ends_at_zero_or_starts_without_a_rate_gives_finite_losses() -> None:
    rates = np.concatenate([schedule("linear"), np.zeros(50)])
    for law, theta in ((MULTI_POWER, MPL), (MULTI_POWER_TIED, TIED)):
        fit = CurveFit(law, (), theta, ())
        assert np.isfinite(fit.predict(Track(rates, np.array([0, 1, 5, 1249]), WARMUP))).all()


def test_constant_curves_alone_leave_the_gain_of_a_decay_open_and_say_so() -> None:
    fit = fit_curves(MULTI_POWER, [measured(MULTI_POWER, MPL, "constant")], num_starts=8)
    assert any("do not settle" in warning for warning in fit.warnings)


def write_curve(folder: Path, curve: LossCurve) -> Path:
    path = folder / f"{curve.name}.csv"
    lr = curve.rates[curve.steps]
    rows = zip(curve.steps.tolist(), lr.tolist(), curve.losses.tolist(), strict=True)
    path.write_text("step,lr,loss\n" + "".join(f"{step},{rate!r},{loss!r}\n" for step, rate, loss in rows))
    return path


def files(folder: Path) -> tuple[list[Path], Path]:
    curves = [write_curve(folder, measured(MULTI_POWER, MPL, kind)) for kind in ("constant", "cosine", "drop")]
    target = folder / "target.csv"
    target.write_text("step,lr\n" + "".join(f"{i},{rate!r}\n" for i, rate in enumerate(schedule("linear").tolist())))
    return curves, target


def test_the_facts_of_a_prediction_hold_the_losses_of_the_schedule(tmp_path: Path) -> None:
    curves, target = files(tmp_path)
    facts = verb.predict_curve(curves, target, "mpl", 0, WARMUP)
    assert facts["law"] == "mpl" and set(facts["params"]) == {"L0", "A", "alpha", "B", "C", "beta", "gamma"}
    assert len(facts["steps"]) == len(facts["loss"]) == len(facts["lr"]) <= verb.MAX_POINTS
    assert (facts["steps"][0], facts["steps"][-1]) == (WARMUP, TOTAL - 1) and facts["fit"]["mae"] < 1e-3
    truth = naive(schedule("linear"), TOTAL - 1, MPL, tied=False)
    assert facts["loss"][-1] == pytest.approx(truth, abs=2e-3)
    assert any("falls to 0" in warning for warning in facts["warnings"])


def test_the_facts_are_json_and_the_same_each_time(tmp_path: Path) -> None:
    curves, target = files(tmp_path)
    facts = verb.predict_curve(curves, target, "annealing", 0)
    again = verb.predict_curve(curves, target, "annealing", 0)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts == again


def test_a_prediction_is_shown_as_a_table_and_drawn_as_png_and_svg(tmp_path: Path) -> None:
    curves, target = files(tmp_path)
    facts = verb.predict_curve(curves, target, "annealing", 0)
    with open(os.devnull, "w") as nowhere:
        console = Console(file=nowhere, record=True, width=100)
        console.print(verb.render(facts))
    text = console.export_text()
    assert "mean absolute error" in text and "1,199" in text and "Warning" in text
    png, svg = save_figure(draw_curve(facts), tmp_path / "curve")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "predicted: target" in svg.read_text() and "is predicted to end at" in svg.read_text()


def test_a_longer_schedule_and_another_peak_are_warned_of(tmp_path: Path) -> None:
    curves, target = files(tmp_path)
    target.write_text("step,lr\n60,0.0006\n4000,0.0006\n")
    warnings = " ".join(verb.predict_curve(curves, target, "annealing", 0)["warnings"])
    assert "times as far" in warnings and "highest rate" in warnings


def test_an_unknown_law_no_curve_too_few_rows_and_a_short_schedule_are_refused(tmp_path: Path) -> None:
    curves, target = files(tmp_path)
    with pytest.raises(ConfigError, match="--law"):
        verb.predict_curve(curves, target, "loess", 0)
    with pytest.raises(ConfigError, match="at least one"):
        verb.predict_curve([], target, "mpl", 0)
    lines = curves[0].read_text().splitlines()
    curves[0].write_text("\n".join(lines[:10]))
    with pytest.raises(DataError, match="rows after the warm-up for the 7 parameters"):
        verb.predict_curve(curves[:1], target, "mpl", 0)
    target.write_text("step,lr\n1,0.0003\n20,0.0003\n")
    with pytest.raises(DataError, match="ends before"):
        verb.predict_curve(curves[1:], target, "mpl", 0)
