"""``dedup`` with one bar per pass, on a terminal."""

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from data_tools.dedup.pipeline import dedup
from data_tools.dedup.request import DedupRequest


def dedup_with_progress(request: DedupRequest) -> dict[str, Any]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        passes: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in passes:
                passes[name] = bar.add_task(name)
            bar.update(passes[name], completed=done, total=total or None)

        return dedup(request, progress=show)
