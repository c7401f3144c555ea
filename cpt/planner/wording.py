"""How the planner's numbers read, the same in tables and figures: shares as percentages, losses in nats, ``-`` for what
is not known. Owns the sentence that states a recommendation. Refuses to compute: it only reads facts dictionaries.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cpt.report.summary import scaled

NO_VALUE = "-"
NAMED_SOURCES = 3  # sources that a sentence names; all stand in the table

Facts = Mapping[str, Any]


def number(value: Any) -> float:
    """The value, NaN for None or what is no number: JSON writes NaN as null."""
    return float(value) if isinstance(value, int | float) else math.nan


def known(value: Any) -> bool:
    return math.isfinite(number(value))


def decimals(value: Any, digits: int = 4) -> str:
    """A loss or an error in nats; one too large to be read that way as 1.2e+05."""
    if not known(value):
        return NO_VALUE
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.3g}"


def percent(share: Any) -> str:
    return f"{share:.1%}" if known(share) else NO_VALUE


def amount(value: Any) -> str:
    """A count of parameters or tokens: 70.4 M, 10.5 B, 1 B."""
    return re.sub(r"\.0+(?= )|(?<=\.\d)0(?= )", "", scaled(value)) if known(value) else NO_VALUE


def ends(interval: Any) -> tuple[float, float]:
    """Both ends of an interval, NaN where there is none."""
    if not isinstance(interval, Sequence) or len(interval) != 2:
        return math.nan, math.nan
    return number(interval[0]), number(interval[1])


def has_interval(interval: Any) -> bool:
    return all(map(math.isfinite, ends(interval)))


def span(low: str, high: str) -> str:
    return NO_VALUE if NO_VALUE in (low, high) else f"{low} to {high}"


def loss_span(interval: Any, digits: int = 4) -> str:
    low, high = ends(interval)
    return span(decimals(low, digits), decimals(high, digits))


def share_span(interval: Any) -> str:
    low, high = ends(interval)
    return span(percent(low), percent(high))


def amount_span(interval: Any) -> str:
    low, high = ends(interval)
    return span(amount(low), amount(high))


def targets_of(predicted: Facts) -> list[str]:
    """What losses are predicted for: ``general, domain``, or names of sources."""
    return [key.removeprefix("loss_") for key in predicted if key.startswith("loss_")]


def interval_of(predicted: Facts, target: str) -> Any:
    return predicted.get(f"interval_{target}", predicted.get(f"{target}_interval"))


def weights_of(facts: Facts) -> Mapping[str, Any]:
    """Shares by source where there are more than two sources; empty otherwise."""
    return facts.get("weights") or {}


def law_names(law: Any) -> dict[str, str]:
    """Target -> name of its law, also where one law serves all (key ``""``)."""
    if isinstance(law, Mapping):
        return {str(target): str(name) for target, name in law.items() if name}
    return {"": str(law)} if law else {}


def by_weight(weights: Facts) -> list[str]:
    """Names of the sources, the heaviest first, those of unknown weight last."""
    return sorted(weights, key=lambda name: -number(weights[name]) if known(weights[name]) else 1.0)


def mixture(weights: Facts, most: int = NAMED_SOURCES) -> str:
    """``web 40.0%, code 30.0%, books 20.0% and 2 more``, largest first."""
    ordered = by_weight(weights)
    parts = [f"{name} {percent(weights[name])}" for name in ordered[:most]]
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(parts) + rest


def at_point(facts: Facts) -> str:
    """Where a prediction holds: its mixture, tokens and model size."""
    weights = weights_of(facts)
    general, domain = percent(facts.get("share_general")), percent(facts.get("share_domain"))
    mixed = mixture(weights) if weights else f"{general} general and {domain} domain data"
    return f"{mixed}, {amount(facts.get('tokens'))} tokens, {amount(facts.get('params'))} parameters"


def headline(facts: Facts) -> str:
    """A recommendation in one sentence."""
    losses = _losses(facts.get("predicted") or {})
    if facts.get("usage") == "flops":
        size = f"{amount(facts.get('params'))} parameters{_within(amount_span(facts.get('params_interval')))}"
        mixed = f"{percent(facts.get('share_general'))} general data"
        return f"Train a model of {size} on {amount(facts.get('tokens'))} tokens with {mixed}{losses}."
    if weights := weights_of(facts):
        return f"Train with {mixture(weights)}{losses}."
    within = _within(share_span(facts.get("interval")))
    return f"Train with {percent(facts.get('share_general'))} general data{within}{losses}."


def _within(interval: str) -> str:
    return "" if interval == NO_VALUE else f" (90%: {interval})"


def _losses(predicted: Facts) -> str:
    losses = {target: predicted[f"loss_{target}"] for target in targets_of(predicted)}
    parts = [f"{target} loss {decimals(loss, 3)}" for target, loss in losses.items() if known(loss)]
    return f": {', '.join(parts)} nats" if 0 < len(parts) <= NAMED_SOURCES else ""
