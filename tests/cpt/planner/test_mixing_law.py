"""Data mixing laws: the critical share of the published four points, recovery of a known law, derivatives."""

import numpy as np
from numpy.typing import NDArray

from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.mixing import MIXING, mixing


def inputs_of(shares: NDArray[np.float64], tokens: NDArray[np.float64] | None = None, target: str = "other") -> Inputs:
    ones, unknown = np.ones(len(shares)), np.full(len(shares), np.nan)
    sources = tuple("abcdefgh"[: shares.shape[1]])
    return Inputs(target, sources, ones, ones if tokens is None else tokens, shares, unknown, unknown)


def test_four_published_points_give_the_published_critical_share() -> None:
    general = np.array([0.125, 0.25, 0.375, 0.5])
    losses = np.array([2.9262, 2.8805, 2.8571, 2.8388])
    fitted = MIXING.fit(Samples(inputs_of(np.column_stack((general, 1 - general))), losses, np.arange(4)), 0, 0)
    grid = np.linspace(0.2, 0.4, 20_001)
    predicted = fitted.predict(inputs_of(np.column_stack((grid, 1 - grid))))
    critical = grid[np.argmin(np.abs(predicted - 2.87337))]
    assert 0.283 <= critical <= 0.287


def test_losses_of_new_mixtures_of_a_known_law_are_predicted() -> None:
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.ones(4), size=60)
    transfer = np.array([0.5, -1.0, 0.1, -3.0])
    losses = 2.1 + np.exp(shares @ transfer)
    fitted = MIXING.fit(Samples(inputs_of(shares[:30]), losses[:30], np.arange(30)), 0, 0)
    np.testing.assert_allclose(fitted.predict(inputs_of(shares[30:])), losses[30:], atol=1e-4)
    assert abs(fitted.params["c"] - 2.1) < 0.01 and abs(fitted.params["t_b"] + 1.0) < 0.02


def test_a_loss_that_rises_with_tokens_at_low_replay_is_represented() -> None:
    general, tokens = (grid.ravel() for grid in np.meshgrid([0.05, 0.1, 0.2, 0.4, 0.6], [1.0, 2.0, 4.0, 8.0, 16.0]))
    losses = 2.2 + 0.3 / tokens**0.5 + tokens**0.2 * np.exp(-1.0 - 6.0 * general)
    inputs = inputs_of(np.column_stack((general, 1 - general)), tokens)
    fitted = MIXING.fit(Samples(inputs, losses, np.arange(25) % 5), 4, 0)
    assert np.abs(fitted.predict(inputs) - losses).max() < 2e-3
    assert fitted.params["kappa"] > 0.05
    assert fitted.replicas(inputs).shape == (4, 25)


def test_the_derivatives_are_those_of_the_formula() -> None:
    inputs = inputs_of(np.random.default_rng(0).dirichlet(np.ones(3), 5), np.array([0.5, 1.0, 2.0, 4.0, 8.0]))
    theta = np.array([[2.0, 0.3, 0.4, 0.2, 0.5, 0.1, -0.5, 0.2, -2.0]])
    slopes = mixing(theta, inputs)[1][0]
    nudge = 1e-6
    for at in range(theta.shape[1]):
        moved = theta + nudge * (np.arange(theta.shape[1]) == at)
        numeric = (mixing(moved, inputs)[0][0] - mixing(2 * theta - moved, inputs)[0][0]) / (2 * nudge)
        np.testing.assert_allclose(slopes[at], numeric, atol=1e-7)
