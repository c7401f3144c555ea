"""A suite's tasks as lm_eval's: found by name, built with their items, scored by any of its language models.

Owns every call into lm_eval but those that load weights. ``find_tasks`` names every fault of the suite at once, before
a model is touched; ``score`` runs one entry alone, so that its numbers do not depend on what else the suite holds
(rows are sorted by length and batched over all requests of a call, and a batch's shape moves the last digits).
Refuses tasks that run code which the model writes, and few-shot examples drawn from the items themselves.
"""

import difflib
import math
import random
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pyarrow as pa
from jinja2 import TemplateError
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from cpt.eval.cache import OUTCOME_ITEMS, Metric, Outcome, TaskOutcome
from cpt.eval.harness_items import (
    Reading,
    item_scores,
    items_table,
    measured,
    not_finite,
    primary_metric,
    texts_table,
)
from cpt.eval.results import TEXTS
from cpt.eval.suite import LocalTask, NamedTask
from cpt.eval.task_files import check_named_items, write_local_task, write_named_task
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

_TASK_LINE = re.compile(rb"""^["']?task["']?:[ \t]*["']?([\w.+-]+)["']?[ \t]*\r?$""", re.MULTILINE)
ITEM_FAULTS = (TemplateError, KeyError, IndexError, TypeError, ValueError, AttributeError)


Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # request, tokens of the context, of the continuation


class NotHereError(RuntimeError):
    """What a task needs is not on this machine."""


@dataclass(frozen=True)
class FoundTask:
    """An entry of a suite with its tasks of lm_eval by name: one, or those of a group. ``lines``: of the items in a
    named task's own file.
    """

    entry: NamedTask | LocalTask
    tasks: Mapping[str, Any]
    lines: Sequence[int] = ()

    @property
    def label(self) -> str:
        return self.entry.label


def find_tasks(entries: Sequence[NamedTask | LocalTask], scratch: Path) -> list[FoundTask]:
    """Every entry's tasks, built; files made for them lie in ``scratch``, which must outlive them.

    Raises:
        ConfigError: names that lm_eval does not have, and what cannot be asked of a task, all at once.
        DataError: items that do not fit their task.
        NotHereError: a task's own dataset, or a package that it needs, is not on this machine.
    """
    named = [entry for entry in entries if isinstance(entry, NamedTask)]
    names = _look_up({entry.task for entry in named})
    problems = [problem for entry in named for problem in _name_problems(entry, names)]
    if problems:
        raise ConfigError(*problems)
    found = [_find(entry, names, scratch) for entry in entries]
    for task in (task for one in found for task in one.tasks.values()):
        task.aggregation = partial(_aggregations, task.aggregation)
    problems = [problem for one in found for problem in _task_problems(one)]
    if problems:
        raise ConfigError(*problems)
    return found


def score(
    found: FoundTask, language_model: Any, *, seed: int, truncated: Collection[tuple[str, str]] = frozenset()
) -> Outcome:
    """Score one entry with a language model of lm_eval. ``truncated`` is read afterwards: the (context, continuation)
    of requests that the model cut, a generation with an empty continuation.
    """
    started = time.perf_counter()
    for task in found.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    random.seed(0)
    results = evaluate(
        lm=language_model,
        task_dict={"tasks": dict(found.tasks), "groups": {}},
        limit=found.entry.limit,
        bootstrap_iters=0,  # our own standard errors: 100,000 resamples take longer than many a task
        log_samples=True,
    )
    assert results is not None, "lm_eval gives no results on ranks other than the first"
    seconds = (time.perf_counter() - started) / len(found.tasks)
    parts = [_outcome(found, name, results, truncated, seconds=seconds) for name in found.tasks]
    return Outcome(
        [task for part in parts for task in part.tasks],
        pa.concat_tables([OUTCOME_ITEMS.empty_table(), *(part.items for part in parts)]),
        pa.concat_tables([TEXTS.empty_table(), *(part.texts for part in parts)]),
    )


def fitted(encoded: Encoded, room: int, truncated: set[tuple[str, str]]) -> Encoded:
    """A request with an answer that a model with ``room`` positions can score, cut from the left where it is longer
    than that; a request of which the beginning is then not read goes into ``truncated``.

    Raises:
        DataError: an answer that adds no token to its prompt; lm_eval stops with an assertion there.
    """
    request, context, continuation = encoded
    if not continuation:
        rule = f"an answer to score has no tokens of its own: (prompt, answer) = {request!r:.160}"
        raise DataError(f"{rule}; take the item out of its file, or put a delimiter between them")
    if request is not None and len(context) + len(continuation) > room + 1:  # the last token is only predicted
        truncated.add(request)
    return request, context, continuation[-room:]


# --- finding ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    """What lm_eval knows of some names: the YAML of each that is a single task, and a manager that knows the others."""

    singles: Mapping[str, Path]
    manager: Any


def _look_up(wanted: set[str]) -> _Names:
    """lm_eval's index parses its 14,000 files, for seconds; single tasks are found by one line of their file."""
    found: dict[str, list[Path]] = {}
    if wanted:
        for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml"):
            for match in _TASK_LINE.finditer(path.read_bytes()):
                if (name := match.group(1).decode()) in wanted:
                    found.setdefault(name, []).append(path)
    singles = {name: paths[0] for name, paths in found.items() if len(paths) == 1}
    manager = TaskManager(include_defaults=bool(wanted - singles.keys()))
    index = {name: manager.task_index[name].yaml_path for name in wanted & set(manager.all_subtasks)}
    return _Names({**singles, **{name: path for name, path in index.items() if path is not None}}, manager)


def _name_problems(entry: NamedTask, names: _Names) -> list[Problem]:
    single = names.singles.get(entry.task)
    if single is None and entry.task not in names.manager.all_tasks:
        near = difflib.get_close_matches(entry.task, names.manager.all_tasks, n=3)
        fix = f"did you mean {', '.join(near)}?" if near else "`lm_eval ls tasks` lists all"
        return [Problem("task", entry.task, "is not a task of lm_eval", fix)]
    if entry.data is not None and single is None:
        rule, fix = "is a group: it takes no local files", "name its tasks one by one"
        return [Problem(f"{entry.label}.data", entry.task, rule, fix)]
    if entry.data is not None and single is not None and b"\nclass:" in b"\n" + single.read_bytes():
        rule = "is written in Python: it takes no local files"
        return [Problem(f"{entry.label}.data", entry.task, rule, "leave data out")]
    if entry.name and single is None:
        return [Problem(f"{entry.label}.name", entry.name, f"{entry.task} is a group: its tasks keep their names")]
    return []


def _find(entry: NamedTask | LocalTask, names: _Names, scratch: Path) -> FoundTask:
    if isinstance(entry, LocalTask):
        spec = str(write_local_task(entry, scratch))
        return FoundTask(entry, names.manager.load([spec])["tasks"])
    single, lines = names.singles.get(entry.task), check_named_items(entry)
    spec = entry.task if single is None else str(write_named_task(entry, single, scratch))
    try:
        tasks = names.manager.load([spec])["tasks"]
    except ITEM_FAULTS as error:
        if entry.data is None:
            raise
        raise _misfit(entry, entry.data.test, lines[0], error) from None
    except (OSError, ImportError) as error:
        fix = "fetch its dataset once where there is a network, or name local files with data:"
        raise NotHereError(f"task {entry.task}: cannot be loaded ({error}); {fix}") from None
    for task in tasks.values():
        if single is None and entry.num_fewshot is not None:
            task.set_config("num_fewshot", entry.num_fewshot)
        if entry.data is not None:
            _check_items(entry, task, lines)
    return FoundTask(entry, tasks, lines)


def _check_items(entry: NamedTask, task: Any, lines: Sequence[int]) -> None:
    """Every local item that is to be scored fits the task's templates and has choices to choose from."""
    assert entry.data is not None
    number = len(task.eval_docs) if entry.limit is None else min(entry.limit, len(task.eval_docs))
    for index in range(number):
        doc = task.eval_docs[index]
        try:
            task.doc_to_text(doc)
            task.doc_to_target(doc)
            choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        except ITEM_FAULTS as error:
            raise _misfit(entry, entry.data.test, lines[index], error) from None
        if choices is not None and not (choices and all(choices)):
            raise _misfit(entry, entry.data.test, lines[index], f"its choices are {choices!r:.80}")


def _misfit(entry: NamedTask, path: Path, line: int, reason: object) -> DataError:
    told = f"no field {reason}" if isinstance(reason, KeyError) else str(reason)
    return DataError(f"{path}: line {line}: does not fit task {entry.task}: {told}; its fields must be that dataset's")


def _aggregations(own: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """A task's aggregations by metric, where a perplexity beyond the largest float is infinite, not the end."""

    def bounded(aggregate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(aggregate)
        def call(items: Any) -> Any:
            try:
                return aggregate(items)
            except OverflowError:
                return math.inf

        return call

    return {name: bounded(aggregate) for name, aggregate in own().items()}


def _task_problems(found: FoundTask) -> list[Problem]:
    """What cannot be asked of these tasks."""
    entry, problems = found.entry, []
    for name, task in found.tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            problems.append(
                Problem("task", name, "runs code that the model writes", "evaluate it in a sandbox of yours")
            )
        known = [f"{metric},{each.name}" for metric in task.aggregation() for each in task._filters]
        if entry.metric and not any(entry.metric in (key, key.partition(",")[0]) for key in known):
            told = ", ".join(map(_shown, known))
            problems.append(Problem(f"{found.label}.metric", entry.metric, f"task {name} has {told}"))
        shots = task.get_config("num_fewshot") or 0
        own = isinstance(task, ConfigurableTask) and task.fewshot_cfg.samples is not None
        if isinstance(entry, NamedTask) and entry.data and shots and not entry.data.fewshot and not own:
            rule = f"task {name} puts {shots} examples before each item, and would draw them from the items themselves"
            problems.append(Problem(f"{found.label}.data.fewshot", None, rule, "name a file, or set num_fewshot: 0"))
    return problems


# --- reading ----------------------------------------------------------------------------------------------------------


def _outcome(
    found: FoundTask, name: str, results: Mapping[str, Any], truncated: Collection[Any], *, seconds: float
) -> Outcome:
    """One task of the entry, from lm_eval's results."""
    task, entry = found.tasks[name], found.entry
    values = {key: value for key, value in results["results"][name].items() if "," in key and "_stderr," not in key}
    chosen = primary_metric(entry.metric, list(values))
    samples = [sample for sample in results["samples"][name] if sample["filter"] == chosen.partition(",")[2]]
    reading = _reading(found, name)
    lost = not_finite(samples)
    metrics = {_shown(key): _measured(task, key, value, results["samples"][name]) for key, value in values.items()}
    errors: tuple[str, ...] = ()
    if lost.any():
        metrics = {key: Metric(None, None) for key in metrics}
        errors = (f"task {reading.name}: log-likelihoods are not finite in {lost.sum()} of {len(samples)} items",)
    scores = item_scores([sample[chosen.partition(",")[0]] for sample in samples], _aggregation(task, chosen))
    scores.score[lost] = np.nan
    outcome = TaskOutcome(
        name=reading.name,
        kind=entry.kind if isinstance(entry, LocalTask) else str(task.OUTPUT_TYPE),
        metric=_shown(chosen),
        higher_is_better=bool(task.higher_is_better().get(chosen.partition(",")[0], True)),
        metrics=metrics,
        pooling=scores.pooling,
        few_shot=int(results["n-shot"].get(name, 0) or 0),
        seconds=round(seconds, 3),
        errors=errors,
    )
    table = items_table(samples, reading, scores, truncated=truncated)
    return Outcome([outcome], table, texts_table(samples, reading))


def _shown(key: str) -> str:
    """``acc,none`` -> ``acc``; other filters stay in the name."""
    return key.removesuffix(",none")


def _aggregation(task: Any, key: str) -> str:
    return str(getattr(task.aggregation().get(key.partition(",")[0]), "__name__", "mean"))


def _measured(task: Any, key: str, value: object, samples: Sequence[Mapping[str, Any]]) -> Metric:
    metric, _, wanted = key.partition(",")
    raw = [sample[metric] for sample in samples if sample["filter"] == wanted and metric in sample]
    aggregate = task.aggregation().get(metric, np.mean)
    return measured(value, raw, aggregate, name=_aggregation(task, key))


def _reading(found: FoundTask, name: str) -> Reading:
    task, entry = found.tasks[name], found.entry
    has_choices = isinstance(task, ConfigurableTask) and task.config.doc_to_choice is not None

    def choices(doc: Any) -> Sequence[str]:
        return list(task.doc_to_choice(doc)) if has_choices else []

    def gold(doc: Any, options: Sequence[str]) -> Collection[int]:
        if not options:
            return ()
        given = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        numbers = given if isinstance(given, list | tuple) else [given]
        return {index for one in numbers if (index := _index(one, options)) is not None}

    def line(sample: Mapping[str, Any]) -> int:
        if isinstance(entry, LocalTask):
            return int(sample["doc"]["line"])
        in_order = entry.data is not None and task.config.process_docs is None
        return found.lines[sample["doc_id"]] if in_order else -1

    single = len(found.tasks) == 1
    return Reading(
        name=entry.label if single else name,
        output_type=str(task.OUTPUT_TYPE),
        choices=choices,
        gold=gold,
        subset_field="subset" if isinstance(entry, LocalTask) else entry.subset_field,
        line=line,
    )


def _index(answer: object, options: Sequence[str]) -> int | None:
    if isinstance(answer, bool | int | np.integer):
        return int(answer) if 0 <= int(answer) < len(options) else None
    return options.index(answer) if isinstance(answer, str) and answer in options else None
