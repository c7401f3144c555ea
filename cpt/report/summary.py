"""From run records to the numbers and sentences a report opens with; pure functions, no files, no drawing.

The reference of a comparison is the run without replay: the first run that continues a base (has ``model.init_from``)
and whose planned share_general is 0. Every other run that continues the same base is measured against it: its
forgetting as a fraction of the reference's forgetting, and the share of the reference's domain gain that it gave up.
Runs from random weights have no base to forget: they are shown, and left out of that comparison.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.report.collect import Change, Evaluation, FloatArray, Run, change_of
from cpt.report.reading import number

EQUAL_BUDGET = 0.01  # token budgets closer than this are called equal
STALLS = ("checkpoint", "evaluation")  # phases between steps
PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Summary:
    """One run in numbers. Losses in nats per token, shares in [0, 1], NaN or None where the files do not say."""

    run: Run
    label: str
    general: Change | None
    domain: Change | None
    share_planned: float
    share_realised: float
    tokens: float
    tokens_planned: float
    realised_by_source: dict[str, float]
    groups: dict[str, str]

    @property
    def continues_base(self) -> bool:
        return self.run.init_from is not None

    @property
    def gain(self) -> float | None:
        """Domain gain over the base in nats; None for a run from random weights, which has no base."""
        return self.domain.fall if self.domain and self.continues_base else None

    @property
    def forgetting(self) -> float | None:
        """General forgetting against the base in nats; None as for ``gain``."""
        return self.general.rise if self.general and self.continues_base else None

    def final_loss(self, group: str) -> float:
        losses = [
            item.groups[group] for item in self.run.evaluations if math.isfinite(item.groups.get(group, math.nan))
        ]
        return losses[-1] if losses else math.nan

    def median(self, name: str) -> float:
        """Median of one metrics column over the run; NaN if nothing was logged."""
        return _finite_median(self.run.metrics.scalars[name])

    @property
    def seconds_by_phase(self) -> dict[str, float]:
        """Where the run's time went: seconds of every phase, and of the loop itself. Empty for a run that did not say.

        Evaluations and checkpoints lie between the steps, the other phases within; what the end of the run added after
        the last record stands with its last event.
        """
        metrics = self.run.metrics
        if not metrics.phase_seconds:
            return {}
        steps = np.nan_to_num(metrics.scalars["steps"])
        totals = {name: float(np.nansum(column * steps)) for name, column in metrics.phase_seconds.items()}
        within = sum(seconds for name, seconds in totals.items() if name not in STALLS)
        loop = float(np.nansum(metrics.scalars["step_seconds"] * steps)) - within
        for event in self.run.events:
            said = event.details.get("phase_seconds")
            for name, seconds in said.items() if isinstance(said, dict) else ():
                totals[name] = totals.get(name, 0.0) + number(seconds)
        return {**totals, "loop": max(0.0, loop)}

    @property
    def share_by_phase(self) -> dict[str, float]:
        """Of all the time that a phase is known for; empty as ``seconds_by_phase``."""
        seconds = self.seconds_by_phase
        total = sum(seconds.values())
        return {name: value / total for name, value in seconds.items()} if total else {}

    @property
    def peak_memory_bytes(self) -> float:
        values = self.run.metrics.scalars["memory_bytes"]
        return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


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


def overview(runs: Sequence[Run]) -> Overview:
    summaries = tuple(summarise(run, label) for run, label in zip(runs, _labels(runs), strict=True))
    reference = find_reference(summaries) if len(summaries) > 1 else None
    versus = {item.label: _versus(item, reference) for item in summaries if reference and _comparable(item, reference)}
    own = [(item.label, warning) for item in summaries for warning in item.run.warnings]
    return Overview(
        summaries=summaries,
        reference=reference.label if reference else None,
        versus=versus,
        verdict=_verdict(summaries, reference),
        warnings=(*own, *(("comparison", warning) for warning in _comparison_warnings(summaries, reference))),
    )


def summarise(run: Run, label: str) -> Summary:
    groups = _groups(run)
    planned = {source: float(tokens) for source, tokens in run.plan.tokens_by_source().items()} if run.plan else {}
    realised = {
        name: last for name, column in run.metrics.tokens_by_source.items() if math.isfinite(last := _last(column))
    }
    return Summary(
        run=run,
        label=label,
        general=change_of(run.evaluations, "general"),
        domain=change_of(run.evaluations, "domain"),
        share_planned=_share_general(planned, groups),
        share_realised=_share_general(realised, groups),
        tokens=_last(run.metrics.tokens),
        tokens_planned=sum(planned.values()) if planned else math.nan,
        realised_by_source=realised,
        groups=groups,
    )


def find_reference(summaries: Sequence[Summary]) -> Summary | None:
    """The first run that continues a base and replays nothing; see the rule at the top of this file."""
    candidates = [item for item in summaries if item.continues_base and item.share_planned == 0]
    return next((item for item in candidates if item.general and item.domain), candidates[0] if candidates else None)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Run names; runs of the same name are told apart by a number."""
    seen: Counter[str] = Counter()
    labels = []
    for run in runs:
        seen[run.name] += 1
        labels.append(run.name if seen[run.name] == 1 else f"{run.name} ({seen[run.name]})")
    return labels


def _groups(run: Run) -> dict[str, str]:
    evaluated = {name: source.group for item in run.evaluations for name, source in item.sources.items()}
    return evaluated | ({source.name: str(source.group) for source in run.plan.sources} if run.plan else {})


def _share_general(tokens: dict[str, float], groups: dict[str, str]) -> float:
    total = sum(tokens.values())
    return sum(value for name, value in tokens.items() if groups.get(name) == "general") / total if total else math.nan


def _last(column: FloatArray) -> float:
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else math.nan


def _finite_median(column: FloatArray) -> float:
    finite = column[np.isfinite(column)]
    return float(np.median(finite)) if len(finite) else math.nan


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
            f"No evaluation yet. The training loss is {nats(_last(item.run.metrics.scalars['loss']))} after "
            f"{tokens_text(item.tokens)}."
        )
    if not item.continues_base:
        finals = [
            f"{group} {nats(item.final_loss(group))}"
            for group in ("domain", "general")
            if math.isfinite(item.final_loss(group))
        ]
        return f"Trained from random weights, so there is no base to forget. Final held-out loss: {', '.join(finals)}."
    clauses = []
    if item.domain:
        verb = "fell" if item.domain.fall >= 0 else "rose"
        clauses.append(
            f"Domain loss {verb} by {nats(abs(item.domain.fall))} ({item.domain.base:.3f} to {item.domain.final:.3f})."
        )
    if item.general:
        clauses.append(_forgetting_sentence(item.general))
    return " ".join(clauses) or "Gain and forgetting are unknown: no evaluation of the base."


def _forgetting_sentence(change: Change) -> str:
    if change.rise <= 0:
        moved = f"General loss fell by {nats(-change.rise)}: nothing was forgotten"
    else:
        moved = f"General forgetting against the base is {nats(change.rise)} ({change.base:.3f} to {change.final:.3f})"
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
        kept = f"kept general forgetting at {nats(mine)} ({theirs}, {1 / against.forgetting_ratio:.1f} times as much)"
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
        if abs(item.tokens / reference.tokens - 1) > EQUAL_BUDGET:
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


def nats(value: float) -> str:
    return f"{value:.3f} nats".replace("-", "\u2212") if math.isfinite(value) else "unknown"


def signed(value: float, unit: str = " nats") -> str:
    """``signed(-0.02)`` -> ``"-0.020 nats"``, with a real minus sign."""
    return f"{value:+.3f}{unit}".replace("-", "\u2212") if math.isfinite(value) else "unknown"


def tokens_text(value: float) -> str:
    """``tokens_text(12_600_000)`` -> ``"12.6 M tokens"``."""
    return f"{scaled(value)} tokens" if math.isfinite(value) else "an unknown number of tokens"


def scaled(value: float) -> str:
    """Three digits and a decimal prefix: 950, 12.6 M, 1.25 B, 3.00 T."""
    if not math.isfinite(value):
        return "unknown"
    size, unit = next(((size, unit) for size, unit in PREFIXES if abs(value) >= size), (1.0, ""))
    shown = value / size
    digits = 0 if abs(shown) >= 100 or not unit else 1 if abs(shown) >= 10 else 2
    return f"{shown:,.{digits}f} {unit}".rstrip()


def plain(value: Any) -> Any:
    """JSON has no NaN: a value that is not finite becomes None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
