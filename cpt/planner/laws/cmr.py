"""CMR, the critical mixture ratio scaling law (arXiv 2407.17467), as a law that predicts losses, and its own formulas.

    loss against share, fixed tokens   L(R)       = alpha R^s + beta
    domain loss over tokens, fixed R   dL_dom(T)  = alpha1 T^s1 + beta1
    general loss over tokens, fixed R  dL_gen(T)  = alpha2 T^s2 + alpha3 T^s3 + beta2
    turning point T0(R, lambda)        d/dT (dL_dom + lambda dL_gen) = 0, the general loss stops rising there
    critical ratio of one model size   R_CMR(T)   = alpha4 T^s4 + beta3, through the pairs (T0, R)

R is the share of the domain in the paper; as a law of a loss, R is the share of the corpus whose loss is predicted.
Losses in nats, tokens in billions (the paper's T counts 0.2e9 tokens; one sentence of it that equates T = 250 with 500B
tokens contradicts its own unit). Owns the law ``cmr``: curves over tokens at every trained share, and across the shares
a power at the wanted tokens. It knows nothing between model sizes and refuses sizes that were not trained: the authors
found that the curves do not carry over.

Traps: the exponent s must be free in sign (the published losses need s > 0 with alpha < 0; forced negative, errors are
30 times larger). Endpoints 0 and 1 stay out of the fit over shares, as in the paper, where at least three others are
left. General loss may rise and turn with tokens here, unlike in D-CPT.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cpt.planner.fitting import FloatArray, bootstrap_weights
from cpt.planner.laws.delta_curves import (
    FORM_NAMES,
    LINE,
    NUM_BUDGETS,
    ONE_POWER,
    TWO_POWERS,
    DeltaCurves,
    fit_delta_curves,
    largest_form,
    pad_curves,
)
from cpt.planner.laws.law import Fit, Inputs, IntArray, Law, Samples, predict_folds_by_fitting
from cpt.planner.laws.power_curves import Power, PowerCurves, fit_curves, fit_power
from cpt.rundir import DataError

PAPER = "arXiv 2407.17467"
TOKENS_PER_UNIT = 0.2e9  # the paper's T = 100 is 20e9 tokens
SAME_SIZE = 0.01  # relative difference in parameters up to which two models count as one size
SAME_SHARE = 1e-3
LOWEST_SHARE = 1e-3  # a power with s < 0 has no value at share 0; shares below are held here

# Finance, v2 table 5, (alpha4, s4, beta3) by model size; the domain share at T.
FINANCE_CMR = {
    "460M": (0.22524761, 0.26944345, -0.48139982),
    "940M": (0.7520627, 0.13720245, -1.06581937),
    "1.6B": (-2.36384831, -0.15125569, 1.59223649),
    "3.1B": (-2.5368197, -0.42071423, 0.84375368),
}


def critical_ratio(volume: float, alpha4: float, s4: float, beta3: float) -> float:
    """``R_CMR(T) = alpha4 T^s4 + beta3``, a domain share; ``volume`` in the unit that the constants were fitted in."""
    return float(alpha4 * volume**s4 + beta3)


def fit_critical_ratio(turning_points: Sequence[float], domain_shares: Sequence[float]) -> Power:
    """R_CMR(T) through pairs (T0, R). Compare its predictions, not its constants: they are near-degenerate."""
    return fit_power(turning_points, domain_shares)


@dataclass(frozen=True)
class ShareForm:
    """A curve across shares: ``power`` is CMR's, ``exponential`` that of the data mixing laws (arXiv 2403.16952)."""

    name: str
    variable: Callable[[FloatArray], FloatArray]
    exponents: tuple[float, float]
    takes_zero: bool


def _log_share(shares: FloatArray) -> FloatArray:
    return np.asarray(np.log(np.maximum(shares, LOWEST_SHARE)))


POWER = ShareForm("alpha R^s + beta", _log_share, (-2.0, 2.0), takes_zero=False)
EXPONENTIAL = ShareForm("c + k exp(b R)", lambda shares: shares, (-20.0, 20.0), takes_zero=True)


@dataclass(frozen=True)
class SizeFit:
    """One model size: ``params`` in billions, trained ``shares`` (S,) and the curves over tokens at each.

    ``weights`` (1 + B, S) of the shares, 0 where a share stays out of the fit across shares.
    """

    params: float
    shares: FloatArray
    curves: DeltaCurves
    weights: FloatArray
    form: ShareForm

    def across(self, tokens: FloatArray, rows: slice) -> PowerCurves:
        """Curves (rows, U) across shares at ``tokens`` (U,) billions."""
        losses = self.curves.at(np.log(tokens), rows)
        weights = self.weights[rows]
        used = weights[0] > 0
        return fit_curves(
            self.form.variable(self.shares[used]), losses[:, :, used], weights[:, used], self.form.exponents
        )

    def predict(self, shares: FloatArray, tokens: FloatArray, rows: slice) -> FloatArray:
        """(rows, n) losses."""
        budgets, place = np.unique(tokens, return_inverse=True)
        found = self.across(budgets, rows)
        parts = (part[:, place] for part in (found.level, found.slope, found.exponent))
        # A power with s < 0 runs off to infinity at share 0; half the least fitted share is as far as it is taken.
        least = 0.0 if self.form.takes_zero else 0.5 * float(self.shares[self.weights[0] > 0].min())
        return PowerCurves(*parts).at(self.form.variable(np.maximum(shares, least)))


@dataclass(frozen=True)
class CmrFit:
    """The law on its observations; row 0 of every array is the fit, the others are bootstrap replicates."""

    sizes: tuple[SizeFit, ...]
    tokens: float  # largest measured budget, billions
    warnings: tuple[str, ...]

    @property
    def params(self) -> Mapping[str, float]:
        """For each size the curve across shares at the largest budget, and s1, s2, s3 of the curves over tokens."""
        values: dict[str, float] = {}
        for size in self.sizes:
            tail = "" if len(self.sizes) == 1 else f"@{size.params:g}B"
            found = size.across(np.array([self.tokens]), slice(0, 1))
            slope, s = float(found.slope[0, 0]), float(found.exponent[0, 0])
            alpha = slope / (s if abs(s) > 1e-9 else 1e-9)
            values |= {f"alpha{tail}": alpha, f"s{tail}": s, f"beta{tail}": float(found.level[0, 0]) - alpha}
            for share, theta in zip(size.shares, size.curves.theta[0], strict=True):
                named = zip("abscu", theta, strict=True)
                values |= {f"{name}[{share:.3g}]{tail}": float(value) for name, value in named}
        return values

    def size_of(self, params: float) -> SizeFit:
        """The trained size (billions); a size that was not trained is refused."""
        for size in self.sizes:
            if abs(params / size.params - 1) <= SAME_SIZE:
                return size
        trained = ", ".join(f"{size.params * 1e9:.4g}" for size in self.sizes)
        raise DataError(
            f"params = {params * 1e9:.4g}: the law cmr is fitted for each model size and trained were {trained}; "
            "choose one of these, or a law that sees the size, such as dcpt"
        )

    def predict(self, inputs: Inputs) -> FloatArray:
        return np.asarray(self._predict(inputs, slice(0, 1))[0])

    def replicas(self, inputs: Inputs) -> FloatArray:
        return self._predict(inputs, slice(1, None))

    def _predict(self, inputs: Inputs, rows: slice) -> FloatArray:
        losses: FloatArray = np.empty((len(self.sizes[0].weights[rows]), len(inputs)))
        if not len(losses):
            return losses
        owners = np.array([self.sizes.index(self.size_of(float(value))) for value in inputs.params])
        for number, size in enumerate(self.sizes):
            here = owners == number
            if here.any():
                losses[:, here] = size.predict(inputs.own_share[here], inputs.tokens[here], rows)
        return losses


def fit_cmr(
    samples: Samples, num_replicas: int = 0, seed: int = 0, *, form: ShareForm = POWER, interior: bool = True
) -> CmrFit:
    """Fits curves over tokens at every share of every size, and prepares the curve across shares.

    Replicates weight runs (one Dirichlet weight each, over shares) and points within runs (over tokens): a share with a
    single run would otherwise have one curve in all replicates, as if extrapolating it were certain.
    """
    runs = bootstrap_weights(samples.runs, num_replicas, seed) if num_replicas else np.empty((0, len(samples)))
    points = np.random.default_rng([seed, 0xC112]).exponential(size=runs.shape)
    warnings: list[str] = []
    sizes = []
    for params, members in _sizes(samples.inputs.params):
        sizes.append(_fit_size(samples, (params, members), (runs, points), (form, interior), warnings))
    return CmrFit(tuple(sizes), float(samples.inputs.tokens.max()), tuple(warnings))


def _fit_size(
    samples: Samples,
    size: tuple[float, IntArray],
    weights: tuple[FloatArray, FloatArray],
    how: tuple[ShareForm, bool],
    warnings: list[str],
) -> SizeFit:
    (params, members), (runs, points), (form, interior) = size, weights, how
    own, logs = samples.inputs.own_share[members], np.log(samples.inputs.tokens[members])
    shares, groups = _grouped(own)
    members_of = [members[group] for group in groups]
    padded, places = pad_curves([logs[group] for group in groups], [samples.losses[index] for index in members_of])
    most = ONE_POWER if samples.inputs.target == "domain" else TWO_POWERS
    replicates = np.zeros((len(runs), *padded.x.shape))
    for row, (index, place) in enumerate(zip(members_of, places, strict=True)):
        replicates[:, row, place] = (runs * points)[:, index]
    curves = fit_delta_curves(padded, most, replicates)
    first = [np.unique(samples.runs[index], return_index=True)[1] for index in members_of]
    by_share = np.array([runs[:, index[start]].sum(axis=1) for index, start in zip(members_of, first, strict=True)])
    counts = np.array([len(start) for start in first], dtype=np.float64)
    used = _in_ratio_fit(shares, form, interior)
    if used.sum() < 2:
        raise DataError(
            f"share_{samples.inputs.target}: {_counted(len(shares), 'share')} at {params * 1e9:.4g} parameters; a "
            "curve across shares needs at least two above 0 (four to be tested); run pilots at other shares"
        )
    warnings += _warnings(params, int(used.sum()), [padded.budgets(row) for row in range(len(shares))], most)
    return SizeFit(params, shares, curves, np.concatenate((counts[None], by_share.T)) * used, form)


def _in_ratio_fit(shares: FloatArray, form: ShareForm, interior: bool) -> NDArray[np.bool_]:
    inside = (shares > SAME_SHARE) & (shares < 1 - SAME_SHARE)
    if interior and inside.sum() >= 3:
        return np.asarray(inside)
    return np.ones_like(inside) if form.takes_zero else np.asarray(shares > SAME_SHARE)


def _warnings(params: float, num_shares: int, budgets: list[int], most: int) -> list[str]:
    size = f"{params * 1e9:.4g} parameters"
    found = []
    if num_shares == 2:
        found.append(f"two shares at {size}: the curve across shares is a line in its variable, nothing tests it")
    elif num_shares == 3:
        found.append(f"three shares at {size} determine the curve across shares exactly; its error cannot be seen")
    low = min(budgets)
    if low < NUM_BUDGETS[most]:
        able = largest_form(low, most)
        found.append(
            f"{_counted(low, 'token budget')} at one share and {size}: the loss over tokens is {FORM_NAMES[able]} "
            f"instead of {FORM_NAMES[most]}, which needs {NUM_BUDGETS[most]}"
            + ("; predictions at other budgets ignore the tokens" if able < LINE else "")
        )
    return found


def _sizes(params: FloatArray) -> list[tuple[float, IntArray]]:
    """Model sizes (geometric mean of those within one percent) with their observations."""
    ordered = np.argsort(params, kind="stable")
    jumps = [i for i, (a, b) in enumerate(pairwise(params[ordered]), start=1) if b / a - 1 > SAME_SIZE]
    return [(math.exp(float(np.log(params[part]).mean())), part) for part in np.split(ordered, jumps)]


def _grouped(shares: FloatArray) -> tuple[FloatArray, list[IntArray]]:
    ordered = np.argsort(shares, kind="stable")
    jumps = [i for i, (a, b) in enumerate(pairwise(shares[ordered]), start=1) if b - a > SAME_SHARE]
    parts = np.split(ordered, jumps)
    return np.array([shares[part].mean() for part in parts]), parts


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def share_law(name: str, title: str, paper: str, form: ShareForm, *, interior: bool) -> Law:
    """A law that puts curves over tokens and one curve across shares together."""

    def fit(samples: Samples, num_replicas: int, seed: int) -> CmrFit:
        return fit_cmr(samples, num_replicas, seed, form=form, interior=interior)

    chosen: Fit = fit
    folds = predict_folds_by_fitting(chosen)
    return Law(name, title, paper, chosen, folds, sizes=False, rises=True, min_shares=4, reach=2.0)


def trained_sizes(samples: Samples) -> list[float]:
    """Model sizes in billions, ascending."""
    return [params for params, _ in _sizes(samples.inputs.params)]


CMR = share_law("cmr", "CMR: alpha R^s + beta across shares, powers over tokens", PAPER, POWER, interior=True)
