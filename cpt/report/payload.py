"""The page's data for its script: every plot as JSON, its numbers as one base64 text of 32-bit floats.

Owns how much of a long curve travels: strong curves and noise each have a budget of points, shared by all of their
kind on the page, so that twenty runs of 10^5 steps stay within megabytes. Spikes survive (see ``decimate``).

Curves over tokens carry tokens only. Per run, ``knots`` map tokens to steps and to hours, and the script interpolates.
"""

import base64
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from cpt.report.plots import Axis, Chart, FloatArray, Plot, Series, decimate
from cpt.report.summary import Summary

BUDGET = {"line": 70_000, "raw": 130_000}  # points on the whole page
FEWEST, MOST = 160, 60_000  # points of one curve
KNOTS = 200


class Numbers:
    """All floats of the page, one after another; an entry is known by (start, count)."""

    def __init__(self) -> None:
        self._parts: list[FloatArray] = []
        self._count = 0

    def add(self, values: FloatArray) -> tuple[int, int]:
        found = (self._count, len(values))
        self._parts.append(np.asarray(values, dtype=np.float64))
        self._count += len(values)
        return found

    def text(self) -> str:
        joined = np.concatenate([*self._parts, np.empty(0)]).astype("<f4")
        return base64.b64encode(joined.tobytes()).decode("ascii")


def page_data(charts: Sequence[Chart], runs: Sequence[Summary]) -> str:
    """JSON for a script element: no ``<`` in it, so nothing in a run's name can end the element."""
    numbers = Numbers()
    budgets = _budgets([item for chart in charts for plot in chart.plots for item in plot.series])
    told = {
        "runs": [_run(item, numbers) for item in runs],
        "charts": {
            chart.name: [_plot(plot, numbers, budgets) for plot in chart.plots] for chart in charts if chart.plots
        },
    }
    told["floats"] = numbers.text()
    text = json.dumps(told, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _budgets(series: Sequence[Series]) -> dict[str, int]:
    """Points for one curve of each style. Short curves leave their share to the long ones."""
    found = {}
    for style, budget in BUDGET.items():
        left = budget
        lengths = sorted(len(item.points) for item in series if item.style == style)
        for place, length in enumerate(lengths):
            share = left // (len(lengths) - place)
            if length > share:
                found[style] = min(MOST, max(FEWEST, share))
                break
            left -= length
        else:
            found[style] = MOST
    return found


def _run(item: Summary, numbers: Numbers) -> dict[str, Any]:
    """The label, and where in the numbers the knots of tokens, steps and hours since the first record lie."""
    scalars = item.run.metrics.scalars
    columns = np.column_stack([item.run.metrics.tokens, scalars["step"], scalars["time"]])
    known = columns[np.isfinite(columns[:, :2]).all(axis=1)]
    if len(known) > KNOTS:
        known = known[np.unique(np.linspace(0, len(known) - 1, KNOTS).astype(int))]
    has_hours = bool(len(known)) and bool(np.isfinite(known[:, 2]).all())
    hours = (known[:, 2] - known[0, 2]) / 3600 if has_hours else np.zeros(len(known))
    rising = np.maximum.accumulate(hours)  # a clock that was set back
    return {
        "label": item.label,
        "knots": [numbers.add(known[:, 0]), numbers.add(known[:, 1]), numbers.add(rising)],
        "hours": has_hours,
    }


def _plot(plot: Plot, numbers: Numbers, budgets: dict[str, int]) -> dict[str, Any]:
    return {
        "x": _axis(plot.x),
        "y": _axis(plot.y),
        "origin": plot.origin,
        "height": plot.height,
        "marks": [{"run": mark.run, "x": mark.x, "symbol": mark.symbol, "text": mark.text} for mark in plot.marks],
        "series": [_series(_thinned(item, budgets), numbers) for item in plot.series if len(item.points)],
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {"label": axis.label, "kind": axis.kind, "limits": axis.limits, "fromZero": axis.from_zero}


def _thinned(item: Series, budgets: dict[str, int]) -> Series:
    budget = budgets.get(item.style)
    return replace(item, points=decimate(item.points, budget // 4)) if budget else item


def _series(item: Series, numbers: Numbers) -> dict[str, Any]:
    optional = {name: getattr(item, name) for name in ("low", "high", "left", "right", "steps")}
    return {
        "run": item.run,
        "label": item.label,
        "style": item.style,
        "x": numbers.add(item.points[:, 0]),
        "y": numbers.add(item.points[:, 1]),
        **{name: numbers.add(values) for name, values in optional.items() if values is not None},
    }
