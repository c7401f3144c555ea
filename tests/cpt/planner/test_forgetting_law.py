"""The forgetting law: its reduction factor, that general loss rises with tokens, derivatives, and recovery."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.forgetting import FORGETTING, forgetting, reduction
from cpt.planner.laws.law import Inputs, Samples

GENERAL = np.array([2.8, 0.05, 20.0, 0.5, 0.3])
DOMAIN = np.array([1.1, 0.4, 0.2, 0.15])


def inputs(target: str, shares: FloatArray, tokens: FloatArray, *, params: float = 1.0, base: float = 2.8) -> Inputs:
    count = len(shares)
    columns = np.column_stack((shares, 1 - shares))
    sizes = np.full(count, params)
    return Inputs(target, ("general", "domain"), sizes, tokens, columns, np.full(count, np.nan), np.full(count, base))


@pytest.mark.parametrize(("injection", "expected"), [(1e4, (0.3015, 0.0995, 0.0447)), (829, (0.7394, 0.3281, 0.1535))])
def test_the_reduction_by_injected_data_is_the_published_one(injection: float, expected: tuple[float, ...]) -> None:
    assert [reduction(share, injection, 0.5) for share in (0.001, 0.01, 0.05)] == pytest.approx(expected, abs=6e-5)


def test_general_loss_rises_with_tokens_and_falls_with_the_general_share() -> None:
    tokens = np.array([1.0, 10.0, 100.0])
    low, high = (forgetting(GENERAL[None], inputs("general", np.full(3, p), tokens))[0][0] for p in (0.01, 0.5))
    assert (np.diff(low) > 0).all()
    assert (high < low).all()
    none = forgetting(GENERAL[None], inputs("general", np.ones(3), tokens))[0][0]
    assert none == pytest.approx(2.8, abs=1e-12)


def test_the_loss_of_the_base_comes_from_the_data_where_it_is_known() -> None:
    one = np.array([0.5])
    known = forgetting(GENERAL[None], inputs("general", one, one, base=3.0))[0][0, 0]
    unknown = forgetting(GENERAL[None], inputs("general", one, one, base=np.nan))[0][0, 0]
    assert known - unknown == pytest.approx(0.2, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["general", "domain"]),
    st.lists(st.floats(0.05, 2.0), min_size=5, max_size=5),
    st.tuples(st.floats(0.0, 0.99), st.floats(0.05, 50), st.floats(0.05, 10)),
)
def test_the_derivatives_are_those_of_the_value(
    target: str, values: list[float], point: tuple[float, float, float]
) -> None:
    share, tokens, params = point
    theta = np.array(values if target == "general" else values[:4])
    at = inputs(target, np.array([share]), np.array([tokens]), params=params, base=np.nan)
    jacobian = forgetting(theta[None], at)[1][0, :, 0]
    steps = np.eye(len(theta)) * 1e-6
    high, low = (forgetting(theta + sign * steps, at)[0][:, 0] for sign in (1, -1))
    assert jacobian == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-5 * float(np.abs(jacobian).max()))


@pytest.mark.parametrize(("target", "theta"), [("general", GENERAL), ("domain", DOMAIN)])
def test_a_fit_predicts_unseen_tokens(target: str, theta: FloatArray) -> None:
    share, tokens = (v.ravel() for v in np.meshgrid([0.01, 0.05, 0.2, 0.5], np.geomspace(0.5, 20, 6)))
    parts = [inputs(target, share, tokens, params=params) for params in (0.2, 1.0, 4.0)]
    names = ("params", "tokens", "shares", "lr", "base_loss")
    seen = Inputs(
        target, ("general", "domain"), *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
    )
    losses = forgetting(theta[None], seen)[0][0]
    fitted = FORGETTING.fit(Samples(seen, losses, np.arange(len(seen))), 0, 0)
    wanted = inputs(target, np.array([0.1, 0.4]), np.array([60.0, 60.0]))
    assert fitted.predict(wanted) == pytest.approx(forgetting(theta[None], wanted)[0][0], rel=0.005)


def test_losses_below_the_base_are_warned_of() -> None:
    share, tokens = np.array([0.1, 0.2, 0.4, 0.5]), np.array([1.0, 2.0, 3.0, 4.0])
    measured = Samples(inputs("general", share, tokens), np.array([2.9, 2.85, 2.79, 2.7]), np.arange(4))
    assert any(text.startswith("2 of 4 general losses lie below") for text in FORGETTING.fit(measured, 0, 0).warnings)
