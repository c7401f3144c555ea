"""D-CPT: test vectors, derivatives, recovery, where its trends hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.admissibility import trusted_shares
from cpt.planner.laws.dcpt import DCPT, L1, L5, dcpt, l1, l5
from cpt.planner.laws.law import Inputs
from cpt.planner.scores import score

VECTORS = [
    ((0.5, 2, 0.5), 2.250548143),
    ((1.8, 10, 0.2), 2.118190156),
    ((4, 26, 0.9), 1.846988204),
    ((1.8, 10, 0.0), 2.266521394),
    ((1.8, 10, 1.0), 1.943738649),
]


@pytest.mark.parametrize(("at", "loss"), VECTORS)
def test_the_law_gives_the_published_values(at: Any, loss: float, exact_law: Any, two_source_inputs: Any) -> None:
    assert exact_law("P").predict(two_source_inputs(*at))[0] == pytest.approx(loss, abs=1e-8)


def test_parameters_that_break_the_trends_still_give_their_value(exact_law: Any, two_source_inputs: Any) -> None:
    assert exact_law("Q").predict(two_source_inputs(1.8, 10, 0.2))[0] == pytest.approx(3.302299248, abs=1e-8)


def test_at_a_fixed_share_the_law_is_chinchilla(exact_law: Any, two_source_inputs: Any) -> None:
    tokens = np.array([1.0, 5.0, 25.0])
    chinchilla = 1.585848 + 0.5 / 1.8**0.34 + 0.038637 / tokens**0.28
    assert np.allclose(exact_law("P").predict(two_source_inputs(1.8, tokens, 0.5)), chinchilla, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(dcpt, 9), (l1, 8), (l5, 6)]))
def test_analytic_derivatives_equal_finite_differences(seed: int, law: tuple[Callable[..., Any], int]) -> None:
    formula, size = law
    rng = np.random.default_rng(seed)
    theta = rng.uniform(0.2, 1.5, size=(3, size))
    own = rng.uniform(0.01, 1, size=5)
    unknown = np.full(5, np.nan)
    inputs = Inputs("domain", ("general", "domain"), rng.uniform(0.1, 5, 5), rng.uniform(0.1, 30, 5),
                    np.stack([1 - own, own], axis=1), unknown, unknown)  # fmt: skip
    _, jacobian = formula(theta, inputs)
    for i in range(size):
        step = np.zeros(size)
        step[i] = 1e-6
        numeric = (formula(theta + step, inputs)[0] - formula(theta - step, inputs)[0]) / 2e-6
        assert np.allclose(jacobian[:, i], numeric, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["P", "Q"])
def test_held_out_shares_and_tokens_are_predicted_to_a_thousandth_nat(
    name: str, synthetic: Any, parameter_sets: Any
) -> None:
    samples, exact = synthetic(parameter_sets[name])
    shares = np.isin(samples.inputs.own_share.round(3), (0.2, 0.8))
    late = samples.inputs.tokens > np.quantile(samples.inputs.tokens, 2 / 3)
    predicted = DCPT.predict_folds(samples, np.stack([~shares, ~late]), 0)
    for fold, left_out in enumerate((shares, late)):
        found = score(predicted[fold][left_out], exact[left_out])
        assert found.mae <= 0.001
        assert found.r2 >= 0.999


def test_two_model_sizes_leave_the_floor_and_the_size_term_open(synthetic: Any, parameter_sets: Any) -> None:
    samples, _ = synthetic(parameter_sets["P"], sizes=(0.5, 1.8))
    (warning,) = DCPT.fit(samples, 0, 0).warnings
    assert warning.startswith("E, A and alpha cannot be told apart with 2 model sizes")


def test_one_model_size_pins_the_size_term(synthetic: Any, parameter_sets: Any) -> None:
    samples, exact = synthetic(parameter_sets["P"], sizes=(1.8,))
    fitted = DCPT.fit(samples, 0, 0)
    assert (fitted.params["A"], fitted.params["alpha"]) == (0.0, 1.0)
    assert np.abs(fitted.predict(samples.inputs) - exact).mean() < 0.001


def test_the_interaction_term_pays_where_shares_and_tokens_interact(synthetic: Any, parameter_sets: Any) -> None:
    samples, exact = synthetic(parameter_sets["Q"])
    errors = {law.name: np.abs(law.fit(samples, 0, 0).predict(samples.inputs) - exact).mean() for law in (DCPT, L1, L5)}
    assert errors["dcpt"] < 0.2 * errors["l1"]
    assert errors["dcpt"] < 0.2 * errors["l5"]


def test_the_legal_set_is_trusted_everywhere_from_its_critical_tokens_on(
    exact_law: Any, two_source_inputs: Any
) -> None:
    like = two_source_inputs(1.8, 10, 0.5)
    assert trusted_shares(exact_law("P"), like, params=1.8, tokens=0.2).high < 1
    for tokens in (0.2107, 0.5, 26.0):
        found = trusted_shares(exact_law("P"), like, params=1.8, tokens=tokens)
        assert (found.low, found.high, found.warnings) == (0.0, 1.0, ())


def test_the_illegal_set_is_flagged_at_both_ends(exact_law: Any, two_source_inputs: Any) -> None:
    found = trusted_shares(exact_law("Q"), two_source_inputs(1.8, 10, 0.5), params=1.8, tokens=10.0)
    assert found.low == pytest.approx(1.3e-4, rel=0.05)
    assert found.high == pytest.approx(0.3252, abs=2e-4)
    assert len(found.warnings) == 2
