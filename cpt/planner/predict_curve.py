"""Predict the loss curve of a learning-rate schedule from measured curves of other schedules: `cpt plan predict-curve`.

Owns the way from files to a prediction, its facts for people and machines, and when a prediction reaches too far.
Refuses to know formulas (``cpt.planner.laws``) or file formats (``cpt.planner.curves``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cpt.planner.curves import IntArray, LossCurve, Schedule, read_curve, read_schedule
from cpt.planner.fitting import FloatArray
from cpt.planner.laws.annealing import ANNEALING
from cpt.planner.laws.curve_law import CurveLaw, errors_of, fit_curves, settled, track_of
from cpt.planner.laws.multi_power import MULTI_POWER, MULTI_POWER_TIED
from cpt.planner.wording import Facts
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

CURVE_LAWS: Mapping[str, CurveLaw] = {law.name: law for law in (MULTI_POWER, MULTI_POWER_TIED, ANNEALING)}
MAX_POINTS = 1000  # steps of the schedule whose loss is written
MEASURED_POINTS = 240  # rows of each measured curve that are handed on
SHOWN_ROWS = 8
ROWS_PER_PARAMETER = 2
FAR = 1.5  # a schedule with this much more area behind it than any measured run is far away


def predict_curve(
    curve_paths: Sequence[Path], schedule_path: Path, law: str, seed: int, warmup_steps: int | None = None
) -> Facts:
    """Facts of the prediction, ready for JSON. ``warmup_steps``: where the warm-up of all runs ends, when that is
    before their first row.

    Raises:
        ConfigError: there is no such law, or no curve.
        DataError: a file cannot be used, or the curves are too short for the law.
    """
    if law not in CURVE_LAWS:
        raise ConfigError(Problem("--law", law, f"must be one of {', '.join(CURVE_LAWS)}"))
    if not curve_paths:
        raise ConfigError(Problem("CURVES", None, "at least one measured curve is needed", "name its CSV file"))
    curves = [read_curve(path, warmup_steps) for path in curve_paths]
    schedule = read_schedule(schedule_path, warmup_steps)
    _check_rows(curves, CURVE_LAWS[law])
    steps = _wanted_steps(schedule, schedule_path, curves)
    fit = fit_curves(CURVE_LAWS[law], curves, seed=seed)
    fitted = [fit.predict(track_of(curve)) for curve in curves]
    errors = errors_of(np.concatenate(fitted), np.concatenate([curve.losses for curve in curves]))
    return {
        "law": law,
        "paper": fit.law.paper,
        "params": dict(fit.params),
        "schedule": schedule.name,
        "steps": steps.tolist(),
        "lr": schedule.rates[steps].tolist(),
        "loss": fit.predict(track_of(schedule, steps)).tolist(),
        "fit": asdict(errors),
        "measured": [_measured(curve, losses) for curve, losses in zip(curves, fitted, strict=True)],
        "warnings": [*fit.warnings, *_reach(schedule, curves)],
    }


def _measured(curve: LossCurve, fitted: FloatArray) -> Facts:
    """At most ``MEASURED_POINTS`` rows of a measured curve, for the figure."""
    every = -(-len(curve.steps) // MEASURED_POINTS)
    steps = curve.steps[::every]
    return {
        "name": curve.name,
        "steps": steps.tolist(),
        "lr": curve.rates[steps].tolist(),
        "loss": curve.losses[::every].tolist(),
        "fitted": fitted[::every].tolist(),
    }


def _check_rows(curves: Sequence[LossCurve], law: CurveLaw) -> None:
    rows = sum(len(settled(curve)[0]) for curve in curves)
    parameters = len(law.ranges([track_of(curve) for curve in curves], curves[0].losses))
    if rows < ROWS_PER_PARAMETER * parameters:
        names = ", ".join(curve.name for curve in curves)
        raise DataError(
            f"{names}: {rows} rows after the warm-up for the {parameters} parameters of {law.name}; write at least "
            f"{ROWS_PER_PARAMETER * parameters}"
        )


def _wanted_steps(schedule: Schedule, path: Path, curves: Sequence[LossCurve]) -> IntArray:
    """Evenly spread steps, from the warm-up's end and as much area as behind the first measurement to the last step."""
    first = min(float(curve.rates[: curve.steps[0] + 1].sum()) for curve in curves)
    reached = np.flatnonzero(np.cumsum(schedule.rates) >= first * (1 - 1e-9))
    if not len(reached):
        raise DataError(f"{path}: ends before the measured curves begin; write a longer schedule")
    last = len(schedule.rates) - 1
    start = max(int(reached[0]), schedule.warmup_end if schedule.warmup_end < last else 0)
    return np.unique(np.linspace(start, last, min(MAX_POINTS, last - start + 1)).round().astype(np.int64))


def _reach(schedule: Schedule, curves: Sequence[LossCurve]) -> list[str]:
    """Where the schedule leaves what was measured."""
    found = []
    area, measured = float(schedule.rates.sum()), max(float(curve.rates.sum()) for curve in curves)
    if area > FAR * measured:
        found.append(
            f"the schedule trains {area / measured:.1f} times as far (sum of rates) as the longest curve; its loss "
            "there is an extrapolation"
        )
    peak, known = float(schedule.rates.max()), max(float(curve.rates.max()) for curve in curves)
    if abs(peak / known - 1.0) > 0.05:
        found.append(f"the schedule's highest rate is {peak:.3g}, the curves' {known:.3g}; the laws assume one peak")
    lowest = float(schedule.rates[schedule.warmup_end :].min())
    floor = min(float(curve.rates[curve.warmup_end :].min()) for curve in curves)
    if lowest < 0.5 * floor:
        found.append(f"the schedule falls to {lowest:.3g}; no curve was measured below {floor:.3g}")
    return found


def render(facts: Facts) -> Group:
    """A few rows of the predicted curve, the fit's errors, the warnings."""
    table = Table(title=f"{facts['schedule']}, predicted by {facts['law']}", title_justify="left")
    for name in ("step", "lr", "loss"):
        table.add_column(name, justify="right")
    for at in np.unique(np.linspace(0, len(facts["steps"]) - 1, SHOWN_ROWS).round().astype(int)):
        table.add_row(f"{facts['steps'][at]:,}", f"{facts['lr'][at]:.3g}", f"{facts['loss'][at]:.4f}")
    names = ", ".join(one["name"] for one in facts["measured"])
    # strict JSON has no NaN: R2 is null where all measured losses are one
    r2 = "" if facts["fit"]["r2"] is None else f", R2 {facts['fit']['r2']:.4f}"
    fitted = f"Fitted on {names}: mean absolute error {facts['fit']['mae']:.4f} nats{r2}."
    return Group(table, Text(fitted), *(Text(f"Warning: {warning}.") for warning in facts["warnings"]))
