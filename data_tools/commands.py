"""What ``cpt data`` prints around the tools: a progress bar while a store is built, and what came of it."""

import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_tools.store_builder import StoreRequest, StoreResult, build_store


def tokenize_with_progress(request: StoreRequest, *, as_json: bool) -> StoreResult:
    """Build the store with a bar on a terminal, then print the counts."""
    columns = (TextColumn("tokenizing {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(request.source, total=None)
        result = build_store(
            request, progress=lambda done, total: bar.update(task, completed=done, total=total or None)
        )
    if as_json:
        print(json.dumps(asdict(result), indent=1))
        return result
    for name, split in result.splits.items():
        print(
            f"{request.out / name}: {split.documents:,} documents, {split.tokens:,} tokens, {split.utf8_bytes:,} bytes"
        )
    state = "was already finished" if result.already_done else f"took {result.seconds:.1f} s"
    resumed = f", continued behind {result.resumed_segments} finished segments" if result.resumed_segments else ""
    print(f"encoder: {result.encoder}; {state}{resumed}")
    for warning in result.warnings:
        print(f"warning: {warning}")
    return result
