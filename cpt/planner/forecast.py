"""A chosen law, fitted, with what is needed to say how wrong it may be.

Owns the interval of a predicted loss (90%). Three things widen it: the bootstrap over runs (which pilots happened to be
run), the error at held-out shares and tokens (how wrong the form of the law is, growing with the log of the tokens
beyond the measured ones), and the distance outside the measurements (``cpt.planner.admissibility.widening``). Refuses
sizes that the observations say nothing about.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.planner.admissibility import at_shares, extrapolation, trusted_shares, widening
from cpt.planner.compare import Ranked, Wanted, choose, unable
from cpt.planner.fitting import FloatArray
from cpt.planner.laws.law import Fitted, Inputs, Samples
from cpt.planner.observations import BILLION, Observations, samples
from cpt.planner.scores import token_distance
from cpt.problems import ConfigError, Problem

NUM_REPLICAS = 200
QUANTILES = (0.05, 0.95)
NORMAL_95 = 1.6449  # 95% quantile of the standard normal
SHARES_DRAWN = np.linspace(0.0, 1.0, 41)
MISSED = 4.0  # times the median error over shares
LEAST_MISS = 0.02  # nats
SAME_SIZE = 1.5  # a model is "the same size" up to this factor


@dataclass(frozen=True)
class Forecaster:
    """A fitted law of one target; ``notes`` say which points it was fitted on, and where it is not trusted.

    ``above``: own shares up to this one are outside the law, None: no such limit is known.
    """

    ranked: Ranked
    fitted: Fitted
    samples: Samples
    notes: tuple[str, ...]
    above: float | None = None

    @property
    def name(self) -> str:
        return self.ranked.law.name

    @property
    def target(self) -> str:
        return self.ranked.target


@dataclass(frozen=True)
class Band:
    """Predicted losses (n,) in nats with the ends of their 90% interval."""

    loss: FloatArray
    low: FloatArray
    high: FloatArray


def forecaster(
    observations: Observations,
    target: str,
    wanted: Wanted,
    *,
    seed: int = 0,
    num_replicas: int = NUM_REPLICAS,
    progress: Callable[[str], None] | None = None,
) -> Forecaster:
    """Choose a law for ``target``, fit it, and refit it on bootstrap replicates.

    Raises:
        ConfigError, DataError: an unknown law, or observations that do not suit it.
    """
    ranked = choose(observations, target, wanted, seed=seed, progress=progress)
    chosen, notes = samples(observations, target)
    everything = chosen
    if ranked.above is not None:
        chosen = everything.select(everything.inputs.own_share > ranked.above)
        rises = f"the {target} loss rises with tokens at shares up to {ranked.above:.3g}"
        notes = (*notes, f"{rises}; law {ranked.law.name} cannot, it is fitted on and trusted at the shares above")
    if progress:
        progress(f"{target}: {ranked.law.name}, {num_replicas} bootstrap refits")
    fitted = ranked.law.fit(chosen, num_replicas, seed)
    above = ranked.above
    if above is None and target in chosen.inputs.sources:
        above, told = missed_shares(fitted, everything, ranked.law.name)
        notes = (*notes, *told)
    return Forecaster(ranked, fitted, chosen, (*notes, *_cautions(ranked, chosen, wanted)), above)


def _cautions(ranked: Ranked, chosen: Samples, wanted: Wanted) -> list[str]:
    """What speaks against a law that was called by name."""
    found = [f"law {ranked.law.name} is not chosen by auto: {ranked.excluded}"] if ranked.excluded else []
    limits = unable(ranked.law, chosen, wanted)
    return [*found, f"{limits}; the question lies beyond that"] if limits else found


def said(by: Forecaster) -> list[str]:
    """What there is to know about a fitted law, each line with its target and name."""
    return [f"{by.target}, law {by.name}: {line}" for line in (*by.notes, *by.fitted.warnings)]


def missed_shares(fitted: Fitted, everything: Samples, law: str) -> tuple[float | None, tuple[str, ...]]:
    """The highest own share, below the middle one, whose measurements the law misses far more than the others; and why.

    Where little is replayed the loss changes in kind, and a law that fits the other shares may be nats away there.
    """
    own = everything.inputs.own_share.round(6)
    misses = np.abs(fitted.predict(everything.inputs) - everything.losses)
    shares = np.unique(own)
    errors = np.array([misses[own == share].mean() for share in shares])
    missed = (errors > MISSED * max(float(np.median(errors)), LEAST_MISS / MISSED)) & (shares < np.median(shares))
    if not missed.any():
        return None, ()
    worst = int(np.flatnonzero(missed)[-1])
    told = f"law {law} misses the measured {everything.inputs.target} loss at share {shares[worst]:.3g} by"
    return float(shares[worst]), (f"{told} {errors[worst]:.2g} nats; it is trusted at the shares above",)


def check_size(by: Forecaster, params: float) -> None:
    """Raises ConfigError where ``params`` (billions) is not the one size, or one of the sizes, that the law knows."""
    sizes = np.unique(by.samples.inputs.params)
    nearest = float(sizes[np.argmin(np.abs(np.log(sizes / params)))])
    near = max(nearest / params, params / nearest) <= SAME_SIZE
    if near or (by.ranked.law.sizes and len(sizes) > 1):
        return
    known = ", ".join(f"{size * BILLION:.4g}" for size in sizes)
    if len(sizes) == 1:
        rule = f"the observations hold one model size, {known} parameters; nothing tells how losses change with size"
        fix = f"run pilots at two more sizes, or ask for --params {nearest * BILLION:.4g}"
    else:
        rule = f"law {by.name} is one per model size and knows {known}"
        fix = "ask for one of these, or choose a law that sees the size, such as --law dcpt"
    raise ConfigError(Problem("--params", params * BILLION, rule, fix))


def snapped(by: Forecaster, params: float) -> float:
    """The measured size (billions) that stands for ``params`` where the law does not see sizes."""
    sizes = np.unique(by.samples.inputs.params)
    if by.ranked.law.sizes and len(sizes) > 1:
        return params
    return float(sizes[np.argmin(np.abs(np.log(sizes / params)))])


def band(by: Forecaster, inputs: Inputs, *, widen: float = 1.0) -> Band:
    """Predicted losses and their interval; ``widen`` multiplies its half-widths."""
    loss = by.fitted.predict(inputs)
    replicas = by.fitted.replicas(inputs)
    low, high = np.quantile(replicas, QUANTILES, axis=0) if len(replicas) else (loss, loss)
    form = NORMAL_95 * form_error(by, inputs.tokens)
    below = widen * np.sqrt(np.maximum(loss - low, 0) ** 2 + form**2)
    above = widen * np.sqrt(np.maximum(high - loss, 0) ** 2 + form**2)
    return Band(loss, loss / (1 + below / loss), loss + above)  # below as far in ratio as above, and never under 0


def form_error(by: Forecaster, tokens: FloatArray) -> FloatArray:
    """(n,) error of the law's form in nats: what it errs on hidden points beyond what it errs on the fitted ones, which
    is the noise of a measurement and no error of a prediction; at least a third of it, since a fit adapts to noise.
    """
    error = by.ranked.error(token_distance(by.samples, tokens))
    noise = float(np.sqrt(np.mean((by.fitted.predict(by.samples.inputs) - by.samples.losses) ** 2)))
    return np.asarray(np.maximum(np.sqrt(np.maximum(error**2 - noise**2, 0.0)), error / 3))


def outside(by: Forecaster, *, params: float, tokens: float, share: float) -> tuple[float, list[str]]:
    """Factor by which intervals widen, and one sentence per way in which a question leaves the measurements."""
    widen, told = outside_scale(by, params=params, tokens=tokens)
    own = by.samples.inputs.own_share
    beyond = max(0.0, float(own.min()) - share, share - float(own.max()))
    if beyond > 1e-3:
        told.append(
            f"share of {by.target} data {share:.3g} lies outside the measured {own.min():.3g} to {own.max():.3g}; "
            "intervals are widened"
        )
    return widen + beyond / max(0.05, float(own.max() - own.min())), told


def outside_scale(by: Forecaster, *, params: float, tokens: float) -> tuple[float, list[str]]:
    """The same for size and tokens alone, in billions."""
    factors = extrapolation(by.samples, params=params, tokens=tokens)
    asked = {"params": params * BILLION, "tokens": tokens * BILLION}
    told = []
    for name, noun in (("params", "model size"), ("tokens", "token budget")):
        if factors[name] > 1.001:
            measured = getattr(by.samples.inputs, name) * BILLION
            told.append(
                f"{noun} {asked[name]:.4g} is {factors[name]:.3g} times outside the measured "
                f"{measured.min():.4g} to {measured.max():.4g}; intervals are widened"
            )
    sizes = len(np.unique(by.samples.inputs.params))
    if sizes == 2 and factors["params"] > 1.001:
        told.append("two model sizes cannot tell the floor E from A and alpha (three can): a larger model is a guess")
    return widening(by.samples, factors), told


def predict_facts(
    by: Forecaster, *, params: float | None, tokens: float | None, share_general: float
) -> dict[str, Any]:
    """One predicted loss with its interval, for ``cpt plan predict``; sizes and tokens are counts, None: the largest.

    Raises:
        ConfigError: a share outside 0 to 1, or a size that the law cannot know.
    """
    if not 0 <= share_general <= 1:
        raise ConfigError(Problem("--share-general", share_general, "a share lies between 0 and 1"))
    inputs = by.samples.inputs
    size = float(inputs.params.max()) if params is None else params / BILLION
    budget = float(inputs.tokens.max()) if tokens is None else tokens / BILLION
    check_size(by, size)
    size = snapped(by, size)
    own = share_general if by.target == "general" else 1 - share_general
    widen, told = outside(by, params=size, tokens=budget, share=own)
    result = band(by, at_shares(inputs, np.array([own]), params=size, tokens=budget), widen=widen)
    trusted = trusted_shares(by.fitted, inputs, params=size, tokens=budget)
    least = max(trusted.low, by.above or 0.0)
    drawn = SHARES_DRAWN if by.target == "general" else 1 - SHARES_DRAWN
    line = band(by, at_shares(inputs, drawn, params=size, tokens=budget), widen=widen)
    if not math.isfinite(float(result.loss[0])):
        raise ConfigError(Problem("--law", by.name, "gives no finite loss here", "choose another law"))
    return {
        "target": by.target,
        "loss": float(result.loss[0]),
        "interval": [float(result.low[0]), float(result.high[0])],
        "law": by.name,
        "params": size * BILLION,
        "tokens": budget * BILLION,
        "share_general": share_general,
        "share_domain": 1 - share_general,
        "curve": [
            {
                "share_general": float(at),
                "loss": float(line.loss[i]),
                "interval": [float(line.low[i]), float(line.high[i])],
            }
            for i, at in enumerate(SHARES_DRAWN)
        ],
        "trusted_shares": [least, trusted.high] if by.target == "general" else [1 - trusted.high, 1 - least],
        "warnings": [*by.notes, *by.fitted.warnings, *trusted.warnings, *told],
    }
