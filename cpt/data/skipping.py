"""Rows that a run leaves out since they broke a step: the list of them, and a loader that serves blanks in their place.

Owns ``skipped_rows.json``. A row is known by its step, its source and its number among the source's rows, so the list
holds for any number of processes, and of a plan whose mixture was changed before that step nothing is skipped by
mistake. The order of all other data stays as it is. A blank has the row's documents, but token 0 throughout and no
label: nothing of it counts in a loss, and nothing that was wrong with its tokens reaches the model.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from cpt.data.batch import Batch
from cpt.data.loader import Loader
from cpt.data.packing import IGNORE_INDEX
from cpt.data.sampler import locate, rows_of_step, tokens_seen
from cpt.plan import Plan
from cpt.rundir import DataError, write_atomic

FORMAT_VERSION = 1


@dataclass(frozen=True)
class SkippedRow:
    """One row of one step. ``document``: the first one in it, counted in the store's train split. ``loss``: its mean
    in nats per token when it was met; None where it was not finite, or the row has no label.
    """

    step: int  # counted from 1, as in metrics.jsonl
    source: str
    row: int
    document: int | None
    loss: float | None
    reason: str


def write_skipped(path: Path, rows: Iterable[SkippedRow]) -> None:
    content = {"format_version": FORMAT_VERSION, "rows": [asdict(row) for row in rows]}
    write_atomic(path, json.dumps(content, indent=1) + "\n")


def read_skipped(path: Path) -> tuple[SkippedRow, ...]:
    """The rows that a run leaves out; none where it has no such file.

    Raises:
        DataError: the file is not one of ours; going on without it would train on the rows that broke the run.
    """
    if not path.exists():
        return ()
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {raw['format_version']!r}, this version of cpt reads {FORMAT_VERSION}")
        names = [field.name for field in fields(SkippedRow)]
        return tuple(SkippedRow(**{name: row[name] for name in names}) for row in raw["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        fix = "restore it from a copy; without it a resumed run would meet the rows again that it was to leave out"
        raise DataError(f"{path}: not a list of skipped rows ({error}); {fix}") from None


class SkippedRows:
    """The rows that a run leaves out, for look-up."""

    def __init__(self, rows: Iterable[SkippedRow] = ()) -> None:
        self.rows: tuple[SkippedRow, ...] = ()
        self._keys: dict[int, set[tuple[str, int]]] = defaultdict(set)
        self.add(rows)

    def add(self, rows: Iterable[SkippedRow]) -> list[SkippedRow]:
        """Returns those that were not on the list."""
        new = []
        for row in rows:
            if (row.source, row.row) not in self._keys[row.step]:
                self._keys[row.step].add((row.source, row.row))
                new.append(row)
        self.rows = (*self.rows, *new)
        return new

    def at(self, step: int) -> set[tuple[str, int]]:
        """(source, row) of those that step ``step`` (from 1) leaves out."""
        return self._keys.get(step, set())

    def tokens_seen(self, plan: Plan, step: int) -> dict[str, int]:
        """Tokens of each source that the first ``step`` steps trained on."""
        seen = tokens_seen(plan, step)
        for row in self.rows:
            if row.step <= step and row.source in seen:
                seen[row.source] -= plan.seq_len_of(plan.stage_of_step(row.step - 1))
        return seen


class SkippingLoader:
    """A loader whose skipped rows are blank. ``skipped`` may grow at any time."""

    def __init__(self, loader: Loader, plan: Plan, skipped: SkippedRows) -> None:
        self._loader = loader
        self._plan = plan
        self._skipped = skipped

    def step(self, step: int) -> list[Batch]:
        """As ``Loader.step``."""
        batches = self._loader.step(step)
        unwanted = self._skipped.at(step + 1)
        if not unwanted:
            return batches
        where = [identities(self._plan, rows) for rows in self._loader.global_rows(step)]
        return [
            blanked(batch, [place for place, row in enumerate(rows) if row in unwanted])
            for batch, rows in zip(batches, where, strict=True)
        ]

    def global_rows(self, step: int) -> list[list[int]]:
        """As ``Loader.global_rows``."""
        return self._loader.global_rows(step)


def identities(plan: Plan, rows: Sequence[int]) -> list[tuple[str, int]]:
    """(source, row in the source) of each global row."""
    where = locate(plan, np.asarray(rows, dtype=np.int64))
    return [
        (plan.sources[source].name, row)
        for source, row in zip(where.source_index.tolist(), where.row_in_source.tolist(), strict=True)
    ]


def identities_of_step(plan: Plan, step: int) -> list[tuple[str, int]]:
    """The same for all rows of one step (from 0), in order."""
    return identities(plan, rows_of_step(plan, step).tolist())


def blanked(batch: Batch, places: Sequence[int]) -> Batch:
    """The batch with the rows at ``places`` replaced by blanks."""
    if not places:
        return batch
    ids, labels = batch.input_ids_BT.clone(), batch.labels_BT.clone()
    ids[places], labels[places] = 0, IGNORE_INDEX
    return replace(batch, input_ids_BT=ids, labels_BT=labels)
