"""The best checkpoint by a suite: a rule such as ``general.accuracy`` or ``arc_easy.acc``, and its pin. No torch.

A rule names a group, whose accuracy counts, or a task, whose primary metric counts; the metric may be left out. Ties go
to the newer checkpoint. Only what lies in the run folder can be kept, so the base model (step 0) is not among them.
Refuses names that the suite does not have.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cpt.checkpoint.retention import Pin, read_pins, survey, write_pin
from cpt.eval.results import SuiteRecord, read_suite_record, record_file
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

FIELD = "--keep-best"


@dataclass(frozen=True)
class Rule:
    """What decides, by its name in the results."""

    name: str
    metric: str = ""  # "": the one that speaks for the task or group

    def __str__(self) -> str:
        return f"{self.name}.{self.metric}" if self.metric else self.name

    def value(self, record: SuiteRecord) -> float | None:
        """What the record says, larger for better; None where it was not measured.

        Raises:
            ConfigError: it has no task or group of that name, or decides by another metric.
        """
        if (group := record.groups.get(self.name)) and self.metric in ("", "accuracy"):
            return group.accuracy
        task = record.tasks.get(self.name)
        if task and self.metric in ("", task.metric):
            return task.value if task.value is None or task.higher_is_better else -task.value
        known = [f"{name}.accuracy" for name in record.groups]
        known += [f"{name}.{each.metric}" for name, each in record.tasks.items()]
        raise ConfigError(_unknown(str(self), known))


def parse_rule(text: str, names: Collection[str]) -> Rule:
    """``names``: the suite's groups and tasks. A task such as mmlu stands for mmlu_anatomy and the like, too.

    Raises:
        ConfigError: the suite knows nothing of that name.
    """
    if text in names:
        return Rule(text)
    name, _, metric = text.rpartition(".")
    if name in names or any(name.startswith(f"{known}_") for known in names):
        return Rule(name, metric)
    raise ConfigError(_unknown(text, names))


def best_step(records: Iterable[SuiteRecord], rule: Rule, available: Collection[int]) -> int | None:
    """The step of the best of the ``available`` checkpoints; None where none was measured."""
    measured = [
        (value, record.step)
        for record in records
        if record.step in available and record.step > 0 and (value := rule.value(record)) is not None
    ]
    return max(measured)[1] if measured else None


def pin_best(checkpoints: Path, results: Path, rule: Rule) -> int | None:
    """Pin the best checkpoint under the suite's name; returns its step where the pin is new.

    What is pinned follows from all records that can be read, whoever wrote them. Two watchers may pin at one moment:
    each looks again afterwards, so that the last one to write has seen the records of both.
    """
    new = None
    while True:
        available = [step for step, kind in survey(checkpoints).items() if kind != "broken"]
        step = best_step(_readable(results, available), rule, available)
        pin = read_pins(checkpoints).get(results.name)
        if step is None or (pin is not None and pin.step == step):
            return new
        write_pin(checkpoints, results.name, Pin(step, f"best {rule} of the suite {results.name}"))
        new = step


def _readable(results: Path, steps: Iterable[int]) -> Iterator[SuiteRecord]:
    for step in steps:
        with suppress(DataError):  # none yet, damaged, or of another version: it says nothing, and is written anew
            yield read_suite_record(record_file(results, step))


def _unknown(text: str, known: Iterable[str]) -> Problem:
    names = sorted(known)
    near = difflib.get_close_matches(text, names, n=3, cutoff=0.5) or names[:8]
    rule = "must name a group's accuracy or a task's own metric in this suite"
    return Problem(FIELD, text, rule, f"such as {', '.join(near)}")
