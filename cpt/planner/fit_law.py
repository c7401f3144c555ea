"""One law on one target: its parameters, how well it fits, and how well it predicts what it did not see."""

import math
from typing import Any

import numpy as np

from cpt.planner.admissibility import rising_runs, trusted_shares
from cpt.planner.compare import Wanted, unsuitable
from cpt.planner.fitting import FloatArray
from cpt.planner.forecast import NUM_REPLICAS, QUANTILES, Forecaster, forecaster
from cpt.planner.laws.law import Samples
from cpt.planner.laws.table import LAWS
from cpt.planner.observations import BILLION, Observations, samples
from cpt.planner.scores import KINDS, score
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError


def fit_facts(observations: Observations, law: str, target: str, *, seed: int = 0) -> dict[str, Any]:
    """The facts of ``cpt plan fit``.

    Raises:
        ConfigError: no such law. DataError: it does not suit the observations, or the domain loss rises in every run.
    """
    chosen, _ = samples(observations, target)
    check_suits(observations, law, chosen)
    by = forecaster(observations, target, Wanted(law), seed=seed)
    chosen = by.samples
    fitted = by.fitted.predict(chosen.inputs)
    quality = score(fitted, chosen.losses)
    scores = by.ranked.scores
    return {
        "law": by.name,
        "title": by.ranked.law.title,
        "paper": by.ranked.law.paper,
        "target": target,
        "params": dict(by.fitted.params),
        "params_interval": _parameter_intervals(by),
        "r2": _finite(quality.r2),
        "huber": quality.huber,
        "mae": quality.mae,
        "num_points": quality.num_points,
        "heldout": {kind: _of(scores[kind], "mae") for kind in KINDS},
        "heldout_r2": {kind: _of(scores[kind], "r2") for kind in KINDS},
        "heldout_huber": {kind: _of(scores[kind], "huber") for kind in KINDS},
        "points": _points(chosen, fitted),
        "warnings": [*observations.warnings, *by.notes, *by.fitted.warnings, *_warnings(observations, by)],
    }


def check_suits(observations: Observations, law: str, chosen: Samples) -> None:
    """Raises ConfigError or DataError where a law called by name cannot be fitted."""
    if law != "auto" and law not in LAWS:
        raise ConfigError(Problem("--law", law, "no such law", f"choose auto or one of {', '.join(LAWS)}"))
    reason = unsuitable(LAWS[law], chosen) if law != "auto" else ""
    if reason:
        raise DataError(f"{observations.path}: law {law} cannot be fitted: {reason}. Run pilots at more shares")
    check_learns(observations, chosen)


def check_learns(observations: Observations, chosen: Samples) -> None:
    """Raises DataError where the domain loss rises in every run: then something else than the mixture is wrong."""
    runs = np.unique(chosen.runs)
    if chosen.inputs.target == "domain" and len(rising_runs(chosen)) == len(runs) and _all_end_higher(chosen):
        raise DataError(
            f"{observations.path}: the domain loss rises with tokens in all of {len(runs)} runs; no mixture law "
            "describes that. Look for swapped loss columns, a diverging learning rate, or tokens counted backwards"
        )


def _all_end_higher(chosen: Samples) -> bool:
    """A run that rises while its rate is re-warmed and then falls has learnt something."""
    tokens = chosen.inputs.tokens
    runs = [np.flatnonzero(chosen.runs == run) for run in np.unique(chosen.runs)]
    return all(chosen.losses[r[np.argmax(tokens[r])]] > chosen.losses[r[np.argmin(tokens[r])]] for r in runs)


def _warnings(observations: Observations, by: Forecaster) -> list[str]:
    found = []
    inputs = by.samples.inputs
    sizes = np.unique(inputs.params)
    if by.ranked.law.sizes and len(sizes) < 3:
        counted = "one model size" if len(sizes) == 1 else "two model sizes"
        found.append(f"{counted}: how the loss changes with size needs at least three; do not extrapolate the size")
    if observations.two_sided and by.ranked.law.sees_shares:
        tokens = float(inputs.tokens.min())
        size = float(sizes[-1])
        found += trusted_shares(by.fitted, inputs, params=size, tokens=tokens).warnings
    return found


def _parameter_intervals(by: Forecaster) -> dict[str, list[float]]:
    thetas = getattr(by.fitted, "thetas", np.empty((0, 0)))
    if len(thetas) < NUM_REPLICAS // 2:
        return {}
    ends = np.quantile(thetas, QUANTILES, axis=0)
    return {name: [float(low), float(high)] for name, low, high in zip(by.fitted.params, *ends, strict=True)}


def _points(chosen: Samples, fitted: FloatArray) -> list[dict[str, Any]]:
    inputs = chosen.inputs
    columns = {"params": inputs.params * BILLION, "tokens": inputs.tokens * BILLION}
    columns |= {f"share_{name}": inputs.shares[:, i] for i, name in enumerate(inputs.sources)}
    columns |= {"measured": chosen.losses, "predicted": fitted}
    return [{name: float(column[i]) for name, column in columns.items()} for i in range(len(chosen))]


def _of(value: Any, field: str) -> float | None:
    return None if value is None else _finite(getattr(value, field))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
