"""What a mixture law is: something fitted on observations that predicts losses elsewhere, with bootstrap replicates.

Owns the types that all laws share and the one way from a formula with derivatives to a law. A law's file holds its
formula, its parameters with their ranges, and its paper. Refuses to choose observations (``cpt.planner.observations``)
or to judge a fit (``cpt.planner.compare``).

Parameters and tokens enter formulas in billions, which keeps coefficients near one.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cpt.planner.fitting import (
    FitProblem,
    FloatArray,
    Parameter,
    bootstrap_weights,
    fit_best,
    fit_each,
    flat_parameters,
    refit,
)

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Inputs:
    """What a law sees, one entry per observation (n).

    ``params`` and ``tokens`` (n,) in billions; ``shares`` (n, m): share of the training tokens by source, rows sum to
    1; ``lr`` (n,) peak learning rate and ``base_loss`` (n,) nats before training, NaN where unknown. ``bases``: size in
    billions and loss of every base that was measured, also of those that were not trained.
    """

    target: str
    sources: tuple[str, ...]
    params: FloatArray
    tokens: FloatArray
    shares: FloatArray
    lr: FloatArray
    base_loss: FloatArray
    bases: tuple[tuple[float, float], ...] = ()

    def __len__(self) -> int:
        return len(self.params)

    @property
    def own_share(self) -> FloatArray:
        """(n,) share of the corpus whose loss is predicted, the ``r`` of D-CPT."""
        if self.target not in self.sources:
            raise ValueError(f"no share is known for target {self.target!r}; sources are {', '.join(self.sources)}")
        return np.ascontiguousarray(self.shares[:, self.sources.index(self.target)])

    def select(self, index: NDArray[np.bool_] | IntArray) -> "Inputs":
        columns = {name: getattr(self, name)[index] for name in ("params", "tokens", "shares", "lr", "base_loss")}
        return replace(self, **columns)


@dataclass(frozen=True)
class Samples:
    """Inputs with the measured ``losses`` (n,) in nats and the index of the ``runs`` (n,) they come from."""

    inputs: Inputs
    losses: FloatArray
    runs: IntArray

    def __len__(self) -> int:
        return len(self.losses)

    def select(self, index: NDArray[np.bool_] | IntArray) -> "Samples":
        return Samples(self.inputs.select(index), self.losses[index], self.runs[index])


class Fitted(Protocol):
    """A law with its parameters."""

    @property
    def params(self) -> Mapping[str, float]: ...

    @property
    def warnings(self) -> tuple[str, ...]: ...

    def predict(self, inputs: Inputs) -> FloatArray:
        """(n,) losses in nats."""
        ...

    def replicas(self, inputs: Inputs) -> FloatArray:
        """(B, n) losses, one row per bootstrap replicate; (0, n) where none were asked for."""
        ...


Fit = Callable[[Samples, int, int], Fitted]  # samples, number of bootstrap replicates, seed
Folds = Callable[[Samples, NDArray[np.bool_], int], FloatArray]  # samples, fitted-on masks (F, n), seed -> (F, n)
Formula = Callable[[FloatArray, Inputs], tuple[FloatArray, FloatArray]]
Ranges = Callable[[Samples], tuple[Parameter, ...]]


@dataclass(frozen=True)
class Law:
    """One entry of the table of laws.

    ``fit(samples, num_replicas, seed)`` fits it; ``predict_folds(samples, masks, seed)`` fits it once for each mask
    (True: fitted on) and predicts all points. ``many_sources``: takes any number of sources. ``sizes``: sees the
    model size. ``rises``: its general loss may rise with tokens. ``sees_shares``: False for the baseline that ignores
    the mixture. ``min_shares``: distinct mixtures that it needs at least. ``reach``: factor beyond the measured tokens
    up to which it may be chosen; laws whose curves of different shares know nothing of each other have a short one.
    """

    name: str
    title: str
    paper: str
    fit: Fit
    predict_folds: Folds
    many_sources: bool = False
    sizes: bool = True
    rises: bool = False
    sees_shares: bool = True
    min_shares: int = 3
    reach: float = math.inf


@dataclass(frozen=True)
class ParametricFit:
    """A formula with fitted parameters: ``theta`` (P,), bootstrap replicates ``thetas`` (B, P), natural values."""

    names: tuple[str, ...]
    formula: Formula
    theta: FloatArray
    thetas: FloatArray
    converged: bool
    flat: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    @property
    def params(self) -> Mapping[str, float]:
        return {name: float(value) for name, value in zip(self.names, self.theta, strict=True)}

    def predict(self, inputs: Inputs) -> FloatArray:
        return np.asarray(self.formula(self.theta[None, :], inputs)[0][0])

    def replicas(self, inputs: Inputs) -> FloatArray:
        return self.formula(self.thetas, inputs)[0] if len(self.thetas) else np.empty((0, len(inputs)))


def parametric(name: str, formula: Formula, ranges: Ranges, **entry: object) -> Law:
    """A law from its formula (losses and derivatives) and its parameters' ranges, which may depend on the data."""

    def fit(samples: Samples, num_replicas: int, seed: int) -> ParametricFit:
        problem = problem_of(samples, formula, ranges(samples))
        finalists = fit_best(problem, seed=seed)
        theta = finalists.theta[0]
        weights = bootstrap_weights(samples.runs, num_replicas, seed)
        thetas = refit(problem, theta, weights) if num_replicas else np.empty((0, theta.size))
        flat = flat_parameters(problem, theta)
        warnings = fit_warnings(samples, bool(finalists.converged[0]), flat)
        return ParametricFit(problem.names, formula, theta, thetas, bool(finalists.converged[0]), flat, warnings)

    def predict_folds(samples: Samples, masks: NDArray[np.bool_], seed: int) -> FloatArray:
        problem = problem_of(samples, formula, ranges(samples))
        theta = fit_each(problem, masks.astype(np.float64), seed=seed)
        return np.asarray(problem.evaluate(theta)[0])

    return Law(name=name, fit=fit, predict_folds=predict_folds, **entry)  # type: ignore[arg-type]


def problem_of(samples: Samples, formula: Formula, parameters: tuple[Parameter, ...]) -> FitProblem:
    inputs = samples.inputs
    return FitProblem(parameters, lambda theta: formula(theta, inputs), samples.losses)


def fit_warnings(samples: Samples, converged: bool, flat: tuple[str, ...]) -> tuple[str, ...]:
    found = []
    if not converged:
        found.append("the fit did not converge; treat its parameters as rough, or measure more points")
    if flat:
        sizes = len(np.unique(samples.inputs.params))
        shares = len(np.unique(samples.inputs.shares, axis=0))
        found.append(
            f"{_listed(flat)} cannot be told apart with {_counted(sizes, 'model size')} and "
            f"{_counted(shares, 'share')}; their values are one choice of many, predictions inside the data are not"
        )
    return tuple(found)


def predict_folds_by_fitting(fit: Fit) -> Folds:
    """``predict_folds`` for laws that are not parametric: one fit per fold."""

    def predict_folds(samples: Samples, masks: NDArray[np.bool_], seed: int) -> FloatArray:
        return np.stack([fit(samples.select(mask), 0, seed).predict(samples.inputs) for mask in masks])

    return predict_folds


def _listed(names: tuple[str, ...]) -> str:
    if len(names) > 8:
        return f"{', '.join(names[:4])} and {len(names) - 4} more"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
