"""The learning-rate annealing law: one fit of two schedules predicts a third."""

import numpy as np
import pytest

from cpt.planner.curves import LossCurve, rise_end
from cpt.planner.laws.annealing import ANNEALING
from cpt.planner.laws.curve_law import Track, fit_curves, track_of

TRUTH = {"L0": 2.65, "A": 0.42, "alpha": 0.5, "C": 0.27}
PEAK, WARMUP, TOTAL = 2e-4, 100, 10_000


def curve(kind: str, noise: float = 0.0) -> LossCurve:
    step = np.arange(TOTAL)
    past = np.clip((step - WARMUP) / (TOTAL - 1 - WARMUP), 0, 1)
    shape = {
        "constant": np.ones(TOTAL),
        "cosine": 0.5 * (1 + np.cos(np.pi * past)),
        "wsd": np.minimum(1.0, (1 - past) / 0.1),
    }[kind]
    rates = PEAK * np.minimum(1.0, step / WARMUP) * shape
    steps = np.arange(200, TOTAL, 100)
    theta = np.array([list(TRUTH.values())])
    losses = ANNEALING.formula(theta, ANNEALING.prepare(Track(rates, steps, rise_end(rates))))[0][0]
    jitter = 1 + noise * np.random.default_rng(len(kind)).standard_normal(len(steps))
    return LossCurve(kind, steps, losses * jitter, rates, rise_end(rates))


def test_the_truth_is_recovered_from_two_schedules() -> None:
    fit = fit_curves(ANNEALING, [curve("constant"), curve("cosine")], num_starts=12)
    for name, value in TRUTH.items():
        assert fit.params[name] == pytest.approx(value, rel=1e-3)
    assert fit.warnings == ()


def test_a_schedule_left_out_is_predicted_within_a_thousandth_from_noisy_curves() -> None:
    fit = fit_curves(ANNEALING, [curve("constant", 1e-3), curve("cosine", 1e-3)], num_starts=12)
    unseen = curve("wsd")
    assert (np.abs(fit.predict(track_of(unseen)) / unseen.losses - 1) < 1e-3).all()


def test_derivatives_are_the_finite_differences() -> None:
    theta = np.array([list(TRUTH.values())])
    view = ANNEALING.prepare(track_of(curve("wsd")))
    slopes = ANNEALING.formula(theta, view)[1][0]
    for index in range(4):
        ahead, behind = theta.copy(), theta.copy()
        ahead[0, index] += 1e-6
        behind[0, index] -= 1e-6
        numeric = (ANNEALING.formula(ahead, view)[0] - ANNEALING.formula(behind, view)[0])[0] / 2e-6
        np.testing.assert_allclose(slopes[index], numeric, atol=1e-7)
