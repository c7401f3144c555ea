"""The figure of ``cpt plan fit``: how near a law comes to the points that it was fitted on.

Refuses to compute losses: the law's curves join its predictions at the measured points, which the facts hold.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from cpt.planner.fitting import FloatArray
from cpt.planner.picture_style import (
    KINDS,
    PAGE,
    SIDES,
    SOFT,
    UNIT,
    dress,
    few_ticks,
    in_counts,
    in_percent,
    no_values,
    sheet,
    styled,
)
from cpt.planner.wording import Facts, amount, decimals, known, number

MAX_SIZES = 6  # facets of model sizes; more are thinned, the right panel holds all points
# From dark blue (least general data) to ochre: told apart on white, and by lightness without colour vision.
SHADES = ("#1f3b8c", "#0a7f8c", "#4fa34a", "#d9a514")
MANY_POINTS = 60  # in one panel: then points are small


@styled
def draw_fit(facts: Facts) -> Figure:
    """Left: measured losses over tokens with the law's curves, one facet per model size. Right: predicted against
    measured."""
    columns = _columns(facts.get("points") or [], facts["target"])
    sizes = _thinned(np.unique(columns["params"]))
    what = f"{facts.get('title', '')}; dots: measured, lines: the law"
    figure = sheet(_fit_title(facts), what, height=4.8 if len(sizes) <= 3 else 7.2)
    rows, across = (2, -(-len(sizes) // 2)) if len(sizes) > 3 else (1, max(len(sizes), 1))
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.35 if across < 3 else 2, 1))
    left, right = halves
    facets = left.subplots(rows, across, squeeze=False)
    shades = _shades(columns["share"])
    over_share = len(np.unique(columns["tokens"])) < 2
    for index, axes in enumerate(facets.flat):
        if index >= max(len(sizes), 1):
            axes.set_visible(False)
            continue
        of_size = columns["params"] == sizes[index] if len(sizes) else np.zeros(0, dtype=bool)
        part = {name: column[of_size] for name, column in columns.items()}
        _facet(axes, part, shades, facts, over_share)
        if index % across:
            axes.set_ylabel("")
        if index + across < len(sizes):
            axes.set_xlabel("")
    if len(columns["share"]) and not over_share:
        _share_bar(left, facets, shades, columns["share"], _share_name(facts))
    beside, *unused = right.subplots(rows, 1, squeeze=False)[:, 0]
    _against(beside, columns, shades)
    for axes in unused:
        axes.set_visible(False)
    return figure


def _fit_title(facts: Facts) -> str:
    by_kind = facts.get("heldout") or {}
    held_out = [f"{words} {decimals(by_kind[kind])}" for kind, (_, words) in KINDS.items() if known(by_kind.get(kind))]
    told = f"held out {', '.join(held_out)}" if held_out else "nothing is held out"
    return f"Law {facts['law']} fits {facts['target']} loss to {decimals(facts.get('mae'))} nats; {told}"


def _columns(points: Sequence[Facts], target: str) -> dict[str, FloatArray]:
    """Arrays (n,) of the points; ``share`` is general data's, or with many sources that of the target."""
    share = "share_general" if _two_sided(points) else f"share_{target}"
    names = {"params": "params", "tokens": "tokens", "share": share, "measured": "measured", "predicted": "predicted"}
    columns = {ours: np.array([number(point.get(theirs)) for point in points]) for ours, theirs in names.items()}
    measured: NDArray[np.bool_] = np.isfinite(np.stack([columns[name] for name in ("measured", "tokens", "params")]))
    columns["share"] = np.nan_to_num(columns["share"])
    return {name: column[measured.all(axis=0)] for name, column in columns.items()}


def _two_sided(points: Sequence[Facts]) -> bool:
    return not points or "share_general" in points[0]


def _share_name(facts: Facts) -> str:
    return "share of general data" if _two_sided(facts.get("points") or []) else f"share of {facts['target']}"


def _thinned(sizes: FloatArray) -> FloatArray:
    kept = np.linspace(0, len(sizes) - 1, min(len(sizes), MAX_SIZES)).round().astype(int)
    thinned: FloatArray = sizes[kept]
    return thinned


def _shades(shares: FloatArray) -> ScalarMappable:
    low, high = (float(shares.min()), float(shares.max())) if len(shares) else (0.0, 1.0)
    colours = LinearSegmentedColormap.from_list("shares", SHADES)
    return ScalarMappable(Normalize(low, high if high > low else low + 1.0), colours)


def _facet(axes: Axes, part: dict[str, FloatArray], shades: Any, facts: Facts, over_share: bool) -> None:
    x_label = _share_name(facts) if over_share else "training tokens"
    size = amount(part["params"][0]) if len(part["params"]) else ""
    dress(axes, x_label, f"{facts['target']} loss ({UNIT})", title=f"{size} parameters" if size else "")
    if not len(part["measured"]):
        no_values(axes)
        return
    x = part["share"] if over_share else part["tokens"]
    groups = np.zeros(len(x)) if over_share else part["share"].round(6)
    joined = "-" if not over_share or _two_sided(facts["points"]) else "none"  # other shares differ from point to point
    crowded = len(x) > MANY_POINTS
    for share in np.unique(groups):
        chosen = np.flatnonzero(groups == share)
        chosen = chosen[np.argsort(x[chosen], kind="stable")]
        colour = SIDES["general"] if over_share else shades.to_rgba(share)
        axes.plot(
            x[chosen], part["predicted"][chosen], color=colour, linewidth=1.6, linestyle=joined,
            marker="_" if joined == "none" else "", zorder=2,
        )  # fmt: skip
        axes.plot(
            x[chosen], part["measured"][chosen], "o", color=colour, markersize=3 if crowded else 5.5,
            markeredgecolor=PAGE, markeredgewidth=0 if crowded else 0.6, zorder=3,
        )  # fmt: skip
    if over_share:
        in_percent(axes)
    else:
        in_counts(axes)


def _share_bar(left: Any, facets: Any, shades: ScalarMappable, shares: FloatArray, name: str) -> None:
    bar = left.colorbar(shades, ax=facets, shrink=0.85, aspect=28, pad=0.02)
    bar.set_label(name, color=SOFT)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=SOFT)
    levels = np.unique(shares.round(6))
    if 1 <= len(levels) <= 12 and _apart(levels):
        bar.set_ticks(levels)
    exact = bool(len(levels) <= 12 and (np.abs(levels * 100 - np.rint(levels * 100)) > 1e-6).any())
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1 if exact else None))


def _apart(levels: FloatArray) -> bool:
    """Whether tick labels at these shares would stand clear of one another."""
    spread = levels[-1] - levels[0]
    return len(levels) < 2 or bool(np.diff(levels).min() > 0.05 * spread)


def _against(axes: Axes, columns: dict[str, FloatArray], shades: ScalarMappable) -> None:
    """Predicted over measured losses; the closer to the diagonal the better."""
    dress(axes, f"measured loss ({UNIT})", f"predicted loss ({UNIT})", title="on the line: exact", grid="both")
    drawn = np.isfinite(columns["predicted"])
    if not drawn.any():
        no_values(axes)
        return
    measured, predicted, share = (columns[name][drawn] for name in ("measured", "predicted", "share"))
    both = np.concatenate([measured, predicted])
    room = 0.05 * max(float(np.ptp(both)), 1e-3)
    low, high = both.min() - room, both.max() + room
    axes.plot([low, high], [low, high], color=SOFT, linewidth=1.2, zorder=1)
    area = 28 if len(measured) <= MANY_POINTS else 12
    axes.scatter(measured, predicted, c=shades.to_rgba(share), s=area, edgecolors=PAGE, linewidths=0.4, zorder=2)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    few_ticks(axes, 5)
    axes.yaxis.set_major_locator(MaxNLocator(5))
