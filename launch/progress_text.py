"""``cpt launch status`` for people: a few lines, a table of hosts, the last events."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SHOWN = 3  # of an event's details
HOST = ("host", "ranks", "step", "phase", "state")
POD = ("pod", "node", "phase", "reason", "exit_code", "restarts")  # what Kubernetes says of a host


def render_progress(facts: Mapping[str, Any]) -> RenderableType:
    """``facts``: those of ``launch.progress``, and under ``launch`` what is known of the job by its kind."""
    rate, checkpoint = facts["tokens_per_second"], facts["checkpoint"]
    launch = {name: value for name, value in facts["launch"].items() if value not in ("", [], None)}
    lines = [
        f"{name:<12}{', '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in launch.items()
        if not (isinstance(value, list) and value and isinstance(value[0], dict))
    ]
    lines += [
        f"{'run folder':<12}{facts['run_dir']}",
        f"{'step':<12}{facts['step'] or 0:,} of {facts['num_steps'] or '?'}"
        + (f", {rate:,.0f} tokens/s" if rate else ""),
        f"{'checkpoint':<12}{f'step {checkpoint:,}' if checkpoint is not None else 'none yet'}",
    ]
    pods = [each for each in launch.get("hosts", ()) if isinstance(each, dict)]
    pod_rows = [["" if pod[key] is None else str(pod[key]) for key in POD] for pod in pods]
    rows = [
        [host, _ranks(told["ranks"]), f"{told['step']:,}", told["phase"], _state(told)]
        for host, told in facts["hosts"].items()
    ]
    events = [_event(event) for event in facts["events"]]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    for titles, table in ((POD, pod_rows), (HOST, rows)):
        parts += [Text(""), _table(titles, table)] if table else []
    if events:
        parts.append(Text("\n".join(["", "last events:", *events])))
    return Group(*parts)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(show_edge=False, pad_edge=False)
    for title in titles:
        table.add_column(title.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _state(told: Mapping[str, Any]) -> str:
    silent = f"SILENT: rank {_ranks(told['silent'])} shows no life" if told["silent"] else ""
    return "; ".join(filter(None, [silent or ", ".join(told["states"]), told["said"]]))


def _ranks(ranks: Sequence[int]) -> str:
    is_row = len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"{ranks[0]} to {ranks[-1]}" if is_row else ", ".join(map(str, ranks))


def _when(seconds: Any) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (TypeError, ValueError, OverflowError, OSError):  # a damaged line
        return "when?"


def _event(event: Mapping[str, Any]) -> str:
    rest = [(name, value) for name, value in event.items() if name not in ("time", "step", "event")]
    told = ", ".join(f"{name} {value}" for name, value in rest[:SHOWN])
    head = f"  {_when(event.get('time'))}  step {event.get('step', 0)}  {event.get('event')}"
    return f"{head}: {told}" if told else head
