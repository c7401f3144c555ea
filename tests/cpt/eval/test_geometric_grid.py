"""The steps of benchmarks in training: close together at first, few in all."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.eval.geometric_grid import geometric_steps


@pytest.mark.parametrize(
    ("num_steps", "steps"),
    [
        (1, (0, 1)),
        (40, (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40)),
        (1000, (0, 1, 2, 4, 7, 13, 25, 50, 100, 200, 300, 400, 500, 600, 700, 800, 900, 1000)),
    ],
)
def test_the_grid_doubles_over_the_first_twentieth_and_then_goes_by_tenths(
    num_steps: int, steps: tuple[int, ...]
) -> None:
    assert geometric_steps(num_steps) == steps


@settings(deadline=None)
@given(st.integers(1, 10**9))
def test_a_run_of_any_length_is_measured_at_both_ends_and_a_few_times_between(num_steps: int) -> None:
    steps = geometric_steps(num_steps)
    assert steps[0] == 0 and steps[-1] == num_steps
    assert list(steps) == sorted(set(steps))
    assert len(steps) <= math.log2(num_steps) + 12
    early = [step for step in steps if 0 < step <= math.ceil(num_steps / 20)]
    assert all(later <= 2 * before for before, later in pairwise(early))  # never a wider gap
