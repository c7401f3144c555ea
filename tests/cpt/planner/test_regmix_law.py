"""RegMix's trees: rank and best mixture of a synthetic law and bootstrap."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.regmix import REGMIX
from cpt.planner.simplex import at_scale, average_of_best, replicates

SOURCES = ("a", "b", "c")


def samples_of(shares: NDArray[np.float64]) -> Samples:
    ones, unknown = np.ones(len(shares)), np.full(len(shares), np.nan)
    losses = 2.0 + ((shares - np.array([0.5, 0.3, 0.2])) ** 2).sum(axis=1)
    return Samples(Inputs("a", SOURCES, ones, ones, shares, unknown, unknown), losses, np.arange(len(shares)))


def test_trees_rank_new_mixtures_and_find_the_best_one() -> None:
    shares = np.random.default_rng(0).dirichlet(np.ones(3), size=356)
    known, new = samples_of(shares[:256]), samples_of(shares[256:])
    fitted = REGMIX.fit(known, 0, 0)
    assert spearmanr(fitted.predict(new.inputs), new.losses).statistic > 0.9
    best = average_of_best(at_scale(fitted, "a", SOURCES, 1.0, 1.0), np.ones(3), np.ones(3), num_candidates=5000)
    np.testing.assert_allclose(best, [0.5, 0.3, 0.2], atol=0.06)


def test_replicates_differ_and_few_mixtures_are_warned_of() -> None:
    samples = samples_of(np.random.default_rng(1).dirichlet(np.ones(3), size=40))
    fitted = REGMIX.fit(samples, 3, 0)
    assert "hold 40" in fitted.warnings[0]
    rows = fitted.replicas(samples.inputs)
    assert rows.shape == (3, 40) and rows.std(axis=0).max() > 0
    np.testing.assert_array_equal(replicates(fitted)[1].predict(samples.inputs), rows[1])
    assert REGMIX.fit(samples, 0, 0).replicas(samples.inputs).shape == (0, 40)
