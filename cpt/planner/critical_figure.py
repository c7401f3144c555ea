"""The figure of ``cpt plan critical``: R*(eps) with its band, and the general loss over tokens at every trained share.

Refuses to compute losses: it draws the facts of :func:`cpt.planner.critical.critical`.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, PercentFormatter

from cpt.planner.picture_style import (
    BEST,
    GREY,
    INK,
    PAGE,
    SIDES,
    SOFT,
    UNIT,
    dress,
    few_ticks,
    legend,
    marker,
    no_values,
    sheet,
    styled,
)
from cpt.planner.wording import Facts, amount, percent
from cpt.report.drawing import EndLabel, end_label, label_right
from cpt.report.palette import RUNS_LIGHT, tick


@styled
def draw_critical(facts: Facts) -> Figure:
    """Left: the smallest general share against the allowed rise. Right: change of general loss over tokens."""
    row = next((row for row in facts["critical"] if row["feasible"]), facts["critical"][0])
    bound = f"within {row['epsilon']:g} nats of its start" if row["epsilon"] else "at its start"
    least = f"At least {percent(row['share_general'])} general data" if row["feasible"] else "No share of general data"
    title = f"{least} keeps the general loss {bound}"
    place = f"{amount(facts['tokens'])} tokens, {amount(facts['params'])} parameters; law {facts['law']}"
    figure = sheet(title, place, height=5.2, between=0.06)
    left, right = figure.subplots(1, 2)
    _tolerances(left, facts)
    _curves(right, facts)
    shapes = [
        Patch(facecolor=SIDES["general"], alpha=0.22, label="90% interval"),
        Line2D([], [], linestyle="none", marker="o", color=BEST, label="asked"),
        Line2D([], [], linestyle="none", marker="v", color=INK, markersize=8, label="stops rising"),
        Line2D([], [], linestyle=":", color=SOFT, label="the budget"),
    ]
    legend(figure, shapes)
    return figure


def _tolerances(axes: Axes, facts: Facts) -> None:
    dress(axes, f"allowed rise of general loss ({UNIT})", "", title="Smallest share of general data")
    rows = [row for row in facts["epsilon_curve"] if row["feasible"]]
    if not rows:
        no_values(axes, "infeasible at every tolerance shown")
        return
    allowed = [row["epsilon"] for row in rows]
    if rows[0]["interval"] is not None:
        low, high = np.array([row["interval"] for row in rows]).T
        axes.fill_between(allowed, low, high, color=SIDES["general"], alpha=0.22, linewidth=0)
    axes.plot(allowed, [row["share_general"] for row in rows], color=SIDES["general"], linewidth=2.2)
    asked = np.array([(row["epsilon"], row["share_general"]) for row in facts["critical"] if row["feasible"]])
    axes.plot(*asked.reshape(-1, 2).T, "o", color=BEST, markersize=9, markeredgecolor=PAGE, zorder=5, clip_on=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    few_ticks(axes)


def _curves(axes: Axes, facts: Facts) -> None:
    dress(axes, "tokens seen", "", title=f"Change of general loss ({UNIT})")
    if not facts["delta_curves"]:
        no_values(axes, "this size was not trained")
        return
    axes.axhline(0, color=GREY, linewidth=1)
    axes.axvline(facts["tokens"], color=SOFT, linewidth=1, linestyle=":")
    turns = {row["share_general"]: row["tokens"] for row in facts["turning_points"]}
    labels: list[EndLabel] = []
    for index, curve in enumerate(facts["delta_curves"]):
        colour = RUNS_LIGHT[index % len(RUNS_LIGHT)]
        fitted, measured = np.array(curve["fitted"]), np.array(curve["measured"])
        axes.plot(*fitted.T, color=colour, linewidth=1.8)
        axes.plot(*measured.T, marker(index), color=colour, markersize=4, alpha=0.7)
        labels.append(end_label(fitted, percent(curve["share_general"]), colour))
        turn = turns.get(curve["share_general"])
        if turn is not None and fitted[0, 0] <= turn <= fitted[-1, 0]:
            axes.plot(turn, float(np.interp(turn, *fitted.T)), "v", color=INK, markersize=8, zorder=5)
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    few_ticks(axes, 5)
    label_right(axes, labels)
