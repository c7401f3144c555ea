"""A suite on one model: what is known already comes from the cache, the rest from lm_eval in a process of its own.

Owns the look-up, the process and what becomes of its results. No torch and no lm_eval here, so a suite whose results
are all known is answered in the time it takes to read them. Refuses a suite whose groups of tasks overlap, and a
machine without lm_eval, by name.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from cpt.eval.cache import OUTCOME_ITEMS, Outcome, OutcomeCache, TaskOutcome, outcome_key, read_outcome
from cpt.eval.harness_items import ItemScores, pooled
from cpt.eval.overlap_list import lines_known, read_overlaps
from cpt.eval.results import TEXTS, CopyingProbe, Measured, TaskResult
from cpt.eval.suite import LocalTask, NamedTask, Suite, task_hash
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, write_atomic

NEEDED = ("lm_eval", "accelerate")
# A watcher may have been started by a job of several ranks, which this process is none of.
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOG_TAIL = 2000
Entry = NamedTask | LocalTask


@dataclass(frozen=True)
class ModelOnDisk:
    """A model by what identifies it. ``place`` is called only where something is still to be scored: it is given a
    scratch folder and returns the Hugging Face folder, perhaps made there. ``tokenizer``: its fingerprint;
    ``tokenizer_settings``: a hash of what else decides how it reads a text.
    """

    weights_hash: str
    tokenizer: str
    dtype: Literal["fp32", "bf16"]
    place: Callable[[Path], Path]
    tokenizer_settings: str = ""


@dataclass(frozen=True)
class SuiteOutcome:
    """Results of every task, with tables of its items (columns of ``results.ITEMS``) and texts (``results.TEXTS``).
    ``scored`` entries were computed now, the others were known.
    """

    tasks: Mapping[str, TaskResult]
    items: pa.Table
    texts: pa.Table
    errors: tuple[str, ...]
    harness: str
    scored: int
    copying: CopyingProbe | None = None


def run_suite(
    model: ModelOnDisk,
    suite: Suite,
    *,
    device: str,
    cache: Path,
    on_entry: Callable[[str], None] = lambda label: None,
) -> SuiteOutcome:
    """Every task of the suite on the model. ``device``: cpu, cuda or cuda:N; ``on_entry`` is told each entry that has
    its results, those from the cache first.

    Raises:
        ConfigError: the suite asks for what lm_eval does not have, or cannot do.
        DataError: items, or the model's files, cannot be used.
        RuntimeError: lm_eval or a data set is not here, or the process failed; what was scored before stays known.
    """
    work = _Work(model, suite, device, OutcomeCache(cache), harness_name(), on_entry)
    outcomes = {number: found for number, key in enumerate(work.keys) if (found := work.store.get(key)) is not None}
    for number in outcomes:
        on_entry(work.entries[number].label)
    copying = _probe_of(work.store.get_fields(work.copying_key)) if suite.copying_probe else None
    missing = [number for number in range(len(work.entries)) if number not in outcomes]
    if missing or (suite.copying_probe and copying is None):
        made, copied = _score(work, missing, copying=suite.copying_probe and copying is None)
        outcomes, copying = {**outcomes, **made}, _probe_of(copied) or copying
    return join_outcomes(
        [(*entry, outcomes[number]) for number, entry in enumerate(suite.tasks())],
        suite,
        harness=work.harness,
        scored=len(missing),
        copying=copying,
    )


def _probe_of(fields: Mapping[str, Any] | None) -> CopyingProbe | None:
    """None where there are none, or they are of another version."""
    try:
        return TypeAdapter(CopyingProbe).validate_json(json.dumps(fields)) if fields else None
    except ValidationError:
        return None


@dataclass(frozen=True)
class _Work:
    """A suite on a model, with the keys by which its results are known."""

    model: ModelOnDisk
    suite: Suite
    device: str
    store: OutcomeCache
    harness: str
    on_entry: Callable[[str], None]

    @cached_property
    def entries(self) -> list[Entry]:
        return [entry for _, entry in self.suite.tasks()]

    @cached_property
    def keys(self) -> list[str]:
        return [self._key({"task": task_hash(entry, self.suite)}) for entry in self.entries]

    @cached_property
    def copying_key(self) -> str:
        return self._key({"copying": self.suite.seed})

    def _key(self, what: Mapping[str, object]) -> str:
        model = {"weights": self.model.weights_hash, "dtype": self.model.dtype}
        model |= {"tokenizer": self.model.tokenizer, "tokenizer_settings": self.model.tokenizer_settings}
        return outcome_key({**model, "device": self.device.partition(":")[0], "harness": self.harness, **what})


def harness_name() -> str:
    """Such as "lm_eval 0.4.9"; no import of it."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise RuntimeError(f"benchmarks need {' and '.join(absent)}, not installed here: pip install 'cpt[eval]'")
    return f"lm_eval {importlib.metadata.version('lm_eval')}"


# --- the process ------------------------------------------------------------------------------------------------------


def _score(work: _Work, missing: Sequence[int], *, copying: bool) -> tuple[dict[int, Outcome], dict[str, Any] | None]:
    """Score entries, by their numbers, in a process of their own, and perhaps copying; each goes into the cache as soon
    as it is done.
    """
    scratch = Path(tempfile.mkdtemp(prefix="cpt-eval-"))
    entries = [work.entries[number] for number in missing]
    made: dict[int, Outcome] = {}
    copied = None
    try:
        request = {
            "model": str(work.model.place(scratch)),
            "dtype": work.model.dtype,
            "device": work.device,
            "batch_size": work.suite.batch_size,
            "seed": work.suite.seed,
            "entries": [entry.model_dump(mode="json") for entry in entries],
            "copying": copying,
            "scratch": str(scratch),
        }
        write_atomic(scratch / "request.json", json.dumps(request))
        with (scratch / "log").open("wb") as log, _process(scratch, entries, log=log) as process:
            assert process.stdout is not None
            for event in map(json.loads, process.stdout):
                if "copying" in event:
                    copied = event["copying"]
                    work.store.put_fields(work.copying_key, copied)
                else:
                    number = missing[event["done"]]
                    made[number] = _kept(work, number, scratch / "outcomes" / str(event["done"]))
        left = [entry.label for number, entry in zip(missing, entries, strict=True) if number not in made]
        if process.returncode or left:
            _explain(scratch, process.returncode, left)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made, copied


def _kept(work: _Work, number: int, folder: Path) -> Outcome:
    """What the process wrote for an entry, which goes into the cache."""
    found = read_outcome(folder)
    assert found is not None, f"{folder}: just written, and not readable"
    work.store.put(work.keys[number], folder)
    work.on_entry(work.entries[number].label)
    return found


@contextlib.contextmanager
def _process(scratch: Path, entries: Sequence[Entry], *, log: Any) -> Iterator[subprocess.Popen[str]]:
    """The process, ended with the block; it ends itself when ours does, for then its standard input closes."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if all(isinstance(entry, LocalTask) or entry.data is not None for entry in entries):
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # nothing is wanted from outside
    process = subprocess.Popen(
        [sys.executable, "-m", "cpt.eval.harness_process", str(scratch / "request.json")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield process
        process.wait()
    finally:
        process.kill()
        process.communicate()


def _explain(scratch: Path, code: int, left: Sequence[str]) -> None:
    """Raise what went wrong in the process; ``left``: entries without results."""
    fault = scratch / "fault.json"
    if fault.is_file():
        told = json.loads(fault.read_text(encoding="utf-8"))
        if "data" in told:
            raise DataError(told["data"])
        if "environment" in told:
            raise RuntimeError(told["environment"])
        raise ConfigError(*(Problem(field, value, rule, fix) for field, value, rule, fix in told["problems"]))
    tail = (scratch / "log").read_text(encoding="utf-8", errors="replace")[-LOG_TAIL:].strip()
    at = f" at task {left[0]}" if left else ""
    raise RuntimeError(f"the process that runs lm_eval ended with {code}{at}; the end of what it said:\n{tail}")


# --- results ----------------------------------------------------------------------------------------------------------


def join_outcomes(
    parts: Sequence[tuple[str, Entry, Outcome]],
    suite: Suite,
    *,
    harness: str,
    scored: int,
    copying: CopyingProbe | None = None,
) -> SuiteOutcome:
    """One outcome from those of all entries, each with its group, with the items that are known to overlap marked.

    Raises:
        ConfigError: a task is measured twice, under its name and as a part of a group.
        DataError: the suite's list of overlaps cannot be used.
    """
    overlaps = read_overlaps(suite.overlaps) if suite.overlaps else {}
    results: dict[str, TaskResult] = {}
    errors: list[str] = []
    tables = []
    for group, entry, outcome in parts:
        known, hashed = _known_lines(entry, overlaps), task_hash(entry, suite)
        marks = np.isin(outcome.items["line"].to_numpy(), sorted(known))
        tables.append(outcome.items.append_column("overlap", pa.array(marks)))
        if known and not pc.any(pc.greater(outcome.items["line"], 0)).as_py():
            errors.append(f"task {entry.label}: known overlaps are not marked, for lm_eval reorders its items")
        for task in outcome.tasks:
            if task.name in results:
                rule = "is measured twice, also as a part of another entry"
                raise ConfigError(Problem(f"groups.{group}", task.name, rule, "leave one of them out"))
            results[task.name] = _result(task, group, tables[-1], hashed)
            errors += task.errors
    empty = OUTCOME_ITEMS.append(pa.field("overlap", pa.bool_())).empty_table()
    return SuiteOutcome(
        tasks=results,
        items=pa.concat_tables([empty, *tables]),
        texts=pa.concat_tables([TEXTS.empty_table(), *(outcome.texts for _, _, outcome in parts)]),
        errors=tuple(errors),
        harness=harness,
        scored=scored,
        copying=copying,
    )


def _known_lines(entry: Entry, overlaps: Mapping[tuple[str, str], frozenset[int]]) -> frozenset[int]:
    path = entry.paths().get("file") or entry.paths().get("data.test")
    names = {entry.label, entry.task} if isinstance(entry, NamedTask) else {entry.label}
    return lines_known(overlaps, path, names) if path is not None else frozenset()


def _result(task: TaskOutcome, group: str, table: pa.Table, hashed: str) -> TaskResult:
    own = pc.equal(table["task"], task.name).to_numpy()
    overlap = table["overlap"].to_numpy(zero_copy_only=False)[own]
    scores = ItemScores(table["score"].to_numpy()[own], table["weight"].to_numpy()[own], task.pooling)
    speaks = task.metrics[task.metric]
    apart = pooled(scores, ~overlap) if overlap.any() else speaks
    return TaskResult(
        group=group,
        kind=task.kind,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        value=speaks.value,
        stderr=speaks.stderr,
        metrics={name: Measured(found.value, found.stderr) for name, found in task.metrics.items()},
        items=int(own.sum()),
        truncated=int(table["truncated"].to_numpy(zero_copy_only=False)[own].sum()),
        overlapping=int(overlap.sum()),
        value_without_overlap=apart.value,
        stderr_without_overlap=apart.stderr,
        few_shot=task.few_shot,
        task_hash=hashed,
        seconds=task.seconds,
    )
