"""Cross-domain D-CPT: the reference value, the direction of K, and a domain that was only probed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.cross_domain import (
    cross_domain,
    fit_cross_domain,
    learnable_coefficient,
    measure_learnability,
)
from cpt.planner.laws.law import Inputs, Samples
from cpt.rundir import DataError

SHARED = [1.2, 0.5, 0.34, 0.08, 0.28, 1.05, 0.35, 0.60, 0.35]
TRUTH = np.array([*SHARED, 0.3, 0.5, 1.5])
PROBES = {"law": (2.4, 0.9), "code": (1.6, 1.6), "medicine": (2.1, 0.5), "chemistry": (2.8, 0.2), "music": (1.9, 1.1)}


def inputs(params: FloatArray, tokens: FloatArray, shares: FloatArray) -> Inputs:
    rest = np.full(len(params), np.nan)
    return Inputs("domain", ("general", "domain"), params, tokens, np.column_stack((1 - shares, shares)), rest, rest)


def measured(domain: str) -> Samples:
    n, d, r = (v.ravel() for v in np.meshgrid([0.5, 1.8, 4.0], np.geomspace(0.5, 20, 5), [0.1, 0.3, 0.5, 0.8]))
    at = inputs(n, d, r)
    k1, k2 = (np.full(len(n), value) for value in PROBES[domain])
    losses = cross_domain(TRUTH[None], at, k1, k2)[0][0]
    noise = np.random.default_rng(len(domain)).normal(0, 0.002, len(n))
    return Samples(at, losses + noise, np.arange(len(n)))


def test_the_reference_value() -> None:
    theta = np.array([[*SHARED, 0.3, 0.5, 1.0]])  # K = 1/k1 + k2 = 2
    at = inputs(np.array([1.8]), np.array([10.0]), np.array([0.5]))
    assert cross_domain(theta, at, np.ones(1), np.ones(1))[0][0, 0] == pytest.approx(2.227685468, abs=1e-9)
    assert learnable_coefficient(1.0, 1.0, 1.0) == 2.0


def test_a_larger_coefficient_is_an_easier_domain() -> None:
    at = inputs(np.full(3, 1.8), np.full(3, 10.0), np.full(3, 0.5))
    losses = cross_domain(TRUTH[None], at, np.full(3, 2.0), np.array([0.1, 1.0, 10.0]))[0][0]
    assert (np.diff(losses) < 0).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.1, 2.0), min_size=12, max_size=12), st.floats(0.5, 4), st.floats(0.0, 3))
def test_the_derivatives_are_those_of_the_value(values: list[float], k1: float, k2: float) -> None:
    theta, at = np.array(values), inputs(np.array([1.8]), np.array([3.0]), np.array([0.4]))
    figures = np.array([k1]), np.array([k2])
    jacobian = cross_domain(theta[None], at, *figures)[1][0, :, 0]
    steps = np.eye(12) * 1e-6
    high, low = (cross_domain(theta + sign * steps, at, *figures)[0][:, 0] for sign in (1, -1))
    assert jacobian == pytest.approx((high - low) / 2e-6, rel=1e-4, abs=1e-5 * float(np.abs(jacobian).max()))


def test_a_domain_that_was_only_probed_is_predicted() -> None:
    fitted_on = [name for name in PROBES if name != "music"]
    k1, k2 = ({name: PROBES[name][i] for name in fitted_on} for i in (0, 1))
    fitted = fit_cross_domain({name: measured(name) for name in fitted_on}, k1, k2, num_starts=16)
    left_out = measured("music")
    error = fitted.predict(left_out.inputs, *PROBES["music"]) - left_out.losses
    assert 1 - (error**2).sum() / ((left_out.losses - left_out.losses.mean()) ** 2).sum() > 0.95
    assert len(fitted.params) == 12
    assert not any("domains:" in text for text in fitted.warnings)


def test_two_domains_are_warned_of_and_one_is_refused() -> None:
    names = ["law", "code"]
    k1, k2 = ({name: PROBES[name][i] for name in names} for i in (0, 1))
    parts = {name: measured(name).select(np.arange(0, 60, 6)) for name in names}
    assert any(text.startswith("2 domains:") for text in fit_cross_domain(parts, k1, k2, num_starts=2).warnings)
    with pytest.raises(DataError, match="1 domain given"):
        fit_cross_domain({"law": parts["law"]}, k1, k2)
    with pytest.raises(DataError, match="code: no k1 or no k2"):
        fit_cross_domain(parts, k1, {"law": 1.0})
    with pytest.raises(DataError, match=r"law: k1 = -1\.0"):
        fit_cross_domain(parts, k1 | {"law": -1.0}, k2)


def test_a_probe_gives_the_first_loss_and_the_early_decline() -> None:
    k1, k2 = measure_learnability(np.array([0.0, 0.1, 0.2, 0.4, 9.0]), np.array([2.5, 2.45, 2.4, 2.3, 2.0]))
    assert (k1, k2) == pytest.approx((2.5, 0.5))
    assert measure_learnability(np.array([0.0, 0.1]), np.array([2.5, 2.6])) == (2.5, 0.0)
    with pytest.raises(DataError, match="tokens = 0"):
        measure_learnability(np.array([0.1, 0.2]), np.array([2.5, 2.4]))
