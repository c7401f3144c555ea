"""What a law of whole loss curves is: fitted on a few measured runs, it predicts any schedule's loss at every step.

Owns the types that these laws share and the one way from a formula with derivatives to a fit. A law's file holds its
formula, its view of a schedule, its parameters with their ranges, and its paper. Unlike the mixture laws
(``cpt.planner.laws.law``) these see no shares: they tell what the rate does to the loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.planner.curves import IntArray, LossCurve, Schedule, thinned
from cpt.planner.fitting import FitProblem, FloatArray, Parameter, fit_best, flat_parameters, huber, log_residuals

FIT_ROWS = 256  # points of each curve that a fit sees; more rows are averaged
# Runs with the same rates still differ by 0.01 nats right after the warm-up, ten times as much as later; what a fit
# reads into those rows it gets wrong later. Rows before this multiple of the warm-up are left out of the fit.
SETTLED = 1.5
MIN_SETTLED_ROWS = 8


@dataclass(frozen=True)
class Track:
    """A schedule and the steps where its loss is wanted: ``rates`` (T,) from step 0 on, ``steps`` (n,) increasing."""

    rates: FloatArray
    steps: IntArray
    warmup_end: int


Ranges = Callable[[Sequence[Track], FloatArray], tuple[Parameter, ...]]  # tracks, all losses
Prepare = Callable[[Track], Any]
Formula = Callable[[FloatArray, Any], tuple[FloatArray, FloatArray]]  # theta (S, P), what prepare made -> loss, slopes


@dataclass(frozen=True)
class CurveLaw:
    """One law of curves. ``prepare`` reduces a schedule, once, to what ``formula`` needs at each evaluation."""

    name: str
    title: str
    paper: str
    ranges: Ranges
    prepare: Prepare
    formula: Formula


@dataclass(frozen=True)
class CurveFit:
    """A law with its parameters ``theta`` (P,), natural values."""

    law: CurveLaw
    names: tuple[str, ...]
    theta: FloatArray
    warnings: tuple[str, ...]

    @property
    def params(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in zip(self.names, self.theta, strict=True)}

    def predict(self, track: Track) -> FloatArray:
        """(n,) losses in nats at the track's steps."""
        losses, _ = self.law.formula(self.theta[None, :], self.law.prepare(track))
        return np.asarray(losses[0])


@dataclass(frozen=True)
class Errors:
    """How far predictions lie from measurements: ``mae`` in nats, ``r2``, mean Huber loss of the log residuals."""

    mae: float
    r2: float
    huber: float


def track_of(run: LossCurve | Schedule, steps: IntArray | None = None) -> Track:
    return Track(run.rates, run.steps if steps is None else steps, run.warmup_end)


def fit_curves(law: CurveLaw, curves: Sequence[LossCurve], *, seed: int = 0, num_starts: int = 60) -> CurveFit:
    """``law`` fitted on all points of all curves, each point alike."""
    points = [thinned(*settled(curve), FIT_ROWS) for curve in curves]
    tracks = [track_of(curve, steps) for curve, (steps, _) in zip(curves, points, strict=True)]
    losses = np.concatenate([losses for _, losses in points])
    views = [law.prepare(track) for track in tracks]

    def evaluate(theta: FloatArray) -> tuple[FloatArray, FloatArray]:
        parts = [law.formula(theta, view) for view in views]
        return np.concatenate([loss for loss, _ in parts], axis=1), np.concatenate([s for _, s in parts], axis=2)

    problem = FitProblem(law.ranges(tracks, losses), evaluate, losses)
    finalists = fit_best(problem, seed=seed, num_starts=num_starts)
    theta = finalists.theta[0]
    warnings = [] if finalists.converged[0] else ["the fit did not converge; its parameters are rough, add a curve"]
    flat = flat_parameters(problem, theta)
    if flat:
        warnings.append(f"the curves do not settle {', '.join(flat)}; add one whose rate drops at another step")
    return CurveFit(law, problem.names, theta, tuple(warnings))


def settled(curve: LossCurve) -> tuple[IntArray, FloatArray]:
    """Steps and losses that a fit sees: the rows well after the warm-up, all rows where few are left."""
    late = curve.steps >= SETTLED * curve.warmup_end
    keep = late if late.sum() >= MIN_SETTLED_ROWS else np.ones_like(late)
    return curve.steps[keep], curve.losses[keep]


def errors_of(predicted: FloatArray, observed: FloatArray) -> Errors:
    """Mean absolute error, coefficient of determination (NaN where the observed losses are all one), mean Huber."""
    spread = float(((observed - observed.mean()) ** 2).sum())
    r2 = 1.0 - float(((predicted - observed) ** 2).sum()) / spread if spread > 0 else float("nan")
    return Errors(
        float(np.abs(predicted - observed).mean()), r2, float(huber(log_residuals(predicted, observed)).mean())
    )
