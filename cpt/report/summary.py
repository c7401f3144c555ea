"""One run in numbers, and how numbers are written; pure functions, no files, no drawing."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.report.collect import Change, FloatArray, Run, change_of
from cpt.report.reading import number

if TYPE_CHECKING:
    # The tables that these modules read need pyarrow, which the planner's words do not.
    from cpt.eval.comparing import RunComparison
    from cpt.eval.significance import Difference

STALLS = ("checkpoint", "evaluation")  # phases between steps
PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Summary:
    """One run in numbers. Losses in nats per token, shares in [0, 1], NaN or None where the files do not say.

    ``compared``: its last evaluations against its base with intervals and words, where items or documents were kept.
    """

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
    compared: "RunComparison | None" = None

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

    @property
    def gain_change(self) -> "Difference | None":
        """Domain gain with its interval, over the documents that both evaluations read."""
        return self.compared.domain_gain if self.compared else None

    @property
    def forgetting_change(self) -> "Difference | None":
        return self.compared.general_forgetting if self.compared else None

    def final_loss(self, group: str) -> float:
        """After the last step that was evaluated; the base is no end."""
        losses = [item.groups.get(group, math.nan) for item in self.run.evaluations if item.step > 0]
        return last_known(np.array(losses))

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


def summarise(run: Run, label: str, compared: "RunComparison | None" = None) -> Summary:
    groups = _groups(run)
    planned = {source: float(tokens) for source, tokens in run.plan.tokens_by_source().items()} if run.plan else {}
    realised = {
        name: last for name, column in run.metrics.tokens_by_source.items() if math.isfinite(last := last_known(column))
    }
    return Summary(
        run=run,
        label=label,
        general=change_of(run.evaluations, "general"),
        domain=change_of(run.evaluations, "domain"),
        share_planned=_share_general(planned, groups),
        share_realised=_share_general(realised, groups),
        tokens=last_known(run.metrics.tokens),
        tokens_planned=sum(planned.values()) if planned else math.nan,
        realised_by_source=realised,
        groups=groups,
        compared=compared,
    )


def _groups(run: Run) -> dict[str, str]:
    evaluated = {name: source.group for item in run.evaluations for name, source in item.sources.items()}
    return evaluated | ({source.name: str(source.group) for source in run.plan.sources} if run.plan else {})


def _share_general(tokens: dict[str, float], groups: dict[str, str]) -> float:
    total = sum(tokens.values())
    return sum(value for name, value in tokens.items() if groups.get(name) == "general") / total if total else math.nan


def last_known(column: FloatArray) -> float:
    """The last finite value, NaN without one."""
    finite = column[np.isfinite(column)]
    return float(finite[-1]) if len(finite) else math.nan


def _finite_median(column: FloatArray) -> float:
    finite = column[np.isfinite(column)]
    return float(np.median(finite)) if len(finite) else math.nan


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
