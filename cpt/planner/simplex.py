"""The best mixture of many sources: search over shares that sum to 1 and stay below what the sources can give.

Owns the caps, the pool of candidate mixtures and the refinement. Refuses to know what is minimised: a function of
mixtures (q, m) -> (q,), lower is better. The result depends on the seed and the inputs only.

Candidates are Dirichlet draws around the token proportions, as in RegMix (arXiv 2407.01492, section 3.1), brought below
the caps by the nearest point. The best of them are then improved twice: by sequential quadratic programming, which ends
at the optimum of a smooth convex loss, and by moving share from one source to another, all pairs and many step sizes in
one call, until no move helps: that needs no derivative, so it works on trees and where a share is zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.law import Fitted, Inputs, ParametricFit
from cpt.planner.laws.regmix import RegMixFit
from cpt.rundir import DataError

Objective = Callable[[FloatArray], FloatArray]  # shares (q, m) -> what to minimise (q,)

STRENGTHS = (0.1, 5.0)  # of the Dirichlet draws, from nearly single sources to mixtures near the prior
TEMPERATURE = 0.5  # the prior is raised to this power: small sources are tried more often than their tokens suggest
STEPS = tuple(0.3 * 0.35**k for k in range(10))  # shares moved from one source to another; the last is 2e-5
NUM_FINALISTS = 4
MAX_MOVES = 60
NUDGE = 1e-6  # of a share, for slopes


def token_caps(available: FloatArray, tokens: float, max_epochs: float, sources: Sequence[str] = ()) -> FloatArray:
    """(m,) highest share of each source: ``available`` (m,) tokens read at most ``max_epochs`` times in ``tokens``.

    Raises:
        DataError: all sources together cannot fill the budget, with the number of tokens that are missing.
    """
    supply = np.asarray(available, dtype=np.float64) * max_epochs
    if supply.sum() < tokens * (1 - 1e-9):
        names = ", ".join(f"{name} {count:.4g}" for name, count in zip(sources, available, strict=False))
        raise DataError(
            f"tokens = {tokens:.4g}: the sources give {supply.sum():.4g} at {max_epochs:g} epochs"
            f"{f' ({names} unique)' if names else ''}, {tokens - supply.sum():.4g} tokens are missing; "
            f"plan fewer tokens, allow {tokens / max(float(np.sum(available)), 1.0):.3g} epochs, or add data"
        )
    return np.minimum(supply / tokens, 1.0)


def at_scale(fitted: Fitted, target: str, sources: tuple[str, ...], params: float, tokens: float) -> Objective:
    """A fitted law as a function of the mixture alone, at ``params`` and ``tokens`` (both in billions)."""
    return lambda shares: fitted.predict(mixture_inputs(shares, target, sources, params, tokens))


def replicates(fitted: Fitted) -> list[Fitted]:
    """Each bootstrap replicate of a law as a law of its own."""
    if isinstance(fitted, ParametricFit):
        return [replace(fitted, theta=theta) for theta in fitted.thetas]
    if isinstance(fitted, RegMixFit):
        return [replace(fitted, trees=trees) for trees in fitted.replicates]
    raise TypeError(f"{type(fitted).__name__} has no replicates that can be searched one by one")


def mixture_inputs(
    shares: FloatArray, target: str, sources: tuple[str, ...], params: float, tokens: float
) -> Inputs:  # fmt: skip
    """Inputs of many mixtures (q, m) at one size and one token count, in billions."""
    size, budget, unknown = (np.full(len(shares), value) for value in (params, tokens, np.nan))
    return Inputs(target, sources, size, budget, shares, unknown, unknown)


def search_mixture(
    predict: Objective, prior: FloatArray, caps: FloatArray, *, seed: int = 0, num_candidates: int = 4096
) -> FloatArray:
    """(m,) shares that minimise ``predict``; ``prior`` (m,) token proportions, ``caps`` (m,) highest shares.

    Raises:
        DataError: the caps sum to less than 1.
    """
    pool = candidates(prior, caps, seed, num_candidates)
    best = pool[np.argsort(predict(pool), kind="stable")[:NUM_FINALISTS]]
    ends = np.stack([_exchange(predict, _polish(predict, start, caps), caps) for start in best])
    return np.asarray(ends[np.argmin(predict(ends))])


def average_of_best(
    predict: Objective,
    prior: FloatArray,
    caps: FloatArray,
    *,
    seed: int = 0,
    num_candidates: int = 100_000,
    num_best: int = 100,
) -> FloatArray:
    """(m,) the mean of the ``num_best`` candidates predicted best: RegMix's choice, less fond of a model's errors."""
    pool = candidates(prior, caps, seed, num_candidates)
    return np.asarray(pool[np.argsort(predict(pool), kind="stable")[:num_best]].mean(axis=0))


def search_replicates(
    objectives: Sequence[Objective], best: FloatArray, prior: FloatArray, caps: FloatArray, *, seed: int = 0
) -> FloatArray:
    """(B, m) the best mixture of each bootstrap replicate: their spread is the uncertainty of ``best`` (m,).

    Each search starts from ``best`` and from the replicate's own choice in a small pool.
    """
    pool = np.concatenate((best[None], candidates(prior, caps, seed, 64 * len(best))))
    found = []
    for predict in objectives:
        starts = np.stack((best, pool[np.argmin(predict(pool))]))
        ends = np.stack([_polish(predict, start, caps, rounds=40) for start in starts])
        found.append(ends[np.argmin(predict(ends))])
    return np.stack(found) if found else np.empty((0, len(best)))


def candidates(prior: FloatArray, caps: FloatArray, seed: int, count: int) -> FloatArray:
    """(count + 2, m) mixtures below the caps: the token proportions, the uniform mixture, and Dirichlet draws.

    Raises:
        DataError: the caps sum to less than 1.
    """
    rng = np.random.default_rng([seed, 0xD1])
    flattened = np.maximum(prior, 1e-6 * np.max(prior)) ** TEMPERATURE
    flattened = flattened / flattened.mean()
    low, high = np.log(STRENGTHS)
    gamma = rng.gamma(np.exp(rng.uniform(low, high, (count, 1))) * flattened)
    fixed = np.stack((prior / np.sum(prior), np.full(len(prior), 1.0 / len(prior))))
    gamma[gamma.sum(axis=1) < 1e-100] = flattened
    return project(np.concatenate((fixed, gamma / gamma.sum(axis=1, keepdims=True))), caps)


def project(shares: FloatArray, caps: FloatArray) -> FloatArray:
    """The nearest mixtures (q, m) with 0 <= share <= cap and sum 1.

    Raises:
        DataError: the caps sum to less than 1.
    """
    caps = np.clip(np.asarray(caps, dtype=np.float64), 0.0, 1.0)
    if caps.sum() < 1 - 1e-9:
        rule = f"the sources can give {caps.sum():.1%} of the tokens, {1 - caps.sum():.1%} of the tokens are missing"
        raise DataError(
            f"caps = {np.round(caps, 4).tolist()}: {rule}; plan fewer tokens, allow more epochs or add data"
        )
    low, high = (shares - caps).min(axis=1), shares.max(axis=1)  # all at their cap, all at 0
    for _ in range(60):
        middle = 0.5 * (low + high)
        over = np.clip(shares - middle[:, None], 0.0, caps).sum(axis=1) > 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return _summing_to_one(np.clip(shares - (0.5 * (low + high))[:, None], 0.0, caps), caps)


def _summing_to_one(shares: FloatArray, caps: FloatArray) -> FloatArray:
    """Takes away what rounding left: the rest goes to the source with the most room."""
    rest = 1.0 - shares.sum(axis=1)
    room = np.where(rest[:, None] > 0, caps - shares, shares)
    shares[np.arange(len(shares)), room.argmax(axis=1)] += rest
    return np.clip(shares, 0.0, caps)


def _polish(predict: Objective, start: FloatArray, caps: FloatArray, rounds: int = 200) -> FloatArray:
    """Sequential quadratic programming from ``start``; returns ``start`` where that finds nothing better."""
    nudges = np.vstack((np.zeros(len(start)), NUDGE * np.eye(len(start))))

    def value_and_slope(shares: FloatArray) -> tuple[float, FloatArray]:
        values = predict(np.maximum(shares, 0.0) + nudges)
        return float(values[0]), (values[1:] - values[0]) / NUDGE

    result = minimize(
        value_and_slope,
        start,
        jac=True,
        method="SLSQP",
        bounds=[(0.0, min(float(cap), 1.0)) for cap in caps],
        constraints=LinearConstraint(np.ones((1, len(start))), 1.0, 1.0),
        options={"maxiter": rounds, "ftol": 1e-10},
    )
    if not np.isfinite(result.x).all():
        return start
    ends = np.stack((start, project(result.x[None], caps)[0]))
    return np.asarray(ends[np.argmin(predict(ends))])


def _exchange(predict: Objective, start: FloatArray, caps: FloatArray) -> FloatArray:
    """Moves share between two sources as long as that helps, always by the best move of all."""
    giver, taker = np.nonzero(~np.eye(len(start), dtype=bool))
    here, value = start, float(predict(start[None])[0])
    for _ in range(MAX_MOVES):
        room = np.maximum(np.minimum(here[giver], (caps - here)[taker]), 0.0)
        moved = np.minimum.outer(np.array(STEPS), room).ravel()
        row = np.arange(moved.size)
        trial = np.tile(here, (moved.size, 1))
        trial[row, np.tile(giver, len(STEPS))] -= moved
        trial[row, np.tile(taker, len(STEPS))] += moved
        found = predict(trial)
        best = int(np.argmin(found))
        if not found[best] < value - 1e-12 * abs(value):
            break
        here, value = trial[best], float(found[best])
    return np.clip(here, 0.0, np.minimum(caps, 1.0))
