"""What a report opens with: who is the reference, the verdict in sentences, and what makes the comparison doubtful.

The reference of a comparison is the run without replay: the first run that continues a base (has ``model.init_from``)
and whose planned share_general is 0. Every other run that continues the same base is measured against it: its
forgetting as a fraction of the reference's forgetting, and the share of the reference's domain gain that it gave up.
Runs from random weights have no base to forget: they are shown, and left out of that comparison.

Intervals and words ("within noise") are those of :mod:`cpt.eval.comparing`; a figure without one is given bare.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from cpt.report.collect import Change, Evaluation, Run, is_base_alone
from cpt.report.plots import pareto_front
from cpt.report.reading import count
from cpt.report.summary import Summary, last_known, nats, summarise, tokens_text

if TYPE_CHECKING:
    from cpt.eval.comparing import RunComparison
    from cpt.eval.comparison_rows import Row
    from cpt.eval.significance import Difference

EQUAL_BUDGET = 0.01  # token budgets closer than this are called equal
LEAST_TIMES = 1.05  # said as a factor
MANY = 6  # runs; of more, two sentences stand for all of them
SOME = 4  # names in such a sentence


@dataclass(frozen=True)
class Versus:
    """A run against the reference; a figure is None where the reference forgot, or gained, nothing."""

    label: str
    reference: str
    forgetting_ratio: float | None
    gain_given_up: float | None


@dataclass(frozen=True)
class Overview:
    """All runs of one report: their numbers, who is the reference, the verdict in sentences, warnings."""

    summaries: tuple[Summary, ...]
    reference: str | None
    versus: dict[str, Versus]
    verdict: tuple[str, ...]
    warnings: tuple[tuple[str, str], ...]


def overview(runs: Sequence[Run], compared: Mapping[int, "RunComparison"] | None = None) -> Overview:
    """``compared``: number of a run -> its comparison with its base."""
    found = compared or {}
    summaries = tuple(
        summarise(run, label, found.get(number))
        for number, (run, label) in enumerate(zip(runs, _labels(runs), strict=True))
    )
    reference = find_reference(summaries) if len(summaries) > 1 else None
    versus = {item.label: _versus(item, reference) for item in summaries if reference and _comparable(item, reference)}
    own = [(item.label, warning) for item in summaries for warning in item.run.warnings]
    return Overview(
        summaries=summaries,
        reference=reference.label if reference else None,
        versus=versus,
        verdict=(*_of_many(summaries), *_verdict(summaries, reference), *_benchmark_sentences(summaries)),
        warnings=(*own, *(("comparison", warning) for warning in _comparison_warnings(summaries, reference))),
    )


def interval_text(change: "Difference | None", *, scale: float = 1.0, digits: int = 3, lead: str = "") -> str:
    """``0.031 to 0.049`` after ``lead``; empty where no interval is known. A negative ``scale``: of the fall."""
    if change is None or change.low is None or change.high is None:
        return ""
    low, high = sorted((change.low * scale, change.high * scale))
    return lead + f"{low:.{digits}f} to {high:.{digits}f}".replace("-", "\u2212")


def find_reference(summaries: Sequence[Summary]) -> Summary | None:
    """The first run that continues a base and replays nothing; see the rule at the top of this file."""
    candidates = [item for item in summaries if item.continues_base and item.share_planned == 0]
    return next((item for item in candidates if item.general and item.domain), candidates[0] if candidates else None)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Run names; runs of the same name are told apart by a number."""
    labels: list[str] = []
    for run in runs:
        numbered = (f"{run.name} ({number})" for number in range(2, len(runs) + 2))
        labels.append(next(label for label in chain([run.name], numbered) if label not in labels))
    return labels


def _comparable(item: Summary, reference: Summary) -> bool:
    return item is not reference and item.run.init_from == reference.run.init_from


def _versus(item: Summary, reference: Summary) -> Versus:
    ratio = given_up = None
    if item.general and reference.general and reference.general.rise > 0:
        ratio = item.general.rise / reference.general.rise
    if item.domain and reference.domain and reference.domain.fall > 0:
        given_up = 1 - item.domain.fall / reference.domain.fall
    return Versus(label=item.label, reference=reference.label, forgetting_ratio=ratio, gain_given_up=given_up)


def _verdict(summaries: Sequence[Summary], reference: Summary | None) -> tuple[str, ...]:
    if reference is None:
        named = len(summaries) > 1
        return tuple(f"{item.label}: {_verdict_of_one(item)}" if named else _verdict_of_one(item) for item in summaries)
    compared = [item for item in summaries if _comparable(item, reference)]
    sentences = [_verdict_against(item, reference) for item in compared] or [
        f"{reference.label}: {_verdict_of_one(reference)}"
    ]
    others = [item for item in summaries if item is not reference and item not in compared]
    return (*sentences, *(f"{item.label}: {_verdict_of_one(item)}" for item in others))


def _verdict_of_one(item: Summary) -> str:
    if not item.run.evaluations:
        return (
            f"No evaluation yet. The training loss is {nats(last_known(item.run.metrics.scalars['loss']))} after "
            f"{tokens_text(item.tokens)}."
        )
    if not item.continues_base:
        finals = [
            f"{group} {nats(item.final_loss(group))}"
            for group in ("domain", "general")
            if math.isfinite(item.final_loss(group))
        ]
        told = f" Final held-out loss: {', '.join(finals)}." if finals else ""
        return f"Trained from random weights, so there is no base to forget.{told}"
    clauses = []
    if item.domain:
        fell = item.domain.fall >= 0
        verb, sure = "fell" if fell else "rose", _sureness(item, "domain", 1.0 if fell else -1.0)
        moved = f"{item.domain.base:.3f} to {item.domain.final:.3f}"
        clauses.append(f"Domain loss {verb} by {nats(abs(item.domain.fall))} ({moved}{sure}).")
    if item.general:
        sure = _sureness(item, "general", 1.0 if item.general.rise > 0 else -1.0)
        clauses.append(_forgetting_sentence(item.general, sure))
    if clauses:
        return " ".join(clauses)
    why = "only the base is evaluated yet" if is_base_alone(item.run) else "no evaluation of the base"
    return f"Gain and forgetting are unknown: {why}."


def _sureness(item: Summary, group: str, scale: float | None = None) -> str:
    """``; 95% interval 0.031 to 0.049``, ``, within noise``, or nothing where no test is known. The interval, with a
    ``scale`` only, is of the gain and of the forgetting at 1, of their opposites at -1.
    """
    if item.compared is None:
        return ""
    row = next((row for row in item.compared.source_groups if row.name == group), None)
    if row is None or row.word == "not tested":
        return ""
    change = item.compared.domain_gain if group == "domain" else row.change
    told = interval_text(change, scale=scale) if scale else ""
    return (f"; 95% interval {told}" if told else "") + (f", {_called(row)}" if row.word == "within noise" else "")


def _benchmark_sentences(summaries: Sequence[Summary]) -> list[str]:
    """A sentence for every run with results of a suite: accuracy by group, and how many tasks moved."""
    found = []
    for item in summaries:
        if item.compared is not None and item.compared.tasks:
            told = "; ".join(_accuracy_clause(row) for row in item.compared.groups)
            words = Counter(row.word for row in item.compared.tasks)
            moved = ", ".join(
                f"{words[word]:,} {word}" for word in ("drop", "gain", "within noise", "not tested") if words[word]
            )
            named = f"{item.label}: " if len(summaries) > 1 else ""
            counted = f"of {count(len(item.compared.tasks), 'task')} {moved}"
            found.append(
                f"{named}Benchmarks: {told + '; ' if told else ''}{counted}{_named_drops(item.compared.tasks)}."
            )
    return found


def _accuracy_clause(row: "Row") -> str:
    change = row.change
    if change.before is None or change.after is None or change.value is None:
        return f"{row.name} accuracy unknown"
    points = f"{change.value * 100:+.1f} points".replace("-", "\u2212")
    told = interval_text(change, scale=100, digits=1)
    interval = f", 95% interval {told}" if told else ""
    return f"{row.name} accuracy {change.before:.1%} to {change.after:.1%} ({points}{interval}, {_called(row)})"


def _called(row: "Row") -> str:
    """What a difference may be called; an interval that leaves out 0 needs the reason why it is noise all the same."""
    low, high = row.change.low, row.change.high
    if row.word == "within noise" and low is not None and high is not None and (low > 0 or high < 0):
        return "within noise after the correction for many comparisons"
    return f"a {row.word}" if row.word in ("drop", "gain") else row.word


def _named_drops(rows: Sequence["Row"]) -> str:
    drops = sorted((row for row in rows if row.word == "drop"), key=_worsening, reverse=True)
    return f" (dropped: {_some([row.name for row in drops])})" if drops else ""


def _worsening(row: "Row") -> float:
    change = row.change.value or 0.0
    return -change if row.higher_is_better else change


def _of_many(summaries: Sequence[Summary]) -> list[str]:
    """Two sentences for many runs: who ends on the front, forgot least and learned most; whose benchmarks dropped."""
    known = [item for item in summaries if item.gain is not None and item.forgetting is not None]
    if len(summaries) <= MANY or len(known) < 2:
        return []
    ends = np.array([(item.forgetting, item.gain) for item in known], dtype=np.float64)
    front = {tuple(point) for point in pareto_front(ends).tolist()}
    best = [item.label for item, end in zip(known, ends.tolist(), strict=True) if tuple(end) in front]
    least = min(known, key=lambda item: item.forgetting or 0.0)
    most = max(known, key=lambda item: item.gain or 0.0)
    return [
        f"{least.label} forgot least ({nats(least.forgetting or 0.0)}, gain {nats(least.gain or 0.0)}), {most.label} "
        f"gained most ({nats(most.gain or 0.0)}, forgetting {nats(most.forgetting or 0.0)}).",
        f"{len(best)} of {len(known)} runs end on the Pareto front of gain against forgetting: {_some(best)}."
        + _dropped_in_many(known),
    ]


def _dropped_in_many(summaries: Sequence[Summary]) -> str:
    measured = [
        (item.label, row.word)
        for item in summaries
        if item.compared is not None
        for row in item.compared.groups
        if row.name == "general"
    ]
    dropped = [label for label, word in measured if word == "drop"]
    if not measured:
        return ""
    named = f": {_some(dropped)}" if dropped else ""
    return f" General accuracy dropped beyond noise in {len(dropped)} of {len(measured)} runs{named}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SOME]) + (f" and {len(names) - SOME:,} more" if len(names) > SOME else "")


def _forgetting_sentence(change: Change, sure: str) -> str:
    if change.rise <= 0:
        moved = f"General loss fell by {nats(-change.rise)}: nothing was forgotten" + (f" ({sure[2:]})" if sure else "")
    else:
        ends = f"{change.base:.3f} to {change.final:.3f}{sure}"
        moved = f"General forgetting against the base is {nats(change.rise)} ({ends})"
    at_worst = change.worst_rise > max(change.rise, 0) + 5e-4
    return f"{moved}, {nats(change.worst_rise)} at its worst (step {change.worst_step:,})." if at_worst else f"{moved}."


def _verdict_against(item: Summary, reference: Summary) -> str:
    if not (item.general and item.domain and reference.general and reference.domain):
        return (
            f"{item.label} cannot be compared with {reference.label} yet: an evaluation of the base or of "
            "the result is missing."
        )
    against = _versus(item, reference)
    mine, theirs = item.general.rise, f"{reference.label}: {nats(reference.general.rise)}"
    if mine <= 0:
        kept = f"forgot nothing (general loss fell by {nats(-mine)}; {theirs})"
    elif against.forgetting_ratio is not None and against.forgetting_ratio < 1:
        sure, times = _sureness(item, "general"), 1 / against.forgetting_ratio
        # A ratio to what may be nothing says nothing.
        more = f", {times:.1f} times as much" if not sure and times >= LEAST_TIMES else ""
        kept = f"kept general forgetting at {nats(mine)}{sure} ({theirs}{more})"
    else:
        kept = f"did not reduce general forgetting: {nats(mine)} ({theirs})"
    return f"{item.label} {kept} and {_gain_clause(item.domain, reference.domain, against.gain_given_up)}."


def _gain_clause(mine: Change, reference: Change, given_up: float | None) -> str:
    figures = f"({mine.fall:.3f} against {reference.fall:.3f} nats)"
    if given_up is None:
        return f"gained {nats(mine.fall)} on the domain {figures}"
    if given_up >= 0.005:
        return f"gave up {given_up:.0%} of the domain gain {figures}"
    return (
        f"gained {-given_up:.0%} more on the domain {figures}"
        if given_up <= -0.005
        else f"gave up none of the domain gain {figures}"
    )


def _comparison_warnings(summaries: Sequence[Summary], reference: Summary | None) -> list[str]:
    if len(summaries) < 2:
        return []
    if reference is None:
        return [
            "No run without replay (share_general 0, with model.init_from) is among these, so replay's "
            "effect is not measured."
        ]
    found = []
    for item in summaries:
        if item.continues_base and item.run.init_from != reference.run.init_from:
            found.append(
                f"{item.label} continues another base ({item.run.init_from}) than {reference.label} and is not "
                "compared with it."
            )
        if abs(item.tokens - reference.tokens) > EQUAL_BUDGET * reference.tokens:
            found.append(
                f"{item.label} saw {tokens_text(item.tokens)}, {reference.label} "
                f"{tokens_text(reference.tokens)}: unequal budgets."
            )
        if _comparable(item, reference) and _evaluated(item) != _evaluated(reference):
            found.append(
                f"{item.label} and {reference.label} were evaluated on different sources; compare their figures "
                "with care."
            )
    return found


def _evaluated(item: Summary) -> set[str]:
    last: Evaluation | None = item.run.evaluations[-1] if item.run.evaluations else None
    return set(last.sources) if last else set()
