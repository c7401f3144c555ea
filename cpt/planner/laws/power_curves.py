"""Power curves with a free exponent of either sign, and where a sum of them turns: the numerics under CMR.

``alpha x^s + beta`` is fitted as ``level + slope (x^s - 1) / s`` (Box-Cox): as s passes through 0 the curve becomes
``level + slope log x`` without a jump, while alpha and beta grow without bound with opposite signs and predict nothing
by themselves. Owns the one-dimensional curves; which observations enter them is ``cpt.planner.laws.cmr``'s.

Level and slope are solved exactly for each exponent (variable projection), so that thousands of curves, one for every
budget and bootstrap replicate, are fitted side by side; the objective is least squares, for a curve has three to ten
points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from cpt.planner.fitting import FloatArray

EXPONENTS = (-2.0, 2.0)
NUM_EXPONENTS = 41  # of the grid that the search starts from


def box_cox(x: FloatArray, exponent: FloatArray) -> FloatArray:
    """``(e^(s x) - 1) / s``, which is x at s = 0; with x a logarithm it is ``(X^s - 1) / s``."""
    return box_cox_with_slope(x, exponent)[0]


def box_cox_with_slope(x: FloatArray, exponent: FloatArray) -> tuple[FloatArray, FloatArray]:
    """:func:`box_cox` and its derivative by the exponent; by their series where the exponent is near 0."""
    z = x * exponent
    small = np.abs(z) < 1e-3
    safe = np.where(small, 1.0, z)
    grown = np.expm1(safe)
    value = np.where(small, 1.0 + z * (0.5 + z * (1 / 6 + z / 24)), grown / safe)
    slope = np.where(small, 0.5 + z * (1 / 3 + z * (0.125 + z / 30)), (safe * (grown + 1.0) - grown) / (safe * safe))
    return x * value, x * x * slope


@dataclass(frozen=True)
class PowerCurves:
    """``level + slope box_cox(x, exponent)``; the three have any common shape."""

    level: FloatArray
    slope: FloatArray
    exponent: FloatArray

    def at(self, x: FloatArray) -> FloatArray:
        return self.level + self.slope * box_cox(x, self.exponent)


def fit_curves(
    x: FloatArray, y: FloatArray, weights: FloatArray, bounds: tuple[float, float] = EXPONENTS
) -> PowerCurves:
    """Weighted least-squares curves through ``y`` (B, U, S) at ``x`` (S,) with ``weights`` (B, S); shapes (B, U).

    Two distinct x say nothing of the exponent: it is 0 then.
    """
    free = len(np.unique(np.round(x, 9))) > 2
    grid = np.linspace(*bounds, NUM_EXPONENTS) if free else np.zeros(1)
    rows = [_fit_row(x, values, weight / weight.sum(), grid) for values, weight in zip(y, weights, strict=True)]
    return PowerCurves(*(np.stack(parts) for parts in zip(*rows, strict=True)))


def _fit_row(x: FloatArray, y: FloatArray, weight: FloatArray, grid: FloatArray) -> tuple[FloatArray, ...]:
    """Curves (U,) through ``y`` (U, S): the best exponent of the grid, then Gauss-Newton steps on the exponent."""
    shapes = box_cox(x, grid[:, None])
    shapes = shapes - (shapes @ weight)[:, None]
    spread = np.maximum(shapes**2 @ weight, 1e-300)
    exponent = grid[np.argmax(((y * weight) @ shapes.T) ** 2 / spread, axis=1)]
    level, slope, rest, step = _project(x, y, weight, exponent)
    if len(grid) == 1:
        return level, slope, exponent
    scale, longest = np.ones_like(exponent), grid[1] - grid[0]
    best = np.stack((level, slope, rest, step, exponent))
    live = np.arange(len(exponent))
    for _ in range(12):
        move = scale[live] * np.clip(best[3, live], -longest, longest)
        trial = np.clip(best[4, live] + move, grid[0], grid[-1])
        moved = np.abs(trial - best[4, live]) > 1e-7
        live, trial = live[moved], trial[moved]
        if not live.size:
            break
        found = np.stack((*_project(x, y[live], weight, trial), trial))
        better = found[2] < best[2, live]
        best[:, live[better]] = found[:, better]
        scale[live[~better]] *= 0.3
    return best[0], best[1], best[4]


def _project(x: FloatArray, y: FloatArray, weight: FloatArray, exponent: FloatArray) -> tuple[FloatArray, ...]:
    """Best level and slope (U,) at given exponents, the squares that remain, and the next step of the exponents."""
    shape, tilt = box_cox_with_slope(x, exponent[:, None])
    middle, height = shape @ weight, y @ weight
    shape, tilt, y = shape - middle[:, None], tilt - (tilt @ weight)[:, None], y - height[:, None]
    spread = np.maximum(shape**2 @ weight, 1e-300)
    slope = (shape * y) @ weight / spread
    residual = y - slope[:, None] * shape
    across = slope[:, None] * (tilt - ((tilt * shape) @ weight / spread)[:, None] * shape)
    step = (across * residual) @ weight / np.maximum(across**2 @ weight, 1e-300)
    return height - slope * middle, slope, residual**2 @ weight, step


@dataclass(frozen=True)
class Power:
    """``alpha X^s + beta`` of one variable X > 0, kept as level and slope at ``unit``, the geometric mean of the data.

    ``alpha`` and ``beta`` are what the paper's tables give; near s = 0 they are degenerate, so compare predictions.
    """

    level: float
    slope: float
    exponent: float
    unit: float

    @property
    def alpha(self) -> float:
        return float(self.slope / _away_from_zero(self.exponent) * self.unit**-self.exponent)

    @property
    def beta(self) -> float:
        return self.level - self.slope / _away_from_zero(self.exponent)

    def __call__(self, x: float) -> float:
        return float(self.level + self.slope * box_cox(np.log(np.array(x / self.unit)), np.array(self.exponent)))


def fit_power(x: Sequence[float], y: Sequence[float], bounds: tuple[float, float] = EXPONENTS) -> Power:
    """One power curve through a few points, endpoints included if they are given."""
    logs = np.log(np.asarray(x, dtype=np.float64))
    middle = float(logs.mean())
    curves = fit_curves(logs - middle, np.asarray(y, dtype=np.float64)[None, None, :], np.ones((1, len(logs))), bounds)
    level, slope, exponent = (float(part[0, 0]) for part in (curves.level, curves.slope, curves.exponent))
    return Power(level, slope, exponent, math.exp(middle))


def _away_from_zero(exponent: float) -> float:
    return exponent if abs(exponent) > 1e-9 else 1e-9


@dataclass(frozen=True)
class Slope:
    """Slope of a loss curve over the logarithm of tokens, ``dL / dlog T = sum of rate T^exponent``."""

    terms: tuple[tuple[float, float], ...]  # (rate, exponent)

    @staticmethod
    def of_powers(*powers: tuple[float, float]) -> "Slope":
        """From the terms (alpha, s) of ``sum of alpha T^s + beta``."""
        return Slope(tuple((alpha * s, s) for alpha, s in powers))

    def at(self, log_tokens: float) -> float:
        return sum(rate * math.exp(exponent * log_tokens) for rate, exponent in self.terms)

    def scaled(self, factor: float) -> "Slope":
        return Slope(tuple((factor * rate, exponent) for rate, exponent in self.terms))

    def __add__(self, other: "Slope") -> "Slope":
        return Slope(self.terms + other.terms)


def lagrangian(general: Slope, domain: Slope | None = None, penalty: float = math.inf) -> Slope:
    """Slope of ``L_general + L_domain / lambda``, which has the sign of CMR's ``L_domain + lambda L_general``.

    ``penalty`` is lambda (100 to 7000 in the paper); at infinity only the general curve counts.
    """
    if domain is None or math.isinf(penalty):
        return general
    return general + domain.scaled(1 / penalty)


def turning_point(slope: Slope, low: float, high: float) -> float | None:
    """T0: the last tokens between ``low`` and ``high`` at which the curve stops rising and falls, None without one.

    Bracketed on a grid and solved there: the paper's implicit closed form need not converge.
    """
    grid = np.linspace(math.log(low), math.log(high), 800)
    values = [slope.at(x) for x in grid]
    turns = [i for i in range(len(grid) - 1) if values[i] > 0 >= values[i + 1]]
    return math.exp(float(brentq(slope.at, grid[turns[-1]], grid[turns[-1] + 1], xtol=1e-13))) if turns else None
