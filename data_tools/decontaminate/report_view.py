"""The report on the terminal: what was found in each benchmark, with the words; a bar while the passes run."""

import sys
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from data_tools.corpus.stage_view import render_summary
from data_tools.decontaminate.passes import DecontaminateRequest, decontaminate
from data_tools.look.inspection import short_name
from data_tools.look.terminal import visible

_SHOWN_EXAMPLES = 2


def decontaminate_with_progress(request: DecontaminateRequest) -> dict[str, Any]:
    """``decontaminate`` with a bar over the bytes of the input files, once per pass, on a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bar:
        tasks = {what: bar.add_task(what, total=None, visible=False) for what in ("scanning", "writing")}
        return decontaminate(
            request,
            lambda what, done, total: bar.update(tasks[what], completed=done, total=total or None, visible=True),
        )


def render_outcome(outcome: dict[str, Any]) -> RenderableType:
    """A table of the sets, examples of each, then what the stage kept; less where tasks or the dry run end earlier."""
    report, summary = outcome["report"], outcome["summary"]
    if report is None:
        return Text("this task is done, others are not; the report comes with the last of them")
    parts: list[RenderableType] = [_sets_table(report), *_examples(report), *_frequent(report)]
    return Group(*parts, render_summary(summary)) if summary else Group(*parts, Text("nothing was written yet"))


def _sets_table(report: dict[str, Any]) -> Table:
    title = f"{report['documents']:,} documents, {report['overlapping_documents']:,} of them overlap"
    table = Table(title=title, title_justify="left")
    table.add_column("set")
    for name in ("items", "too short", "found", "share", "documents"):
        table.add_column(name, justify="right")
    table.add_column("in")
    for entry in report["sets"]:
        inputs = [f"{short_name(name)} {count:,}" for name, count in entry["documents_by_input"].items()]
        rest = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
        counts = [f"{entry[key]:,}" for key in ("items", "items_too_short", "contaminated_items")]
        where = Text(visible(", ".join(inputs[:3]) + rest))
        table.add_row(Text(visible(entry["name"])), *counts, f"{entry['share']:.2%}", f"{entry['documents']:,}", where)
    return table


def _examples(report: dict[str, Any]) -> list[Text]:
    lines = []
    for entry in report["sets"]:
        for example in entry["examples"][:_SHOWN_EXAMPLES]:
            before, overlap, after = (visible(" ".join(part.split())) for part in example["excerpt"])
            place = f"{example['item']} in {short_name(example['origin'])}: "
            lines.append(Text.assemble((visible(place), "dim"), f"... {before} ", (overlap, "bold"), f" {after} ..."))
    return lines


def _frequent(report: dict[str, Any]) -> list[Text]:
    """Only where one n-gram tells on many documents: then it may be boiler-plate."""
    lines = []
    for entry in report["most_frequent_ngrams"]:
        if entry["documents"] > 10:
            state = "counted" if entry["counted"] else "ignored"
            lines.append(
                Text(f"in {entry['documents']:,} documents ({state}): {visible(' '.join(entry['text'].split()))}")
            )
    return [Text("frequent n-grams; --max-documents 10 would ignore them:"), *lines] if lines else []
