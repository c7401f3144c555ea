"""Questions about more than two sources: the loss of a mixture, and the mixture with the lowest loss.

Owns the objective: the mean predicted loss over the domain targets, held under a limit on the general loss where both a
tolerance and a base row are given. Caps come from what the sources hold: no source is planned for more than
``MAX_EPOCHS`` passes (arXiv 2305.16264). Refuses weights for sources that the observations do not have.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.planner.base_losses import base_loss
from cpt.planner.fitting import FloatArray
from cpt.planner.forecast import QUANTILES, Forecaster, band, check_size, outside_scale
from cpt.planner.laws.law import Fitted, Samples
from cpt.planner.observations import BILLION, Observations
from cpt.planner.reweighting import token_proportional, uniform
from cpt.planner.simplex import (
    Objective,
    at_scale,
    mixture_inputs,
    replicates,
    search_mixture,
    search_replicates,
    token_caps,
)
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

MAX_EPOCHS = 4.0
PENALTY = 10.0  # of a nat above the limit of the general loss; domain losses never gain as much by breaking it
INTERVAL_REPLICAS = 40  # searches that the interval of the weights takes; each costs about as much as the answer


@dataclass(frozen=True)
class ManyQuestion:
    """``params`` and ``tokens`` in billions; ``available`` tokens by source (counts), empty where unknown."""

    params: float
    tokens: float
    available: Mapping[str, float]
    tolerance: float | None = None
    seed: int = 0


def read_weights(path: Path, sources: Sequence[str], option: str) -> dict[str, float]:
    """A JSON object source -> number >= 0; sources that it leaves out get 0.

    Raises:
        ConfigError: not such an object, an unknown source, or nothing above 0.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(option, str(path), f"cannot be read as JSON ({error})")) from None
    if not isinstance(raw, dict):
        raise ConfigError(Problem(option, str(path), 'must hold an object such as {"web": 0.7, "law": 0.3}'))
    unknown = sorted(set(raw) - set(sources))
    if unknown:
        rule = f"names the unknown source {unknown[0]!r}"
        raise ConfigError(Problem(option, str(path), rule, f"sources are {', '.join(sources)}"))
    for name, value in raw.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(Problem(f"{option} {name}", value, "must be a finite number >= 0"))
    if not sum(raw.values()) > 0:
        raise ConfigError(Problem(option, str(path), "gives no source a weight above 0"))
    return {name: float(raw.get(name, 0.0)) for name in sources}


def predict_mixture(
    by: Forecaster, weights: Mapping[str, float], *, params: float | None, tokens: float | None
) -> dict[str, Any]:
    """Predicted loss of one mixture with its interval, for ``cpt plan predict --weights``; None: the largest."""
    inputs = by.samples.inputs
    total = sum(weights.values())
    shares = np.array([[weights[name] / total for name in inputs.sources]])
    size = float(inputs.params.max()) if params is None else params / BILLION
    budget = float(inputs.tokens.max()) if tokens is None else tokens / BILLION
    check_size(by, size)
    widen, told = outside_scale(by, params=size, tokens=budget)
    result = band(by, mixture_inputs(shares, by.target, inputs.sources, size, budget), widen=widen)
    return {
        "target": by.target,
        "loss": float(result.loss[0]),
        "interval": [float(result.low[0]), float(result.high[0])],
        "law": by.name,
        "params": size * BILLION,
        "tokens": budget * BILLION,
        "weights": {name: float(share) for name, share in zip(inputs.sources, shares[0], strict=True)},
        "warnings": [*by.notes, *by.fitted.warnings, *told, *_far(by.samples, shares[0])],
    }


def recommend_mixture(
    observations: Observations, laws: Mapping[str, Forecaster], question: ManyQuestion
) -> dict[str, Any]:
    """The facts of ``cpt plan recommend`` for more than two sources; ``laws`` by target.

    Raises:
        DataError: the sources cannot give the tokens, or the limit has no base row.
    """
    limit = math.inf
    if question.tolerance is not None and "general" in laws:
        base = base_loss(observations, "general", question.params * BILLION).loss
        limit = base * (1 + question.tolerance)
    told: list[str] = []
    for by in laws.values():
        check_size(by, question.params)
        told += outside_scale(by, params=question.params, tokens=question.tokens)[1]
    sources = observations.sources
    fits = {target: by.fitted for target, by in laws.items()}
    objective = _objective(fits, question, sources, limit)
    prior, caps = _prior(observations, question), _caps(sources, question)
    best = search_mixture(objective, prior, caps, seed=question.seed)
    _check_limit(fits, question, sources, best, limit)
    refits = zip(*(replicates(fit)[:INTERVAL_REPLICAS] for fit in fits.values()), strict=False)
    each = [_objective(dict(zip(fits, group, strict=True)), question, sources, limit) for group in refits]
    spread = search_replicates(each, best, prior, caps, seed=question.seed)
    ends = np.quantile(np.concatenate([spread, best[None, :]]), QUANTILES, axis=0)
    general = "general" in sources
    share_general = float(best[sources.index("general")]) if general else None
    index = sources.index("general") if general else -1
    return {
        "usage": "tolerance",
        "share_general": share_general,
        "share_domain": None if share_general is None else 1 - share_general,
        "interval": [float(ends[0][index]), float(ends[1][index])] if general else None,
        "weights": _named(sources, best),
        "weights_interval": {name: [float(ends[0][i]), float(ends[1][i])] for i, name in enumerate(sources)},
        "params": question.params * BILLION,
        "tokens": question.tokens * BILLION,
        "limit_general": None if math.isinf(limit) else limit,
        "tolerance": question.tolerance,
        "predicted": _losses(fits, question, sources, best),
        "baselines": [
            {
                "name": name,
                "weights": _named(sources, shares),
                "share_general": float(shares[index]) if general else None,
                **_losses(fits, question, sources, shares),
                "regret": max(0.0, float((objective(shares[None, :]) - objective(best[None, :]))[0])),
            }
            for name, shares in _baselines(observations, question, list(laws)).items()
        ],
        "law": _law_names(laws),
        "warnings": list(dict.fromkeys([*observations.warnings, *_said(laws), *told, *_far(_any(laws), best)])),
    }


def _objective(fits: Mapping[str, Fitted], question: ManyQuestion, sources: tuple[str, ...], limit: float) -> Objective:
    """Mean domain loss of mixtures (q, m), plus ``PENALTY`` times what the general loss exceeds its limit by."""
    predict = {t: at_scale(fit, t, sources, question.params, question.tokens) for t, fit in fits.items()}
    wanted = [target for target in predict if target != "general"] or list(predict)

    def value(shares: FloatArray) -> FloatArray:
        mean = np.mean([predict[target](shares) for target in wanted], axis=0)
        over = np.maximum(predict["general"](shares) - limit, 0) if "general" in predict else 0.0
        return np.asarray(mean + PENALTY * over)

    return value


def _prior(observations: Observations, question: ManyQuestion) -> FloatArray:
    """Token proportions where they are known, else the mean mixture of the pilots."""
    if question.available:
        return token_proportional(np.array([question.available[name] for name in observations.sources]))
    mean = np.array([column[observations.trained].mean() for column in observations.shares.values()])
    return np.asarray(mean / mean.sum())


def _caps(sources: Sequence[str], question: ManyQuestion) -> FloatArray:
    if not question.available:
        return np.ones(len(sources))
    tokens = np.array([question.available[name] for name in sources])
    return token_caps(tokens, question.tokens * BILLION, MAX_EPOCHS, sources)


def _losses(
    fits: Mapping[str, Fitted], question: ManyQuestion, sources: tuple[str, ...], shares: FloatArray
) -> dict[str, float]:
    at = {target: at_scale(fit, target, sources, question.params, question.tokens) for target, fit in fits.items()}
    return {f"loss_{target}": float(predict(shares[None, :])[0]) for target, predict in at.items()}


def _baselines(observations: Observations, question: ManyQuestion, targets: Sequence[str]) -> dict[str, FloatArray]:
    named = {"uniform": uniform(len(observations.sources))}
    if question.available:
        named["token-proportional"] = _prior(observations, question)
    named["best pilot"] = _best_pilot(observations, targets)
    return named


def _best_pilot(observations: Observations, targets: Sequence[str]) -> FloatArray:
    wanted = [t for t in targets if t != "general"] or list(targets)
    losses = np.mean([observations.losses[target] for target in wanted], axis=0)
    losses = np.where(observations.trained & np.isfinite(losses), losses, np.inf)
    if not np.isfinite(losses).any():
        raise DataError(f"{observations.path}: no pilot has all of the losses {', '.join(wanted)}")
    return np.array([column[int(np.argmin(losses))] for column in observations.shares.values()])


def _named(sources: Sequence[str], shares: FloatArray) -> dict[str, float]:
    return {name: float(share) for name, share in zip(sources, shares, strict=True)}


def _law_names(laws: Mapping[str, Forecaster]) -> dict[str, str]:
    names = {target: by.name for target, by in laws.items()}
    domain = next((name for target, name in names.items() if target != "general"), "")
    return {"general": names.get("general", domain), "domain": domain or names["general"]}


def _check_limit(
    fits: Mapping[str, Fitted], question: ManyQuestion, sources: tuple[str, ...], best: FloatArray, limit: float
) -> None:
    """Raises ConfigError where not even the best mixture keeps the general loss below its limit."""
    if math.isinf(limit) or question.tolerance is None:
        return
    general = _losses(fits, question, sources, best)["loss_general"]
    base = limit / (1 + question.tolerance)
    if general > limit + 1e-4:
        rule = (
            f"no mixture keeps the general loss within it: at best it rises by {general / base - 1:.2%} over the base"
        )
        fix = f"ask for --tolerance {math.ceil((general / base - 1) * 1000 + 0.5) / 1000:g} or more"
        raise ConfigError(Problem("--tolerance", question.tolerance, rule, fix))


def _said(laws: Mapping[str, Forecaster]) -> list[str]:
    return [f"{target}, law {by.name}: {line}" for target, by in laws.items() for line in by.fitted.warnings]


def _any(laws: Mapping[str, Forecaster]) -> Samples:
    return next(iter(laws.values())).samples


def _far(chosen: Samples, shares: FloatArray) -> list[str]:
    """Sources that are asked for beyond what any pilot had."""
    highest = chosen.inputs.shares.max(axis=0)
    beyond = [
        f"{name} {share:.3g} (pilots: at most {top:.3g})"
        for name, share, top in zip(chosen.inputs.sources, shares, highest, strict=True)
        if share > top + 0.01
    ]
    return [f"shares beyond every pilot: {', '.join(beyond)}"] if beyond else []
