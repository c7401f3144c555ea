"""The fitting harness: finds the optimum that a general optimiser finds, holds bounds, names flat directions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from cpt.planner.fitting import (
    HUBER_DELTA,
    FitProblem,
    bootstrap_weights,
    fit_best,
    fit_each,
    flat_parameters,
    huber,
    log_residuals,
    pinned,
    positive,
    random_starts,
    refit,
    solve,
)

X = np.geomspace(0.1, 20, 40)


def power_law(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """e + b x^-beta with its derivatives."""
    e, b, beta = theta.T[:, :, None]
    decay = np.exp(-beta * np.log(X))
    return e + b * decay, np.stack([np.ones_like(decay), decay, -b * decay * np.log(X)], axis=1)


PARAMETERS = (
    positive("e", 0.1, 10, (0.5, 3)),
    positive("b", 1e-4, 10, (0.01, 2)),
    positive("beta", 0.01, 3, (0.05, 1.5)),
)
TRUE = np.array([1.7, 0.6, 0.4])


def noisy(seed: int = 0, size: float = 0.002) -> np.ndarray:
    exact = power_law(TRUE[None, :])[0][0]
    return np.asarray(exact * np.exp(size * np.random.default_rng(seed).standard_t(2, size=len(X))))


def problem(losses: np.ndarray) -> FitProblem:
    return FitProblem(PARAMETERS, power_law, losses)


def test_exact_data_give_the_parameters_back() -> None:
    found = fit_best(problem(power_law(TRUE[None, :])[0][0]))
    assert np.allclose(found.theta[0], TRUE, rtol=1e-5)
    assert found.converged[0]


@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_is_as_good_as_that_of_a_general_optimiser(seed: int) -> None:
    losses = noisy(seed)

    def objective(z: np.ndarray) -> float:
        return float(huber(log_residuals(power_law(np.exp(z)[None, :])[0][0], losses)).mean())

    ours = fit_best(problem(losses)).objective[0]
    options = {"maxiter": 20_000, "xatol": 1e-10, "fatol": 1e-16}
    theirs = minimize(objective, np.log(TRUE), method="Nelder-Mead", options=options).fun
    assert ours <= theirs * (1 + 1e-6)


def test_huber_is_quadratic_inside_delta_and_linear_outside() -> None:
    assert huber(np.array([0.5 * HUBER_DELTA])) == pytest.approx(0.125 * HUBER_DELTA**2)
    assert huber(np.array([-3 * HUBER_DELTA])) == pytest.approx(2.5 * HUBER_DELTA**2)


def test_one_wild_point_hardly_moves_the_fit() -> None:
    losses = power_law(TRUE[None, :])[0][0].copy()
    losses[7] *= 1.5
    assert np.allclose(fit_best(problem(losses)).theta[0], TRUE, rtol=2e-3)


def test_points_of_weight_zero_do_not_count() -> None:
    losses = power_law(TRUE[None, :])[0][0].copy()
    losses[:5] *= 2
    weights = np.ones((2, len(X)))
    weights[:, :5] = 0
    assert np.allclose(fit_each(problem(losses), weights), TRUE, rtol=1e-4)


def test_a_pinned_parameter_keeps_its_value_and_bounds_hold() -> None:
    parameters = (positive("e", 0.1, 1.5, (0.5, 1.5)), PARAMETERS[1], pinned("beta", 0.5))
    found = fit_best(FitProblem(parameters, power_law, noisy()))
    assert found.theta[0][2] == 0.5
    assert found.theta[0][0] <= 1.5 * (1 + 1e-12)


def test_the_same_seed_gives_the_same_answer_and_starts_cover_their_ranges() -> None:
    assert np.array_equal(fit_best(problem(noisy()), seed=5).theta, fit_best(problem(noisy()), seed=5).theta)
    starts = np.log(random_starts(PARAMETERS, 60, 1)[:, 0])
    counts, _ = np.histogram(starts, bins=60, range=(np.log(0.5), np.log(3)))
    assert counts.tolist() == [1] * 60


def test_a_batch_solves_each_problem_as_if_it_were_alone() -> None:
    losses, weights = noisy(), bootstrap_weights(np.arange(len(X)), 3, 0)
    together = refit(problem(losses), TRUE, weights)
    for row, theta in zip(weights, together, strict=True):
        alone = solve(problem(losses), TRUE[None, :], row[None, :], iterations=60).theta[0]
        assert np.allclose(alone, theta, rtol=1e-9)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6), st.integers(0, 1000))
def test_bootstrap_weights_are_one_per_run_and_average_one(runs: int, points: int, seed: int) -> None:
    index = np.repeat(np.arange(runs), points)
    weights = bootstrap_weights(index, 5, seed).reshape(5, runs, points)
    assert np.allclose(weights, weights[:, :, :1])
    assert np.allclose(weights[:, :, 0].mean(axis=1), 1)
    assert (weights > 0).all()


def test_parameters_on_a_flat_direction_are_named_and_others_are_not() -> None:
    def twins(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """a b x^-beta: only the product of a and b shows."""
        a, b, beta = theta.T[:, :, None]
        loss = a * b * np.exp(-beta * np.log(X))
        return loss, np.stack([loss / a, loss / b, -loss * np.log(X)], axis=1)

    parameters = (positive("a", 0.1, 10, (0.5, 2)), positive("b", 0.1, 10, (0.5, 2)), PARAMETERS[2])
    theta = np.array([1.2, 0.9, 0.3])
    losses = twins(theta[None, :])[0][0] * np.exp(0.002 * np.random.default_rng(0).normal(size=len(X)))
    assert flat_parameters(FitProblem(parameters, twins, losses), theta) == ("a", "b")
    assert flat_parameters(problem(noisy()), TRUE) == ()


def test_a_prediction_below_zero_is_a_bad_start_and_not_a_crash() -> None:
    def line(theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        loss = theta[:, :1] - theta[:, 1:] * X
        return loss, np.stack([np.ones_like(loss), np.broadcast_to(-X, loss.shape)], axis=1)

    parameters = (positive("a", 0.1, 100, (0.1, 90)), positive("b", 1e-3, 10, (0.01, 9)))
    losses = 45.0 - 2.0 * X
    assert np.allclose(fit_best(FitProblem(parameters, line, losses)).theta[0], [45.0, 2.0], rtol=1e-4)
