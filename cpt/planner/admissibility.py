"""Where a fitted law may be trusted: trends it must show, and what in the data it cannot represent.

Owns the checks; refuses to repair a law. D-CPT requires that a loss falls with the share of its own corpus (arXiv
2406.01375, explicit trend). Its form does not guarantee that: with eta < 1 the slope turns positive as the share goes
to 0 (the inflection share), and with few tokens also near 1. A recommendation stays between the two.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.law import Fitted, Inputs, Samples

# Dense near 0, where an inflection share of 1e-4 is common. A slope between two points belongs to their middle.
SHARE_GRID = np.concatenate([np.geomspace(1e-7, 1e-2, 2001), np.linspace(1e-2, 1.0, 4001)[1:]])
SLOPE_TOLERANCE = 1e-9  # nats per unit of share; a law without shares has slope 0 up to rounding


@dataclass(frozen=True)
class TrustedShares:
    """Shares of its own corpus between which a law's loss falls; ``warnings`` say what is wrong outside."""

    low: float
    high: float
    warnings: tuple[str, ...] = ()


def at_shares(like: Inputs, own_shares: FloatArray, *, params: float, tokens: float) -> Inputs:
    """Inputs of a two-source law at one size and budget (billions) for many shares (n,) of its own corpus."""
    own = like.sources.index(like.target)
    shares = np.empty((len(own_shares), 2))
    shares[:, own], shares[:, 1 - own] = own_shares, 1 - own_shares
    full = np.ones(len(own_shares))
    return Inputs(
        target=like.target,
        sources=like.sources,
        params=params * full,
        tokens=tokens * full,
        shares=shares,
        lr=float(np.median(like.lr)) * full,  # NaN unless all are known: a law sees the rate in every row or in none
        base_loss=base_at(like, params * full),
        bases=like.bases,
    )


def base_at(like: Inputs, params: FloatArray) -> FloatArray:
    """(n,) loss before training at sizes ``params`` (n,) in billions: as measured, or a power of the size between.

    NaN where no base was measured, and far from the only one that was.
    """
    sizes, losses = np.array(like.bases).reshape(-1, 2).T
    if not len(sizes):
        return np.full(len(params), np.nan)
    apart = np.abs(np.log(sizes[None, :] / params[:, None]))
    nearest, distance = losses[np.argmin(apart, axis=1)], apart.min(axis=1)
    if len(np.unique(sizes)) == 1:
        return np.asarray(np.where(distance < np.log(1.5), nearest, np.nan))
    slope, level = np.polyfit(np.log(sizes), np.log(losses), 1)
    return np.asarray(np.where(distance < 0.01, nearest, np.exp(level + slope * np.log(params))))


def trusted_shares(fitted: Fitted, like: Inputs, *, params: float, tokens: float) -> TrustedShares:
    """Check the trend in the share at one model size and token budget (billions)."""
    losses = fitted.predict(at_shares(like, SHARE_GRID, params=params, tokens=tokens))
    rising = np.diff(losses) > SLOPE_TOLERANCE * np.diff(SHARE_GRID)
    middles = 0.5 * (SHARE_GRID[1:] + SHARE_GRID[:-1])
    if not rising.any():
        return TrustedShares(0.0, 1.0)
    if rising.all():
        told = f"the {like.target} loss rises with its own share everywhere at {tokens:.4g}B tokens"
        return TrustedShares(0.0, 1.0, (f"{told}: the law must not be used here",))
    falling = np.flatnonzero(~rising).astype(np.int64)
    best = max(_runs(falling), key=lambda run: middles[run[-1]] - middles[run[0]])
    low = 0.0 if best[0] == 0 else float(SHARE_GRID[best[0]])
    high = 1.0 if best[-1] == len(middles) - 1 else float(SHARE_GRID[best[-1] + 1])
    found = []
    if low > 0:
        found.append(f"below its inflection share {low:.3g} the {like.target} loss rises with its own share")
    if high < 1:
        found.append(f"above share {high:.4g} the {like.target} loss rises with its own share (too few tokens)")
    return TrustedShares(low, high, tuple(f"{told}; the law is not trusted there" for told in found))


def _runs(indices: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Stretches of consecutive indices."""
    return np.split(indices, np.flatnonzero(np.diff(indices) > 1) + 1)


def rising_runs(samples: Samples) -> list[int]:
    """Indices of runs whose loss rises over some stretch of tokens, beyond what noise explains.

    The largest rise from a point to a later one is held against the noise of a point, which second differences along
    all runs tell. Six times that noise is beyond chance for hundreds of points; 0.002 nats is the least of interest.
    """
    curves = {}
    for run in np.unique(samples.runs):
        rows = np.flatnonzero(samples.runs == run)
        curves[int(run)] = samples.losses[rows[np.argsort(samples.inputs.tokens[rows], kind="stable")]]
    bends = np.concatenate([np.diff(losses, 2) for losses in curves.values()])
    if not len(bends):
        return []
    noise = float(np.sqrt((bends**2).mean() / 6))  # the variance of a - 2 b + c is six times that of one point
    return [run for run, losses in curves.items() if _largest_rise(losses) > max(6 * noise, 0.002)]


def _largest_rise(losses: FloatArray) -> float:
    return float((losses - np.minimum.accumulate(losses)).max())


def extrapolation(samples: Samples, *, params: float, tokens: float) -> dict[str, float]:
    """Factors by which size and tokens (billions) lie outside the measurements, to the nearest end; 1 is inside."""
    return {"params": _factor(params, samples.inputs.params), "tokens": _factor(tokens, samples.inputs.tokens)}


def _factor(value: float, measured: FloatArray) -> float:
    return max(1.0, value / float(measured.max()), float(measured.min()) / value)


def widening(samples: Samples, factors: dict[str, float]) -> float:
    """Factor for the half-width of an interval: 1 inside the data, plus the log distance outside in units of the range.

    One unit is the covered range, at least a factor 2. So fitting 0.5B to 4B and asking for 8B widens by a third.
    """
    total = 1.0
    for name, measured in (("params", samples.inputs.params), ("tokens", samples.inputs.tokens)):
        covered = max(np.log(2.0), float(np.log(measured.max() / measured.min())))
        total += float(np.log(factors[name])) / covered
    return total
