"""Repeated data: the published losses, effective epochs, the best allocation and the harmful band."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.planner.laws.repeats import (
    best_allocation,
    effective_tokens,
    loss,
    optimal_params,
    repeat_band,
    repeat_warning,
)


@pytest.mark.parametrize(
    ("params", "tokens", "expected"), [(6.34e9, 242e9, 2.2256440889984477), (8.67e9, 178e9, 2.2269634075087867)]
)
def test_the_losses_of_the_reference_implementation(params: float, tokens: float, expected: float) -> None:
    assert loss(params, tokens, 25e9) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("passes", "epochs"), [(1, 1.0), (2, 1.9682), (4, 3.7257), (8, 6.6241), (16, 10.5825), (40, 15.1675)]
)
def test_passes_are_worth_fewer_epochs(passes: int, epochs: float) -> None:
    assert effective_tokens(passes * 5e9, 5e9) / 5e9 == pytest.approx(epochs, abs=6e-5)


@given(st.floats(1e3, 1e13), st.floats(1e3, 1e12))
def test_effective_tokens_never_exceed_the_seen_ones_nor_saturation(tokens: float, unique: float) -> None:
    worth = effective_tokens(tokens, unique)
    assert worth <= tokens * (1 + 1e-12)
    assert worth <= unique * 16.4
    assert tokens > unique or worth == tokens


def test_the_best_allocation_repeats_a_small_corpus_nine_times() -> None:
    tokens, epochs, params = best_allocation(1e22, 25e9)
    assert (tokens, epochs, params) == pytest.approx((237.337e9, 9.493, 7.022e9), rel=1e-3)
    assert loss(params, tokens, 25e9) <= loss(1e22 / (6 * 237.337e9), 237.337e9, 25e9)


def test_parameters_beyond_the_optimum_count_less() -> None:
    large = 20 * optimal_params(1e9)
    assert loss(large, 1e9, 1e9) < loss(large / 20, 1e9, 1e9)
    assert loss(1000 * large, 1e9, 1e9) == pytest.approx(loss(100 * large, 1e9, 1e9), rel=1e-6)


@pytest.mark.parametrize(
    ("params", "low", "high"), [(8e8, 43, 1803), (1e9, 38, 1613), (1e10, 10.5, 510), (1e8, 139, 5100)]
)
def test_the_band_of_harmful_repeats(params: float, low: float, high: float) -> None:
    assert repeat_band(params) == pytest.approx((low, high), rel=0.02)


def test_only_repeats_inside_the_band_are_warned_of() -> None:
    text = repeat_warning(8e8, 100, "replay")
    assert text is not None
    assert text.startswith("replay is seen 100 times; between 43 and 1803")
    assert repeat_warning(8e8, 4, "replay") is None
    assert repeat_warning(8e8, 2000, "replay") is None
