"""One step of each reweighting rule against published or hand-computed numbers, and the baselines."""

import numpy as np
import pytest

from cpt.planner.reweighting import (
    autoscale_step,
    doremi_step,
    skillit_step,
    token_proportional,
    uniform,
    velocitune_step,
)
from cpt.rundir import DataError


def test_skillit_moves_weight_to_the_skill_that_helps_most() -> None:
    graph = np.array([[1.0, 0.5], [0.0, 1.0]])
    np.testing.assert_allclose(skillit_step(graph, np.array([5.4, 2.7])), [0.88340, 0.11660], atol=5e-6)
    window = np.array([[1.8, 0.9]] * 3)
    np.testing.assert_allclose(skillit_step(graph, window), [0.88340, 0.11660], atol=5e-6)


def test_skillit_without_transfer_weighs_by_loss_alone() -> None:
    losses = np.array([3.0, 2.0, 1.0])
    expected = np.exp(0.5 * losses) / np.exp(0.5 * losses).sum()
    np.testing.assert_allclose(skillit_step(np.eye(3), losses), expected)


def test_doremi_raises_what_the_proxy_lags_behind_on() -> None:
    found = doremi_step(np.array([0.5, 0.3, 0.2]), np.array([0.2, -0.1, 0.6]))
    np.testing.assert_allclose(found, [0.478920, 0.235281, 0.285799], atol=5e-7)


def test_doremi_revives_a_source_without_weight_only_by_smoothing() -> None:
    found = doremi_step(np.array([1.0, 0.0]), np.array([0.0, 5.0]), smoothing=0.01)
    np.testing.assert_allclose(found, [0.995, 0.005])


def test_velocitune_raises_what_has_further_to_go() -> None:
    found = velocitune_step(np.array([0.5, 0.5]), np.array([2.4, 1.2]), np.array([3.0, 2.0]), np.array([2.0, 1.0]))
    np.testing.assert_allclose(found, [0.549834, 0.450166], atol=5e-7)


def test_velocitune_leaves_a_source_alone_whose_target_is_its_start() -> None:
    weights = np.array([0.25, 0.75])
    np.testing.assert_allclose(velocitune_step(weights, np.ones(2), np.ones(2), np.ones(2)), weights)


def test_autoscale_continues_each_source_on_its_own_path() -> None:
    np.testing.assert_allclose(autoscale_step(np.array([1.0, 2.0]), np.array([2.0, 3.0])), [4.0, 4.5])


def test_baselines_are_exact() -> None:
    np.testing.assert_array_equal(uniform(4), [0.25] * 4)
    np.testing.assert_array_equal(token_proportional(np.array([30.0, 10.0])), [0.75, 0.25])


@pytest.mark.parametrize("tokens", [[0.0, 0.0], [1.0, -1.0], [1.0, np.nan]])
def test_token_counts_that_cannot_be_are_refused(tokens: list[float]) -> None:
    with pytest.raises(DataError, match="token counts"):
        token_proportional(np.array(tokens))
