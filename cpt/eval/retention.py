"""What a run gained on its domain and what it forgot of the general text, from its evaluations alone. Pure; no torch.

Gain is base loss - final loss of the domain group, forgetting final loss - base loss of the general group; both are
nats per token and positive in the usual case. The base is the model before training, evaluated at step
0. Refuses a sequence without it.

Worked example, general loss 2.0 (step 0), 2.6 (10), 2.3 (20): forgetting 0.3, at its worst 0.6.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from cpt.eval.records import EvalRecord
from cpt.rundir import DataError

GENERAL, DOMAIN = "general", "domain"


@dataclass(frozen=True)
class Retention:
    """Gain and forgetting of one run in nats per token; None without sources of that group, and where the base or the
    last evaluation had no finite loss. ``worst_forgetting``: how deep the run went before it recovered.
    """

    domain_gain: float | None
    general_forgetting: float | None
    worst_forgetting: float | None


def measure_retention(records: Sequence[EvalRecord]) -> Retention:
    """Gain and forgetting from a run's evaluations in any order, against the one at step 0.

    Raises:
        DataError: no records, or no base.
    """
    ordered = sorted(records, key=lambda record: record.step)
    if not ordered or ordered[0].step != 0:
        found = f"the first one is of step {ordered[0].step}" if ordered else "there are none"
        raise DataError(f"evaluations: {found}, but gain and forgetting need the base model's; evaluate at step 0")
    general, domain = ([_loss(record, group) for record in ordered] for group in (GENERAL, DOMAIN))
    return Retention(
        domain_gain=_minus(domain[0], domain[-1]),
        general_forgetting=_minus(general[-1], general[0]),
        worst_forgetting=_minus(max((loss for loss in general if loss is not None), default=None), general[0]),
    )


def _loss(record: EvalRecord, group: str) -> float | None:
    return record.groups[group].loss if group in record.groups else None


def _minus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other
