"""Search on the simplex: caps hold, shares sum to 1, known optima are found, and too few tokens are said in tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.mixing import MIXING
from cpt.planner.simplex import (
    at_scale,
    average_of_best,
    candidates,
    project,
    replicates,
    search_mixture,
    search_replicates,
    token_caps,
)
from cpt.rundir import DataError

Floats = NDArray[np.float64]


def gains(strength: Floats) -> tuple[Floats, Floats]:
    """sum of C_i sqrt(h_i) is largest at shares proportional to C_i^2."""
    return strength, strength**2 / (strength**2).sum()


def loss_of(strength: Floats, shares: Floats) -> Floats:
    return np.asarray(1 / (np.sqrt(shares) @ strength))


@st.composite
def feasible(draw: st.DrawFn) -> tuple[Floats, Floats]:
    """Prior and caps of two to eight sources, the caps sum to 1 or more."""
    number = draw(st.integers(2, 8))
    parts = st.lists(st.floats(0.001, 1.0), min_size=number, max_size=number)
    caps, prior = np.array(draw(parts)), np.array(draw(parts))
    return prior / prior.sum(), caps * max(1.0, draw(st.floats(1.0, 3.0)) / caps.sum())


@given(feasible(), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_candidates_sum_to_one_and_stay_below_their_caps(setting: tuple[Floats, Floats], seed: int) -> None:
    prior, caps = setting
    pool = candidates(prior, caps, seed, 50)
    np.testing.assert_allclose(pool.sum(axis=1), 1.0, atol=1e-9)
    assert (pool >= 0).all() and (pool <= caps).all()


@given(feasible())
@settings(max_examples=15, deadline=None)
def test_a_search_sums_to_one_stays_below_its_caps_and_beats_the_prior(setting: tuple[Floats, Floats]) -> None:
    prior, caps = setting
    strength = np.linspace(1.0, 3.0, len(prior))
    best = search_mixture(lambda shares: loss_of(strength, shares), prior, caps, num_candidates=64)
    assert best.sum() == pytest.approx(1.0, abs=1e-9)
    assert (best >= 0).all() and (best <= caps).all()
    assert loss_of(strength, best[None])[0] <= loss_of(strength, project(prior[None], caps))[0] + 1e-12


@pytest.mark.parametrize("num_sources", [2, 5, 12])
def test_the_optimum_of_a_convex_law_is_found_within_a_thousandth(num_sources: int) -> None:
    strength, optimum = gains(np.random.default_rng(num_sources).uniform(0.5, 3.0, num_sources))
    ones = np.ones(num_sources)
    best = search_mixture(lambda shares: loss_of(strength, shares), ones / num_sources, ones, num_candidates=512)
    np.testing.assert_allclose(best, optimum, atol=1e-3)


def test_a_cap_that_binds_sends_the_rest_to_the_others_by_their_worth() -> None:
    strength = np.array([3.0, 1.0, 1.0])
    best = search_mixture(lambda shares: loss_of(strength, shares), np.ones(3) / 3, np.array([0.4, 1.0, 1.0]))
    np.testing.assert_allclose(best, [0.4, 0.3, 0.3], atol=1e-3)


def test_a_law_of_steps_is_searched_without_derivatives() -> None:
    best = search_mixture(lambda shares: np.ceil(20 * np.abs(shares[:, 0] - 0.7)), np.ones(3), np.ones(3))
    assert abs(best[0] - 0.7) <= 0.05


def test_the_mean_of_the_best_lies_near_the_optimum() -> None:
    strength, optimum = gains(np.array([1.0, 1.5, 2.0]))
    best = average_of_best(lambda shares: loss_of(strength, shares), np.ones(3), np.ones(3), num_candidates=4000)
    assert best.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(best, optimum, atol=0.03)


def test_each_replicate_finds_its_own_optimum() -> None:
    strengths = np.random.default_rng(0).uniform(0.5, 2.0, (6, 4))
    objectives = [lambda shares, one=one: loss_of(one, shares) for one in strengths]
    found = search_replicates(objectives, np.full(4, 0.25), np.full(4, 0.25), np.ones(4))
    np.testing.assert_allclose(found, strengths**2 / (strengths**2).sum(axis=1, keepdims=True), atol=1e-3)
    assert search_replicates([], np.full(4, 0.25), np.full(4, 0.25), np.ones(4)).shape == (0, 4)


def test_a_fitted_law_and_its_replicates_are_searched() -> None:
    shares = np.random.default_rng(2).dirichlet(np.ones(3), size=30)
    ones, unknown = np.ones(30), np.full(30, np.nan)
    losses = 2.0 + np.exp(shares @ np.array([0.0, -2.0, 0.5])) * np.exp(0.01 * np.sin(99 * shares[:, 0]))
    inputs = Inputs("t", ("a", "b", "c"), ones, ones, shares, unknown, unknown)
    fitted = MIXING.fit(Samples(inputs, losses, np.arange(30)), 4, 0)
    caps = np.array([1.0, 0.6, 1.0])
    best = search_mixture(at_scale(fitted, "t", ("a", "b", "c"), 1.0, 1.0), np.ones(3), caps, num_candidates=100)
    np.testing.assert_allclose(best, [0.4, 0.6, 0.0], atol=1e-3)
    objectives = [at_scale(one, "t", ("a", "b", "c"), 1.0, 1.0) for one in replicates(fitted)]
    np.testing.assert_allclose(search_replicates(objectives, best, np.ones(3), caps), np.tile(best, (4, 1)), atol=1e-3)


def test_the_same_seed_gives_the_same_mixture() -> None:
    ones = np.ones(4)
    first, second = (average_of_best(lambda shares: shares[:, 1], ones, ones, seed=7, num_candidates=500) for _ in "ab")
    np.testing.assert_array_equal(first, second)


def test_caps_come_from_available_tokens_and_passes() -> None:
    np.testing.assert_allclose(token_caps(np.array([10e9, 1e9]), 20e9, 4), [1.0, 0.2])


def test_too_few_tokens_are_said_in_tokens() -> None:
    with pytest.raises(DataError, match=r"4e\+09 tokens are missing; .*allow 5 epochs") as caught:
        token_caps(np.array([3e9, 1e9]), 20e9, 4, ("web", "med"))
    assert "web 3e+09, med 1e+09" in str(caught.value)


def test_caps_that_cannot_fill_a_mixture_are_refused() -> None:
    with pytest.raises(DataError, match=r"80.0% of the tokens, 20.0% of the tokens are missing"):
        search_mixture(lambda shares: shares[:, 0], np.ones(2), np.array([0.5, 0.3]))
