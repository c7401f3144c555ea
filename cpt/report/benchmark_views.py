"""Benchmarks in the report: the table of tasks, accuracy over a run, stability, and the copying probe.

Figures and their words come from ``cpt.eval``; here they get their place. Overlapping items, those known to be in the
training corpora, have columns of their own.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from cpt.eval.comparing import RunComparison
from cpt.eval.comparison_rows import Row as Compared
from cpt.eval.results import is_accuracy
from cpt.eval.retention import DOMAIN
from cpt.eval.significance import Difference
from cpt.eval.stability import Course, Stability, measure_stability
from cpt.report.cells import NO_VALUE, Row, Table
from cpt.report.outcomes import Outcomes, Point, Points
from cpt.report.plot_svg import is_crowded, plot_chart
from cpt.report.plots import Axis, Chart, Plot, Series
from cpt.report.summary import Summary
from cpt.report.verdict import interval_text

TWO_ERRORS = 2.0
HEAD = (
    *("Run", "Task", "Group", "Verdict", "Before", "After", "Difference", "95% interval", "p, corrected", "Items"),
    *("Truncated", "Overlapping", "Without them", "Metric"),
)
RUN, GROUP, VERDICT, TRUNCATED, OVERLAPPING, WITHOUT = 0, 2, 3, 10, 11, 12  # places in HEAD
WHOLE = "all of it"  # in place of a group, in the row of a whole group
MOST_ROWS = 40  # of the Markdown twin: more, and only differences beyond noise are listed


def task_table(runs: Sequence[Summary], outcomes: Outcomes, suite: str) -> Table | None:
    """Every task of every run, and before them the groups: before, after, difference, interval, word."""
    rows: list[Row] = []
    for number, compared in outcomes.compared.get(suite, {}).items():
        found = [*compared.groups, *compared.tasks, *compared.copying]
        is_group = [True] * len(compared.groups) + [False] * (len(compared.tasks) + len(compared.copying))
        rows += [
            _task_row(runs[number].label, number, row, group=group) for row, group in zip(found, is_group, strict=True)
        ]
    if not rows:
        return None
    # Which columns say something: one run needs no name, and without overlaps there is nothing to tell apart.
    dull = {RUN} if len({row.run for row in rows}) == 1 else set()
    dull |= {TRUNCATED} if all(row.values[TRUNCATED] == 0 for row in rows) else set()
    dull |= {OVERLAPPING, WITHOUT} if all(row.values[OVERLAPPING] == 0 for row in rows) else set()
    kept = [place for place in range(len(HEAD)) if place not in dull]
    shown = tuple(row.only(kept) for row in rows)
    notable = [row for row in rows if row.cells[VERDICT] in ("drop", "gain") or row.cells[GROUP] == WHOLE]
    brief = tuple(row.only(kept) for row in notable)
    note = (
        "The last checkpoint against the base, on the same items: paired bootstrap, p corrected for all tasks, or "
        "all groups, of this table (Holm). Differences of accuracies in percentage points."
    )
    note += " Overlapping items are known to be in the training corpora." if OVERLAPPING in kept else ""
    note += " No prompt was longer than the context." if TRUNCATED in dull else ""
    return Table(
        f"Benchmarks against the base: {suite}",
        tuple(HEAD[place] for place in kept),
        shown,
        "tasks",
        note,
        noun="tasks",
        choose=tuple(number for number, place in enumerate(kept) if place in (RUN, GROUP, VERDICT)),
        brief=brief if len(rows) > MOST_ROWS else None,
    )


def _task_row(label: str, number: int, row: Compared, *, group: bool) -> Row:
    change, is_share = row.change, is_accuracy(row.metric) or row.metric in ("accuracy", "token_accuracy")
    scale, digits = (100.0, 1) if is_share else (1.0, 3)
    clean = row.without_overlap
    moved = _scaled(change, scale)
    told: tuple[tuple[str, float | None], ...] = (
        (label, None),
        (_called(row, group=group), None),
        (WHOLE if group else row.group, None),
        (row.word, None),
        (_level(change.before, share=is_share), change.before),
        (_level(change.after, share=is_share), change.after),
        (_moved(change, scale, digits), moved),
        (interval_text(change, scale=scale, digits=digits) or NO_VALUE, moved),
        (NO_VALUE if row.corrected_p is None else _p_text(row.corrected_p), row.corrected_p),
        (f"{change.units:,}" if change.units else NO_VALUE, change.units),
        (f"{row.truncated:,}", row.truncated),
        (f"{row.overlapping:,}", row.overlapping),
        (NO_VALUE if clean is None else _moved(clean, scale, digits), _scaled(clean, scale)),
        (row.metric, None),
    )
    cells, values = tuple(text for text, _ in told), tuple(value for _, value in told)
    return Row(cells, values=values, run=number)


def _called(row: Compared, *, group: bool) -> str:
    if group:
        return f"{row.name}, all tasks"
    return f"{row.name}, {row.metric.replace('_', ' ')}" if row.group == "copying" else row.name


def _scaled(change: Difference | None, scale: float) -> float | None:
    return None if change is None or change.value is None else change.value * scale


def _moved(change: Difference, scale: float, digits: int) -> str:
    if change.value is None:
        return NO_VALUE
    return f"{change.value * scale:+.{digits}f}".replace("-", "\u2212")


def _level(value: float | None, *, share: bool) -> str:
    return NO_VALUE if value is None else f"{value:.1%}" if share else f"{value:,.3f}"


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def accuracy_charts(runs: Sequence[Summary], outcomes: Outcomes) -> list[Chart]:
    """For every suite the accuracy of each of its groups over tokens, and the copying probe where it was run."""
    found = []
    for place, suite in enumerate(outcomes.suites, start=1):
        points = outcomes.points[suite]
        groups = sorted({name for own in points.values() for point in own for name in point.groups})
        wanted = [(f"Accuracy, {name}: {suite}", "accuracy", name) for name in groups]
        copying = (f"Copying from the context: {suite}", "copied exactly", None)
        for number, (title, words, group) in enumerate((*wanted, copying), start=1):
            if series := _series(runs, points, group):
                caption = "Share of passages" if group is None else "Mean over the tasks of the group"
                caption += told_band(series)
                plot = Plot(Axis("tokens seen", "tokens"), Axis(words, "share"), series)
                name = f"accuracy_{place}_{number}"
                found.append(plot_chart(name, title, caption, [plot]))
    return found


def told_band(series: Sequence[Series]) -> str:
    """The end of a caption: whether the curves have bands."""
    has_band = not is_crowded(series) and any(item.low is not None and len(item.points) > 1 for item in series)
    return ", with a band of two standard errors." if has_band else "."


def _series(runs: Sequence[Summary], points: Points, group: str | None) -> tuple[Series, ...]:
    """One curve per run of a group's accuracy, or of the copying probe."""
    found = []
    for number, own in points.items():
        rows = np.array([(point.tokens_seen, *_measured(point, group)) for point in own]).reshape(-1, 3)
        rows = rows[np.isfinite(rows[:, :2]).all(axis=1)]
        if not len(rows):
            continue
        spread = TWO_ERRORS * rows[:, 2]
        low, high = (rows[:, 1] - spread, rows[:, 1] + spread) if np.isfinite(spread).all() else (None, None)
        found.append(Series(number, runs[number].label, rows[:, :2], "held_out", low, high))
    return tuple(found)


def _measured(point: Point, group: str | None) -> tuple[float, float]:
    return point.copying if group is None else point.groups.get(group, (math.nan, math.nan))


def stability_table(item: Summary, points: Mapping[str, tuple[Point, ...]]) -> Table | None:
    """How deep the run fell before it recovered, on held-out losses and on every suite's accuracies."""
    losses = [(each.step, each.groups) for each in item.run.evaluations]
    found = [("Held-out loss, nats per token", _stability(losses, higher_is_better=False), 1.0, 3)]
    for suite, own in points.items():
        accuracies = [(point.step, {name: value for name, (value, _) in point.groups.items()}) for point in own]
        found.append((f"Accuracy on {suite}, %", _stability(accuracies, higher_is_better=True), 100.0, 1))
    rows: list[Row] = []
    windows: tuple[int, ...] = ()
    for title, stability, scale, digits in found:
        if stability is None:
            continue
        rows.append(Row((title,), heading=True))
        courses = dict(stability.old) | ({"domain": stability.current} if stability.current else {})
        for name, course in courses.items():
            windows = tuple(course.forgetting)
            rows.append(Row((name, *_course_cells(course, scale, digits))))
        summed = [("min-ACC" if stability.higher_is_better else "mean of the highest", stability.worst)]
        summed += [("WC-ACC" if stability.higher_is_better else "worst case, domain included", stability.worst_case)]
        rows += [Row((words, _number(value, scale, digits))) for words, value in summed if value is not None]
    if not rows:
        return None
    head = ("", "Worst", "at step", "Final", *(f"{kind}{w}" for kind in ("WF", "WP") for w in windows))
    rows = [row if row.heading else Row((*row.cells, *[""] * (len(head) - len(row.cells)))) for row in rows]
    note = (
        "Worst: lowest accuracy or highest loss at any evaluation. WF and WP: the largest fall and rise of what is "
        "good within so many evaluations. min-ACC: the mean of the lowest accuracies outside the domain; WC-ACC: their "
        "mean with the final one of the domain (arXiv 2205.13452)."
    )
    return Table(f"Stability: {item.label}", head, tuple(rows), note=note)


def _stability(points: Sequence[tuple[int, Mapping[str, float]]], *, higher_is_better: bool) -> Stability | None:
    """Of figures by group at (step, figures): every group but the domain is an old task."""
    names = sorted({name for _, figures in points for name in figures if math.isfinite(figures[name])})
    series = {name: [_finite(figures.get(name, math.nan)) for _, figures in points] for name in names}
    old = {name: values for name, values in series.items() if name != DOMAIN}
    if len(points) < 2 or not old:
        return None
    steps = [step for step, _ in points]
    return measure_stability(steps, old, series.get(DOMAIN), higher_is_better=higher_is_better)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _course_cells(course: Course, scale: float, digits: int) -> tuple[str, ...]:
    step = NO_VALUE if course.worst_step is None else f"{course.worst_step:,}"
    ends = (_number(course.worst, scale, digits), step, _number(course.final, scale, digits))
    changes = (*course.forgetting.values(), *course.plasticity.values())
    return (*ends, *(_number(value, scale, digits) for value in changes))


def _number(value: float | None, scale: float, digits: int) -> str:
    return NO_VALUE if value is None else f"{value * scale:,.{digits}f}".replace("-", "\u2212")


def comparison_data(compared: RunComparison | None) -> dict[str, object] | None:
    """For ``--json``: gain and forgetting with their intervals, as ``cpt eval compare`` has them."""
    if compared is None:
        return None
    gain, forgetting = compared.domain_gain, compared.general_forgetting
    return {
        "domain_gain": gain.to_dict() if gain else None,
        "general_forgetting": forgetting.to_dict() if forgetting else None,
        "tasks": [
            {
                "task": row.name,
                "group": row.group,
                "metric": row.metric,
                "word": row.word,
                "corrected_p": row.corrected_p,
            }
            | row.change.to_dict()
            for row in compared.tasks
        ],
    }
