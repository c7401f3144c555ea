"""The figures of ``cpt plan compare`` and ``predict``; those of ``fit`` and ``recommend`` are taken from their modules.

Each says its message in the title and what it holds for below it. Owns what is drawn. Refuses to compute losses: the
facts hold them, and what they lack is left out.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from cpt.planner.fitting import FloatArray
from cpt.planner.picture_fit import draw_fit
from cpt.planner.picture_recommend import draw_recommend
from cpt.planner.picture_style import (
    BEST,
    GREY,
    INK,
    KINDS,
    PAGE,
    SIDES,
    SOFT,
    UNIT,
    Label,
    dress,
    few_ticks,
    hatch_untrusted,
    in_counts,
    in_percent,
    legend,
    no_values,
    place_labels,
    save_figure,
    sheet,
    styled,
)
from cpt.planner.wording import Facts, at_point, decimals, ends, has_interval, known, loss_span, number

__all__ = ["draw_compare", "draw_fit", "draw_predict", "draw_recommend", "save_figure"]

MAX_PANELS = 8  # targets compared; the table holds all
WIDE_RANGE = 30  # errors that differ by more are drawn on a logarithmic axis


@styled
def draw_compare(facts: Facts) -> Figure:
    """Held-out errors of the laws as bars, a panel per target, the best one highlighted."""
    ranking = facts["ranking"]
    targets = list(dict.fromkeys(row["target"] for row in ranking))[:MAX_PANELS]
    by_target = {target: [row for row in ranking if row["target"] == target] for target in targets}
    most = max((len(rows) for rows in by_target.values()), default=1)
    across, down = min(len(targets), 2) or 1, max(1, -(-len(targets) // 2))
    reasons = list(dict.fromkeys(row["excluded"] for row in ranking if row.get("excluded")))
    told = [f"mean absolute error on held-out points, {facts.get('num_points')} points in all", "shorter is better"]
    told += [f"({place}) not chosen: {reason}" for place, reason in enumerate(reasons, start=1)]
    figure = sheet(
        "Which law predicts what it was not fitted on?",
        "; ".join(told),
        height=1.7 + down * (1.7 + 0.36 * max(most, 2)),
    )
    panels = figure.subplots(down, across, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index < len(targets):
            _bars(axes, targets[index], by_target[targets[index]], reasons)
        else:
            axes.set_visible(False)
    if not targets:
        panels[0, 0].set_visible(True)
        no_values(panels[0, 0], "no law was compared")
    legend(figure, _compare_keys(ranking), columns=3)
    return figure


def _bars(axes: Axes, target: str, rows: Sequence[Facts], reasons: Sequence[str]) -> None:
    dress(axes, f"held-out error ({UNIT})", "", title=f"{target.capitalize()} loss", grid="x")
    best = next((row for row in rows if not row.get("excluded") and known(row.get("heldout_mae"))), None)
    errors = [number(row.get("heldout_mae")) for row in rows]
    for place, (row, error) in enumerate(zip(rows, errors, strict=True)):
        out = bool(row.get("excluded"))
        colour = PAGE if out else BEST if row is best else SIDES["general"]
        axes.barh(
            place, np.nan_to_num(error), height=0.62, linewidth=0, zorder=2, facecolor=colour,
            edgecolor=GREY if out else colour, hatch="////" if out else None,
        )  # fmt: skip
        for kind, (shape, _) in KINDS.items():
            value = number((row.get("heldout") or {}).get(kind))
            axes.plot(value, place, shape, color=INK, markersize=7, markeredgecolor=PAGE, zorder=4, clip_on=False)
        note = decimals(error) + (f" ({reasons.index(row['excluded']) + 1})" if out else "")
        axes.annotate(
            note, (1.02, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False,
            color=BEST if row is best else SOFT if out else INK, fontweight="bold" if row is best else "normal",
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row["law"] for row in rows])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(max(len(rows), 2) - 0.4, -0.6)
    _error_axis(axes, rows, errors)


def _error_axis(axes: Axes, rows: Sequence[Facts], errors: Sequence[float]) -> None:
    shown = np.array([*errors, *(number(value) for row in rows for value in (row.get("heldout") or {}).values())])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    if not len(shown):
        axes.set_xlim(0, 1)
    elif shown.max() / shown.min() > WIDE_RANGE:
        axes.set_xscale("log")
        axes.set_xlim(shown.min() / 2, shown.max() * 1.4)
        axes.set_xlabel(f"{axes.get_xlabel().replace(')', ', logarithmic axis)', 1)}")
        in_counts(axes)
    else:
        axes.set_xlim(0, shown.max() * 1.06)
        few_ticks(axes, 5)


def _compare_keys(ranking: Sequence[Facts]) -> list[Any]:
    keys: list[Any] = [Patch(facecolor=BEST, label="mean, best law"), Patch(facecolor=SIDES["general"], label="mean")]
    if any(row.get("excluded") for row in ranking):
        keys.append(Patch(facecolor=PAGE, edgecolor=GREY, hatch="////", label="mean, may not be chosen"))
    drawn = [kind for kind in KINDS if any(known((row.get("heldout") or {}).get(kind)) for row in ranking)]
    for kind in drawn:
        shape, words = KINDS[kind]
        keys.append(Line2D([], [], linestyle="none", marker=shape, color=INK, markersize=6, label=f"held out {words}"))
    return keys


@styled
def draw_predict(facts: Facts) -> Figure:
    """The loss over the share of general data with its interval, and the point that was asked for."""
    target = facts["target"]
    loss, interval = number(facts.get("loss")), facts.get("interval")
    within = f" (90%: {loss_span(interval)})" if has_interval(interval) else ""
    figure = sheet(
        f"Predicted {target} loss: {decimals(loss)} nats per token{within}",
        f"{at_point(facts)}; law {facts.get('law')}",
        height=4.8 if facts.get("curve") else 2.6,
    )
    axes = figure.subplots()
    if facts.get("curve") and math.isfinite(number(facts.get("share_general"))):
        _loss_over_share(axes, facts)
        figure.draw_without_rendering()  # the label is placed in the finished layout
        label = Label(number(facts["share_general"]), loss, f"asked: {decimals(loss)}", BEST)
        if math.isfinite(loss):
            place_labels(axes, [label], [_curve(facts)[0]])
    else:
        _loss_alone(axes, facts)
    return figure


def _curve(facts: Facts) -> tuple[FloatArray, FloatArray]:
    rows = facts.get("curve") or []
    line = np.array([(number(row.get("share_general")), number(row.get("loss"))) for row in rows]).reshape(-1, 2)
    return line, np.array([ends(row.get("interval")) for row in rows]).reshape(-1, 2)


def _loss_over_share(axes: Axes, facts: Facts) -> None:
    target = facts["target"]
    colour = SIDES.get(target, SIDES["general"])
    dress(axes, "share of general data in training (the rest is domain data)", f"{target} loss ({UNIT})")
    line, band = _curve(facts)
    axes.plot(*line.T, color=colour, linewidth=2.2, zorder=3, label="predicted loss")
    axes.fill_between(line[:, 0], *band.T, color=colour, alpha=0.22, linewidth=0, label="90% interval")
    share = number(facts["share_general"])
    if has_interval(facts.get("interval")):
        axes.plot([share, share], ends(facts["interval"]), color=BEST, linewidth=2.5, zorder=4)
    axes.plot(share, number(facts.get("loss")), "o", color=BEST, markersize=10, markeredgecolor=PAGE, zorder=5)
    axes.set_xlim(0, 1)
    in_percent(axes)
    handles = axes.get_legend_handles_labels()[0]
    if hatch_untrusted(axes, facts.get("trusted_shares")):
        handles.append(Patch(facecolor="none", edgecolor=GREY, hatch="////", label="law not to be trusted"))
    axes.legend(handles=handles, loc="best", frameon=False, labelcolor=INK)


def _loss_alone(axes: Axes, facts: Facts) -> None:
    """Where there is no axis of shares: only the number and its interval."""
    dress(axes, f"{facts['target']} loss ({UNIT})", "", grid="x")
    loss = number(facts.get("loss"))
    if not math.isfinite(loss):
        no_values(axes)
        return
    if has_interval(facts.get("interval")):
        axes.plot(ends(facts["interval"]), [0, 0], color=BEST, linewidth=6, alpha=0.35, solid_capstyle="butt")
    axes.plot(loss, 0, "o", color=BEST, markersize=11, zorder=4)
    axes.annotate(decimals(loss), (loss, 0), xytext=(0, 11), textcoords="offset points", ha="center", color=BEST)
    axes.set_yticks([])
    axes.margins(x=0.3)
    axes.set_ylim(-1, 1)
