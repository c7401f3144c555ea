"""What a run gained on its domain and what it forgot of the general text, from its evaluations alone. Pure; no torch.

One sign convention: ``change`` = final loss - base loss, so a negative change is an improvement. Gain is the negative
change of the domain group, forgetting the change of the general group; both are nats per token and positive in the
usual case. The base is the model before training: a separate record, or the evaluation at step 0. Refuses a sequence
that has no base.

Worked example, general loss 2.0 (step 0), 2.6 (10), 2.3 (20): change 0.3, relative 0.15, worst 2.6 at step 10, best
2.0 at step 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cpt.eval.records import EvalRecord, GroupEval, SourceEval
from cpt.rundir import DataError

GENERAL, DOMAIN = "general", "domain"


@dataclass(frozen=True)
class Trajectory:
    """One source or group over a run, in nats per token; None where the evaluation had no finite loss.

    ``worst`` and ``best`` range over all evaluations, the base included. ``unmeasured_steps`` had no finite loss.
    """

    base: float | None
    final: float | None
    best: float | None
    best_step: int | None
    worst: float | None
    worst_step: int | None
    unmeasured_steps: tuple[int, ...] = ()

    @property
    def change(self) -> float | None:
        return None if self.base is None or self.final is None else self.final - self.base

    @property
    def relative_change(self) -> float | None:
        return None if self.change is None or not self.base else self.change / self.base

    @property
    def worst_change(self) -> float | None:
        return None if self.base is None or self.worst is None else self.worst - self.base

    def to_dict(self) -> dict[str, Any]:
        derived = {"change": self.change, "relative_change": self.relative_change, "worst_change": self.worst_change}
        return asdict(self) | derived


@dataclass(frozen=True)
class Retention:
    """Gain and forgetting of one run."""

    base_step: int
    final_step: int
    groups: Mapping[str, Trajectory]
    sources: Mapping[str, Trajectory]

    @property
    def domain_gain(self) -> float | None:
        """Base loss - final loss of the domain group; None without a domain source."""
        change = self.groups[DOMAIN].change if DOMAIN in self.groups else None
        return None if change is None else -change

    @property
    def general_forgetting(self) -> float | None:
        """Final loss - base loss of the general group; negative where general text improved; None without a general
        source.
        """
        return self.groups[GENERAL].change if GENERAL in self.groups else None

    @property
    def relative_forgetting(self) -> float | None:
        """``general_forgetting`` over the base loss."""
        return self.groups[GENERAL].relative_change if GENERAL in self.groups else None

    @property
    def worst_forgetting(self) -> float | None:
        """The largest general loss seen - base loss: how deep the run went before it recovered."""
        return self.groups[GENERAL].worst_change if GENERAL in self.groups else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "base_step": self.base_step,
            "final_step": self.final_step,
            "domain_gain": self.domain_gain,
            "general_forgetting": self.general_forgetting,
            "relative_forgetting": self.relative_forgetting,
            "worst_forgetting": self.worst_forgetting,
            "groups": {name: trajectory.to_dict() for name, trajectory in self.groups.items()},
            "sources": {name: trajectory.to_dict() for name, trajectory in self.sources.items()},
        }


def measure_retention(records: Sequence[EvalRecord], *, base: EvalRecord | None = None) -> Retention:
    """Gain and forgetting from a run's evaluations in any order, against ``base`` or the record at step 0.

    Raises:
        DataError: no records, or no base.
    """
    ordered = sorted(records, key=lambda record: record.step)
    if base is not None:
        ordered = [base, *(record for record in ordered if record.step > base.step)]
    if not ordered or (base is None and ordered[0].step != 0):
        found = f"the first one is of step {ordered[0].step}" if ordered else "there are none"
        raise DataError(f"evaluations: {found}, but gain and forgetting need the base model's; evaluate at step 0")
    groups = sorted({name for record in ordered for name in record.groups})
    sources = sorted({name for record in ordered for name in record.sources})
    steps = [record.step for record in ordered]
    return Retention(
        base_step=steps[0],
        final_step=steps[-1],
        groups={name: _trajectory(steps, [record.groups.get(name) for record in ordered]) for name in groups},
        sources={name: _trajectory(steps, [record.sources.get(name) for record in ordered]) for name in sources},
    )


def _trajectory(steps: Sequence[int], evals: Sequence[SourceEval | GroupEval | None]) -> Trajectory:
    losses = [None if entry is None else entry.loss for entry in evals]
    known = [(loss, step) for loss, step in zip(losses, steps, strict=True) if loss is not None]
    best, best_step = min(known, default=(None, None))
    # The first of equal worst points: when the damage was complete.
    worst, worst_step = max(known, key=lambda pair: (pair[0], -pair[1]), default=(None, None))
    return Trajectory(
        base=losses[0],
        final=losses[-1],
        best=best,
        best_step=best_step,
        worst=worst,
        worst_step=worst_step,
        unmeasured_steps=tuple(step for loss, step in zip(losses, steps, strict=True) if loss is None),
    )
