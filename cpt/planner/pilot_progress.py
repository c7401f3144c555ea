"""Where each pilot stands, read from its run folder while it trains, as a live table or as lines for a log file."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console, ConsoleRenderable, RichCast
from rich.live import Live
from rich.table import Table

from cpt.model.size import render_count
from cpt.planner.pilots import Grid, Pilot
from cpt.report.reading import parse_object
from cpt.rundir import RunDir

TAIL_BYTES = 16_384  # more than one line of metrics.jsonl


class Progress(Protocol):
    """Someone to tell how the grid goes."""

    def update(self, states: Mapping[str, str]) -> None: ...

    def close(self) -> None: ...


def progress_for(grid: Grid, console: Console) -> Progress:
    return LiveTable(grid, console) if console.is_terminal else PlainLines(grid, console)


class PlainLines:
    """One line whenever a run's state changes: for log files and pipes."""

    def __init__(self, grid: Grid, console: Console) -> None:
        self._grid, self._console = grid, console
        self._told: dict[str, str] = {}

    def update(self, states: Mapping[str, str]) -> None:
        for name, state in states.items():
            if self._told.get(name) != state:
                losses = _losses(self._grid.pilot(name)) if state == "finished" else {}
                told = "  ".join([f"{name}: {state}", *(f"{group} {loss:.4f}" for group, loss in losses.items())])
                self._console.print(told, highlight=False, soft_wrap=True)
        self._told = dict(states)

    def close(self) -> None:
        """Nothing is open."""


class LiveTable:
    """One row per run, redrawn in place."""

    def __init__(self, grid: Grid, console: Console) -> None:
        self._grid = grid
        self._live = Live(console=console, auto_refresh=False)
        self._live.start()

    def update(self, states: Mapping[str, str]) -> None:
        self._live.update(self._table(states), refresh=True)

    def close(self) -> None:
        self._live.stop()

    def _table(self, states: Mapping[str, str]) -> ConsoleRenderable | RichCast:
        done = sum(state == "finished" for state in states.values())
        title = f"pilots {self._grid.settings.name}: {done} of {len(states)} finished"
        table = Table(title=title, title_justify="left")
        for column in ("run", "params", "share general", "tokens", "state", "step", "loss general", "loss domain"):
            words = column in ("run", "state")
            table.add_column(column, justify="left" if words else "right", no_wrap=words)
        prefix = f"{self._grid.settings.name}_"
        for pilot in self._grid.pilots:
            losses = _losses(pilot)
            measured = (f"{losses[group]:.4f}" if group in losses else "" for group in ("general", "domain"))
            cells = (render_count(pilot.params), f"{pilot.share_general:.1%}", f"{pilot.config.train.tokens:,}")
            step = f"{_step(pilot)}/{pilot.num_steps}"
            table.add_row(pilot.name.removeprefix(prefix), *cells, states[pilot.name], step, *measured)
        return table


def _step(pilot: Pilot) -> int:
    """The last step that the run logged."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        return int(json.loads(_last_line(RunDir(pilot.run_dir).metrics))["step"])
    return pilot.first_step if pilot.run_dir.exists() else 0


def _last_line(path: Path) -> bytes:
    """The last whole line: the one being written has no end yet."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().split(b"\n")[-2]


def _losses(pilot: Pilot) -> dict[str, float]:
    """Held-out loss by group at the newest evaluation, where it is a number."""
    newest = max(RunDir(pilot.run_dir).evals.glob("step_*.json"), default=None)
    record: dict[str, Any] = (parse_object(newest.read_bytes()) or {}) if newest else {}
    losses = {name: group.get("loss") for name, group in record.get("groups", {}).items()}
    return {name: loss for name, loss in losses.items() if loss is not None}
