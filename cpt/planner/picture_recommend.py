"""The figure of ``cpt plan recommend``: where the recommended share lies, what limits it, what the usual rules cost.

Refuses to compute losses: it draws the facts. Recommendations that are no share of general data (many sources, model
sizes) are drawn by :mod:`cpt.planner.picture_choices`.
"""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cpt.planner.fitting import FloatArray
from cpt.planner.picture_choices import draw_sizes, draw_weights
from cpt.planner.picture_style import (
    BEST,
    FONT,
    GREY,
    INK,
    LIMIT,
    PAGE,
    SIDES,
    SOFT,
    UNIT,
    Label,
    dress,
    hatch_untrusted,
    in_percent,
    legend,
    place_labels,
    sheet,
    styled,
)
from cpt.planner.wording import (
    Facts,
    at_point,
    decimals,
    ends,
    has_interval,
    headline,
    law_names,
    number,
    percent,
    weights_of,
)

SAME_SHARE = 0.004  # rules this near to each other share one label
MEANINGS = {
    "general": "General loss, what the model knew: stays below the limit",
    "domain": "Domain loss, what it learns: as low as the limit allows",
}


@styled
def draw_recommend(facts: Facts) -> Figure:
    """The recommendation of ``facts``."""
    if facts.get("usage") == "flops":
        return draw_sizes(facts)
    return draw_weights(facts) if weights_of(facts) else _draw_shares(facts)


def _draw_shares(facts: Facts) -> Figure:
    """General loss above, domain loss below, over the share of general data."""
    laws = ", ".join(f"{name} for {target}" for target, name in law_names(facts.get("law")).items())
    figure = sheet(headline(facts), f"{at_point(facts)}; laws: {laws}", height=7.6)
    panels = list(figure.subplots(2, sharex=True))
    for axes, target in zip(panels, SIDES, strict=True):
        _panel(axes, target, facts)
    panels[0].set_xlabel("")
    panels[1].set_xlim(0, 1)
    in_percent(panels[1])
    legend(figure, _keys(facts), columns=3)
    figure.draw_without_rendering()  # labels are placed in the finished layout
    for axes, target in zip(panels, SIDES, strict=True):
        _name_choices(axes, target, facts)
    return figure


def _panel(axes: Axes, target: str, facts: Facts) -> None:
    colour = SIDES[target]
    limited = math.isfinite(number(facts.get("limit_general")))
    title = MEANINGS[target] if limited else MEANINGS[target].partition(":")[0]
    x_label = "share of general data in training (the rest is domain data)"
    dress(axes, x_label, f"{target} loss ({UNIT})", title=title)
    line, low, high = _curve(facts, target)
    axes.plot(*line.T, color=colour, linewidth=2.2, zorder=3)
    axes.fill_between(line[:, 0], low, high, color=colour, alpha=0.22, linewidth=0)
    hatch_untrusted(axes, facts.get("trusted_shares"))
    if has_interval(facts.get("interval")):
        axes.axvspan(*ends(facts["interval"]), color=BEST, alpha=0.13, linewidth=0, zorder=1)
    axes.axvline(number(facts.get("share_general")), color=BEST, linewidth=2, zorder=2)
    limit = number(facts.get("limit_general"))
    if target == "general" and math.isfinite(limit):
        axes.axhline(limit, color=LIMIT, linewidth=1.8, linestyle=(0, (5, 3)), zorder=3)
    _limit_losses(axes, target, facts, (line, low, high))
    for share, loss, name in _choices(facts, target):
        own = name.startswith("recommended")
        axes.plot(
            share, loss, marker="o", markersize=10 if own else 7, color=BEST if own else INK, markeredgecolor=PAGE,
            zorder=6, clip_on=False,
        )  # fmt: skip


def _limit_losses(axes: Axes, target: str, facts: Facts, drawn: tuple[FloatArray, FloatArray, FloatArray]) -> None:
    """Shows what is chosen between, not how far a power law rises at the edge of its range."""
    line, low, high = drawn
    limit = number(facts.get("limit_general")) if target == "general" else math.nan
    core = np.array([limit, *(loss for _, loss, _ in _choices(facts, target))])
    core = core[np.isfinite(core)]
    edges = np.concatenate([low, high, line[:, 1]])
    edges = edges[np.isfinite(edges)]
    if not len(core) or not len(edges):
        return
    room = max(2 * float(np.ptp(core)), 0.01)
    bottom, top = max(edges.min(), core.min() - room), min(edges.max(), core.max() + room)
    bottom, top = min(bottom, core.min()), max(top, core.max())
    axes.set_ylim(bottom - 0.08 * (top - bottom), top + 0.08 * (top - bottom))


def _name_choices(axes: Axes, target: str, facts: Facts) -> None:
    labels = []
    for share, loss, name in _choices(facts, target):
        own = name.startswith("recommended")
        labels.append(Label(share, loss, f"{name}, {decimals(loss, 3)}", BEST if own else INK))
    line = _curve(facts, target)[0]
    within = np.array(axes.get_ylim())
    share = number(facts.get("share_general"))
    lines = [line, np.column_stack([[share, share], within])]
    if target == "general" and math.isfinite(limit := number(facts.get("limit_general"))):
        lines.append(np.array([[0.0, limit], [1.0, limit]]))
        rise = (
            f", {percent(facts.get('tolerance'))} above the base's" if facts.get("tolerance") else " (the base's own)"
        )
        axes.annotate(
            f"limit {decimals(limit, 3)}{rise}", (0.995, limit), xytext=(0, 5), textcoords="offset points", ha="right",
            color=LIMIT, fontsize=FONT * 0.95,
        )  # fmt: skip
    place_labels(axes, labels, lines)


def _choices(facts: Facts, target: str) -> list[tuple[float, float, str]]:
    """Share, loss and name of what can be chosen, the recommendation first; what lies on one point has one name."""
    predicted = facts.get("predicted") or {}
    rows: list[Any] = [{**predicted, "name": "recommended", "share_general": facts.get("share_general")}]
    found: list[tuple[float, float, str]] = []
    for row in [*rows, *(facts.get("baselines") or [])]:
        share, loss = number(row.get("share_general")), number(row.get(f"loss_{target}"))
        if not math.isfinite(share + loss):
            continue
        near = next((i for i, other in enumerate(found) if abs(other[0] - share) < SAME_SHARE), None)
        if near is None:
            found.append((share, loss, row["name"]))
        else:
            found[near] = (*found[near][:2], f"{found[near][2]} = {row['name']}")
    return found


def _curve(facts: Facts, target: str) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Points [N, 2] of the predicted loss and the ends of its interval."""
    rows = facts.get("curve") or []
    line = np.array([(number(r["share_general"]), number(r.get(f"loss_{target}"))) for r in rows]).reshape(-1, 2)
    band = np.array([ends(r.get(f"{target}_interval")) for r in rows]).reshape(-1, 2)
    return line, band[:, 0], band[:, 1]


def _keys(facts: Facts) -> list[Any]:
    keys: list[Any] = [
        Line2D([], [], color=SOFT, linewidth=2.2, label="predicted loss"),
        Patch(facecolor=SOFT, alpha=0.22, label="its 90% interval"),
        Line2D([], [], color=BEST, linewidth=2, label="recommended share"),
    ]
    if has_interval(facts.get("interval")):
        keys.append(Patch(facecolor=BEST, alpha=0.13, label="its 90% interval"))
    if math.isfinite(number(facts.get("limit_general"))):
        keys.append(Line2D([], [], color=LIMIT, linewidth=1.8, linestyle=(0, (5, 3)), label="highest general loss"))
    start, end = ends(facts.get("trusted_shares"))
    if start > 0.002 or end < 0.998:
        keys.append(Patch(facecolor="none", edgecolor=GREY, hatch="////", label="laws not to be trusted"))
    return keys
