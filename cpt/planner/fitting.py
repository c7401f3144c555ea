"""One harness that fits every parametric law: robust residuals, many starts, weights for folds and bootstrap.

Owns the optimiser. All starts, all folds and all bootstrap replicates of a law are problems of one batch and move
together: one call of the law evaluates them all, and small linear systems are solved side by side. Refuses to know what
a law means; a law hands over its parameters, its values and its analytic derivatives.

The objective is Huber's loss of the log residuals, ``log(prediction) - log(observed)``, with delta 1e-3 (the convention
of the Chinchilla fits, arXiv 2203.15556): relative errors count alike at every loss level, and one odd pilot does not
bend the curve. Positive parameters move as their logarithms. Each iteration is a Levenberg-Marquardt step on the
reweighted least-squares problem that touches Huber's loss from above; parameters at a bound stay there while the
gradient points outwards.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
# Natural parameter values (S, P) -> predicted losses (S, n) and derivatives by the natural values (S, P, n).
Evaluate = Callable[[FloatArray], tuple[FloatArray, FloatArray]]

HUBER_DELTA = 1e-3
LOWEST_LOSS = 1e-9  # a prediction at or below zero has no logarithm; it is held here, far from every observed loss


@dataclass(frozen=True)
class Parameter:
    """Bounds, and the range of random starts, in natural units. ``low == high`` pins it.

    ``log`` parameters are positive and move as their logarithm; the others move as they are.
    """

    name: str
    low: float
    high: float
    start_low: float
    start_high: float
    log: bool = True

    def __post_init__(self) -> None:
        assert self.low <= self.high, f"{self.name}: bounds {self.low} to {self.high}"
        assert not self.log or self.low > 0, f"{self.name} is fitted as a logarithm; its lower bound is {self.low}"

    @property
    def pinned(self) -> bool:
        return self.low == self.high


def positive(name: str, low: float, high: float, start: tuple[float, float]) -> Parameter:
    """A positive parameter; its starts are spread evenly over the logarithm of ``start``."""
    return Parameter(name, low, high, max(start[0], low), min(start[1], high))


def pinned(name: str, value: float) -> Parameter:
    """A parameter that the data cannot tell: it keeps ``value``."""
    return Parameter(name, value, value, value, value, log=False)


@dataclass(frozen=True)
class FitProblem:
    """A law on given observations: ``losses`` (n,) in nats, all positive."""

    parameters: tuple[Parameter, ...]
    evaluate: Evaluate
    losses: FloatArray

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(parameter.name for parameter in self.parameters)


@dataclass(frozen=True)
class Solution:
    """Where each problem of a batch ended: ``theta`` (S, P) natural, ``objective`` (S,), ``converged`` (S,)."""

    theta: FloatArray
    objective: FloatArray
    converged: NDArray[np.bool_]

    def best(self, count: int = 1) -> "Solution":
        order = np.argsort(self.objective, kind="stable")[:count]
        return Solution(self.theta[order], self.objective[order], self.converged[order])


def huber(residuals: FloatArray, delta: float = HUBER_DELTA) -> FloatArray:
    """Huber's loss, elementwise: quadratic up to ``delta``, linear beyond."""
    size = np.abs(residuals)
    return np.where(size <= delta, 0.5 * size * size, delta * (size - 0.5 * delta))


def log_residuals(predicted: FloatArray, observed: FloatArray) -> FloatArray:
    return np.log(np.maximum(predicted, LOWEST_LOSS)) - np.log(observed)


def random_starts(parameters: tuple[Parameter, ...], count: int, seed: int) -> FloatArray:
    """(count, P) natural values; a Latin hypercube over the start ranges, so that few starts cover them evenly."""
    rng = np.random.default_rng([seed, 0x57A2])
    strata = np.stack([rng.permutation(count) for _ in parameters], axis=1)
    unit = (strata + rng.random(strata.shape)) / count
    low, high = (np.array([getattr(p, f"start_{end}") for p in parameters]) for end in ("low", "high"))
    logs = np.array([p.log for p in parameters])
    floor = np.where(logs, low, 1.0)
    ratio = np.where(logs, high, 1.0) / floor
    return np.where(logs, floor * ratio**unit, low + (high - low) * unit)


def fit_best(
    problem: FitProblem,
    weights: FloatArray | None = None,
    *,
    num_starts: int = 60,
    seed: int = 0,
    num_finalists: int = 5,
) -> Solution:
    """The best solutions from many starts, best first: all starts run a little, ``num_finalists`` run to their end.

    ``weights`` (n,) are the points' weights. The spread of the finalists tells whether the optimum is one.
    """
    row = np.ones_like(problem.losses) if weights is None else weights
    starts = random_starts(problem.parameters, num_starts, seed)
    rough = solve(problem, starts, np.broadcast_to(row, (num_starts, row.size)), iterations=25).best(num_finalists)
    return solve(problem, rough.theta, np.broadcast_to(row, (len(rough.theta), row.size)), iterations=400).best(
        num_finalists
    )


def fit_each(problem: FitProblem, weights: FloatArray, *, num_starts: int = 16, seed: int = 0) -> FloatArray:
    """One fit for each row of ``weights`` (W, n), each from its own starts; returns theta (W, P). Used for folds."""
    count = len(weights)
    starts = np.tile(random_starts(problem.parameters, num_starts, seed), (count, 1))
    rough = solve(problem, starts, np.repeat(weights, num_starts, axis=0), iterations=20)
    order = np.argsort(rough.objective.reshape(count, num_starts), axis=1, kind="stable")[:, :3]
    chosen = rough.theta.reshape(count, num_starts, -1)[np.arange(count)[:, None], order].reshape(3 * count, -1)
    final = solve(problem, chosen, np.repeat(weights, 3, axis=0), iterations=200)
    best = np.argmin(final.objective.reshape(count, 3), axis=1)
    return np.asarray(final.theta.reshape(count, 3, -1)[np.arange(count), best])


def refit(problem: FitProblem, theta: FloatArray, weights: FloatArray) -> FloatArray:
    """Refits from one optimum ``theta`` (P,) under each row of ``weights`` (W, n): the bootstrap. Returns (W, P)."""
    start = np.broadcast_to(theta, (len(weights), theta.size))
    return solve(problem, start, weights, iterations=60).theta


def bootstrap_weights(runs: NDArray[np.int64], count: int, seed: int) -> FloatArray:
    """(count, n) weights of the Bayesian bootstrap over runs: one Dirichlet weight per run, shared by its points.

    Points of one run share its seed and its data, so resampling points would claim too much. Dirichlet weights (Rubin
    1981) instead of drawing runs with replacement: with four pilots a draw often holds two shares and no law fits it.
    """
    rng = np.random.default_rng([seed, 0xB007])
    names, members = np.unique(runs, return_inverse=True)
    per_run = rng.exponential(size=(count, len(names)))
    return np.asarray((per_run / per_run.mean(axis=1, keepdims=True))[:, members])


def solve(problem: FitProblem, theta: FloatArray, weights: FloatArray, *, iterations: int) -> Solution:
    """Minimise the weighted Huber loss from each row of ``theta`` (S, P) under the same row of ``weights`` (S, n)."""
    return _Batch(problem, theta, weights).run(iterations)


class _Batch:
    """The state of a batch while it is solved, in internal coordinates z: log values where a parameter says so."""

    def __init__(self, problem: FitProblem, theta: FloatArray, weights: FloatArray) -> None:
        self.problem = problem
        self.free = np.array([not p.pinned for p in problem.parameters])
        self.logs = np.array([p.log for p in problem.parameters])
        self.low = self._inner(np.array([p.low for p in problem.parameters]))
        self.high = self._inner(np.array([p.high for p in problem.parameters]))
        self.weights = weights / weights.sum(axis=1, keepdims=True)
        self.z = np.clip(self._inner(theta), self.low, self.high)
        self.objective, self.gradient, self.hessian = self._measure(self.z, self.weights)
        self.damping = np.full(len(self.z), 1e-3)
        self.calm = np.zeros(len(self.z), dtype=np.int64)

    def _inner(self, theta: FloatArray) -> FloatArray:
        return np.where(self.logs, np.log(np.where(self.logs, theta, 1.0)), theta)

    def _natural(self, z: FloatArray) -> FloatArray:
        return np.where(self.logs, np.exp(np.where(self.logs, z, 0.0)), z)

    def run(self, iterations: int) -> Solution:
        done = np.zeros(len(self.z), dtype=bool)
        late = self.objective
        for step in range(iterations):
            live = np.flatnonzero(~done)
            if not live.size:
                break
            if step == iterations // 2:
                late = self.objective.copy()
            self._advance(live)
            done = (self.calm >= 3) | (self.damping > 1e12)
        # Along a flat valley the objective creeps for ever; what the second half of the steps won says if it counts.
        settled = done | (self.objective > 0.99 * late)
        return Solution(self._natural(self.z), self.objective, settled & np.isfinite(self.objective))

    def _advance(self, live: NDArray[np.int64]) -> None:
        trial = np.clip(self.z[live] + self._steps(live), self.low, self.high)
        objective, gradient, hessian = self._measure(trial, self.weights[live])
        better = objective < self.objective[live]
        gained = live[better]
        fall = self.objective[gained] - objective[better]
        slow = fall <= 1e-9 * self.objective[gained] + 1e-24
        self.calm[gained] = np.where(slow, self.calm[gained] + 1, 0)
        self.z[gained], self.objective[gained] = trial[better], objective[better]
        self.gradient[gained], self.hessian[gained] = gradient[better], hessian[better]
        self.damping[live] = np.where(better, np.maximum(self.damping[live] * 0.2, 1e-10), self.damping[live] * 6.0)

    def _steps(self, live: NDArray[np.int64]) -> FloatArray:
        """Damped Newton steps (L, P); a parameter at a bound that pushes outwards, or pinned, gets none."""
        z, gradient = self.z[live], self.gradient[live]
        outward = ((z <= self.low) & (gradient > 0)) | ((z >= self.high) & (gradient < 0))
        moves = self.free & ~outward
        both = moves[:, :, None] & moves[:, None, :]
        matrix = np.where(both, self.hessian[live], 0.0)
        diagonal = np.einsum("spp->sp", matrix)
        scale = np.maximum(diagonal, 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30)
        index = np.arange(z.shape[1])
        matrix[:, index, index] += np.where(moves, self.damping[live, None] * scale, 1.0)
        step = -np.linalg.solve(matrix, np.where(moves, gradient, 0.0)[:, :, None])[:, :, 0]
        return np.clip(step, -2.0, 2.0)

    def _measure(self, z: FloatArray, weights: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Objective (S,), gradient (S, P) and reweighted Gauss-Newton matrix (S, P, P)."""
        theta = self._natural(z)
        predicted, jacobian = self.problem.evaluate(theta)
        positive_part = predicted > LOWEST_LOSS
        residuals = log_residuals(predicted, self.problem.losses)
        objective = (weights * huber(residuals)).sum(axis=1)
        chain = np.where(self.logs, theta, 1.0)[:, :, None]
        rows = jacobian * chain * np.where(positive_part, 1.0 / np.maximum(predicted, LOWEST_LOSS), 0.0)[:, None, :]
        pull = weights * np.minimum(1.0, HUBER_DELTA / np.maximum(np.abs(residuals), 1e-300))
        gradient = np.einsum("spn,sn->sp", rows, pull * residuals)
        hessian = (rows * pull[:, None, :]) @ rows.transpose(0, 2, 1)
        bad = ~np.isfinite(objective)
        objective[bad] = np.inf
        gradient[bad], hessian[bad] = 0.0, np.eye(z.shape[1])
        return objective, gradient, hessian


def flat_parameters(problem: FitProblem, theta: FloatArray) -> tuple[str, ...]:
    """Names of parameters that the observations cannot tell apart: they move together along a flat direction.

    A direction of the Gauss-Newton Hessian in internal coordinates is flat where a change by half a unit (a factor
    1.65 for a positive parameter) would stay within one standard error of the fit.
    """
    predicted, jacobian = problem.evaluate(theta[None, :])
    scale = np.array([t if p.log else max(abs(t), 0.1) for p, t in zip(problem.parameters, theta, strict=True)])
    free = np.array([not p.pinned for p in problem.parameters])
    rows = (jacobian[0] * scale[:, None] / np.maximum(predicted[0], LOWEST_LOSS))[free]
    residuals = log_residuals(predicted[0], problem.losses)
    noise = max(float(np.sqrt(np.mean(residuals**2))), 1e-5)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    flat = noise / np.sqrt(np.maximum(values, 1e-300)) > 0.5
    involved = (np.abs(vectors[:, flat]) > 0.25).any(axis=1)
    names = [p.name for p in problem.parameters if not p.pinned]
    return tuple(name for name, hit in zip(names, involved, strict=True) if hit)
