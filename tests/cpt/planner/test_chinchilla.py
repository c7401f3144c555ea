"""Chinchilla, the baseline: value, derivatives, and that it is blind to shares."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.laws.chinchilla import CHINCHILLA, chinchilla
from cpt.planner.laws.law import Inputs, Samples

THETA = np.array([1.7, 0.4, 0.34, 0.9, 0.28])


def inputs(params: list[float], tokens: list[float], share: float = 0.3) -> Inputs:
    count = len(params)
    shares = np.tile([share, 1 - share], (count, 1))
    rest = np.full(count, np.nan)
    return Inputs("general", ("general", "domain"), np.array(params), np.array(tokens), shares, rest, rest)


def test_the_value_is_the_formula() -> None:
    loss = chinchilla(THETA[None], inputs([1.8], [10.0]))[0][0, 0]
    assert loss == pytest.approx(1.7 + 0.4 * 1.8**-0.34 + 0.9 * 10**-0.28, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.05, 3.0), min_size=5, max_size=5), st.floats(0.01, 70), st.floats(0.01, 300))
def test_the_derivatives_are_those_of_the_value(theta: list[float], params: float, tokens: float) -> None:
    point, at = np.array(theta), inputs([params], [tokens])
    jacobian = chinchilla(point[None], at)[1][0, :, 0]
    steps = np.eye(5) * 1e-6
    high, low = (chinchilla(point + sign * steps, at)[0][:, 0] for sign in (1, -1))
    assert jacobian == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-5 * float(np.abs(jacobian).max()))


def test_a_fit_predicts_a_larger_budget_and_ignores_the_share() -> None:
    sizes, tokens = np.meshgrid([0.5, 1.8, 4.0], np.geomspace(1, 20, 6))
    seen = inputs(sizes.ravel().tolist(), tokens.ravel().tolist())
    losses = chinchilla(THETA[None], seen)[0][0]
    fitted = CHINCHILLA.fit(Samples(seen, losses, np.arange(len(seen))), 5, 0)
    wanted = inputs([1.8], [40.0])
    assert fitted.predict(wanted) == pytest.approx(chinchilla(THETA[None], wanted)[0][0], abs=2e-3)
    assert fitted.predict(inputs([1.8], [40.0], share=0.9)) == pytest.approx(fitted.predict(wanted), abs=1e-12)
    assert fitted.replicas(wanted).shape == (5, 1)
