"""Loss over tokens at one share, for many shares at once: constant, line in log T, one power, or two powers.

    L(T) = a                                                 constant   (1 budget)
    L(T) = a + b log T                                       line       (2 budgets or more)
    L(T) = a + b (T^s - 1)/s                                 one power  (4 or more; CMR's domain curve)
    L(T) = a + b (T^s - 1)/s + c (T^u - 1)/u                 two powers (7 or more; CMR's general curve)

T in units of the curve's own geometric mean. These are the delta curves of CMR (arXiv 2407.17467) in a form
that stays finite at s = 0; the loss before training only shifts ``a``. Each curve takes the largest form that its
budgets and the caller allow: on the released losses of arXiv 2403.16952 a power predicts steps 7-10k from 1-6k with
half the error of the line that the corrected Akaike criterion would choose. Owns these fits; the law across shares is
``cpt.planner.laws.cmr``.

All curves and all bootstrap replicates of one form move in one batch: the number of its curve travels with each
problem as a parameter of zero derivative.
"""

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from cpt.planner.fitting import FitProblem, FloatArray, Parameter, pinned, solve
from cpt.planner.laws.law import IntArray
from cpt.planner.laws.power_curves import Slope, box_cox, box_cox_with_slope

CONSTANT, LINE, ONE_POWER, TWO_POWERS = range(4)
FORM_NAMES = ("a constant", "a line in log tokens", "one power", "two powers")
NUM_BUDGETS = (1, 2, 4, 7)  # distinct budgets that a form needs
STEEPEST = (-1.5, 0.75)  # exponents over tokens
EXPONENT_GRID = (-1.2, -0.8, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 0.7)


@dataclass(frozen=True)
class CurvePoints:
    """Points of C curves, padded to equal length: ``x`` (C, n) log tokens minus ``middle`` (C,), ``losses`` (C, n) in
    nats (1 where padded) and ``weights`` (C, n), 0 where padded."""

    x: FloatArray
    losses: FloatArray
    weights: FloatArray
    middle: FloatArray

    def __len__(self) -> int:
        return len(self.x)

    def budgets(self, curve: int) -> int:
        return len(np.unique(np.round(self.x[curve, self.weights[curve] > 0], 4)))

    def select(self, index: IntArray) -> "CurvePoints":
        return CurvePoints(self.x[index], self.losses[index], self.weights[index], self.middle[index])


@dataclass(frozen=True)
class DeltaCurves:
    """``theta`` (W, C, 5) in the order a, b, s, c, u: row 0 is the fit, the others are bootstrap replicates."""

    theta: FloatArray
    middle: FloatArray
    forms: tuple[int, ...]

    def at(self, log_tokens: FloatArray, rows: slice) -> FloatArray:
        """(rows, U, C) losses at ``log_tokens`` (U,)."""
        a, b, s, c, u = np.moveaxis(self.theta[rows], 2, 0)[:, :, None, :]
        x = log_tokens[:, None] - self.middle
        losses: FloatArray = a + b * box_cox(x, s)
        return losses + c * box_cox(x, u) if TWO_POWERS in self.forms else losses

    def slope(self, curve: int, row: int = 0) -> Slope:
        """Slope over log T, T in billions of tokens like ``middle``."""
        _, b, s, c, u = (float(value) for value in self.theta[row, curve])
        unit = float(self.middle[curve])
        return Slope(((b * math.exp(-s * unit), s), (c * math.exp(-u * unit), u)))


def pad_curves(log_tokens: list[FloatArray], losses: list[FloatArray]) -> tuple[CurvePoints, list[IntArray]]:
    """Curves of any length side by side, and each curve's places in its row."""
    longest = max(len(x) for x in log_tokens)
    shape = (len(log_tokens), longest)
    x, y, weights = np.zeros(shape), np.ones(shape), np.zeros(shape)
    middle = np.array([values.mean() for values in log_tokens])
    for row, (own, values) in enumerate(zip(log_tokens, losses, strict=True)):
        x[row, : len(own)], y[row, : len(own)], weights[row, : len(own)] = own - middle[row], values, 1.0
    return CurvePoints(x, y, weights, middle), [np.arange(len(own)) for own in log_tokens]


def fit_delta_curves(points: CurvePoints, most: int, replicates: FloatArray) -> DeltaCurves:
    """Fits every curve with at most the form ``most``; ``replicates`` (B, C, n) are weights of further fits."""
    forms = np.array([largest_form(points.budgets(curve), most) for curve in range(len(points))])
    theta = np.zeros((len(points), 5))
    for form in np.unique(forms):
        theta[forms == form] = _fit_form(points.select(np.flatnonzero(forms == form)), int(form))
    rows = _refit(points, theta, forms, replicates)
    return DeltaCurves(np.concatenate((theta[None], rows)), points.middle, tuple(int(form) for form in forms))


def largest_form(budgets: int, most: int) -> int:
    return max(form for form in range(most + 1) if budgets >= NUM_BUDGETS[form])


def _fit_form(points: CurvePoints, form: int) -> FloatArray:
    """(C, 5): linear least squares at every exponent of a grid, the best three of each curve refined together."""
    starts = _grid_starts(points, form)  # (C, 3, 5)
    count, tries = starts.shape[:2]
    curves = np.repeat(np.arange(count), tries)
    flat = _numbered(starts.reshape(count * tries, 5), curves)
    solution = solve(_problem(points, form), flat, points.weights[curves], iterations=150)
    best = np.argmin(solution.objective.reshape(count, tries), axis=1)
    return np.asarray(solution.theta.reshape(count, tries, 6)[np.arange(count), best, :5])


def _refit(points: CurvePoints, theta: FloatArray, forms: IntArray, replicates: FloatArray) -> FloatArray:
    rows = np.repeat(theta[None], len(replicates), axis=0)
    if not len(replicates):
        return rows
    for form in np.unique(forms):
        own = np.flatnonzero(forms == form)
        some = points.select(own)
        curves = np.tile(np.arange(len(own)), len(replicates))
        start = _numbered(rows[:, own].reshape(-1, 5), curves)
        weights = replicates[:, own].reshape(len(start), -1)
        found = solve(_problem(some, int(form)), start, weights, iterations=25).theta
        rows[:, own] = found[:, :5].reshape(len(replicates), len(own), 5)
    return rows


def _numbered(theta: FloatArray, curves: IntArray) -> FloatArray:
    return np.concatenate((theta, curves[:, None].astype(np.float64)), axis=1)


def _problem(points: CurvePoints, form: int) -> FitProblem:
    """The curves' losses are divided out, so that problems of different curves share the observation 1."""

    def evaluate(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        a, b, s, c, u, curve = theta.T[:, :, None]
        index = np.rint(curve[:, 0]).astype(np.int64)
        x, observed = points.x[index], points.losses[index]
        (first, by_s), (second, by_u) = box_cox_with_slope(x, s), box_cox_with_slope(x, u)
        slopes = (np.ones_like(x), first, b * by_s, second, c * by_u, np.zeros_like(x))
        return (a + b * first + c * second) / observed, np.stack(slopes, axis=1) / observed[:, None, :]

    return FitProblem(_parameters(form, len(points)), evaluate, np.ones(points.x.shape[1]))


def _parameters(form: int, num_curves: int) -> tuple[Parameter, ...]:
    def free(name: str, bounds: tuple[float, float], needed: int) -> Parameter:
        return Parameter(name, *bounds, *bounds, log=False) if form >= needed else pinned(name, 0.0)

    return (
        free("a", (1e-6, 100.0), CONSTANT),
        free("b", (-100.0, 100.0), LINE),
        free("s", STEEPEST, ONE_POWER),
        free("c", (-100.0, 100.0), TWO_POWERS),
        free("u", STEEPEST, TWO_POWERS),
        Parameter("curve", 0.0, max(num_curves - 1.0, 0.5), 0.0, 0.5, log=False),
    )


def _grid_starts(points: CurvePoints, form: int) -> FloatArray:
    """(C, tries, 5)."""
    pairs = {
        CONSTANT: [(0.0, 0.0)],
        LINE: [(0.0, 0.0)],
        ONE_POWER: [(s, 0.0) for s in EXPONENT_GRID],
        TWO_POWERS: list(combinations(EXPONENT_GRID, 2)),
    }[form]
    exponents = np.array(pairs)  # (K, 2)
    x, root = points.x[:, None, :], np.sqrt(points.weights)[:, None, :]
    columns = [np.ones_like(x + exponents[:, :1]), box_cox(x, exponents[:, :1]), box_cox(x, exponents[:, 1:])]
    used = {CONSTANT: 1, LINE: 2, ONE_POWER: 2, TWO_POWERS: 3}[form]
    design = np.stack(columns[:used], axis=-1) * root[..., None]  # (C, K, n, used)
    target = (points.losses[:, None, :] * root)[..., None]
    solved = np.linalg.pinv(design, rcond=1e-12) @ target
    rest = ((design @ solved - target)[..., 0] ** 2).sum(axis=-1)
    best = np.argsort(rest, axis=1, kind="stable")[:, :3]
    start = np.zeros((*best.shape, 5))
    start[..., [0, 1, 3][:used]] = np.take_along_axis(solved[..., 0], best[..., None], axis=1)
    start[..., [2, 4]] = exponents[best]
    return start
