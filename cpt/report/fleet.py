"""Many runs at once: a line per run that sorts, and the settings in which runs differ."""

import math
from collections.abc import Mapping
from typing import Any

from cpt.report.cells import NO_VALUE, Row, Table, duration, percent
from cpt.report.summary import Summary, scaled, signed
from cpt.report.verdict import Overview, interval_text

MOST_SETTINGS = 60
LONGEST = 48  # characters of a setting
NAMES = ("run.name", "run.dir")  # these always differ


def fleet_table(view: Overview) -> Table:
    """One line per run: what it gained, forgot and cost."""
    head = (
        *("Run", "Domain gain", "95% interval", "General forgetting", "95% interval", "Worst forgetting"),
        *("General share", "Tokens", "Wall time", "Goodput", "Tokens/s"),
    )
    rows = tuple(_fleet_row(number, item, view.reference) for number, item in enumerate(view.summaries))
    note = (
        "Nats per token against each run's own base; intervals by paired bootstrap over documents, where there are any."
    )
    return Table("Runs", head, rows, "fleet", note, noun="runs")


def _fleet_row(number: int, item: Summary, reference: str | None) -> Row:
    gain, forgetting = item.gain_change, item.forgetting_change
    worst = item.general.worst_rise if item.general and item.forgetting is not None else None
    rate, tokens = item.median("tokens_per_second"), item.tokens
    cells = (
        item.label + (" (reference)" if item.label == reference else ""),
        _nats(item.gain),
        interval_text(gain) or NO_VALUE,
        _nats(item.forgetting),
        interval_text(forgetting) or NO_VALUE,
        _nats(worst),
        percent(item.share_realised),
        scaled(tokens) if math.isfinite(tokens) else NO_VALUE,
        duration(item.run.wall_seconds),
        percent(item.run.goodput.fraction),
        scaled(rate) if math.isfinite(rate) else NO_VALUE,
    )
    numbers = (
        item.gain,
        gain.value if gain else None,
        item.forgetting,
        forgetting.value if forgetting else None,
        worst,
    )
    costs = (item.share_realised, tokens, item.run.wall_seconds, item.run.goodput.fraction, rate)
    values = (None, *numbers, *(value if math.isfinite(value) else None for value in costs))
    return Row(cells, values=values, run=number)


def _nats(value: float | None) -> str:
    return NO_VALUE if value is None else signed(value, "")


def settings_table(view: Overview) -> Table | None:
    """Settings that are not the same in all runs; None for one run, or where nothing differs."""
    flat = [dict(_flattened(item.run.config)) for item in view.summaries]
    names = list(dict.fromkeys(name for settings in flat for name in settings if name not in NAMES))
    differing = [name for name in names if len({settings.get(name, NO_VALUE) for settings in flat}) > 1]
    if len(flat) < 2 or not differing:
        return None
    rows = [Row((name, *(_cut(each.get(name, NO_VALUE)) for each in flat))) for name in differing[:MOST_SETTINGS]]
    left = len(differing) - len(rows)
    note = f"{left:,} more differ; they stand in the configs." if left else ""
    return Table("Settings that differ", ("", *(item.label for item in view.summaries)), tuple(rows), "runs", note)


def _flattened(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flattened(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", NO_VALUE if value is None else str(value)))
    return found


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
