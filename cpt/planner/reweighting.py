"""Rules that move the weights of sources while a run goes on, and the mixtures that any planner must beat.

Owns one step of each rule, as a pure function of numbers that somebody else measured: Skill-it (arXiv 2307.14430),
DoReMi (2305.10429), Velocitune (2411.14318), AutoScale (2407.20177); and the baselines, uniform and token-proportional.
Weights are shares of tokens by source (m,), they sum to 1. Refuses to run models: it knows losses only.
"""

import numpy as np

from cpt.planner.fitting import FloatArray
from cpt.rundir import DataError


def uniform(num_sources: int) -> FloatArray:
    """Every source alike."""
    return np.full(num_sources, 1.0 / num_sources)


def token_proportional(tokens: FloatArray) -> FloatArray:
    """Every document as often as it occurs: shares as the sources' token counts (m,).

    Raises:
        DataError: a count is negative or not finite, or no source has tokens.
    """
    counts = np.asarray(tokens, dtype=np.float64)
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise DataError(f"token counts {counts.tolist()}: must be finite, not negative, and not all zero")
    return np.asarray(counts / counts.sum())


def skillit_step(graph: FloatArray, losses: FloatArray, eta: float = 0.5) -> FloatArray:
    """Skill-it: p_i proportional to exp(eta sum_tau sum_j A_ij L_j(tau)), arXiv 2307.14430 section 4.

    ``graph`` (m, m): A_ij > 0 where training on i lowers the loss of j. ``losses`` (w, m) in nats: the last w
    evaluations (the paper takes 3), or (m,) their sum. The paper tries eta of 0.1 to 0.8.
    """
    total = np.atleast_2d(losses).sum(axis=0)
    return _softmax(eta * (graph @ total))


def doremi_step(weights: FloatArray, excess: FloatArray, eta: float = 1.0, smoothing: float = 1e-4) -> FloatArray:
    """DoReMi: w <- (1 - c) softmax(log w + eta excess) + c/m, arXiv 2305.10429 algorithm 1.

    ``excess`` (m,) nats: mean over the tokens of each source by which the proxy's loss exceeds the reference's;
    negative values count as 0. ``smoothing`` is c: no weight dies out. The big run takes the mean over all steps.
    """
    moved = _softmax(_log(weights) + eta * np.maximum(excess, 0.0))
    return np.asarray((1.0 - smoothing) * moved + smoothing / len(moved))


def velocitune_step(weights: FloatArray, losses: FloatArray, initial: FloatArray, targets: FloatArray) -> FloatArray:
    """Velocitune: w_i <- w_i exp(V_i) / sum, V_i = clip((l_i - target_i) / (initial_i - target_i), 0, 1).

    arXiv 2411.14318 section 3. All losses (m,) in nats; V_i is the part of its way that source i still has to go. A
    source whose target is not below its start has no way to go: V_i = 0.
    """
    way = initial - targets
    left = np.where(way > 0, (losses - targets) / np.where(way > 0, way, 1.0), 0.0)
    return _softmax(_log(weights) + np.clip(left, 0.0, 1.0))


def autoscale_step(smaller: FloatArray, larger: FloatArray) -> FloatArray:
    """AutoScale: the best token counts (m,) by source at the next budget, N3 = N2 N2 / N1, arXiv 2407.20177.

    ``smaller`` and ``larger`` hold the best counts at two budgets, all above 0. The next budget comes out as the sum.
    """
    return np.asarray(larger * larger / smaller)


def _log(weights: FloatArray) -> FloatArray:
    """A weight of 0 stays 0 without a warning."""
    return np.where(weights > 0, np.log(np.where(weights > 0, weights, 1.0)), -np.inf)


def _softmax(scores: FloatArray) -> FloatArray:
    raised = np.exp(scores - scores.max())
    return np.asarray(raised / raised.sum())
