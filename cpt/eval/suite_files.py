"""What becomes of a suite's results: the files of one step in ``evals/SUITE`` (``cpt.eval.results``). No torch.

Owns the joining of results with what was evaluated. The record is written last: where it lies, its tables lie too.
Refuses to mix two suites of one name in a folder.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cpt.eval.harness import SuiteOutcome
from cpt.eval.results import (
    CopyingProbe,
    SuiteRecord,
    group_scores,
    items_file,
    read_suite_record,
    record_file,
    texts_file,
    write_items,
    write_suite_record,
    write_texts,
)
from cpt.eval.suite import Suite, suite_hash
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError


@dataclass(frozen=True)
class Evaluated:
    """The model that was evaluated. ``weights_hash``: None of a model in training, whose weights lie nowhere yet;
    ``tokenizer``: its fingerprint.
    """

    step: int
    tokens_seen: int
    weights_hash: str | None
    tokenizer: str
    dtype: Literal["fp32", "bf16"]


def keep_outcome(
    folder: Path, outcome: SuiteOutcome, suite: Suite, about: Evaluated, *, copying: CopyingProbe | None = None
) -> SuiteRecord:
    """Write record, items and texts of one step into ``folder``, evals/SUITE; returns the record.

    Raises:
        OSError: the folder cannot be written.
    """
    record = SuiteRecord(
        suite=suite.name,
        suite_hash=suite_hash(suite),
        step=about.step,
        tokens_seen=about.tokens_seen,
        weights_hash=about.weights_hash,
        tokenizer=about.tokenizer,
        dtype=about.dtype,
        harness=outcome.harness,
        tasks=outcome.tasks,
        groups=group_scores(outcome.tasks),
        copying=copying,
        errors=outcome.errors,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if not texts_file(folder).is_file():
        write_texts(texts_file(folder), outcome.texts)
    write_items(items_file(folder, about.step), outcome.items)
    write_suite_record(record_file(folder, about.step), record)
    return record


def check_same_suite(folder: Path, suite: Suite, *, field: str) -> None:
    """Raises ConfigError where ``folder`` holds results of another suite; ``field`` is what names the suite."""
    wanted = suite_hash(suite)  # reads every file of items
    for path in sorted(folder.glob("step_*.json")):
        try:
            found = read_suite_record(path).suite_hash
        except DataError:  # damaged, or of another version: it is written anew, and says nothing of the suite
            continue
        if found != wanted:
            rule = f"another suite of this name, with other tasks or items, has results in {folder}"
            raise ConfigError(Problem(field, suite.name, rule, "give this one another name, or move those away"))
