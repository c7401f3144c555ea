"""What ``cpt data`` prints around the token store's verbs: a progress bar while one is built, and what came of it."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data_tools.store_builder import (
    SplitResult,
    StoreRequest,
    StoreResult,
    build_store,
    merge_store,
    predict_store,
    verify_store,
)
from data_tools.tokenizing.parts import part_folder
from data_tools.tokenizing.prediction import Prediction, readable


def tokenize_with_progress(request: StoreRequest, *, as_json: bool) -> StoreResult:
    """Build the store with a bar on a terminal, then print the counts."""
    columns = (
        TextColumn("tokenizing {task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with Progress(
        *columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(request.source, total=None)
        result = build_store(
            request, progress=lambda done, total: bar.update(task, completed=done, total=total or None)
        )
    folder = part_folder(request.out, request.task) if request.is_part else request.out
    _print_result(result, folder, as_json=as_json)
    if request.is_part and not as_json:
        print(f"when all parts are there: cpt data merge {request.out}")
    return result


def merge_and_print(out: Path, *, as_json: bool) -> None:
    """Merge the parts of an array job, then print the counts of the whole."""
    _print_result(merge_store(out), out, as_json=as_json)


def verify_and_print(path: Path, *, as_json: bool) -> None:
    """Compare all hashes, then say what was compared."""
    splits = verify_store(path)
    if as_json:
        print(json.dumps({name: asdict(split) for name, split in splits.items()}, indent=1))
        return
    for name, split in splits.items():
        print(f"{path}: {name}: {_counts(split)}; all hashes match, content hash {split.content_hash}")


def predict_and_print(request: StoreRequest, *, as_json: bool) -> None:
    """Say what the store will be like."""
    prediction = predict_store(request)
    print(json.dumps(asdict(prediction), indent=1) if as_json else _describe(prediction))


def _print_result(result: StoreResult, folder: Path, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(result), indent=1))
        return
    for name, split in result.splits.items():
        print(f"{folder / name}: {_counts(split)}")
    state = "was already finished" if result.already_done else f"took {result.seconds:.1f} s"
    resumed = f", continued behind {result.resumed_segments} finished segments" if result.resumed_segments else ""
    print(f"encoder: {result.encoder}; {state}{resumed}")
    for reason, count in sorted(result.rejected.items()):
        print(f"rejected: {count:,} records, {reason}; they are in rejects.jsonl")
    for warning in result.warnings:
        print(f"warning: {warning}")


def _counts(split: SplitResult) -> str:
    return f"{split.documents:,} documents, {split.tokens:,} tokens, {split.utf8_bytes:,} bytes"


def _describe(prediction: Prediction) -> str:
    size = "unknown: these inputs do not tell their size"
    if prediction.store_bytes is not None:
        counts = f"{prediction.tokens:,} tokens of {prediction.documents:,} documents"
        size = f"about {counts}, {readable(prediction.store_bytes)}"
    return (
        f"inputs: {readable(prediction.input_bytes)}; {prediction.sampled_documents} documents sampled, "
        f"{prediction.bytes_per_token} bytes per token\n"
        f"store: {size}; {readable(prediction.free_bytes)} are free there\n"
        f"encoder: {prediction.encoder}"
    )
