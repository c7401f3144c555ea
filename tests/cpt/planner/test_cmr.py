"""CMR: the published constants and losses come back, turning points are found, and the law behaves as an entry."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.cmr import (
    CMR,
    EXPONENTIAL,
    FINANCE_CMR,
    TOKENS_PER_UNIT,
    CmrFit,
    critical_ratio,
    fit_cmr,
    fit_critical_ratio,
)
from cpt.planner.laws.delta_curves import CurvePoints, fit_delta_curves
from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.power_curves import (
    Slope,
    box_cox,
    box_cox_with_slope,
    fit_curves,
    fit_power,
    lagrangian,
    turning_point,
)
from cpt.rundir import DataError

# Finance domain loss at R = 1, .75, .5, 1/3 and, last, the measured loss at .25 that is predicted; and s of the fit.
TABLE_2 = {
    "460M": ((1.4628, 1.4844, 1.5122, 1.5387), 1.5561, 0.178),
    "940M": ((1.3723, 1.3910, 1.4155, 1.4385), 1.4538, 0.178),
    "1.6B": ((1.3242, 1.3416, 1.3643, 1.3854), 1.3994, 0.199),
    "3.1B": ((1.2585, 1.2750, 1.2965, 1.3170), 1.3305, 0.163),
}


def inputs(shares: FloatArray, tokens: FloatArray, target: str = "general", params: float = 1.0) -> Inputs:
    count = len(shares)
    rest = np.full(count, math.nan)
    columns = np.column_stack((shares, 1 - shares))
    return Inputs(target, (target, "other"), np.full(count, params), tokens, columns, rest, rest)


def grid(shares: list[float], tokens: FloatArray) -> tuple[FloatArray, FloatArray]:
    r, t = np.meshgrid(np.array(shares), tokens, indexing="ij")
    return r.ravel(), t.ravel()


def turning_loss(share: FloatArray, tokens: FloatArray) -> FloatArray:
    """General loss that rises and turns; the domain share is 1 - share."""
    ratio = 1 - share
    return np.asarray(2.8 + (0.02 + 0.04 * ratio) * tokens**0.3 - 0.006 * (1.2 - ratio) * tokens**0.6)


def samples(shares: list[float], tokens: FloatArray, noise: float = 0.0, params: float = 1.0) -> Samples:
    r, t = grid(shares, tokens)
    losses = turning_loss(r, t) + np.random.default_rng(0).normal(0, noise, len(r)) if noise else turning_loss(r, t)
    return Samples(inputs(r, t, params=params), losses, np.unique(r, return_inverse=True)[1])


@pytest.mark.parametrize(("model", "share"), [("460M", 0.2976), ("940M", 0.3489), ("1.6B", 0.4143), ("3.1B", 0.4783)])
def test_the_published_constants_give_the_published_critical_ratios(model: str, share: float) -> None:
    assert critical_ratio(20e9 / TOKENS_PER_UNIT, *FINANCE_CMR[model]) == pytest.approx(share, abs=5e-5)


@pytest.mark.parametrize("model", TABLE_2)
def test_the_loss_at_an_unseen_ratio_comes_within_a_hundredth_of_a_percent(model: str) -> None:
    losses, measured, exponent = TABLE_2[model]
    curve = fit_power((1.0, 0.75, 0.5, 1 / 3), losses)
    assert curve(0.25) == pytest.approx(measured, rel=1e-4)
    assert curve.exponent == pytest.approx(exponent, abs=2e-3)
    assert curve.alpha < 0


def test_an_exponent_held_negative_is_much_worse() -> None:
    losses, measured, _ = TABLE_2["460M"]
    error = abs(fit_power((1.0, 0.75, 0.5, 1 / 3), losses, (-2.0, -1e-3))(0.25) / measured - 1)
    assert 1e-3 < error < 4e-3


@pytest.mark.parametrize("exponent", [-1.2, -0.3, 0.0, 1e-5, 0.4, 1.5])
def test_power_curves_of_either_sign_are_recovered(exponent: float) -> None:
    x = np.linspace(-1.5, 0.5, 6)
    y = 2.0 - 0.3 * box_cox(x, np.array(exponent))
    found = fit_curves(x, y[None, None, :], np.ones((1, 6)))
    assert found.at(x[:, None])[:, 0] == pytest.approx(y, abs=1e-9)
    assert found.exponent[0, 0] == pytest.approx(exponent, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(-3, 3))
def test_the_slope_of_the_box_cox_form_is_its_derivative(x: float, exponent: float) -> None:
    step = 1e-5
    value, slope = box_cox_with_slope(np.array(x), np.array(exponent))
    around = (box_cox(np.array(x), np.array(exponent + h)) for h in (-step, step))
    low, high = around
    assert slope == pytest.approx((high - low) / (2 * step), rel=1e-5, abs=1e-6 * (1 + abs(value)))


def test_the_turning_point_of_the_reference_curves() -> None:
    general, domain = Slope.of_powers((0.03, 0.3), (-0.006, 0.6)), Slope.of_powers((-0.10, 0.2))
    assert turning_point(lagrangian(general, domain, 1000), 1e-3, 1e6) == pytest.approx(21.0908, abs=1e-3)
    assert turning_point(general, 1e-3, 1e6) == pytest.approx(21.2064, abs=1e-3)
    assert turning_point(Slope.of_powers((0.03, 0.3)), 1e-3, 1e6) is None


def reference_slope(ratio: float) -> Slope:
    general = Slope.of_powers((0.02 + 0.04 * ratio, 0.3), (-0.006 * (1.2 - ratio), 0.6))
    return lagrangian(general, Slope.of_powers((-(0.10 + 0.05 * ratio), 0.2)), 1000)


def test_the_reference_pipeline_gives_turning_points_feasible_set_and_critical_ratios() -> None:
    expected = {0.1: 7.2777, 0.2: 16.7389, 0.3: 37.1538, 0.4: 81.5388, 0.5: 180.915, 0.6: 415.757}
    for ratio, tokens in expected.items():
        assert turning_point(reference_slope(ratio), 1e-2, 1e5) == pytest.approx(tokens, rel=1e-4)
    assert [ratio for ratio in expected if reference_slope(ratio).at(math.log(100.0)) <= 0] == [0.1, 0.2, 0.3, 0.4]
    ratios = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
    turns = [turning_point(reference_slope(ratio), 1e-2, 1e5) for ratio in ratios]
    law = fit_critical_ratio([turn for turn in turns if turn is not None], ratios)
    for tokens, share in ((20.0, 0.2229), (50.0, 0.3371), (100.0, 0.4246)):
        assert law(tokens) == pytest.approx(share, abs=0.002)


def test_turning_points_come_back_from_fitted_curves() -> None:
    tokens = np.geomspace(0.5, 250.0, 25)
    ratios = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
    x = np.tile(np.log(tokens), (4, 1))
    losses = np.stack([turning_loss(np.array(1 - ratio), tokens) for ratio in ratios])
    middle = x.mean(axis=1)
    points = CurvePoints(x - middle[:, None], losses, np.ones_like(x), middle)
    curves = fit_delta_curves(points, 3, np.empty((0, *x.shape)))
    for row, ratio in enumerate(ratios):
        exact = turning_point(Slope.of_powers((0.02 + 0.04 * ratio, 0.3), (-0.006 * (1.2 - ratio), 0.6)), 0.01, 1e4)
        assert turning_point(curves.slope(row), 0.01, 1e4) == pytest.approx(exact, rel=0.02)


def test_the_law_predicts_losses_between_the_trained_shares() -> None:
    fitted = CMR.fit(samples([0.2, 0.4, 0.6, 0.8], np.geomspace(1, 100, 12)), 0, 0)
    share, tokens = grid([0.3, 0.5, 0.7], np.array([2.0, 30.0, 90.0]))
    assert fitted.predict(inputs(share, tokens)) == pytest.approx(turning_loss(share, tokens), abs=2e-3)


def test_replicates_spread_with_the_noise_and_repeat_with_the_seed() -> None:
    measured = samples([0.2, 0.4, 0.6, 0.8], np.geomspace(1, 100, 10), noise=0.003)
    share, tokens = grid([0.3, 0.5], np.array([30.0, 200.0]))
    fitted, again = (CMR.fit(measured, 40, 5).replicas(inputs(share, tokens)) for _ in range(2))
    assert fitted.shape == (40, 4)
    assert np.array_equal(fitted, again)
    spread = fitted.std(axis=0)
    assert 1e-4 < spread[0] < 0.01
    assert spread[1] > spread[0]  # 200 lies beyond the data


def test_endpoints_stay_out_of_the_fit_across_shares_while_three_others_are_left() -> None:
    tokens = np.geomspace(1, 100, 6)
    many = fit_cmr(samples([0.0, 0.2, 0.5, 0.8, 1.0], tokens))
    assert (many.sizes[0].weights[0] > 0).tolist() == [False, True, True, True, False]
    few = fit_cmr(samples([0.0, 0.2, 0.8, 1.0], tokens))
    assert (few.sizes[0].weights[0] > 0).tolist() == [False, True, True, True]
    exponential = fit_cmr(samples([0.0, 0.2, 0.8, 1.0], tokens), form=EXPONENTIAL, interior=False)
    assert (exponential.sizes[0].weights[0] > 0).all()


def test_few_budgets_and_few_shares_are_warned_of() -> None:
    fitted = fit_cmr(samples([0.2, 0.5, 0.8], np.array([1.0, 5.0, 10.0])))
    assert any("three shares" in text for text in fitted.warnings)
    assert any("a line in log tokens instead of two powers" in text for text in fitted.warnings)
    single = fit_cmr(samples([0.2, 0.5, 0.7, 0.8], np.array([5.0])))
    assert any("ignore the tokens" in text for text in single.warnings)
    assert np.isfinite(single.predict(inputs(np.array([0.0, 0.5, 1.0]), np.array([1.0, 5.0, 50.0])))).all()


def test_one_share_is_refused_with_what_to_do() -> None:
    with pytest.raises(DataError, match=r"share_general: 1 share at 1e\+09 parameters.*run pilots at other shares"):
        fit_cmr(samples([0.5], np.array([1.0, 5.0])))


def two_sizes() -> CmrFit:
    parts = [samples([0.2, 0.5, 0.8], np.array([1.0, 5.0]), params=params) for params in (0.5, 2.0)]
    shift = np.repeat([0.0, -0.5], len(parts[0]))
    columns = {
        name: np.concatenate([getattr(p.inputs, name) for p in parts])
        for name in ("params", "tokens", "shares", "lr", "base_loss")
    }
    joint = Inputs("general", ("general", "other"), **columns)
    return fit_cmr(Samples(joint, np.concatenate([p.losses for p in parts]) + shift, np.arange(len(shift))))


def test_each_model_size_has_its_own_curves_and_others_are_refused() -> None:
    fitted = two_sizes()
    share, tokens = np.array([0.5]), np.array([5.0])
    small, large = (fitted.predict(inputs(share, tokens, params=params)) for params in (0.501, 2.0))
    assert small - large == pytest.approx(0.5, abs=1e-6)
    with pytest.raises(DataError, match=r"params = 1e\+09: .* trained were 5e\+08, 2e\+09"):
        fitted.predict(inputs(share, tokens, params=1.0))
    assert {"alpha@0.5B", "s@2B", "b[0.5]@2B"} <= set(fitted.params)


def test_thousands_of_points_with_replicates_take_seconds_not_minutes() -> None:
    fitted = fit_cmr(samples([0.2, 0.4, 0.6, 0.8], np.geomspace(1, 100, 8), noise=0.002), 20)
    rng = np.random.default_rng(0)
    losses = fitted.replicas(inputs(rng.random(300), rng.uniform(1, 200, 300)))
    assert losses.shape == (20, 300)
    assert np.isfinite(losses).all()


def test_seeds_of_one_share_are_averaged() -> None:
    tokens = np.array([1.0, 4.0, 16.0, 64.0])
    one, two = samples([0.2, 0.5, 0.8], tokens), samples([0.2, 0.5, 0.8], tokens)
    both = Inputs(
        *(one.inputs.target, one.inputs.sources),
        *(np.concatenate((getattr(one.inputs, n), getattr(two.inputs, n))) for n in ("params", "tokens")),
        np.concatenate((one.inputs.shares, two.inputs.shares)),
        *(np.concatenate((getattr(one.inputs, n), getattr(two.inputs, n))) for n in ("lr", "base_loss")),
    )
    losses = np.concatenate((one.losses - 0.001, two.losses + 0.001))
    fitted = fit_cmr(Samples(both, losses, np.concatenate((one.runs, two.runs + 3))), 10)
    assert fitted.predict(one.inputs) == pytest.approx(fit_cmr(one).predict(one.inputs), abs=2e-3)
    assert (fitted.sizes[0].weights[0] == 2).all()
