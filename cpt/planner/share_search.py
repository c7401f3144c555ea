"""The loss at one budget as a function of the general share, and the smallest share that keeps it under a bound.

Owns what ``cpt plan critical`` fits and searches; what it reports is ``cpt.planner.critical``'s. Without a law of the
user's choice the loss is a curve across all trained shares, CMR's power (arXiv 2407.17467) or an exponential (arXiv
2403.16952), the better one when a share is left out: through the measurements at the wanted tokens where there are any,
and through curves over tokens otherwise. Replicates of all of these are pooled, so that an interval holds the
uncertainty of the form. A bound that no share meets has no share: NaN, never the nearest one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.planner.fitting import FloatArray
from cpt.planner.laws.cmr import EXPONENTIAL, PAPER, POWER, share_law
from cpt.planner.laws.law import Fitted, Inputs, Law, Samples
from cpt.planner.scores import share_folds

BILLION = 1e9
SAME_TOKENS = 0.01
SHARES = np.linspace(0.0, 1.0, 501)
NUM_BUDGETS = 25  # of the curves over tokens
REACH = 10.0  # turning points and helpful budgets are sought up to this multiple of the largest measured budget
FORMS = {"cmr": POWER, "exponential": EXPONENTIAL}


@dataclass(frozen=True)
class CriticalQuery:
    """What is asked. ``law`` None: curves across shares at ``tokens``. ``penalty`` is CMR's lambda; finite values
    (100 to 7000 in the paper) need the domain's losses and move a turning point a little earlier. ``base_loss`` None:
    that of the observations at this size.
    """

    tokens: float
    epsilons: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05)
    law: Law | None = None
    params: float | None = None
    penalty: float = math.inf
    base_loss: float | None = None
    num_replicas: int = 200
    seed: int = 0


class Search:
    """The fitted loss across shares and the search for critical shares in it."""

    def __init__(self, samples: Samples, query: CriticalQuery, size: float, base: float) -> None:
        self.samples, self.size, self.base = samples, size, base
        self.wanted = query.tokens / BILLION
        if query.law is None:
            self.law, self.fitted, others, warnings = _fit_forms(samples, query)
        else:
            self.law = query.law.name
            self.fitted = query.law.fit(samples, query.num_replicas, query.seed)
            others, warnings = [], list(self.fitted.warnings)
        self.warnings = warnings
        inputs = self.inputs(np.full(SHARES.shape, self.wanted), SHARES)
        self.losses = self.fitted.predict(inputs)
        self.replicas = np.concatenate([fitted.replicas(inputs) for fitted in (self.fitted, *others)])

    def inputs(self, tokens: FloatArray, shares: FloatArray) -> Inputs:
        known = self.samples.inputs
        columns = np.zeros((len(shares), len(known.sources)))
        place = known.sources.index(known.target)
        columns[:, place] = shares
        columns[:, 1 - place if len(known.sources) == 2 else place - 1] += 1 - shares
        same = (np.full(len(shares), value) for value in (self.size, float(np.median(known.lr)), self.base))
        params, rates, bases = same
        return Inputs(known.target, known.sources, params, tokens, columns, rates, bases)

    def row(self, epsilon: float) -> dict[str, Any]:
        """A replicate that meets the tolerance at no share counts as share 1 in the 90 % interval."""
        share = float(first_share(self.losses[None], self.base + epsilon)[0])
        spread = np.nan_to_num(first_share(self.replicas, self.base + epsilon), nan=1.0)
        interval = [float(value) for value in np.quantile(spread, [0.05, 0.95])] if len(spread) else None
        feasible = not math.isnan(share)
        return {
            "epsilon": epsilon,
            "share_general": share if feasible else None,
            "interval": interval,
            "feasible": feasible,
        }

    def over_tokens(self, epsilons: Sequence[float]) -> list[dict[str, Any]]:
        """R*(T) at every tolerance, from the first measured budget to the last or the wanted one."""
        measured = self.samples.inputs.tokens
        budgets = np.geomspace(measured.min(), max(self.wanted, measured.max()), NUM_BUDGETS)
        losses = self._at(budgets)
        found = []
        for epsilon in epsilons:
            shares = first_share(losses, self.base + epsilon)
            found += [
                {
                    "epsilon": epsilon,
                    "tokens": float(budget * BILLION),
                    "share_general": None if math.isnan(share) else float(share),
                }
                for budget, share in zip(budgets, shares, strict=True)
            ]
        return found

    def _at(self, budgets: FloatArray) -> FloatArray:
        inputs = self.inputs(np.repeat(budgets, len(SHARES)), np.tile(SHARES, len(budgets)))
        return self.fitted.predict(inputs).reshape(len(budgets), len(SHARES))

    def remedy(self, epsilon: float) -> str:
        """Which tolerance, or which budget, would make ``epsilon`` feasible."""
        needed = math.ceil((float(self.losses.min()) - self.base) * 1e4) / 1e4
        wanted = scaled_tokens(self.wanted)
        text = f"epsilon {epsilon:g} is met at no share with {wanted} tokens; epsilon {needed:g} would be"
        measured = self.samples.inputs.tokens
        budgets = np.geomspace(measured.min(), REACH * max(measured.max(), self.wanted), 120)
        met = self._at(budgets).min(axis=1) <= self.base + epsilon
        if not met.any():
            return f"{text}, and so would no budget up to {scaled_tokens(budgets[-1])}"
        nearest = budgets[met][np.argmin(np.abs(np.log(budgets[met] / self.wanted)))]
        guess = ", which is extrapolated" if nearest > measured.max() else ""
        return f"{text}, or a budget of {scaled_tokens(nearest)} tokens{guess}"


def first_share(losses: FloatArray, bound: float) -> FloatArray:
    """(B,) smallest share at which ``losses`` (B, len(SHARES)) are at most ``bound``, NaN where none are; between two
    shares of the grid the loss is taken as straight."""
    met = losses <= bound
    first = np.argmax(met, axis=1)
    rows, before = np.arange(len(losses)), np.maximum(first - 1, 0)
    high, low = losses[rows, before], losses[rows, first]
    part = np.where(first > 0, (high - bound) / np.where(high > low, high - low, 1.0), 1.0)
    share = SHARES[before] + part * (SHARES[first] - SHARES[before])
    return np.asarray(np.where(met.any(axis=1), share, math.nan))


def _fit_forms(samples: Samples, query: CriticalQuery) -> tuple[str, Fitted, list[Fitted], list[str]]:
    """The better form with its name, the fits whose replicates join the interval, and warnings."""
    laws = {name: share_law(name, name, PAPER, form, interior=False) for name, form in FORMS.items()}
    errors = {name: _left_out_error(law, samples, query.seed) for name, law in laws.items()}
    order = sorted(laws, key=lambda name: errors[name])
    curves = {name: laws[name].fit(samples, query.num_replicas, query.seed) for name in order}
    warnings = list(curves[order[0]].warnings)
    at_budget = np.abs(samples.inputs.tokens / (query.tokens / BILLION) - 1) <= SAME_TOKENS
    there = samples.select(at_budget)
    if len(np.unique(there.inputs.own_share.round(3))) < len(np.unique(samples.inputs.own_share.round(3))):
        return order[0], curves[order[0]], [curves[name] for name in order[1:]], warnings
    measured = {name: laws[name].fit(there, query.num_replicas, query.seed) for name in order}
    best = _AtBudget(measured[order[0]], curves[order[0]], query.tokens / BILLION)
    return order[0], best, [measured[order[1]], *curves.values()], warnings


@dataclass(frozen=True)
class _AtBudget:
    """Measurements at one budget (billions), curves over tokens at all others."""

    measured: Fitted
    curves: Fitted
    tokens: float

    @property
    def params(self) -> dict[str, float]:
        return dict(self.measured.params)

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.curves.warnings

    def predict(self, inputs: Inputs) -> FloatArray:
        near = np.abs(inputs.tokens / self.tokens - 1) <= 1e-9
        return np.where(near, self.measured.predict(inputs), self.curves.predict(inputs))

    def replicas(self, inputs: Inputs) -> FloatArray:
        near = np.abs(inputs.tokens / self.tokens - 1) <= 1e-9
        return np.where(near, self.measured.replicas(inputs), self.curves.replicas(inputs))


def _left_out_error(law: Law, samples: Samples, seed: int) -> float:
    """Mean absolute error at interior shares left out one at a time; 0 with too few, so that the first form wins."""
    masks = share_folds(samples)
    if not len(masks):
        return 0.0
    errors = np.abs(law.predict_folds(samples, masks, seed) - samples.losses)
    return float(errors[~masks].mean())


def scaled_tokens(billions: float) -> str:
    return f"{billions * BILLION:.3g}"
