"""What the evaluators left in the run folders beside held-out losses, read for the report: results of suites, how the
last checkpoint compares with the base, items and documents that were lost.

All statistics are those of ``cpt.eval``; here they are only asked for. Files that cannot be read, such as results of an
older version, become warnings and are left out: a report is built from what is there. Runs from random weights are not
compared with their start.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt.eval.comparing import RunComparison, compare_runs, suites_of
from cpt.eval.document_losses import document_facts, measured_steps
from cpt.eval.item_diff import SubsetDiff, diff_suites
from cpt.eval.results import AGAIN, FORMAT_VERSION, SuiteResults, read_suite_record, record_file
from cpt.eval.significance import RESAMPLES
from cpt.report import reading
from cpt.report.collect import Run
from cpt.rundir import DataError, RunDir, step_of

EXAMPLES = 40  # items shown on a page, shared by its runs
FEWEST_EXAMPLES, FEWEST_DOCUMENTS = 1, 3
DOCUMENTS = 10  # in each list of a page with one run
FEW = 100  # resamples of what the comparison already says: the change of whole sources
SEVERAL = 6  # runs: up to here every row is resampled as often as by ``cpt eval compare``, with the same result
RESAMPLES_OF_MANY = 4000  # beyond: intervals to two digits, and exact tests of accuracies all the same

Warn = Callable[[int, str], None]


@dataclass(frozen=True)
class Point:
    """One checkpoint's (accuracy, standard error) by group of tasks, and of the copying probe; NaN where unknown."""

    step: int
    tokens_seen: float
    groups: Mapping[str, tuple[float, float]]
    copying: tuple[float, float]


Points = Mapping[int, tuple[Point, ...]]


@dataclass(frozen=True)
class Outcomes:
    """By number of the run; suites in the order of how many runs have results of them.

    ``points``: suite -> run -> its checkpoints by step. ``compared``: suite ("" where no run has one) -> run ->
    comparison with its base; ``diffs`` likewise. ``documents`` are the facts of ``cpt eval documents``. ``warnings``:
    (number of the run, sentence).
    """

    suites: tuple[str, ...] = ()
    points: Mapping[str, Points] = field(default_factory=dict)
    compared: Mapping[str, Mapping[int, RunComparison]] = field(default_factory=dict)
    diffs: Mapping[str, Mapping[int, tuple[SubsetDiff, ...]]] = field(default_factory=dict)
    documents: Mapping[int, dict[str, Any]] = field(default_factory=dict)
    warnings: tuple[tuple[int, str], ...] = ()

    @property
    def headline(self) -> Mapping[int, RunComparison]:
        """The comparison that the verdict speaks of: the first suite's, whose held-out losses are every suite's."""
        return self.compared.get(self.suites[0] if self.suites else "", {})


def read_outcomes(runs: Sequence[Run]) -> Outcomes:
    found: list[tuple[int, str]] = []

    def warn(number: int, text: str) -> None:
        if (number, text) not in found:
            found.append((number, text))

    suites = _suites(runs)
    points = {suite: {n: _points(run, suite, n, warn) for n, run in enumerate(runs)} for suite in suites}
    based = [number for number, run in enumerate(runs) if run.init_from is not None and run.evaluations]
    compared = {suite: _compared(runs, based, suite, warn) for suite in (suites or [""])}
    diffs = {suite: _diffs(runs, suite, points[suite], warn) for suite in suites}
    documents = {n: facts for n in based if (facts := _documents(runs[n], n, warn, len(based)))}
    return Outcomes(tuple(suites), points, compared, diffs, documents, tuple(found))


def _suites(runs: Sequence[Run]) -> list[str]:
    named = [name for run in runs for name in suites_of(run.root)]
    return sorted(set(named), key=lambda name: (-named.count(name), name))


def _points(run: Run, suite: str, number: int, warn: Warn) -> tuple[Point, ...]:
    found = []
    for path in sorted((RunDir(run.root).evals / suite).glob("step_*.json")):
        if step_of(path) is not None:
            try:
                found.append(_point(path))
            except DataError as error:
                warn(number, f"Left out: {error}.")
    return tuple(found)


def _point(path: Path) -> Point:
    """Only the groups of a record: thousands of them make a curve. What looks odd goes the strict way.

    Raises:
        DataError: as ``read_suite_record``.
    """
    raw = reading.load_object(path) or {}
    groups = raw.get("groups")
    if raw.get("format_version") != FORMAT_VERSION or raw.get("step") != step_of(path) or not isinstance(groups, dict):
        read_suite_record(path)
        raise DataError(f"{path}: not the results of a suite; {AGAIN}")
    probe = raw.get("copying") or {}
    return Point(
        step=raw["step"],
        tokens_seen=reading.number(raw.get("tokens_seen")),
        groups={
            name: (reading.number(score.get("accuracy")), reading.number(score.get("stderr")))
            for name, score in groups.items()
            if isinstance(score, dict) and score.get("tasks")
        },
        copying=(reading.number(probe.get("exact_match")), reading.number(probe.get("exact_match_stderr"))),
    )


def _compared(runs: Sequence[Run], based: Sequence[int], suite: str, warn: Warn) -> dict[int, RunComparison]:
    """All runs at once, since their tests are corrected together; one that cannot be read is left out of it."""
    able = list(based)
    resamples = RESAMPLES if len(based) <= SEVERAL else RESAMPLES_OF_MANY
    try:
        found = _compare([runs[number] for number in able], suite, resamples) if able else ()
    except DataError:
        able = [number for number in based if not _failure(runs[number], suite, number, warn)]
        found = _compare([runs[number] for number in able], suite, resamples) if able else ()
    for number, run in zip(able, found, strict=True):
        for note in run.notes:
            warn(number, f"{note[0].upper()}{note[1:]}.")
    return dict(zip(able, found, strict=True))


def _failure(run: Run, suite: str, number: int, warn: Warn) -> bool:
    """Whether this run stops a comparison; tried with next to no resampling."""
    try:
        _compare([run], suite, 2)
    except DataError as error:
        warn(number, f"Not compared with the base: {error}.")
        return True
    return False


def _compare(runs: Sequence[Run], suite: str, resamples: int) -> tuple[RunComparison, ...]:
    """By the suite where one of the runs has results of it, else by any that they have, for their held-out losses."""
    own = _suites(runs)
    chosen = suite if suite in own else next(iter(own), None)
    return compare_runs([run.root for run in runs], suite=chosen, resamples=resamples).runs


def _diffs(runs: Sequence[Run], suite: str, points: Points, warn: Warn) -> dict[int, tuple[SubsetDiff, ...]]:
    """Base against last checkpoint, of every run that continues a base and has both."""
    able = [n for n, own in points.items() if len(own) > 1 and own[0].step == 0 and runs[n].init_from is not None]
    examples = max(FEWEST_EXAMPLES, min(5, EXAMPLES // max(1, len(able))))
    found = {}
    for number in able:
        folder = RunDir(runs[number].root).evals / suite
        try:
            ends = [read_suite_record(record_file(folder, points[number][place].step)) for place in (0, -1)]
            before, after = (SuiteResults(record, folder) for record in ends)
            found[number] = diff_suites(before, after, examples=examples)
        except DataError as error:
            warn(number, f"Items are not compared: {error}.")
    return found


def _documents(run: Run, number: int, warn: Warn, runs: int) -> dict[str, Any] | None:
    evals: Path = RunDir(run.root).evals
    steps = measured_steps(evals)
    if 0 not in steps or len(steps) < 2:
        return None
    try:
        facts = document_facts(evals, shown=max(FEWEST_DOCUMENTS, DOCUMENTS // runs), resamples=FEW)
    except DataError as error:
        warn(number, f"Documents are not compared: {error}.")
        return None
    for name, reason in facts["left_out"].items():
        warn(number, f"Documents of {name} are not compared: {reason}.")
    return facts
