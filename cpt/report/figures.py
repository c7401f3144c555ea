"""Which figures a report has and what each shows: run summaries in, charts out. How they look is
:mod:`cpt.report.drawing`'s."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from cpt.report import tables
from cpt.report.collect import FloatArray
from cpt.report.drawing import (
    HEIGHT,
    Chart,
    EndLabel,
    blank,
    decimate,
    end_label,
    finite_points,
    ink,
    label_right,
    name_ends,
    run_colour,
    run_marker,
    running_mean,
    short,
    tick,
    to_chart,
    write_beside,
)
from cpt.report.goodput_views import goodput_chart
from cpt.report.promise import promise_chart
from cpt.report.summary import Overview, Summary

MAX_PANELS = 8  # sources drawn; the rest stands in the table


def build_charts(overview: Overview) -> list[Chart]:
    """All figures that the runs have data for, the retention plane first."""
    runs = overview.summaries
    sources = _drawn_sources(runs)
    charts = [
        retention_plane(runs),
        *(promise_chart(item, index, alone=len(runs) == 1) for index, item in enumerate(runs)),
        *(loss_of_source(runs, source, number) for number, source in enumerate(sources, start=1)),
    ]
    charts += [shares(runs), tokens_by_source(runs), learning_rate(runs), throughput(runs), time_split(runs)]
    charts.append(goodput_chart(runs))
    return [chart for chart in charts if chart is not None]


def retention_plane(runs: Sequence[Summary]) -> Chart | None:
    """Forgetting to the right, gain upwards: each run's path through its evaluations, from the base at the origin."""
    drawn = [(index, item) for index, item in enumerate(runs) if item.gain is not None and item.forgetting is not None]
    if not drawn:
        return None
    figure, axes = blank("General forgetting (nats per token)", "Domain gain (nats per token)", height=HEIGHT * 1.25)
    axes.axhline(0, color=ink("soft"), linewidth=0.8)
    axes.axvline(0, color=ink("soft"), linewidth=0.8)
    for index, item in drawn:
        path = _path_of(item)
        axes.plot(
            *path.T,
            color=run_colour(index),
            linewidth=2,
            marker=run_marker(index),
            markersize=4,
            clip_on=False,
            zorder=3,
        )
        axes.plot(*path[-1], color=run_colour(index), marker=run_marker(index), markersize=10, clip_on=False, zorder=4)
    axes.plot(0, 0, color=ink("ink"), marker="o", markersize=7, clip_on=False, zorder=5)
    axes.margins(0.08)
    write_beside(axes, (0, 0), "base", colour=ink("ink"), offset=(7, -16))
    name_ends(axes, [end_label(_path_of(item), item.label, run_colour(index)) for index, item in drawn])
    caption = (
        "Each curve is a run's path through its evaluations, from the base at (0, 0) to the large "
        "marker. Up is learned, right is forgotten: "
        "the best corner is the upper left."
    )
    if left_out := [item.label for item in runs if not item.continues_base]:
        caption += f" Not drawn, because without a base there is nothing to forget: {', '.join(left_out)}."
    return to_chart("retention", "What was learned against what was forgotten", caption, figure)


def loss_of_source(runs: Sequence[Summary], source: str, number: int) -> Chart | None:
    """Training loss (raw, light; running mean, strong) and held-out points of one source over tokens."""
    figure, axes = blank("tokens seen", "loss (nats per token)")
    labels: list[EndLabel] = []
    fixed: list[FloatArray] = []
    fresh: list[FloatArray] = []
    for index, item in enumerate(runs):
        curve = finite_points(item.run.metrics.tokens, item.run.metrics.loss_by_source.get(source))
        held_out = np.array(
            [(e.tokens_seen, e.sources[source].loss) for e in item.run.evaluations if source in e.sources]
        ).reshape(-1, 2)
        held_out = held_out[np.isfinite(held_out).all(axis=1)]
        smooth = running_mean(curve)
        axes.plot(*decimate(curve).T, color=run_colour(index), linewidth=0.7, alpha=0.28)
        axes.plot(*decimate(smooth).T, color=run_colour(index), linewidth=1.8)
        axes.plot(
            *held_out.T,
            color=run_colour(index),
            linewidth=0.8,
            marker=run_marker(index),
            markersize=5.5,
            markerfacecolor=ink("page"),
            markeredgewidth=1.5,
        )
        (fixed if item.continues_base else fresh).extend([smooth, held_out])
        last = held_out if len(held_out) else smooth
        if len(last):
            labels.append(end_label(last, item.label, run_colour(index)))
    limits = _loss_limits(fixed, fresh)
    if limits is None:
        return None
    axes.set_ylim(*limits)
    labels = [replace(label, text=f"{label.text} ↑") if label.y > limits[1] else label for label in labels]
    label_right(axes, labels)
    group = next((item.groups[source] for item in runs if source in item.groups), "unknown")
    caption = "Line: training loss, running mean; light: every logged step. Open markers: held-out loss."
    return to_chart(f"loss_{number}_{source}", f"Loss on {source} ({group})", caption, figure)


def shares(runs: Sequence[Summary]) -> Chart | None:
    """General share of tokens: dashed as planned per stage, solid as realised over a sliding window."""
    figure, axes = blank("tokens seen", "general share of tokens")
    labels = []
    for index, item in enumerate(runs):
        realised, planned = _realised_share(item), _planned_share(item)
        axes.plot(*decimate(realised).T, color=run_colour(index), linewidth=1.8)
        axes.plot(*planned.T, color=run_colour(index), linewidth=1.2, linestyle=(0, (4, 3)), alpha=0.9)
        ends = realised if len(realised) else planned
        if len(ends):
            labels.append(end_label(ends, item.label, run_colour(index)))
    if not labels:
        return None
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    label_right(axes, labels)
    caption = "Dashed: planned. Solid: realised, over a sliding window of one fortieth of the run."
    return to_chart("shares", "General share, planned and realised", caption, figure)


def learning_rate(runs: Sequence[Summary]) -> Chart | None:
    return _over_tokens(runs, "lr", ("Learning rate", "learning rate"), "As applied, after warm-up and decay.")


def throughput(runs: Sequence[Summary]) -> Chart | None:
    caption = "While training, without evaluations and checkpoints. Running mean; light: every logged step."
    return _over_tokens(runs, "tokens_per_second", ("Throughput", "tokens per second"), caption)


def time_split(runs: Sequence[Summary]) -> Chart | None:
    """Bars of the share of time that each phase took, runs side by side."""
    drawn = [(index, item, item.share_by_phase) for index, item in enumerate(runs) if item.share_by_phase]
    if not drawn:
        return None
    names = [name for name in tables.PHASE_WORDS if any(shares.get(name, 0.0) > 0 for _, _, shares in drawn)]
    figure, axes = blank("share of the time", "", height=90.0 + (12.0 + 15.0 * len(drawn)) * len(names), grid="x")
    thickness = 0.8 / len(drawn)
    for row, (index, _, shares) in enumerate(drawn):
        places = np.arange(len(names)) - 0.4 + thickness * (row + 0.5)
        axes.barh(places, [shares.get(name, 0.0) for name in names], height=thickness * 0.82, color=run_colour(index))
        for place, name in zip(places, names, strict=True):
            share = shares.get(name, 0.0)
            write_beside(axes, (share, place), tables.percent(share), colour=ink("soft"), offset=(4, 0), level="center")
    axes.set_yticks(range(len(names)), [tables.PHASE_WORDS[name] for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(max(shares.values()) for _, _, shares in drawn))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    caption = "Of the process that logs; evaluations and checkpoints lie between steps, the other phases within them."
    if len(drawn) > 1:
        caption += f" Bars in the order {', '.join(item.label for _, item, _ in drawn)}."
    return to_chart("time", "Where the time went", caption, figure)


def tokens_by_source(runs: Sequence[Summary]) -> Chart | None:
    """Bars of tokens trained on per source, runs side by side; a tick marks the plan."""
    names = list(dict.fromkeys(name for item in runs for name in (*_planned_tokens(item), *item.realised_by_source)))
    if not names:
        return None
    figure, axes = blank("tokens trained on", "", height=90.0 + 20.0 * len(names) * len(runs), grid="x")
    thickness = 0.8 / len(runs)
    for index, item in enumerate(runs):
        places = np.arange(len(names)) - 0.4 + thickness * (index + 0.5)
        axes.barh(
            places,
            [item.realised_by_source.get(name, 0) for name in names],
            height=thickness * 0.82,
            color=run_colour(index),
        )
        for place, name in zip(places, names, strict=True):
            if _planned_tokens(item).get(name):
                axes.plot(
                    [_planned_tokens(item)[name]] * 2,
                    [place - thickness / 2, place + thickness / 2],
                    color=ink("ink"),
                    linewidth=1.6,
                )
    axes.set_yticks(range(len(names)), [short(name) for name in names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(tick))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    order = ", ".join(item.label for item in runs)
    caption = f"Bars in the order {order}; the tick is the plan." if len(runs) > 1 else "The tick is the plan."
    return to_chart("tokens", "Tokens per source", caption, figure)


def _over_tokens(runs: Sequence[Summary], column: str, words: tuple[str, str], caption: str) -> Chart | None:
    title, unit = words
    figure, axes = blank("tokens seen", unit)
    exact = column == "lr"  # set by a schedule, not measured: nothing to smooth
    curves = [(item, finite_points(item.run.metrics.tokens, item.run.metrics.scalars[column])) for item in runs]
    labels = []
    for index, (item, curve) in enumerate(curves):
        if not len(curve):
            continue
        smooth = curve if exact else running_mean(curve)
        if not exact:
            axes.plot(*decimate(curve).T, color=run_colour(index), linewidth=0.7, alpha=0.28)
        axes.plot(*decimate(smooth).T, color=run_colour(index), linewidth=1.8)
        labels.append(end_label(smooth, item.label, run_colour(index)))
    if not labels:
        return None
    axes.set_ylim(bottom=0)
    if exact and len(labels) > 1 and all(np.array_equal(curve, curves[0][1]) for _, curve in curves):
        caption = f"{caption} All runs share one curve."
    else:
        label_right(axes, labels)
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    return to_chart(column, title, caption, figure)


def _drawn_sources(runs: Sequence[Summary]) -> list[str]:
    tokens: dict[str, float] = {}
    for item in runs:
        for name in item.groups:
            tokens[name] = tokens.get(name, 0.0) + item.realised_by_source.get(name, 0.0)
    return sorted(tokens, key=lambda name: -tokens[name])[:MAX_PANELS]


def _path_of(item: Summary) -> FloatArray:
    """Evaluations as [N, 2] of (forgetting, gain); call only with both changes known."""
    assert item.general and item.domain
    points = [
        (e.groups.get("general", math.nan) - item.general.base, item.domain.base - e.groups.get("domain", math.nan))
        for e in item.run.evaluations
    ]
    path: FloatArray = np.array(points)
    finite: FloatArray = path[np.isfinite(path).all(axis=1)]
    return finite


def _loss_limits(continued: Sequence[FloatArray], fresh: Sequence[FloatArray]) -> tuple[float, float] | None:
    """The range of losses worth seeing: all of the continued runs, and what comes near it of runs from random weights.

    Those fall from log(vocabulary), and showing that fall would press the few tenths of a nat that matter into one
    line.
    """
    settled = [curve[curve[:, 0] >= 0.15 * curve[-1, 0]] for curve in fresh if len(curve)]
    core = np.concatenate([curve[:, 1] for curve in (continued or settled)] or [np.empty(0)])
    if not len(core):
        return None
    spread = max(float(np.ptp(core)), 0.02)
    near = np.concatenate([core, *(curve[curve[:, 1] <= core.max() + 0.6 * spread, 1] for curve in settled)])
    return float(near.min()) - 0.06 * spread, float(near.max()) + 0.06 * spread


def _realised_share(item: Summary) -> FloatArray:
    columns = item.run.metrics.tokens_by_source
    if not columns:
        return np.empty((0, 2))
    zero = np.zeros(len(item.run.metrics))
    general = sum(
        (np.nan_to_num(column) for name, column in columns.items() if item.groups.get(name) == "general"), zero
    )
    total = sum((np.nan_to_num(column) for column in columns.values()), zero)
    window = max(1, len(total) // 40)
    lag = np.maximum(np.arange(len(total)) - window, -1)
    before_general, before_total = (np.concatenate([[0.0], column])[lag + 1] for column in (general, total))
    with np.errstate(invalid="ignore", divide="ignore"):
        return finite_points(item.run.metrics.tokens, (general - before_general) / (total - before_total))


def _planned_share(item: Summary) -> FloatArray:
    plan = item.run.plan
    if plan is None:
        return np.empty((0, 2))
    points = []
    for index, stage in enumerate(plan.stages):
        general = sum(
            rows for source, rows in zip(plan.sources, stage.block_counts, strict=True) if source.group == "general"
        )
        ends = [plan.first_step(number) * plan.global_batch_tokens for number in (index, index + 1)]
        points += [(tokens, general / sum(stage.block_counts)) for tokens in ends]
    return np.array(points, dtype=np.float64)


def _planned_tokens(item: Summary) -> dict[str, float]:
    return {name: float(tokens) for name, tokens in item.run.plan.tokens_by_source().items()} if item.run.plan else {}
