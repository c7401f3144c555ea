"""Figures of recommendations that are no share of general data: weights of many sources, and sizes for given compute.

Refuses to compute losses: it draws the facts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cpt.planner.picture_style import (
    BEST,
    GREY,
    INK,
    LIMIT,
    PAGE,
    UNIT,
    dress,
    few_ticks,
    in_percent,
    legend,
    marker,
    no_values,
    sheet,
)
from cpt.planner.wording import (
    Facts,
    amount,
    by_weight,
    decimals,
    ends,
    has_interval,
    headline,
    interval_of,
    known,
    law_names,
    number,
    weights_of,
)


def draw_weights(facts: Facts) -> Figure:
    """Recommended weights as bars with intervals, other choices as markers; beside it the regret of each."""
    weights = weights_of(facts)
    names = by_weight(weights)
    rivals = [row for row in facts.get("baselines") or [] if row.get("weights")]
    figure = sheet(headline(facts), _weights_subtitle(facts), height=3.0 + 0.34 * max(len(names), len(rivals), 3))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dress(left, "share of training tokens", "", title="Weights of the sources", grid="x")
    places = np.arange(len(names))
    left.barh(places, [number(weights[name]) for name in names], height=0.62, color=BEST, alpha=0.85, zorder=2)
    intervals = facts.get("weights_interval") or {}
    for place, name in enumerate(names):
        if has_interval(intervals.get(name)):
            left.plot(ends(intervals[name]), [place, place], color=INK, linewidth=2, solid_capstyle="butt", zorder=3)
    for index, row in enumerate(rivals):
        values = [number(row["weights"].get(name)) for name in names]
        left.plot(
            values, places, linestyle="none", marker=marker(index), markersize=7, markerfacecolor=PAGE,
            markeredgecolor=_rival(index), markeredgewidth=1.6, zorder=4,
        )  # fmt: skip
    _rows(left, names)
    left.set_xlim(left=0)
    in_percent(left)
    _regrets(right, facts, len(names))
    legend(figure, _weight_keys(rivals, bool(intervals)), columns=4)
    return figure


def _weights_subtitle(facts: Facts) -> str:
    laws = ", ".join(dict.fromkeys(law_names(facts.get("law")).values()))
    return f"{amount(facts.get('tokens'))} tokens, {amount(facts.get('params'))} parameters; law: {laws or 'unknown'}"


def _weight_keys(rivals: Sequence[Facts], intervals: bool) -> list[Any]:
    keys: list[Any] = [Patch(facecolor=BEST, alpha=0.85, label="recommended")]
    if intervals:
        keys.append(Line2D([], [], color=INK, linewidth=2, label="its 90% interval"))
    for index, row in enumerate(rivals):
        keys.append(
            Line2D(
                [], [], linestyle="none", marker=marker(index), markersize=7, markerfacecolor=PAGE,
                markeredgecolor=_rival(index), markeredgewidth=1.6, label=row["name"],
            )
        )  # fmt: skip
    return keys


def _rival(index: int) -> str:
    """Not the blue of the recommendation."""
    return (LIMIT, "#00835c", "#a4508b", "#8a6d00", INK)[index % 5]


def _regrets(axes: Axes, facts: Facts, num_rows: int) -> None:
    """What each other choice costs, in bars as thick as those of ``num_rows`` sources beside it."""
    rows = [row for row in facts.get("baselines") or [] if known(row.get("regret"))]
    dress(axes, f"regret ({UNIT})", "", title="What another choice costs", grid="x")
    if not rows:
        no_values(axes, "no other choice is known")
        return
    regrets = [number(row["regret"]) for row in rows]
    axes.barh(range(len(rows)), regrets, height=0.62, color=GREY, zorder=2)
    for place, regret in enumerate(regrets):
        axes.annotate(
            decimals(regret), (regret, place), xytext=(5, 0), textcoords="offset points", va="center", color=INK
        )
    _rows(axes, [row["name"] for row in rows])
    axes.set_ylim(max(num_rows, len(rows)) - 0.4, -0.6)
    axes.set_xlim(0, max(*regrets, 1e-4) * 1.3)
    few_ticks(axes, 4)


def draw_sizes(facts: Facts) -> Figure:
    """Losses of the best size and of the measured sizes for the same compute."""
    choices = [_size_row(row) for row in facts.get("baselines") or []]
    best = f"best: {amount(facts.get('params'))} parameters, {amount(facts.get('tokens'))} tokens"
    predicted = facts.get("predicted") or {}
    choices.insert(0, (best, {**predicted, "regret": None}))
    subtitle = f"{number(facts.get('flops')):.3g} floating-point operations for every choice; line: 90% interval; "
    subtitle += "in brackets: domain loss above the best"
    figure = sheet(headline(facts), subtitle, height=2.2 + 0.42 * len(choices), between=0.08)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, target in zip(panels, ("domain", "general"), strict=True):
        dress(axes, f"{target} loss ({UNIT})", "", title=f"{target.capitalize()} loss", grid="x")
        for place, (_, row) in enumerate(choices):
            loss, colour = number(row.get(f"loss_{target}")), INK if place else BEST
            axes.plot(loss, place, "o", markersize=7 if place else 10, color=colour, zorder=4)
            note = decimals(loss, 3) + (f" (+{decimals(row['regret'])})" if _costs(row, target) else "")
            axes.annotate(note, (loss, place), xytext=(0, 9), textcoords="offset points", ha="center", color=colour)
        if has_interval(interval_of(predicted, target)):
            axes.plot(ends(interval_of(predicted, target)), [0, 0], color=BEST, linewidth=2, zorder=3)
        axes.margins(x=0.22)
        few_ticks(axes, 5)
    _rows(panels[0], [name for name, _ in choices])
    panels[0].set_ylim(len(choices) - 0.4, -0.7)
    return figure


def _size_row(row: Facts) -> tuple[str, Facts]:
    if known(row.get("params")):
        return f"{amount(row['params'])} parameters, {amount(row.get('tokens'))} tokens", row
    return str(row["name"]), row


def _costs(row: Facts, target: str) -> bool:
    return target == "domain" and known(row.get("regret"))


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Names of horizontal rows, the first one on top."""
    axes.set_yticks(range(len(names)), list(names), parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=INK)
