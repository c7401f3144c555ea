"""The power-transfer law: recovery with one and with two terms, few pilots, derivatives, determinism."""

import numpy as np
import pytest
from numpy.typing import NDArray

from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.power_transfer import POWER_TRANSFER, power_transfer

ONE_TERM = [[1.6, 0, 1, 0, 1, 3.0, 0.4, 0.6, 0, 50.0, 2.0, 0.5]]
TWO_TERMS = [[1.2, 0, 1, 0, 1, 2.0, 0.5, 0.5, 0, 30.0, 3.0, 0.1, 1.5, 0.3, 0.8, 0, 0.2, 9.0, 2.0]]


def inputs_of(shares: NDArray[np.float64], tokens: NDArray[np.float64] | None = None) -> Inputs:
    ones, unknown = np.ones(len(shares)), np.full(len(shares), np.nan)
    sources = tuple("abcd"[: shares.shape[1]])
    return Inputs("other", sources, ones, ones if tokens is None else tokens, shares, unknown, unknown)


def sparse_mixtures(count: int) -> NDArray[np.float64]:
    shares = np.round(np.random.default_rng(3).dirichlet(np.full(3, 0.4), size=count), 3)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(("theta", "num_fitted"), [(ONE_TERM, 40), (TWO_TERMS, 80)], ids=["one term", "two terms"])
def test_losses_of_new_mixtures_of_a_known_law_are_predicted(theta: list[list[float]], num_fitted: int) -> None:
    shares = sparse_mixtures(num_fitted + 40)
    losses = power_transfer(np.array(theta), inputs_of(shares))[0][0]
    samples = Samples(inputs_of(shares), losses, np.arange(len(shares)))
    fitted = POWER_TRANSFER.fit(samples.select(np.arange(num_fitted)), 0, 0)
    assert ("K2" in fitted.params) == (len(theta[0]) > 12)
    assert np.abs(fitted.predict(samples.inputs) - losses)[num_fitted:].mean() < 0.01


def test_four_shares_of_two_sources_are_enough() -> None:
    general = np.array([0.125, 0.25, 0.375, 0.5])
    losses = np.array([2.9262, 2.8805, 2.8571, 2.8388])
    inputs = inputs_of(np.column_stack((general, 1 - general)))
    fitted = POWER_TRANSFER.fit(Samples(inputs, losses, np.arange(4)), 20, 0)
    assert np.abs(fitted.predict(inputs) - losses).max() < 0.005
    assert fitted.params["g"] == 0.5 and fitted.params["b"] == 0.25
    assert np.isfinite(fitted.replicas(inputs)).all()


def test_folds_of_few_pilots_at_several_token_counts_are_predicted() -> None:
    general, tokens = (grid.ravel() for grid in np.meshgrid([0.05, 0.1, 0.2, 0.4, 0.6], [1.0, 2.0, 4.0, 8.0]))
    losses = 1.5 + 0.4 / tokens**0.5 + 0.2 / general**0.3
    samples = Samples(inputs_of(np.column_stack((general, 1 - general)), tokens), losses, np.arange(20) % 5)
    masks = np.stack([general != 0.2, tokens < 8])
    predicted = POWER_TRANSFER.predict_folds(samples, masks, 0)
    assert np.abs(predicted - losses).max() < 0.05


def test_the_same_seed_gives_the_same_parameters() -> None:
    shares = sparse_mixtures(12)
    samples = Samples(inputs_of(shares), power_transfer(np.array(ONE_TERM), inputs_of(shares))[0][0], np.arange(12))
    first, second = (POWER_TRANSFER.fit(samples, 3, 5) for _ in range(2))
    assert first.params == second.params
    np.testing.assert_array_equal(first.replicas(samples.inputs), second.replicas(samples.inputs))


def test_the_derivatives_are_those_of_the_formula() -> None:
    inputs = inputs_of(np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6]]), np.array([0.5, 2.0, 8.0]))
    theta = np.array(TWO_TERMS)
    theta[0, [1, 3, 8, 15]] = 0.3, 0.2, 0.4, 0.6
    slopes = power_transfer(theta, inputs)[1][0]
    for at in range(theta.shape[1]):
        nudge = 1e-6 * (np.arange(theta.shape[1]) == at)
        numeric = (power_transfer(theta + nudge, inputs)[0][0] - power_transfer(theta - nudge, inputs)[0][0]) / 2e-6
        np.testing.assert_allclose(slopes[at], numeric, atol=1e-6)
