"""The dynamics of continual pre-training: published values, whole curves, and the law of mixtures made from it."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.curves import LossCurve
from cpt.planner.laws.cpt_dynamics import CPT_DYNAMICS, History, dynamics, fit_dynamics, replay
from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.lr_areas import annealing_area, forward_area

OLD = {"L0": 3.057, "A": 0.490, "alpha": 0.497, "C1": 0.299, "C2": 0.298, "B": 0.366, "E": 28.0, "beta": 0.189}
NEW = {"L0": 3.024, "A": 0.412, "alpha": 0.677, "C1": 0.278, "C2": 0.324, "B": -0.666, "E": 5662.0, "beta": 0.146}


@pytest.mark.parametrize(
    ("params", "losses"), [(OLD, [3.2581, 3.3647, 3.4156, 3.4269]), (NEW, [3.1465, 2.7163, 2.6569, 2.6293])]
)
def test_published_constants_give_the_published_losses(params: dict[str, float], losses: list[float]) -> None:
    s1_cpt = 2e-4 * np.array([0, 1_000, 5_000, 10_000])
    np.testing.assert_allclose(dynamics(6.0, s1_cpt, 0.0, 0.0, params), losses, atol=5.1e-5)


def continuation(params: dict[str, float], shape: np.ndarray, name: str) -> LossCurve:
    rates = 2e-4 * shape
    steps = np.arange(50, len(rates), 100)
    losses = dynamics(6.0, forward_area(rates), 0.0, annealing_area(rates), params)[steps]
    return LossCurve(name, steps, losses, rates, 0)


@pytest.mark.parametrize(("params", "old_data"), [(OLD, True), (NEW, False)])
@pytest.mark.parametrize("before", [6.0, None])
def test_fitted_on_two_continuations_it_predicts_a_third(
    params: dict[str, float], old_data: bool, before: float | None
) -> None:
    step = np.linspace(0, 1, 6000)
    shapes = {"constant": np.ones(6000), "linear": 1 - step, "wsd": np.minimum(1, (1 - step) / 0.2)}
    curves = {name: continuation(params, shape, name) for name, shape in shapes.items()}
    fit = fit_dynamics([curves["constant"], curves["linear"]], History(before), old_data=old_data)
    unseen = curves["wsd"]
    assert (np.abs(fit.predict(unseen.rates)[unseen.steps] / unseen.losses - 1) < 1e-3).all()
    assert (fit.params["B"] > 0) == old_data
    assert fit.params["C2"] == pytest.approx(params["C2"], rel=0.1)
    assert before is None or fit.params["S1_pt"] == before


SHARES = (0.125, 0.25, 0.5, 0.75)
THETA = np.array([2.87, -0.02, 0.06, 0.6, 8.0, 0.19, 0.5, 0.8, -2.0])


def inputs(target: str, base: float = 2.87) -> Inputs:
    tokens = np.tile(np.linspace(1, 10, 6), len(SHARES))
    shares = np.repeat(SHARES, 6)
    count = len(tokens)
    unknown = np.full(count, np.nan)
    both = np.stack([shares, 1 - shares], axis=1)
    return Inputs(target, ("general", "domain"), np.ones(count), tokens, both, unknown, np.full(count, base))


@given(
    st.lists(st.floats(-0.5, 0.5), min_size=8, max_size=8),
    st.one_of(st.floats(-4, 4), st.just(0.0)),
    st.sampled_from(["general", "domain"]),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_derivatives_of_the_mixture_law_are_the_finite_differences(
    moves: list[float], bend: float, target: str, known: bool
) -> None:
    theta = np.append(THETA[:8] * np.exp(moves), bend)
    seen = inputs(target, 2.87 if known else np.nan)
    slopes = replay(theta[None, :], seen)[1][0]
    for index in range(9):
        size = 1e-5 * max(1.0, abs(theta[index]))
        pair = np.stack([theta, theta])
        pair[0, index] -= size
        pair[1, index] += size
        losses = replay(pair, seen)[0]
        np.testing.assert_allclose(slopes[index], (losses[1] - losses[0]) / (2 * size), rtol=2e-4, atol=2e-6)


def test_without_tokens_the_loss_is_the_bases() -> None:
    seen = inputs("general")
    start = replace(seen, tokens=np.zeros(len(seen)))
    np.testing.assert_allclose(replay(THETA[None, :], start)[0][0], 2.87)


def test_more_domain_raises_the_general_loss_and_lowers_the_domain_loss() -> None:
    general, domain = (replay(THETA[None, :], inputs(target))[0][0].reshape(4, 6) for target in ("general", "domain"))
    assert (np.diff(general, axis=0) < 0).all()
    assert (np.diff(domain, axis=0) > 0).all()
    assert general[0, -1] > general[0, 0]  # it may rise with tokens


@pytest.mark.parametrize("base", [2.87, np.nan])
@pytest.mark.parametrize("target", ["general", "domain"])
def test_a_share_left_out_is_predicted_from_the_others(target: str, base: float) -> None:
    seen = inputs(target, base)
    samples = Samples(seen, replay(THETA[None, :], seen)[0][0], np.repeat(np.arange(4), 6))
    masks = samples.runs != np.arange(4)[:, None]
    predicted = CPT_DYNAMICS.predict_folds(samples, masks[1:3], 0)
    for row, mask in zip(predicted, masks[1:3], strict=True):
        assert np.abs(row - samples.losses)[~mask].max() < 2e-3


def test_rates_scale_the_area_only_where_every_observation_has_one() -> None:
    seen = inputs("general")
    at_unit = replace(seen, lr=np.full(len(seen), 1e-4))
    twice = replace(seen, lr=np.full(len(seen), 2e-4), tokens=seen.tokens / 2)
    expected = replay(THETA[None, :], seen)[0]
    np.testing.assert_allclose(replay(THETA[None, :], at_unit)[0], expected)
    np.testing.assert_allclose(replay(THETA[None, :], twice)[0], expected)
