"""What a plot holds before it is drawn: thin curves that keep their spikes, fronts."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cpt.report.plots import decimate, finite_points, pareto_front, running_mean

BUCKETS = 220


def line(values: list[float]) -> np.ndarray:
    return np.column_stack([np.arange(len(values), dtype=np.float64), values])


def test_a_long_curve_keeps_every_spike_in_few_points() -> None:
    values = [2.0] * 100_000
    values[31_337], values[77_777] = 9.0, -9.0
    short = decimate(line(values), BUCKETS)
    assert len(short) <= 4 * BUCKETS
    assert {9.0, -9.0} <= set(short[:, 1])
    assert (np.diff(short[:, 0]) > 0).all() and short[0, 0] == 0 and short[-1, 0] == 99_999


def test_a_short_curve_is_left_alone() -> None:
    curve = line([1.0, math.pi, 2.0])
    assert decimate(curve, BUCKETS) is curve and running_mean(curve) is curve


def test_the_running_mean_of_a_constant_is_the_constant_to_the_ends() -> None:
    assert np.allclose(running_mean(line([3.0] * 500))[:, 1], 3.0)


def test_points_that_are_not_finite_are_gaps() -> None:
    found = finite_points(np.array([0.0, 1.0, math.nan]), np.array([math.nan, 2.0, 3.0]))
    assert found.tolist() == [[1.0, 2.0]]
    assert len(finite_points(np.array([0.0]), None)) == 0


def test_the_front_is_what_no_other_point_beats_on_both_sides() -> None:
    points = np.array([[0.0, 0.0], [1.0, 2.0], [1.0, 1.0], [0.5, -1.0], [3.0, 3.0], [2.0, 1.5]])
    assert pareto_front(points).tolist() == [[0.0, 0.0], [1.0, 2.0], [3.0, 3.0]]


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=1, max_size=30))
def test_every_point_is_matched_by_the_front_and_none_of_the_front_is_beaten(points: list[tuple[int, int]]) -> None:
    front = pareto_front(np.array(points, dtype=np.float64)).tolist()
    assert all(any(cost <= x and gain >= y for cost, gain in front) for x, y in points)
    assert not any((x, y) != (cost, gain) and x <= cost and y >= gain for x, y in points for cost, gain in front)
