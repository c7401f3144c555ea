"""The grid's arithmetic: it never exceeds its budget, wastes little of it, and refuses what cannot pay for a grid."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.planner.budget import (
    MIN_SMALLEST_STEPS,
    evaluation_steps,
    grid_flops,
    ladder_for_flops,
    ladder_for_tokens,
    make_ladder,
    run_flops,
)
from cpt.problems import ConfigError


def test_the_worked_example_of_the_module() -> None:
    ladder = make_ladder(10, (1, 2, 4), decay_share=0.2)
    assert [ladder.total_steps(multiple) for multiple in ladder.multiples] == [10, 20, 40]
    assert [ladder.branch_step(multiple) for multiple in ladder.multiples] == [8, 16, 32]
    assert (ladder.trunk_steps, ladder.trained_steps) == (40, 46)


def test_flops_of_a_run_are_six_times_parameters_times_tokens() -> None:
    assert run_flops(8e9, 20e9) == 9.6e20
    ladder = make_ladder(10, (1, 2, 4), decay_share=0.2)
    assert grid_flops(ladder, [100, 300], cells_per_model=5, step_tokens=10) == 6 * 400 * 5 * 46 * 10


GRIDS = {
    "params": st.lists(st.integers(10_000, 10**10), min_size=1, max_size=4),
    "cells": st.integers(1, 30),
    "step_tokens": st.integers(32, 10**6),
    "num_budgets": st.integers(1, 5),
    "decay_share": st.floats(0.01, 0.9),
    "factor": st.floats(1.0, 1e4),
}


@given(**GRIDS)  # type: ignore[arg-type]
def test_a_grid_never_exceeds_its_budget_and_one_step_more_would(
    params: list[int], cells: int, step_tokens: int, num_budgets: int, decay_share: float, factor: float
) -> None:
    shape = {"cells_per_model": cells, "step_tokens": step_tokens}
    multiples = tuple(2**power for power in range(num_budgets))
    smallest = make_ladder(MIN_SMALLEST_STEPS, multiples, decay_share=decay_share)
    budget_flops = factor * grid_flops(smallest, params, **shape)
    ladder = ladder_for_flops(budget_flops, params, **shape, num_budgets=num_budgets, decay_share=decay_share)
    assert grid_flops(ladder, params, **shape) <= budget_flops
    longer = make_ladder(ladder.total_steps(1) + 1, multiples, decay_share=decay_share)
    assert grid_flops(longer, params, **shape) > budget_flops


@given(smallest=st.integers(2, 10_000), num_budgets=st.integers(1, 5), decay_share=st.floats(0.01, 0.99))
def test_every_branch_leaves_the_trunk_in_its_constant_phase_and_every_segment_has_a_step(
    smallest: int, num_budgets: int, decay_share: float
) -> None:
    ladder = make_ladder(smallest, tuple(2**power for power in range(num_budgets)), decay_share=decay_share)
    trunk_decay = ladder.branch_step(ladder.multiples[-1])
    for multiple in ladder.multiples:
        assert 0 < ladder.branch_step(multiple) <= trunk_decay
        assert ladder.branch_step(multiple) % ladder.stable_steps == 0  # a multiple of the trunk's save interval
        assert ladder.branch_step(multiple) < ladder.total_steps(multiple)


@given(first=st.integers(1, 50), span=st.integers(0, 10**6), count=st.integers(1, 30))
def test_evaluation_steps_ascend_between_their_ends_and_do_not_exceed_their_number(
    first: int, span: int, count: int
) -> None:
    steps = evaluation_steps(first, first + span, count)
    assert list(steps) == sorted(set(steps)) and len(steps) <= count
    assert steps[-1] == first + span and all(first <= step for step in steps)


def test_evaluation_steps_are_geometric() -> None:
    assert evaluation_steps(1, 64, 7) == (1, 2, 4, 8, 16, 32, 64)


def test_a_budget_below_the_smallest_grid_is_refused_with_its_price() -> None:
    with pytest.raises(ConfigError) as caught:
        ladder_for_flops(1e6, [1000], cells_per_model=5, step_tokens=100, num_budgets=3, decay_share=0.2)
    ladder = make_ladder(MIN_SMALLEST_STEPS, (1, 2, 4), decay_share=0.2)
    needed = grid_flops(ladder, [1000], cells_per_model=5, step_tokens=100)
    assert f"{needed:.3g} FLOPs for 5 cells" in str(caught.value)
    assert f"raise it {needed / 1e6:.2g} times" in str(caught.value) and "budget_fraction" in str(caught.value)


def test_stated_token_budgets_become_whole_steps() -> None:
    ladder = ladder_for_tokens([4200, 1050, 2100], step_tokens=100, decay_share=0.2)
    assert (ladder.multiples, ladder.stable_steps, ladder.decay_steps) == ((1, 2, 4), 8, 2)


@pytest.mark.parametrize(("budgets", "said"), [([1000, 1500], "the nearest are [1000, 2000]"), ([150], "at least 200")])
def test_token_budgets_that_cannot_branch_off_one_trunk_are_refused(budgets: list[int], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ladder_for_tokens(budgets, step_tokens=100, decay_share=0.2)
    assert said in str(caught.value)
