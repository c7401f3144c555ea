"""What a stage prints: a bar while it works, then a table of what was kept and dropped, by reason, with an example."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from data_tools.corpus.convert import ConvertRequest, convert
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.look.terminal import visible

_EXAMPLE = 60


def run_stage_with_progress(request: StageRequest) -> dict[str, Any]:
    """``run_stage`` with a bar over the bytes of the input files, on a terminal."""
    with _bar(request.verb) as tell:
        return run_stage(request, progress=tell)


def convert_with_progress(request: ConvertRequest) -> dict[str, Any]:
    """``convert`` with the same bar."""
    with _bar("convert") as tell:
        return convert(request, progress=tell)


@contextlib.contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


def render_summary(summary: Mapping[str, Any]) -> RenderableType:
    """Kept and dropped documents; {} stands for a stage that other tasks have to finish."""
    if not summary:
        return Text("this task is done; others are not: `cpt data merge FOLDER` when they are")
    table = Table(title=f"{summary['verb']}: {summary['records']:,} records, input files: {summary['inputs']:,}",
                  title_justify="left")  # fmt: skip
    table.add_column("", no_wrap=True)
    for name in ("documents", "share", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    records, size = max(summary["records"], 1), summary["bytes_kept"]
    table.add_row("kept", f"{summary['documents']:,}", f"{summary['documents'] / records:.2%}", f"{size:,}")
    examples = Table.grid(padding=(0, 2))
    for reason, entry in summary["reasons"].items():
        table.add_row(reason, f"{entry['documents']:,}", f"{entry['documents'] / records:.2%}", f"{entry['bytes']:,}")
        for example in entry["examples"][:1]:
            examples.add_row(Text(reason), _example(example))
    return Group(table, examples, Text(f"content hash {summary['content_hash'][:16]}"))


def _example(example: Mapping[str, str]) -> Text:
    excerpt = visible(" ".join(example["excerpt"].split())[:_EXAMPLE])
    return Text(f"{example['detail']} {excerpt}".strip(), overflow="ellipsis", no_wrap=True)
