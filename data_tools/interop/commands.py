"""What ``cpt data export-megatron`` and ``import-megatron`` print: a bar while they work, then what came of it."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from data_tools.interop.megatron_export import Progress, export_megatron
from data_tools.interop.megatron_import import MegatronRequest, import_megatron


def export_with_progress(store: Path, prefix: Path) -> dict[str, Any]:
    return _with_bar(f"exporting {store}", lambda report: export_megatron(store, prefix, progress=report))


def import_with_progress(request: MegatronRequest) -> dict[str, Any]:
    return _with_bar(f"importing {request.prefix}", lambda report: import_megatron(request, progress=report))


def _with_bar(title: str, work: Callable[[Progress], dict[str, Any]]) -> dict[str, Any]:
    with Bar(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(escape(title), total=None)
        return work(lambda done, total: bar.update(task, completed=done, total=total or None))


def render_export(facts: Mapping[str, Any]) -> str:
    counts = f"{facts['documents']:,} documents, {facts['tokens']:,} tokens as {facts['dtype']}"
    return f"{facts['bin']} and .idx: {counts}; content hash {facts['content_hash'][:16]}"


def render_import(facts: Mapping[str, Any]) -> Group:
    table = Table(title=Text(facts["out"]), title_justify="left")
    for name in ("split", "documents", "tokens", "UTF-8 bytes"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in facts["splits"].items():
        table.add_row(name, *(f"{split[key]:,}" for key in ("documents", "tokens", "utf8_bytes")))
    completed = f"EOS added to {facts['eos_added']:,} documents, BOS to {facts['bos_added']:,}"
    return Group(table, Text(f"{completed}; {facts['empty_documents']:,} without tokens left out"))
