"""Promise against measurement: what a run's recommendation predicted, and what its evaluations found.

Owns the comparison, its sentences, table, figure and JSON. Refuses to compare what was not promised: an evaluation
outside the promise's range of tokens counts neither as kept nor as broken.

A promise is made for the *end* of a schedule: "after 10 B tokens, annealed, general loss 2.85 to 2.89". An evaluation
in the middle of a run is taken at a high learning rate, and usually lies above what a run that ends there would reach.
So the evaluation at the plan's last step is judged by itself, and what happened before it is told apart from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from cpt.plan import Group
from cpt.recommendation import PromisePoint
from cpt.report.cells import NO_VALUE, Row, Table, percent
from cpt.report.collect import Evaluation, FloatArray, setting
from cpt.report.plot_svg import plot_chart
from cpt.report.plots import Axis, Chart, Plot, Series
from cpt.report.reading import count
from cpt.report.summary import Summary, plain, scaled

SAME_TOKENS = 0.01  # a run is cut to whole steps: this near to the promise's ends still is inside its range
SAME_BASE = 0.01  # relative difference of two losses of what should be one base on one text
SAME_SHARE = 0.01
CURVE_POINTS = 100


@dataclass(frozen=True)
class Checked:
    """One evaluation of one group against the promise for as many tokens; losses in nats per token."""

    step: int
    tokens: float
    promised: float
    low: float
    high: float
    measured: float
    final: bool

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high

    def __str__(self) -> str:
        better = ", better than promised" if self.measured < self.low else ""
        return f"({self.measured:.3f}, promised {self.low:.3f} to {self.high:.3f}{better})"


@dataclass(frozen=True)
class Kept:
    """How one group's promise was kept. ``base``: loss at step 0, promised and measured, NaN where unknown."""

    group: Group
    base: tuple[float, float]
    points: tuple[Checked, ...]

    @property
    def final(self) -> Checked | None:
        return next((point for point in self.points if point.final), None)

    @property
    def left(self) -> list[Checked]:
        """Evaluations outside the interval before the last one."""
        return [point for point in self.points if not point.inside and not point.final]

    @property
    def base_apart(self) -> float:
        """Relative difference of the measured base from the pilots'; NaN where one is unknown."""
        promised, measured = self.base
        return measured / promised - 1 if promised else math.nan


def compare(item: Summary) -> list[Kept]:
    """Both groups of a run with a recommendation; none without."""
    return [_compare_group(item, group) for group in get_args(Group)] if item.run.recommendation else []


def promised_at(promise: Sequence[PromisePoint], tokens: FloatArray, group: Group) -> FloatArray:
    """Loss, low and high end of its interval [N, 3] after ``tokens``: linear in log tokens, NaN outside the range.

    A point at 0 tokens is the base: it has no logarithm, and nothing is promised between it and the next point.
    """
    points = [point for point in promise if point.tokens > 0]
    if not points:
        return np.full((len(tokens), 3), np.nan)
    known = np.array([(p.tokens, getattr(p, f"loss_{group}"), *getattr(p, f"{group}_interval")) for p in points])
    out_of_range = (tokens < known[0, 0] * (1 - SAME_TOKENS)) | (tokens > known[-1, 0] * (1 + SAME_TOKENS))
    logs = np.log(np.maximum(tokens, 1.0))
    found = np.column_stack([np.interp(logs, np.log(known[:, 0]), column) for column in known[:, 1:].T])
    found[out_of_range] = np.nan
    return found


def in_words(item: Summary) -> str:
    """Did the run keep the promise? The last evaluation first, then when the run left the interval on the way."""
    assert item.run.recommendation
    kept = [each for each in compare(item) if each.points]
    if not kept:
        return f"No evaluation lies in the range of tokens that {_name(item)} promises losses for."
    sentences = [_final_sentence(each.final, each.group) for each in kept if each.final]
    sentences += [_left_sentence(each) for each in kept if each.left]
    amount = max(len(each.points) for each in kept)
    if all(point.inside for each in kept for point in each.points) and (amount > 1 or not sentences):
        sentences.append(f"All {count(amount, 'evaluation')} after the base lie inside the promised intervals.")
    return " ".join(sentences)


def doubts(item: Summary) -> list[str]:
    """Why the promise may be about something else than this run."""
    recommendation = item.run.recommendation
    if recommendation is None:
        return []
    found = [
        f"The base's {each.group} loss is {each.base[1]:.3f}, the pilots' base had {each.base[0]:.3f} "
        f"({percent(abs(each.base_apart))} apart): another base or other held-out text, so the promise is not for it."
        for each in compare(item)
        if abs(each.base_apart) > SAME_BASE
    ]
    advised = recommendation.share_general
    if advised is not None and abs(item.share_planned - advised) > SAME_SHARE:
        found.append(
            f"The recommendation is for a general share of {percent(advised)}, the run was planned with "
            f"{percent(item.share_planned)}: its promise is for another mixture."
        )
    return found


def promise_table(item: Summary) -> Table | None:
    """Every evaluation that something was promised for, a block per group."""
    if item.run.recommendation is None:
        return None
    rows = []
    for each in compare(item):
        rows.append(Row((f"{each.group.capitalize()} loss, nats per token",), heading=True))
        if any(map(math.isfinite, each.base)):
            apart = f"{percent(abs(each.base_apart))} apart" if math.isfinite(each.base_apart) else NO_VALUE
            rows.append(Row(("step 0 (base)", "0", _nats(each.base[0]), NO_VALUE, _nats(each.base[1]), apart)))
        for point in each.points:
            step = f"step {point.step:,}" + (" (last)" if point.final else "")
            interval = f"{point.low:.3f} to {point.high:.3f}"
            verdict = "yes" if point.inside else "no, above" if point.measured > point.high else "no, below"
            cells = (step, scaled(point.tokens), _nats(point.promised), interval, _nats(point.measured), verdict)
            rows.append(Row(cells))
    head = ("Evaluation", "Tokens", "Promised", "90% interval", "Measured", "Inside")
    return Table(f"Promise against measurement: {item.label}", head, tuple(rows), note=_note(item))


def promise_data(item: Summary) -> dict[str, Any] | None:
    """For ``--json``; None for a run without a recommendation."""
    recommendation = item.run.recommendation
    if recommendation is None:
        return None
    return {
        "fingerprint": recommendation.fingerprint,
        "share_general": recommendation.share_general,
        "interval": recommendation.interval,
        **{each.group: _group_data(each) for each in compare(item)},
        "warnings": doubts(item),
    }


def promise_chart(item: Summary, index: int, *, alone: bool) -> Chart | None:
    """One panel per group: the promised curve with its band, and the measured points."""
    recommendation, kept = item.run.recommendation, compare(item)
    starts = [point.tokens for point in recommendation.promise if point.tokens > 0] if recommendation else []
    if recommendation is None or not starts or not any(each.points for each in kept):
        return None
    tokens = np.geomspace(starts[0], starts[-1], CURVE_POINTS)
    plots = []
    for number, each in enumerate(kept):
        loss, low, high = promised_at(recommendation.promise, tokens, each.group).T
        measured = np.array([(p.tokens, p.measured) for p in each.points]).reshape(-1, 2)
        outside = measured[[not point.inside for point in each.points]]
        series = [
            Series(index, "promised", np.column_stack([tokens, loss]), "plan", low, high),
            Series(index, "measured", measured, "held_out"),
            Series(index, "outside", outside, "crossed"),
        ]
        across = Axis("tokens seen" if number + 1 == len(kept) else "", "tokens")
        plots.append(Plot(across, Axis(f"{each.group} loss (nats)"), tuple(series), height=215.0))
    caption = (
        "Dashed, with its band: the promised loss and its 90% interval, for a run that ends there with its learning "
        "rate annealed. Dots: evaluations; crossed out: those outside the interval. Before the last one the rate is "
        "still high, and losses above the promise do not break it."
    )
    title = "Promise against measurement" + ("" if alone else f": {item.label}")
    return plot_chart(f"promise_{index + 1}", title, caption, plots)


def _compare_group(item: Summary, group: Group) -> Kept:
    recommendation = item.run.recommendation
    assert recommendation
    measured = [each for each in item.run.evaluations if math.isfinite(each.groups.get(group, math.nan))]
    later = [each for each in measured if each.step > 0 and math.isfinite(each.tokens_seen)]
    promises = promised_at(recommendation.promise, np.array([each.tokens_seen for each in later]), group)
    points = [
        Checked(each.step, each.tokens_seen, loss, low, high, each.groups[group], _is_final(item, each))
        for each, (loss, low, high) in zip(later, promises.tolist(), strict=True)
        if math.isfinite(loss)
    ]
    promised = getattr(recommendation.base_loss, group)
    base = next((each.groups[group] for each in measured if each.step == 0), math.nan)
    return Kept(group, (math.nan if promised is None else promised, base), tuple(points))


def _is_final(item: Summary, evaluation: Evaluation) -> bool:
    """At the end of the schedule: the plan's last step, or the last evaluation of a finished run without a plan. The
    promise to a run that was extended is of the end that it had first.
    """
    if past := setting(item.run.config, "train.past"):
        return bool(evaluation.step == past[0]["until_step"])
    if item.run.plan:
        return evaluation.step == item.run.plan.num_steps
    return item.run.finished and evaluation is item.run.evaluations[-1]


def _final_sentence(point: Checked, group: Group) -> str:
    where = "inside" if point.inside else "outside"
    return f"The final {group} loss lies {where} the promised interval {point}."


def _left_sentence(kept: Kept) -> str:
    first, before_last = kept.left[0], [point for point in kept.points if not point.final]
    left = f"The run left the promised interval of the {kept.group} loss at step {first.step:,} {first}"
    share = f"{len(kept.left)} of {count(len(before_last), 'evaluation')} before the last lie outside it"
    above = any(point.measured > point.high for point in kept.left)
    return f"{left}; {share}" + (", at a learning rate that is not annealed yet." if above else ".")


def _note(item: Summary) -> str:
    recommendation = item.run.recommendation
    assert recommendation
    covered = {point.step for each in compare(item) for point in each.points}
    skipped = sum(each.step > 0 and each.step not in covered for each in item.run.evaluations)
    laws = f"Laws: {recommendation.law.general} for general, {recommendation.law.domain} for domain loss."
    left_out = f" Not in the promise's range of tokens, so not compared: {count(skipped, 'evaluation')}."
    return f"{_name(item).capitalize()}. {laws}{left_out if skipped else ''}"


def _group_data(kept: Kept) -> dict[str, Any]:
    promised, measured = kept.base
    return {
        "base": {"promised": plain(promised), "measured": plain(measured)},
        "evaluations": [
            {
                "step": point.step,
                "tokens": point.tokens,
                "promised": point.promised,
                "interval": [point.low, point.high],
                "measured": point.measured,
                "inside": point.inside,
                "final": point.final,
            }
            for point in kept.points
        ],
        "left_at_step": kept.left[0].step if kept.left else None,
        "final_inside": kept.final.inside if kept.final else None,
    }


def _name(item: Summary) -> str:
    assert item.run.recommendation
    return f"recommendation {item.run.recommendation.fingerprint}"


def _nats(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NO_VALUE
