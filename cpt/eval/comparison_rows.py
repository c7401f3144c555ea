"""One model's measurements beside another's, row by row: tasks, groups of tasks, held-out sources, groups of sources.

Owns which figures are compared and what is said about those that are not. Tasks are compared on the items that both
answered, sources on the documents that both read. Items known to be in the training corpora count in the main figure,
as in lm_eval's, and are left out of ``without_overlap``. Refuses to pair what may not be the same: a task of another
metric, other examples, or other items is left out, and a note says so. No torch.

A row's word needs the corrected p of all rows of its table, which ``cpt.eval.comparing`` fills in.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cpt.eval.pairing import PairedDocuments, PairedItems, match_rows, pair_documents, pair_items
from cpt.eval.records import EvalRecord, SourceEval, aggregate
from cpt.eval.results import (
    CopyingProbe,
    SuiteResults,
    TaskResult,
    is_accuracy,
    items_file,
    pieces_file,
    read_items,
    read_pieces,
    read_texts,
    texts_file,
)
from cpt.eval.significance import (
    Difference,
    Stratum,
    Word,
    difference,
    difference_apart,
    pair_means,
    pair_ratios,
)

# Exp of a mean is compared before the exp, where a difference has an interval that means something.
EXPONENTIALS = ("perplexity", "word_perplexity", "byte_perplexity")
NAMED = 3  # names in a note, before "and N more"


@dataclass(frozen=True)
class Row:
    """One task, source or group of them. ``change.units`` are shared items, of sources shared documents;
    ``truncated`` and ``overlapping`` count among the items. A perplexity is compared, and called, as its logarithm.
    """

    name: str
    group: str
    metric: str
    higher_is_better: bool
    change: Difference
    truncated: int = 0
    overlapping: int = 0
    without_overlap: Difference | None = None
    corrected_p: float | None = None
    word: Word = "not tested"


@dataclass(frozen=True)
class Rows:
    """Rows of singles (tasks or sources) and of their groups, and sentences on what is not among them."""

    singles: tuple[Row, ...] = ()
    groups: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """Held-out losses and the folder where their pieces lie."""

    folder: Path
    record: EvalRecord


@dataclass(frozen=True)
class _Pair:
    """One task or source that can be compared; ``clean`` has no overlapping items."""

    row: Row
    stratum: Stratum
    clean: Stratum | None


def task_rows(before: SuiteResults, after: SuiteResults, *, resamples: int) -> Rows:
    """Tasks that both records have, on shared items, and unweighted means over the tasks with an accuracy.

    Raises:
        DataError: a table of items is missing or damaged.
    """
    old, new = before.record.tasks, after.record.tasks
    tables = [read_items(items_file(side.folder, side.record.step)) for side in (before, after)]
    paired = pair_items(*tables)
    alike = _alike(before, after)
    pairs: dict[str, _Pair] = {}
    left_out: dict[str, list[str]] = {}
    partly: list[str] = []
    for name in [*new, *(name for name in old if name not in new)]:
        why = _mismatch(old.get(name), new.get(name), name in alike)
        items = paired.get(name)
        if not why and items is not None and name in alike:
            items = items.only(np.isin(items.numbers, alike[name]))
        pair = _task_pair(name, new[name], items, resamples) if not why and items is not None else None
        if pair is None:
            left_out.setdefault(why or "has no item that both scored", []).append(name)
            continue
        pairs[name] = pair
        if items is not None and (items.unshared or pair.stratum.units < len(items.numbers)):
            partly.append(f"{name} ({pair.stratum.units})")
    notes = [f"{_named(names)}: not compared, {why}" for why, names in left_out.items()]
    if partly:
        notes.append(f"{_named(partly)}: compared on the items that both scored only; their number in brackets")
    accuracies = {name: pair for name, pair in pairs.items() if is_accuracy(pair.row.metric)}
    return Rows(tuple(pair.row for pair in pairs.values()), _group_rows(accuracies), tuple(notes))


def source_rows(before: Losses, after: Losses, *, resamples: int) -> Rows:
    """Held-out sources that both records have, on shared documents, and groups: the loss over all their tokens.

    Without tables of pieces the standard errors serve. Where no document is shared, or every one was tokenised in
    another way, losses per token have no difference.
    """
    files = [pieces_file(side.folder, side.record.step) for side in (before, after)]
    paired = pair_documents(*map(read_pieces, files)) if all(path.is_file() for path in files) else {}
    old, new = before.record.sources, after.record.sources
    rows: list[Row] = []
    strata: dict[str, Stratum] = {}
    notes: list[str] = []
    for name in (name for name in new if name in old):
        found = paired.get(name)
        stratum = None
        if found is not None and old[name].loss is not None and new[name].loss is not None:
            stratum = pair_ratios(found.before, found.after, found.tokens, name=name, resamples=resamples)
            if found.unshared:
                shared = f"compared on the {len(found.tokens)} documents that both read" if stratum else "not compared"
                notes.append(f"{name}: {shared}; {found.unshared} stand in one only or were tokenised in another way")
        if stratum:
            strata[name] = stratum
        change = difference([stratum]) if stratum else _unpaired(old[name], new[name], found)
        rows.append(Row(name, new[name].group, "loss", False, change))
    missing = sorted(old.keys() ^ new.keys())
    notes += [f"{_named(missing)}: not compared, held-out text of one of the two only"] if missing else []
    if rows and not paired:
        notes.append("held-out losses are not compared in pairs: there are no losses by document; run `cpt eval` again")
    groups = []
    for name in sorted({row.group for row in rows}):
        members = [row for row in rows if row.group == name]
        groups.append(Row(name, name, "loss", False, _group_change(members, (before.record, after.record), strata)))
    return Rows(tuple(rows), tuple(groups), tuple(notes))


def copying_rows(before: CopyingProbe | None, after: CopyingProbe | None) -> tuple[Row, ...]:
    """Both accuracies of the copying probe; its passages are not paired."""
    if before is None or after is None:
        return ()
    metrics = ("exact_match", "token_accuracy")
    changes = [
        difference_apart(*(getattr(side, name) for side in (before, after) for name in (metric, f"{metric}_stderr")))
        for metric in metrics
    ]
    return tuple(Row("copying", "copying", *pair) for pair in zip(metrics, (True, True), changes, strict=True))


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(names[:NAMED])
    return f"{shown} and {len(names) - NAMED} more" if len(names) > NAMED else shown


def _mismatch(before: TaskResult | None, after: TaskResult | None, alike: bool) -> str:
    """Why two results of one task must not be compared; empty where they may."""
    if before is None or after is None:
        return "measured on one of the two only"
    if before.metric != after.metric:
        return f"one is scored by {before.metric}, the other by {after.metric}"
    if before.few_shot != after.few_shot:
        return f"one has {before.few_shot} examples before an item, the other {after.few_shot}"
    if before.task_hash != after.task_hash and not alike:
        return "the two are of another definition of the task"
    return ""


def _alike(before: SuiteResults, after: SuiteResults) -> dict[str, Any]:
    """Task -> numbers of the items whose texts are equal, for tasks whose definitions differ. Two runs have texts of
    their own; steps of one run share a file, which then says nothing.
    """
    old, new = before.record.tasks, after.record.tasks
    changed = {name for name in old.keys() & new.keys() if old[name].task_hash != new[name].task_hash}
    files = [texts_file(side.folder) for side in (before, after)]
    if not changed or before.folder == after.folder or not all(path.is_file() for path in files):
        return {}
    tables = [read_texts(path) for path in files]
    matched = match_rows(*tables)
    texts = [_texts(table, rows) for table, rows in zip(tables, (matched.before, matched.after), strict=True)]
    same = np.array([one == other for one, other in zip(*texts, strict=True)], dtype=np.bool_)
    found = {}
    for task, first, last in zip(matched.tasks, matched.bounds[:-1].tolist(), matched.bounds[1:].tolist(), strict=True):
        if task in changed and same[first:last].any():
            found[task] = matched.numbers[first:last][same[first:last]]
    return found


def _texts(table: pa.Table, rows: Any) -> list[dict[str, Any]]:
    taken: list[dict[str, Any]] = table.select(["prompt", "gold", "choices"]).take(rows).to_pylist()
    return taken


def _task_pair(name: str, task: TaskResult, items: PairedItems, resamples: int) -> _Pair | None:
    stratum = _stratum(name, items, resamples)
    if stratum is None:
        return None
    overlapping = int(items.overlap.sum())
    clean: Stratum | None = stratum
    if overlapping:
        clean = _stratum(name, items.only(~items.overlap), resamples)
    row = Row(
        name,
        task.group,
        f"log_{task.metric}" if task.metric.partition(",")[0] in EXPONENTIALS else task.metric,
        task.higher_is_better,
        difference([stratum]),
        truncated=int(items.truncated.sum()),
        overlapping=overlapping,
        without_overlap=difference([clean] if clean else []) if overlapping else None,
    )
    return _Pair(row, stratum, clean)


def _stratum(name: str, items: PairedItems, resamples: int) -> Stratum | None:
    """Of texts, whose scores are per word or byte, the mean over all words or bytes, as lm_eval has it."""
    if (items.weight == 1).all():
        return pair_means(items.before, items.after, name=name, resamples=resamples)
    sums = items.before * items.weight, items.after * items.weight
    return pair_ratios(*sums, items.weight, name=name, resamples=resamples)


def _group_rows(pairs: Mapping[str, _Pair]) -> tuple[Row, ...]:
    return tuple(
        _group_row(group, [pair for pair in pairs.values() if pair.row.group == group])
        for group in sorted({pair.row.group for pair in pairs.values()})
    )


def _group_row(group: str, members: Sequence[_Pair]) -> Row:
    overlapping = _total(members, lambda row: row.overlapping)
    clean = [member.clean for member in members if member.clean is not None]
    return Row(
        group,
        group,
        "accuracy",
        True,
        difference([member.stratum for member in members]),
        truncated=_total(members, lambda row: row.truncated),
        overlapping=overlapping,
        without_overlap=difference(clean) if overlapping else None,
    )


def _total(members: Iterable[_Pair], count: Callable[[Row], int]) -> int:
    return sum(count(member.row) for member in members)


def _unpaired(before: SourceEval, after: SourceEval, documents: PairedDocuments | None) -> Difference:
    """From standard errors, where there are any: wider than in pairs, for the text is the same. If ``documents`` are
    known and not one is shared, it is not.
    """
    if documents is not None:
        return Difference(before.loss, after.loss, None)
    return difference_apart(before.loss, before.stderr, after.loss, after.stderr)


def _group_change(
    members: Sequence[Row], records: tuple[EvalRecord, EvalRecord], strata: Mapping[str, Stratum]
) -> Difference:
    """Of the sources that both sides have: another one on either side would pass for a change."""
    names = [row.name for row in members]
    if all(name in strata for name in names):
        return difference([strata[name] for name in names])
    old, new = (_loss_over(record, names) for record in records)
    if any(row.change.value is None for row in members):
        return Difference(old, new, None)
    return difference_apart(old, None, new, None)


def _loss_over(record: EvalRecord, names: Sequence[str]) -> float | None:
    return aggregate({name: replace(record.sources[name], group="") for name in names})[""].loss
