"""What a task of a suite gave on one model, and where such results are kept, so that nothing is scored twice. No torch.

A result is a folder, read whole or not at all:

    outcome.json      metrics with standard errors of every task (one, or all those of a group of lm_eval's)
    items.parquet     one row per item: OUTCOME_ITEMS
    texts.parquet     what the items ask: the columns of ``cpt.eval.results.TEXTS``

The cache holds such folders under a hash of everything that the numbers depend on: the weights, the tokenizer, the
task with its items and settings, dtype and device, and lm_eval's version. A folder is renamed into its place, so that
several watchers may fill one cache. A damaged one is dropped and made again.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from cpt.eval.results import TEXTS
from cpt.rundir import write_atomic

FORMAT_VERSION = 1
FILES = ("outcome.json", "items.parquet", "texts.parquet")
OUTCOME_ITEMS = pa.schema(
    {
        "task": pa.string(),
        "item": pa.int32(),
        "line": pa.int32(),  # of the item in its file, from 1; -1 where items do not stand in a file's order
        "score": pa.float64(),  # NaN where it could not be computed
        "weight": pa.float64(),  # of the score in the task's mean
        "margin": pa.float64(),  # NaN where there is none
        "chosen": pa.string(),
        "truncated": pa.bool_(),
    }
)
# How the items' scores make the task's value: their weighted mean, exp of it, or in a way that only lm_eval knows.
Pooling = Literal["mean", "exp_mean", "other"]


@dataclass(frozen=True)
class Metric:
    """One metric; None where it is not finite, or its error is not known."""

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class TaskOutcome:
    """One task of lm_eval on one model; ``metric`` is the one that speaks for it, and that its items' scores are of."""

    name: str
    kind: str
    metric: str
    higher_is_better: bool
    metrics: Mapping[str, Metric]
    pooling: Pooling
    few_shot: int
    seconds: float
    errors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """All that one entry of a suite gave."""

    tasks: Sequence[TaskOutcome]
    items: pa.Table
    texts: pa.Table


_TASKS = TypeAdapter(list[TaskOutcome])


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Write a new folder; ``outcome.json`` comes last and has the digests of the tables."""
    folder.mkdir(parents=True)
    pq.write_table(outcome.items.select(OUTCOME_ITEMS.names).cast(OUTCOME_ITEMS), folder / FILES[1], compression="zstd")
    pq.write_table(outcome.texts.select(TEXTS.names).cast(TEXTS), folder / FILES[2], compression="zstd")
    content = {"format_version": FORMAT_VERSION, "tasks": [asdict(task) for task in outcome.tasks]}
    content["digests"] = {name: _digest(folder / name) for name in FILES[1:]}
    (folder / FILES[0]).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_outcome(folder: Path) -> Outcome | None:
    """None where the folder is absent, damaged or of another version."""
    try:
        content = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            return None
        if any(_digest(folder / name) != content["digests"][name] for name in FILES[1:]):
            return None
        tasks = _TASKS.validate_python(content["tasks"])
        return Outcome(tasks, pq.read_table(folder / FILES[1]), pq.read_table(folder / FILES[2]))
    except (OSError, ValueError, TypeError, KeyError, ValidationError, pa.ArrowException):
        return None


def outcome_key(settings: Mapping[str, object]) -> str:
    """32 hex digits of everything that a result depends on."""
    text = json.dumps({"format_version": FORMAT_VERSION, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def default_cache() -> Path:
    """``$CPT_CACHE/evals``, or ``~/.cache/cpt/evals``."""
    return Path(os.environ.get("CPT_CACHE") or Path.home() / ".cache" / "cpt") / "evals"


class OutcomeCache:
    """Outcomes by key in a folder that is made when the first one is put."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, key: str) -> Outcome | None:
        """None where there is none that can be used; a damaged one is removed."""
        folder = self._folder(key)
        was_there = folder.exists()  # one that another process puts there meanwhile is not damaged
        found = read_outcome(folder)
        if found is None and was_there:
            shutil.rmtree(folder, ignore_errors=True)
        return found

    def put(self, key: str, made: Path) -> None:
        """Move a folder into the cache; where another process was quicker its result stays, for it is the same.

        Raises:
            OSError: the cache cannot be written.
        """
        target = self._folder(key)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process number names no process where several hosts, or containers, share a cache.
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            shutil.move(made, beside)  # perhaps from another file system: only the rename that follows is atomic
            try:
                os.rename(Path(beside) / made.name, target)
            except OSError:
                if not target.is_dir():
                    raise

    def get_fields(self, key: str) -> dict[str, Any] | None:
        """A small result that is no table, such as of the copying probe; None where there is none."""
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put_fields(self, key: str, fields: Mapping[str, Any]) -> None:
        """Raises OSError: the cache cannot be written."""
        self._file(key).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(key), json.dumps(fields, allow_nan=False))

    def _file(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}.json"

    def _folder(self, key: str) -> Path:
        return self.root / key[:2] / key


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
