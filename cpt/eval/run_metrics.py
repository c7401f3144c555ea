"""The figures of one run that a gate may ask for, by name, each with its 95% interval. No torch.

Owns the names:

    domain_gain  relative_domain_gain  general_forgetting  relative_general_forgetting  worst_general_forgetting
    SOURCE.loss  GROUP.accuracy  TASK.METRIC  copying.exact_match      what the checkpoint has
    the same and .change                                               minus what it is compared with

A relative figure is over the loss of what it is compared with, and so are its ends. Refuses nothing: what is not known
is there without a value, and says why.
"""

from collections.abc import Iterable
from pathlib import Path

from scipy.special import stdtrit

from cpt.eval.comparing import Comparison, RunComparison
from cpt.eval.comparison_rows import Row
from cpt.eval.gate import Measurement
from cpt.eval.records import EvalRecord, read_eval, read_evals
from cpt.eval.results import SuiteRecord, read_suite_record, record_file
from cpt.eval.retention import measure_retention
from cpt.eval.significance import TAIL, Difference
from cpt.rundir import DataError, RunDir

WORST = "worst_general_forgetting"
NOT_FINITE = "it was measured, and is not a finite number"
# Known by name wherever they were not measured: a gate on them is not met, rather than not understood.
USUAL = ("general.accuracy", "domain.accuracy", "copying.exact_match", "copying.token_accuracy")


def run_metrics(run_dir: Path, comparison: Comparison) -> dict[str, Measurement]:
    """Every figure of the only run that was compared; ``run_dir`` is its folder.

    Raises:
        DataError: an evaluation that was compared is damaged now.
    """
    [run] = comparison.runs
    evals = RunDir(run_dir).evals
    absent = Measurement(None, why="no results of a suite that measures it; run `cpt eval` with --suite")
    found = {name + end: absent for name in USUAL for end in ("", ".change")}
    found |= {**_verdict_figures(run), WORST: _worst(evals, comparison)}
    if run.loss_step is not None:
        found |= _losses(read_eval(RunDir(run_dir).eval_file(run.loss_step)), run)
    if comparison.suite is not None and run.suite_step is not None:
        found |= _benchmarks(read_suite_record(record_file(evals / comparison.suite, run.suite_step)), run)
    return found


def _verdict_figures(run: RunComparison) -> dict[str, Measurement]:
    why = "; ".join(run.notes) or "the run has no held-out text of that group"
    found = {}
    for name, change in (("domain_gain", run.domain_gain), ("general_forgetting", run.general_forgetting)):
        found[name] = _of_change(change, why)
        found[f"relative_{name}"] = _over(found[name], change.before if change else None)
    return found


def _over(found: Measurement, base: float | None) -> Measurement:
    if not base:
        return Measurement(None, why=found.why or NOT_FINITE)
    value, low, high = (None if each is None else each / base for each in (found.value, found.low, found.high))
    return Measurement(value, low, high, found.why)


def _of_change(change: Difference | None, why: str) -> Measurement:
    if change is None:
        return Measurement(None, why=why)
    if change.value is None:
        finite = change.before is not None and change.after is not None
        return Measurement(None, why=why if finite else f"{NOT_FINITE}; {why}")
    return Measurement(change.value, change.low, change.high)


def _worst(evals: Path, comparison: Comparison) -> Measurement:
    if comparison.baseline != "base":
        return Measurement(None, why="it is told against the run's own base: --baseline base")
    try:
        worst = measure_retention(read_evals(evals)).worst_forgetting
    except DataError as error:
        return Measurement(None, why=str(error))
    return Measurement(worst, why=NOT_FINITE if worst is None else "the largest of several figures has no interval")


def _losses(record: EvalRecord, run: RunComparison) -> dict[str, Measurement]:
    levels = {f"{name}.loss": _level(source.loss, source.stderr) for name, source in record.sources.items()}
    return levels | _changes(levels, run.sources, run)


def _benchmarks(record: SuiteRecord, run: RunComparison) -> dict[str, Measurement]:
    levels = {f"{name}.accuracy": _level(group.accuracy, group.stderr) for name, group in record.groups.items()}
    for name, task in record.tasks.items():
        levels |= {f"{name}.{metric}": _level(found.value, found.stderr) for metric, found in task.metrics.items()}
    if (probe := record.copying) is not None:
        levels["copying.exact_match"] = _level(probe.exact_match, probe.exact_match_stderr)
        levels["copying.token_accuracy"] = _level(probe.token_accuracy, probe.token_accuracy_stderr)
    return levels | _changes(levels, (*run.groups, *run.tasks, *run.copying), run)


def _level(value: float | None, stderr: float | None) -> Measurement:
    """A figure by itself, with the normal interval of its standard error."""
    if value is None or stderr is None:
        return Measurement(value, why=NOT_FINITE if value is None else "its standard error is not known")
    reach = -float(stdtrit(float("inf"), TAIL)) * stderr
    return Measurement(value, value - reach, value + reach)


def _changes(levels: Iterable[str], rows: Iterable[Row], run: RunComparison) -> dict[str, Measurement]:
    """Of every level, what became of it; only a task's primary metric is compared."""
    why = "; ".join(run.notes) or "only a task's primary metric is compared, a perplexity as log_perplexity"
    absent = {f"{name}.change": Measurement(None, why=why) for name in levels}
    return absent | {f"{row.name}.{row.metric}.change": _of_change(row.change, why) for row in rows}
