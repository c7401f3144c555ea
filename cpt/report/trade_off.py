"""The trade-off picture: domain gain against general forgetting, every checkpoint of every run, the Pareto front over
them, and where the plan said that a run would end.
"""

import math
from collections.abc import Sequence

import numpy as np

from cpt.report.plot_svg import plot_chart
from cpt.report.plots import Axis, Chart, FloatArray, Plot, Series, pareto_front
from cpt.report.promise import promised_at
from cpt.report.summary import Summary

HEIGHT = 360.0


def retention_plane(runs: Sequence[Summary]) -> Chart | None:
    """Forgetting to the right, gain upwards: each run's path through its evaluations, from the base at the origin."""
    drawn = [(index, item) for index, item in enumerate(runs) if item.gain is not None and item.forgetting is not None]
    if not drawn:
        return None
    paths = {index: _path_of(item) for index, item in drawn}
    front = pareto_front(np.concatenate([path[:, :2] for path in paths.values()]))
    series = [Series(-1, "Pareto front", front, "front")] if len(front) > 1 else []
    series += [_path(index, item, paths[index]) for index, item in drawn]
    goals = [goal for index, item in drawn if (goal := _goal(index, item))]
    plot = Plot(
        Axis("general forgetting (nats per token)"),
        Axis("domain gain (nats per token)"),
        (*series, *goals),
        origin="base",
        height=HEIGHT,
    )
    caption = (
        "Each curve is a run's path through its evaluations, from the base at (0, 0) to the large marker. Up is "
        "learned, right is forgotten: the best corner is the upper left."
    )
    if len(front) > 1:
        caption += " Dashed: the Pareto front, checkpoints that no other one beats on both sides."
    if any(item.low is not None for item in series):
        caption += " Bars through the large markers: 95% intervals."
    if goals:
        caption += " Open circle: where the plan promised that the run would end, with its 90% intervals."
    if left_out := [item.label for item in runs if not item.continues_base]:
        caption += f" Not drawn, because without a base there is nothing to forget: {', '.join(left_out)}."
    return plot_chart("retention", "What was learned against what was forgotten", caption, [plot])


def _path(index: int, item: Summary, path: FloatArray) -> Series:
    """With the intervals of its end, where they are known."""
    ends: dict[str, FloatArray] = {}
    if item.compared is not None and path[-1, 2] == item.compared.loss_step:
        for change, low, high in (
            (item.forgetting_change, "left", "right"),
            (item.gain_change, "low", "high"),
        ):
            if change is not None and change.low is not None and change.high is not None:
                ends |= {low: np.array([change.low]), high: np.array([change.high])}
    return Series(index, item.label, path[:, :2], "path", steps=path[:, 2], **ends)


def _path_of(item: Summary) -> FloatArray:
    """Evaluations as [N, 3] of (forgetting, gain, step); call only with both changes known."""
    assert item.general and item.domain
    base, start = item.general.base, item.domain.base
    rows = [
        (e.groups.get("general", math.nan) - base, start - e.groups.get("domain", math.nan), e.step)
        for e in item.run.evaluations
    ]
    path = np.array(rows, dtype=np.float64)
    finite: FloatArray = path[np.isfinite(path).all(axis=1)]
    return finite


def _goal(index: int, item: Summary) -> Series | None:
    """The promised end of the run, measured from its own base; None where nothing was promised for it."""
    found = item.run.recommendation
    if found is None or not found.promise or item.general is None or item.domain is None:
        return None
    tokens = item.tokens_planned if math.isfinite(item.tokens_planned) else found.promise[-1].tokens
    general, low, high = promised_at(found.promise, np.array([tokens]), "general")[0] - item.general.base
    domain, best, worst = item.domain.base - promised_at(found.promise, np.array([tokens]), "domain")[0]
    if not all(map(math.isfinite, (general, domain))):
        return None
    return Series(
        index,
        "planned",
        np.array([[general, domain]]),
        "goal",
        low=np.array([worst]),
        high=np.array([best]),
        left=np.array([low]),
        right=np.array([high]),
    )
