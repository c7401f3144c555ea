"""Domains learned one after the other: what was learned, what is retained of it, what was forgotten since.

A sequence of runs, each begun from the one before; the first one's base counts as the first domain, with the general
sources it was trained on. Metrics of arXiv 2508.01908, all in nats per token:

    learned     mean over domains of the loss at the end of the run that learned them
    retained    mean over domains of the loss at the end of the sequence
    forgetting  mean over all domains but the last of the final loss - the best loss seen at any evaluation

Worked example, losses of two domains after the base, run A and run B:

    base text    2.0  2.4  2.3        learned (2.0 + 1.5 + 1.0) / 3 = 1.5
    A's domain   3.0  1.5  1.9        retained (2.3 + 1.9 + 1.0) / 3 = 1.733
    B's domain   3.0  2.8  1.0        forgetting ((2.3 - 2.0) + (1.9 - 1.5)) / 2 = 0.35

Refuses a sequence without a base. A domain that a later run did not hold out is named, and the means are then unknown.
No torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpt.eval.records import EvalRecord, read_evals
from cpt.eval.retention import DOMAIN, GENERAL
from cpt.rundir import DataError, RunDir


@dataclass(frozen=True)
class Stage:
    """One run of a sequence: its evaluations by step, and the sources it was the first to learn."""

    name: str
    sources: tuple[str, ...]
    evaluations: tuple[EvalRecord, ...]


@dataclass(frozen=True)
class Domain:
    """One domain, named after the run that learned it; ``learned`` is its loss at the end of that run."""

    name: str
    sources: tuple[str, ...]
    learned: float | None
    final: float | None
    best: float | None

    @property
    def forgetting(self) -> float | None:
        return None if self.final is None or self.best is None else self.final - self.best


@dataclass(frozen=True)
class DomainSequence:
    """``forgetting`` leaves the last domain out: nothing came after it. None where one of the losses is not known."""

    domains: tuple[Domain, ...]
    learned: float | None
    retained: float | None
    forgetting: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        found = asdict(self)
        for entry, domain in zip(found["domains"], self.domains, strict=True):
            entry["forgetting"] = domain.forgetting
        return found


def read_sequence(run_dirs: Sequence[Path]) -> DomainSequence:
    """From the evaluations of runs in the order in which they were trained.

    Raises:
        DataError: a run without evaluations, or a first run without one of its base.
    """
    stages: list[Stage] = []
    for run_dir in run_dirs:
        records = tuple(read_evals(RunDir(run_dir).evals))
        if not records or not (stages or records[0].step == 0):
            wanted = "evaluations" if stages else "an evaluation of its base, of step 0"
            raise DataError(f"{run_dir}: a sequence of domains needs {wanted}; run `cpt eval`")
        if not stages:
            stages.append(Stage("base", _sources(records[0], GENERAL, ()), records[:1]))
        known = [source for stage in stages for source in stage.sources]
        stages.append(Stage(run_dir.resolve().name, _sources(records[-1], DOMAIN, known), records))
    return measure_sequence(stages)


def measure_sequence(stages: Sequence[Stage]) -> DomainSequence:
    """Stages in order; one that learned no source is evaluated, but is no domain."""
    domains = tuple(_domain(stages, place) for place, stage in enumerate(stages) if stage.sources)
    notes = [
        f"{domain.name}: no loss of {', '.join(domain.sources)} at the end of "
        f"{stages[-1].name if domain.learned is not None else domain.name}; hold it out in every run of the sequence"
        for domain in domains
        if domain.learned is None or domain.final is None
    ]
    return DomainSequence(
        domains=domains,
        learned=_mean([domain.learned for domain in domains]),
        retained=_mean([domain.final for domain in domains]),
        forgetting=_mean([domain.forgetting for domain in domains[:-1]]),
        notes=tuple(notes),
    )


def _sources(record: EvalRecord, group: str, known: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(name for name, e in record.sources.items() if e.group == group and name not in known))


def _domain(stages: Sequence[Stage], place: int) -> Domain:
    own = stages[place]
    seen = [_loss(record, own.sources) for stage in stages for record in stage.evaluations]
    return Domain(
        name=own.name,
        sources=own.sources,
        learned=_loss(own.evaluations[-1], own.sources),
        final=seen[-1],
        best=min((loss for loss in seen if loss is not None), default=None),
    )


def _loss(record: EvalRecord, sources: Sequence[str]) -> float | None:
    """Over all tokens of the sources; None where one of them has no finite loss."""
    entries = [record.sources.get(name) for name in sources]
    found = [(entry.loss * entry.tokens, entry.tokens) for entry in entries if entry and entry.loss is not None]
    if len(found) < len(sources):
        return None
    return math.fsum(nats for nats, _ in found) / sum(tokens for _, tokens in found)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None
