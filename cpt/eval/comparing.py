"""A run's last checkpoint against its base, or against another run: every figure with its interval and a word.

Owns which checkpoints are compared, the correction for many comparisons, and the figures that a verdict rests on: gain
and forgetting. Reads run folders, files only; no torch. Refuses runs without an evaluation, and to guess which of
several suites is meant. What is missing beside that is left out and becomes a note.

Correction: rows of one kind (tasks, groups, sources, groups of sources, copying) of all runs compared in one call are
one family of tests (Holm). Of 67 tasks on which nothing changed, three would "drop" at p < 0.05 by chance alone.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpt.eval.comparison_rows import (
    Losses,
    Row,
    Rows,
    copying_rows,
    source_rows,
    task_rows,
)
from cpt.eval.records import read_eval
from cpt.eval.results import SuiteResults, read_suite_results
from cpt.eval.retention import DOMAIN, GENERAL
from cpt.eval.significance import RESAMPLES, Difference, holm, wording
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, RunDir, step_name, step_of

BASE = "base"


@dataclass(frozen=True)
class RunComparison:
    """One run against the baseline. The steps are None where there is nothing to compare: no results of a suite, or no
    held-out losses.
    """

    run: str
    suite_step: int | None
    loss_step: int | None
    tasks: tuple[Row, ...]
    groups: tuple[Row, ...]
    sources: tuple[Row, ...]
    source_groups: tuple[Row, ...]
    copying: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def domain_gain(self) -> Difference | None:
        """``value`` = loss before - loss after on domain text, nats per token."""
        change = _change_of(self.source_groups, DOMAIN)
        return None if change is None else change.negated()

    @property
    def general_forgetting(self) -> Difference | None:
        """``value`` = loss after - loss before on general text, nats per token."""
        return _change_of(self.source_groups, GENERAL)


FAMILIES = ("tasks", "groups", "sources", "source_groups", "copying")


@dataclass(frozen=True)
class Comparison:
    """``baseline`` is "base", each run's own model before training, or the name of a run; ``suite`` None where no run
    has results of one.
    """

    baseline: str
    suite: str | None
    runs: tuple[RunComparison, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is not known is None."""
        found = asdict(self)
        for entry, run in zip(found["runs"], self.runs, strict=True):
            for name in ("domain_gain", "general_forgetting"):
                change: Difference | None = getattr(run, name)
                entry[name] = None if change is None else change.to_dict()
        return found


@dataclass(frozen=True)
class _Model:
    """What was measured on one checkpoint, and how to call it."""

    label: str
    suite: SuiteResults | None
    losses: Losses | None


def compare_runs(
    run_dirs: Sequence[Path],
    *,
    baseline: str | Path = BASE,
    suite: str | None = None,
    step: int | None = None,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Every run at ``step``, by default the last one measured, against its own base or against the run ``baseline``
    (a folder, or the name of one of ``run_dirs``) at its last step.

    Raises:
        ConfigError: no such baseline or suite, several suites and none is named, or no run beside the baseline.
        DataError: a run has no evaluation, or a file is damaged or of another version.
    """
    other = None if baseline == BASE else baseline_dir(baseline, run_dirs)
    everywhere = [*run_dirs, *([other] if other else [])]
    chosen = choose_suite(everywhere, suite)
    against = _measured(other, chosen, None) if other else None
    compared = []
    for run_dir in run_dirs:
        if other is None or run_dir.resolve() != other.resolve():
            after = _measured(run_dir, chosen, step)
            before = against or _model(run_dir, chosen, 0)
            compared.append(_compare(before, after, resamples=resamples))
    if not compared:
        raise ConfigError(Problem("--baseline", str(baseline), "is the only run given", f"give another, or {BASE}"))
    name = other.resolve().name if other else BASE
    return Comparison(name, chosen, _corrected(compared))


def suites_of(run_dir: Path) -> list[str]:
    """Suites that a run has results of."""
    folders = {path.parent.name for path in RunDir(run_dir).evals.glob("*/step_*.json") if step_of(path) is not None}
    return sorted(folders)


def _change_of(rows: Sequence[Row], name: str) -> Difference | None:
    return next((row.change for row in rows if row.name == name), None)


def baseline_dir(baseline: str | Path, run_dirs: Sequence[Path]) -> Path:
    """The run that is compared with: a folder, or the name of one of ``run_dirs``.

    Raises:
        ConfigError: neither.
    """
    named = [run_dir for run_dir in run_dirs if run_dir.resolve().name == str(baseline)]
    if named or Path(baseline).is_dir():
        return named[0] if named else Path(baseline)
    known = ", ".join([BASE, *(run_dir.resolve().name for run_dir in run_dirs)])
    raise ConfigError(Problem("--baseline", str(baseline), "is no run folder", f"give one, or one of {known}"))


def choose_suite(run_dirs: Sequence[Path], suite: str | None) -> str | None:
    known = sorted({name for run_dir in run_dirs for name in suites_of(run_dir)})
    if suite is not None and suite not in known:
        fix = f"there are results of {', '.join(known)}" if known else "run `cpt eval RUN --suite SUITE.yaml` first"
        raise ConfigError(Problem("--suite", suite, "no run has results of it", fix))
    if suite is None and len(known) > 1:
        raise ConfigError(Problem("--suite", None, "is required", f"there are results of {', '.join(known)}"))
    return suite or (known[0] if known else None)


def _measured(run_dir: Path, suite: str | None, step: int | None) -> _Model:
    """As ``_model``. Raises DataError: nothing is known."""
    found = _model(run_dir, suite, step)
    if found.losses is None and found.suite is None:
        which = "no evaluation" if step is None else f"no evaluation of step {step}"
        raise DataError(f"{RunDir(run_dir).evals}: {which}; run `cpt eval` on a checkpoint of {found.label}")
    return found


def _model(run_dir: Path, suite: str | None, step: int | None) -> _Model:
    """What is known of the run's checkpoint after ``step``, None for the last one measured."""
    evals = RunDir(run_dir).evals
    results = None if suite is None else read_suite_results(evals / suite, step)
    return _Model(run_dir.resolve().name, results, _losses(evals, step))


def _losses(evals: Path, step: int | None) -> Losses | None:
    steps = {found for path in evals.glob("step_*.json") if (found := step_of(path)) is not None}
    chosen = max(steps, default=None) if step is None else step
    return Losses(evals, read_eval(evals / f"{step_name(chosen)}.json")) if chosen in steps else None


def _compare(before: _Model, after: _Model, *, resamples: int) -> RunComparison:
    notes: list[str] = []
    tasks, losses = Rows(), Rows()
    copying: tuple[Row, ...] = ()
    if before.suite and after.suite and _place(after.suite) != _place(before.suite):
        tasks = task_rows(before.suite, after.suite, resamples=resamples)
        copying = copying_rows(before.suite.record.copying, after.suite.record.copying)
        notes += _suite_notes(before.suite, after.suite)
    elif before.suite or after.suite:
        notes.append(f"benchmarks are not compared: {_whats_missing(before.suite, after.suite)}")
    if before.losses and after.losses and _place(after.losses) != _place(before.losses):
        losses = source_rows(before.losses, after.losses, resamples=resamples)
    else:
        notes.append(f"held-out losses are not compared: {_whats_missing(before.losses, after.losses)}")
    suite_step = after.suite.record.step if after.suite else None
    loss_step = after.losses.record.step if after.losses else None
    if suite_step is not None and loss_step is not None and suite_step != loss_step:
        notes.append(f"benchmarks are of step {suite_step}, held-out losses of step {loss_step}")
    return RunComparison(
        run=after.label,
        suite_step=suite_step,
        loss_step=loss_step,
        tasks=tasks.singles,
        groups=tasks.groups,
        sources=losses.singles,
        source_groups=losses.groups,
        copying=copying,
        notes=(*notes, *tasks.notes, *losses.notes),
    )


def _place(measured: SuiteResults | Losses) -> tuple[Path, int]:
    return measured.folder.resolve(), measured.record.step


def _whats_missing(before: object, after: object) -> str:
    if before and after:
        return "only the baseline itself was measured so far"
    if before:
        return "the run has none"
    return "the baseline has none" if after else "neither has any"


def _suite_notes(before: SuiteResults, after: SuiteResults) -> list[str]:
    old, new = before.record, after.record
    notes = [f"of what is compared with: {error}" for error in old.errors] + list(new.errors)
    if old.suite_hash != new.suite_hash:
        notes.append(f"the suite {new.suite} was changed between the two: tasks with the same items are compared")
    if old.tokenizer != new.tokenizer:
        notes.append("the two have different tokenizers: losses per token are not comparable, accuracies are")
    if old.dtype != new.dtype:
        notes.append(f"one was evaluated in {old.dtype}, the other in {new.dtype}")
    if old.harness != new.harness:
        notes.append(f"one was evaluated with {old.harness}, the other with {new.harness}")
    return notes


def _corrected(runs: Sequence[RunComparison]) -> tuple[RunComparison, ...]:
    """Rows with their corrected p and word; see the top of this file for what is one family."""
    rows: dict[str, list[tuple[Row, ...]]] = {}
    for family in FAMILIES:
        corrected = iter(holm([row.change.p for run in runs for row in getattr(run, family)]))
        rows[family] = [tuple(_tested(row, next(corrected)) for row in getattr(run, family)) for run in runs]
    return tuple(
        replace(
            run,
            tasks=rows["tasks"][number],
            groups=rows["groups"][number],
            sources=rows["sources"][number],
            source_groups=rows["source_groups"][number],
            copying=rows["copying"][number],
        )
        for number, run in enumerate(runs)
    )


def _tested(row: Row, corrected_p: float | None) -> Row:
    word = wording(row.change.value, corrected_p, higher_is_better=row.higher_is_better)
    return replace(row, corrected_p=corrected_p, word=word)
