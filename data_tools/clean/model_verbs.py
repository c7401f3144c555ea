"""What ``cpt data train-ngram`` and ``cpt data score`` do around the model: read, show a bar, say what came of it."""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from data_tools.clean.ngram_training import TrainOptions, train_ngram
from data_tools.clean.store_scores import ScoreRequest, score_store
from data_tools.sources import Input, ReadOptions, read_texts, resolve_inputs


def train_and_save(inputs: Sequence[str], out: Path, options: TrainOptions, read: ReadOptions) -> dict[str, Any]:
    """Train on the inputs in their order; the model's facts with its size.

    Raises:
        DataError: bad input, a reference without words.
    """
    start = time.perf_counter()
    sources = resolve_inputs(inputs)
    with _progress() as bar:
        task = bar.add_task("reading the reference, MB", total=sum(entry.size_bytes for entry in sources) // 10**6)
        model = train_ngram(_texts(sources, read, bar, task), options)
    model.save(out)
    sizes = {"vocabulary": len(model.words), "file_bytes": out.stat().st_size}
    return {"out": str(out), **model.facts, **sizes, "seconds": time.perf_counter() - start}


def _texts(sources: Sequence[Input], read: ReadOptions, bar: Progress, task: Any) -> Iterator[str]:
    done = 0
    for source in sources:
        for text in read_texts(source, read):
            yield text
            bar.update(task, completed=(done + source.done_bytes) // 10**6)
        done += source.size_bytes
    bar.update(task, description="counting and estimating")


def score_with_progress(request: ScoreRequest) -> dict[str, Any]:
    with _progress() as bar:
        task = bar.add_task("scoring documents", total=None)
        return score_store(request, progress=lambda done, total: bar.update(task, completed=done, total=total))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def render_facts(facts: Mapping[str, Any]) -> RenderableType:
    table = Table(show_header=False, title=str(facts["out"]), title_justify="left")
    for key, value in facts.items():
        if key != "out":
            table.add_row(key.replace("_", " "), _shown(value))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
