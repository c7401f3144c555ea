"""Stability metrics against the vectors of their definition, a brute-force reference, and each other's mirror."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.eval.stability import largest_fall, measure_course, measure_stability

SERIES = [0.80, 0.78, 0.55, 0.60, 0.70, 0.76, 0.79]  # the first is the value when the task was finished
STEPS = range(0, 70, 10)


def test_the_published_definition_on_its_vector() -> None:
    found = measure_stability(STEPS, {"general": SERIES}, [*[0.0] * 6, 0.9], higher_is_better=True)
    course = found.old["general"]
    assert (course.worst, course.worst_step, course.final) == (0.55, 20, 0.79)
    assert course.forgetting[10] == pytest.approx(0.25)
    assert course.plasticity[10] == pytest.approx(0.24)
    assert largest_fall(SERIES, 3) == pytest.approx(0.25)
    assert found.worst == 0.55
    assert found.worst_case == pytest.approx(0.725)


def test_of_losses_the_rise_is_what_was_forgotten() -> None:
    losses = [3.0 - value for value in SERIES]
    course = measure_course(STEPS, losses, higher_is_better=False)
    assert (course.worst, course.worst_step) == (pytest.approx(2.45), 20)
    assert (course.forgetting[10], course.plasticity[10]) == (pytest.approx(0.25), pytest.approx(0.24))
    found = measure_stability(STEPS, {"general": losses}, [1.0] * 7, higher_is_better=False)
    assert found.worst_case == pytest.approx((1.0 + 2.45) / 2)


def test_each_old_task_counts_alike() -> None:
    old = {"a": [0.9, 0.5, 0.8], "b": [0.8, 0.9, 0.7]}
    found = measure_stability([0, 1, 2], old, [0.1, 0.2, 0.9], higher_is_better=True)
    assert found.worst == pytest.approx(0.6)
    assert found.worst_case == pytest.approx(0.9 / 3 + 2 / 3 * 0.6)


values = st.floats(-100.0, 100.0)


@given(st.lists(values, min_size=2, max_size=40), st.integers(1, 50))
def test_the_linear_computation_equals_all_pairs(series: list[float], window: int) -> None:
    falls = [series[a] - series[b] for b in range(len(series)) for a in range(max(0, b - window + 1), b + 1)]
    assert largest_fall(series, window) == pytest.approx(max(falls))


@given(st.lists(values, min_size=2, max_size=40), st.integers(1, 50))
def test_a_wider_window_never_sees_less_and_a_rising_series_never_fell(series: list[float], window: int) -> None:
    narrow, wide = largest_fall(series, window), largest_fall(series, window + 1)
    assert narrow is not None and wide is not None and 0.0 <= narrow <= wide
    assert largest_fall(sorted(series), window) == 0.0


def test_evaluations_without_a_value_are_left_out() -> None:
    course = measure_course(STEPS, [0.8, None, 0.55, None, None, 0.76, None], higher_is_better=True)
    assert (course.worst, course.worst_step, course.final) == (0.55, 20, None)
    assert course.forgetting[10] == pytest.approx(0.25)


def test_a_series_of_one_value_has_no_change_and_of_none_nothing() -> None:
    single = measure_course([0], [0.8], higher_is_better=True)
    assert (single.worst, single.forgetting[10]) == (0.8, None)
    empty = measure_course([], [], higher_is_better=True)
    assert (empty.worst, empty.worst_step, empty.final, empty.plasticity[100]) == (None, None, None, None)


def test_a_worst_case_is_not_told_without_all_its_parts() -> None:
    found = measure_stability([0, 1], {"a": [0.9, 0.5], "b": [None, None]}, [0.1, 0.2], higher_is_better=True)
    assert found.worst is None and found.worst_case is None
    assert measure_stability([0, 1], {"a": [0.9, 0.5]}, None, higher_is_better=True).worst_case is None
    assert measure_stability([0, 1], {"a": [0.9, 0.5]}, [0.1, None], higher_is_better=True).worst_case is None
