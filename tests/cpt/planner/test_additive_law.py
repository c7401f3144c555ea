"""The additive law: its published minimiser, that the best mixture knows no size or budget, recovery, derivatives."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cpt.planner.laws.additive import ADDITIVE, additive, mixture_term
from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.simplex import search_mixture


def inputs_of(shares: NDArray[np.float64], params: float = 1.0, tokens: float = 1.0) -> Inputs:
    full, unknown = np.ones(len(shares)), np.full(len(shares), np.nan)
    return Inputs("other", tuple("abcd"[: shares.shape[1]]), params * full, tokens * full, shares, unknown, unknown)


def best_mixture(params: float, tokens: float) -> tuple[float, float]:
    theta = np.array([[0.0, 2.0, 0.3, 3.0, 0.4, 1.0, 2.0, 0.3, 0.5]])
    found = search_mixture(
        lambda shares: additive(theta, inputs_of(shares, params, tokens))[0][0], np.ones(2), np.ones(2)
    )
    return float(found[0]), float(mixture_term(theta[:, 5:7], theta[:, 7:], found[None])[0][0, 0])


@pytest.mark.parametrize(("params", "tokens"), [(1.0, 1.0), (0.01, 300.0), (70.0, 0.1)])
def test_the_published_minimiser_holds_at_every_size_and_budget(params: float, tokens: float) -> None:
    share, value = best_mixture(params, tokens)
    assert share == pytest.approx(0.1583, abs=2e-4)
    assert value == pytest.approx(0.414917, abs=1e-6)


def test_losses_of_new_mixtures_sizes_and_budgets_of_a_known_law_are_predicted() -> None:
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(3), size=80)
    size, tokens = rng.choice([0.1, 0.4, 1.0], 80), rng.choice([1.0, 5.0, 20.0], 80)
    inputs = Inputs("c", ("a", "b", "c"), size, tokens, shares, np.full(80, np.nan), np.full(80, np.nan))
    theta = np.array([[1.7, 0.3, 0.35, 0.4, 0.4, 0.5, 2.0, 1.0, 0.3, 0.6, 0.4]])
    losses = additive(theta, inputs)[0][0]
    known = np.arange(60)
    fitted = ADDITIVE.fit(Samples(inputs.select(known), losses[:60], known), 0, 0)
    assert np.abs(fitted.predict(inputs) - losses).max() < 2e-3


def test_with_few_mixtures_the_exponents_are_kept() -> None:
    shares = np.array([[0.1, 0.9], [0.3, 0.7], [0.5, 0.5], [0.8, 0.2]])
    losses = np.array([2.9, 2.85, 2.83, 2.82])
    fitted = ADDITIVE.fit(Samples(inputs_of(shares), losses, np.arange(4)), 0, 0)
    assert fitted.params["gamma_a"] == fitted.params["gamma_b"] == 0.5
    assert np.abs(fitted.predict(inputs_of(shares)) - losses).max() < 0.01


def test_a_source_without_a_share_costs_no_infinite_derivative() -> None:
    shares = np.array([[1.0, 0.0, 0.0], [0.0, 0.2, 0.8]])
    loss, slopes = additive(np.array([[1.0, 0, 1, 0, 1, 1.0, 2.0, 3.0, 0.3, 0.5, 0.7]]), inputs_of(shares))
    assert np.isfinite(loss).all() and np.isfinite(slopes).all()
    assert loss[0, 0] == pytest.approx(2.0)


def test_the_derivatives_are_those_of_the_formula() -> None:
    inputs = inputs_of(np.random.default_rng(0).dirichlet(np.ones(2), 5), 0.3, 4.0)
    theta = np.array([[2.0, 0.3, 0.4, 0.2, 0.5, 1.0, 2.0, 0.3, 0.5]])
    slopes = additive(theta, inputs)[1][0]
    for at in range(theta.shape[1]):
        nudge = 1e-6 * (np.arange(theta.shape[1]) == at)
        numeric = (additive(theta + nudge, inputs)[0][0] - additive(theta - nudge, inputs)[0][0]) / 2e-6
        np.testing.assert_allclose(slopes[at], numeric, atol=1e-7)
