"""Which figures a report has and what each shows: run summaries in, charts out. How they look is
:mod:`cpt.report.plot_svg`'s and :mod:`cpt.report.bars`'."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cpt.report.bars import Bar, Part, stacked_bars
from cpt.report.benchmark_views import accuracy_charts, told_band
from cpt.report.cells import duration
from cpt.report.goodput_views import goodput_chart
from cpt.report.guard_marks import event_marks, told_marks
from cpt.report.outcomes import Outcomes
from cpt.report.plot_svg import is_crowded, plot_chart
from cpt.report.plots import HUGE, Axis, Chart, FloatArray, Plot, Series, finite_points, running_mean
from cpt.report.promise import promise_chart
from cpt.report.summary import Summary, scaled
from cpt.report.trade_off import retention_plane
from cpt.report.verdict import Overview

MAX_PANELS = 8  # sources drawn; the rest stands in the table
TOKENS = Axis("tokens seen", "tokens")
TWO_ERRORS = 2.0  # a band around held-out losses, in standard errors
STRENGTHS = (1.0, 0.72, 0.52, 0.36, 0.24)  # of the sources of one group
PHASE_PARTS = {
    "forward": Part("forward", "run0"),
    "backward": Part("backward", "run0", 0.6),
    "optimizer": Part("optimizer", "run2"),
    "communication": Part("communication", "run3"),
    "data": Part("waiting for data", "run1", hatched=True),
    "checkpoint": Part("checkpoints", "run4"),
    "evaluation": Part("evaluations", "run4", 0.5),
    "loop": Part("the loop itself", "soft", 0.35),
}


@dataclass(frozen=True)
class Figures:
    """All figures that the runs have data for, by the place they have in a report."""

    trade_off: Chart | None
    curves: tuple[Chart, ...]
    accuracies: tuple[Chart, ...]
    mixture: tuple[Chart, ...]
    cost: tuple[Chart, ...]

    @property
    def all(self) -> list[Chart]:
        first = (self.trade_off,) if self.trade_off else ()
        return [*first, *self.curves, *self.accuracies, *self.mixture, *self.cost]


def build_figures(overview: Overview, outcomes: Outcomes) -> Figures:
    runs = overview.summaries
    losses = [loss_of_source(runs, source, number) for number, source in enumerate(_drawn_sources(runs), start=1)]
    promises = [promise_chart(item, index, alone=len(runs) == 1) for index, item in enumerate(runs)]
    return Figures(
        trade_off=retention_plane(runs),
        curves=_drawn([*losses, learning_rate(runs), gradient_norm(runs), *promises]),
        accuracies=tuple(accuracy_charts(runs, outcomes)),
        mixture=_drawn([mixture(runs), shares(runs)]),
        cost=_drawn([goodput_chart(runs), time_split(runs), throughput(runs)]),
    )


def _drawn(charts: Sequence[Chart | None]) -> tuple[Chart, ...]:
    return tuple(chart for chart in charts if chart is not None)


def loss_of_source(runs: Sequence[Summary], source: str, number: int) -> Chart | None:
    """Training loss (raw, light; running mean, strong) and held-out points of one source over tokens."""
    series: list[Series] = []
    fixed: list[FloatArray] = []
    fresh: list[FloatArray] = []
    for index, item in enumerate(runs):
        curve = finite_points(item.run.metrics.tokens, item.run.metrics.loss_by_source.get(source))
        held_out, spread = _held_out(item, source)
        smooth = running_mean(curve)
        series += [Series(index, item.label, curve, "raw"), Series(index, item.label, smooth)]
        low, high = (held_out[:, 1] - spread, held_out[:, 1] + spread) if np.isfinite(spread).all() else (None, None)
        series.append(Series(index, item.label, held_out, "held_out", low, high))
        (fixed if item.continues_base else fresh).extend([smooth, held_out])
    limits = _loss_limits(fixed, fresh)
    if limits is None:
        return None
    group = next((item.groups[source] for item in runs if source in item.groups), "unknown")
    caption = "Line: training loss, running mean" + told_noise(series)
    if any(item.style == "held_out" and len(item.points) for item in series):
        caption += " Markers on thin lines: held-out loss" + told_band(series)
    marks = event_marks(runs)
    y = Axis("loss (nats per token)", limits=limits)
    plot = Plot(TOKENS, y, _filled(series), marks)
    title = f"Loss on {source} ({group})"
    return plot_chart(f"loss_{number}_{source}", title, caption + told_marks(marks), [plot])


def told_noise(series: Sequence[Series]) -> str:
    """The end of a caption: what else than the running mean is drawn."""
    return "." if is_crowded(series) else "; light: every logged step."


def shares(runs: Sequence[Summary]) -> Chart | None:
    """General share of tokens: dashed as planned per stage, solid as realised over a sliding window."""
    series = []
    for index, item in enumerate(runs):
        series.append(Series(index, item.label, _realised_share(item)))
        series.append(Series(index, item.label, _planned_share(item), "plan"))
    if not _filled(series):
        return None
    caption = "Dashed: planned. Solid: realised, over a sliding window of one fortieth of the run."
    plot = Plot(TOKENS, Axis("general share of tokens", "share", (-0.02, 1.02)), _filled(series))
    return plot_chart("shares", "General share, planned and realised", caption, [plot])


def learning_rate(runs: Sequence[Summary]) -> Chart | None:
    return _over_tokens(runs, "lr", ("Learning rate", "learning rate"), "As applied, after warm-up and decay.")


def gradient_norm(runs: Sequence[Summary]) -> Chart | None:
    return _over_tokens(runs, "grad_norm", ("Gradient norm", "gradient norm"), "Of the gradient, before clipping.")


def throughput(runs: Sequence[Summary]) -> Chart | None:
    caption = "While training, without evaluations and checkpoints."
    return _over_tokens(runs, "tokens_per_second", ("Throughput", "tokens per second"), caption)


def time_split(runs: Sequence[Summary]) -> Chart | None:
    """A bar per run of the share of time that each phase took."""
    drawn = [(item.label, item.share_by_phase, sum(item.seconds_by_phase.values())) for item in runs]
    bars = [Bar(label, shares, note=duration(seconds)) for label, shares, seconds in drawn if shares]
    if not bars:
        return None
    parts = {key: part for key, part in PHASE_PARTS.items() if any(bar.shares.get(key, 0.0) > 0 for bar in bars)}
    title = "Where the time went"
    caption = (
        "Of the process that logs; evaluations and checkpoints lie between steps, the other phases within them. "
        "Hatched: waiting. At the right: all phases together."
    )
    return Chart("time", title, caption, stacked_bars("time", title, parts, bars))


def mixture(runs: Sequence[Summary]) -> Chart | None:
    """A bar per run of the tokens trained on by source; the thin bar below is the plan."""
    bars = []
    for item in runs:
        realised, planned = _of_sum(item.realised_by_source), _of_sum(_planned_tokens(item))
        if realised or planned:
            bars.append(Bar(item.label, realised, planned, scaled(item.tokens) if math.isfinite(item.tokens) else ""))
    groups = {name: group for item in runs for name, group in item.groups.items()}
    names = sorted({name for bar in bars for name in (*bar.shares, *(bar.planned or {}))})
    parts: dict[str, Part] = {}
    for group in ("general", "domain"):
        members = [name for name in names if (groups.get(name) == "general") == (group == "general")]
        for number, name in enumerate(members):
            parts[name] = Part(f"{name} ({groups.get(name, 'unknown')})", group, STRENGTHS[number % len(STRENGTHS)])
    if not parts:
        return None
    title = "Mixture, realised and planned"
    caption = "Shares of the tokens trained on. The thin bar below is the plan; at the right: tokens trained on."
    return Chart("tokens_by_source", title, caption, stacked_bars("tokens_by_source", title, parts, bars))


def _of_sum(tokens: dict[str, float]) -> dict[str, float]:
    total = sum(tokens.values())
    return {name: value / total for name, value in tokens.items()} if total else {}


def _filled(series: Sequence[Series]) -> tuple[Series, ...]:
    return tuple(item for item in series if len(item.points))


def _held_out(item: Summary, source: str) -> tuple[FloatArray, FloatArray]:
    """Held-out losses [N, 2] over tokens, and half the width of their bands [N]: NaN where no error is known."""
    found = [(e.tokens_seen, e.sources[source]) for e in item.run.evaluations if source in e.sources]
    rows = np.array([(tokens, each.loss, TWO_ERRORS * each.stderr) for tokens, each in found]).reshape(-1, 3)
    rows = rows[np.isfinite(rows[:, 0]) & (np.abs(rows[:, 1]) < HUGE)]
    return rows[:, :2], rows[:, 2]


def _over_tokens(runs: Sequence[Summary], column: str, words: tuple[str, str], caption: str) -> Chart | None:
    title, unit = words
    exact = column == "lr"  # set by a schedule, not measured: nothing to smooth
    smoothed: Callable[[FloatArray], FloatArray] = (lambda curve: curve) if exact else running_mean
    series = []
    for index, item in enumerate(runs):
        curve = finite_points(item.run.metrics.tokens, item.run.metrics.scalars[column])
        series += [] if exact else [Series(index, item.label, curve, "raw")]
        series.append(Series(index, item.label, smoothed(curve)))
    drawn = _filled(series)
    if not drawn:
        return None
    caption += "" if exact else " Running mean" + told_noise(drawn)
    if exact and len(drawn) > 1 and all(np.array_equal(item.points, drawn[0].points) for item in drawn):
        caption, drawn = f"{caption} All runs share one curve.", drawn[:1]
    marks = event_marks(runs)
    plot = Plot(TOKENS, Axis(unit, from_zero=True), drawn, marks)
    return plot_chart(column, title, caption + told_marks(marks), [plot])


def _drawn_sources(runs: Sequence[Summary]) -> list[str]:
    tokens: dict[str, float] = {}
    for item in runs:
        for name in item.groups:
            tokens[name] = tokens.get(name, 0.0) + item.realised_by_source.get(name, 0.0)
    return sorted(tokens, key=lambda name: -tokens[name])[:MAX_PANELS]


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
