"""What a suite of benchmarks found on one checkpoint: a record, and tables of its items, texts and document pieces. No
torch.

Owns these files and their readers:

    evals/SUITE/step_00000500.json            SuiteRecord: strict JSON, what is unknown or not finite is null
    evals/SUITE/step_00000500.items.parquet   ITEMS: one row per item of a task
    evals/SUITE/texts.parquet                 TEXTS: what the items ask, the same for every step
    evals/step_00000500.documents.parquet     PIECES: held-out loss of pieces of documents

Refuses a file of another version or another shape, with its name, what is wrong with it, and what to do.
"""

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from cpt.rundir import DataError, step_name, step_of, write_atomic

FORMAT_VERSION: Literal[1] = 1
AGAIN = "delete it and run `cpt eval` again"

_WORDS = pa.dictionary(pa.int32(), pa.string())
ITEMS = pa.schema(
    {
        "task": _WORDS,
        "item": pa.int32(),  # its number in the task
        "score": pa.float32(),  # the task's metric on this item; accuracy: 0 or 1; of a perplexity its logarithm
        "weight": pa.float32(),  # of the score in the task's mean, such as the words of a text; 1 for accuracies
        "margin": pa.float32(),  # nats by which the gold answer leads the best other one; NaN where there is none
        "chosen": pa.string(),
        "truncated": pa.bool_(),  # the prompt was longer than the context
        "overlap": pa.bool_(),  # known to be in the training corpora
    }
)
TEXTS = pa.schema(
    {
        "task": _WORDS,
        "item": pa.int32(),
        "subset": pa.string(),
        "prompt": pa.string(),
        "gold": pa.string(),
        "choices": pa.list_(pa.string()),
    }
)
PIECES = pa.schema({"source": _WORDS, "document": pa.int64(), "tokens": pa.int32(), "nats": pa.float64()})

# Characters kept of a text: the end of a prompt, where its question stands, the start of anything else.
LONGEST = {"chosen": 200, "prompt": 2000, "gold": 300}

# Metrics of lm_eval that are the share of items answered right, or are read like it.
ACCURACIES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "pass@1"})


def _finite(value: object) -> object:
    """NaN and infinity are unknown; numpy's numbers become Python's."""
    if isinstance(value, int | float | np.number) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value


Number = Annotated[float | None, BeforeValidator(_finite)]
_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class Measured:
    """One metric of one task with its standard error."""

    value: Number
    stderr: Number


@dataclass(frozen=True, config=_STRICT)
class TaskResult:
    """One task. ``value`` and ``stderr`` are those of ``metric``, the one that speaks for the task; ``overlapping``
    items are known to be in the training corpora, and the values ``without_overlap`` leave them out.
    """

    group: str
    kind: str
    metric: str
    higher_is_better: bool
    value: Number
    stderr: Number
    metrics: Mapping[str, Measured]
    items: int
    truncated: int
    overlapping: int
    value_without_overlap: Number
    stderr_without_overlap: Number
    few_shot: int
    task_hash: str
    seconds: float


@dataclass(frozen=True, config=_STRICT)
class GroupScore:
    """Unweighted mean over a group's tasks with an accuracy; ``stderr`` = sqrt(sum of squares) / tasks."""

    accuracy: Number
    stderr: Number
    tasks: int
    items: int


@dataclass(frozen=True, config=_STRICT)
class CopyingProbe:
    """In-context copying: a passage stands twice in the context, and the second time is predicted (arXiv 2506.00288).

    ``exact_match``: share of passages copied without a fault; ``token_accuracy``: share of copied tokens;
    ``passages`` of ``passage_tokens`` tokens each. ``parts``: token accuracy by what was copied and how many tokens
    back it stood, such as "passage 64 back" and "pairs 64 back" (``cpt.eval.copying``).
    """

    exact_match: Number
    exact_match_stderr: Number
    token_accuracy: Number
    token_accuracy_stderr: Number
    passages: int
    passage_tokens: int
    parts: Mapping[str, Measured] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class SuiteRecord:
    """Everything a suite measured on one checkpoint; step 0 is the base model, before any training."""

    suite: str
    suite_hash: str
    step: int
    tokens_seen: int
    weights_hash: str | None  # None of a model measured while it trained, without a checkpoint
    tokenizer: str  # its fingerprint
    dtype: Literal["fp32", "bf16"]
    harness: str  # such as "lm_eval 0.4.9"
    tasks: Mapping[str, TaskResult]
    groups: Mapping[str, GroupScore]
    copying: CopyingProbe | None = None
    errors: tuple[str, ...] = ()
    format_version: Literal[1] = FORMAT_VERSION


class SuiteResults(NamedTuple):
    """A suite's record and the folder where it lies, with its items and texts."""

    record: SuiteRecord
    folder: Path


_RECORD = TypeAdapter(SuiteRecord)


def is_accuracy(metric: str) -> bool:
    """Whether a metric is a share of right answers; ``exact_match,strict-match`` names a filter after the comma."""
    return metric.partition(",")[0] in ACCURACIES


def group_scores(tasks: Mapping[str, TaskResult]) -> dict[str, GroupScore]:
    """Groups from tasks. A group has no accuracy where none of its tasks has one, or one of them was not measured."""
    names = sorted({task.group for task in tasks.values()})
    return {name: _group_score([task for task in tasks.values() if task.group == name]) for name in names}


def _group_score(members: Iterable[TaskResult]) -> GroupScore:
    counted = [task for task in members if is_accuracy(task.metric)]
    number, items = len(counted), sum(task.items for task in counted)
    values = [task.value for task in counted if task.value is not None]
    errors = [task.stderr for task in counted if task.stderr is not None]
    return GroupScore(
        accuracy=math.fsum(values) / number if number and len(values) == number else None,
        stderr=math.hypot(*errors) / number if number and len(errors) == number else None,
        tasks=number,
        items=items,
    )


def record_file(folder: Path, step: int) -> Path:
    return folder / f"{step_name(step)}.json"


def items_file(folder: Path, step: int) -> Path:
    return folder / f"{step_name(step)}.items.parquet"


def texts_file(folder: Path) -> Path:
    return folder / "texts.parquet"


def pieces_file(evals: Path, step: int) -> Path:
    return evals / f"{step_name(step)}.documents.parquet"


def write_suite_record(path: Path, record: SuiteRecord) -> None:
    """Write one record atomically, creating the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, _RECORD.dump_json(record, indent=1) + b"\n")


def read_suite_record(path: Path) -> SuiteRecord:
    """Raises DataError: the file is missing, damaged, of another version or of another step than its name says."""
    try:
        record = _RECORD.validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); run `cpt eval` to write it") from None
    except ValidationError as error:
        raise DataError(f"{path}: {_fault(error)}; {AGAIN}") from None
    if step_of(path) not in (None, record.step):
        raise DataError(f"{path}: holds the results of step {record.step}; {AGAIN}")
    return record


def _fault(error: ValidationError) -> str:
    """The first thing that is wrong: another version before anything that follows from it."""
    found = error.errors(include_url=False)
    for fault in found:
        if fault["loc"] == ("format_version",):
            return f"results of format version {fault['input']!r:.40}, this cpt reads version {FORMAT_VERSION}"
    field = ".".join(map(str, found[0]["loc"]))
    return f"not the results of a suite ({field + ': ' if field else ''}{found[0]['msg']:.200})"


def read_suite_results(folder: Path, step: int | None = None) -> SuiteResults | None:
    """What a suite found after ``step``, by default on the last checkpoint measured; None where it measured none.

    Raises:
        DataError: the record is damaged or of another version.
    """
    steps = {found for path in folder.glob("step_*.json") if (found := step_of(path)) is not None}
    chosen = max(steps, default=None) if step is None else step
    return SuiteResults(read_suite_record(record_file(folder, chosen)), folder) if chosen in steps else None


def write_items(path: Path, table: pa.Table) -> None:
    """Write a table with the columns of ITEMS, in any order; long answers are cut."""
    _write(path, table, ITEMS)


def read_items(path: Path) -> pa.Table:
    """Raises DataError: missing, damaged, or other columns than ITEMS."""
    return _read(path, ITEMS)


def write_texts(path: Path, table: pa.Table) -> None:
    """Write a table with the columns of TEXTS, in any order; long texts are cut."""
    _write(path, table, TEXTS)


def read_texts(path: Path) -> pa.Table:
    """Raises DataError: missing, damaged, or other columns than TEXTS."""
    return _read(path, TEXTS)


def write_pieces(path: Path, table: pa.Table) -> None:
    """Write a table with the columns of PIECES: one row per evaluated piece of a document, in a fixed order."""
    _write(path, table, PIECES)


def read_pieces(path: Path) -> pa.Table:
    """Raises DataError: missing, damaged, or other columns than PIECES."""
    return _read(path, PIECES)


def _write(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    typed = table.select(schema.names).cast(schema)
    columns = [_cut(name, typed.column(name)) for name in schema.names]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer, compression="zstd")
    write_atomic(path, buffer.getvalue())


def _cut(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if name not in LONGEST:
        return column
    ends = (-LONGEST[name], None) if name == "prompt" else (0, LONGEST[name])
    return pc.utf8_slice_codeunits(column, *ends)


def _read(path: Path, schema: pa.Schema) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            return file.read(columns=schema.names).select(schema.names).cast(schema)
    except (OSError, pa.ArrowException, KeyError) as error:
        raise DataError(f"{path}: not a table of {', '.join(schema.names)} ({error!s:.200}); {AGAIN}") from None
