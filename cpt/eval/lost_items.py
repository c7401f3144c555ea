"""The items of a run that were right before and are wrong now, and back: facts for people and programs. No torch.

Owns which two checkpoints are compared: one of the run, by default the last that was evaluated on the suite, with its
base or with the last one of another run. Refuses a run without results of the suite at either end.
"""

from pathlib import Path
from typing import Any

from cpt.eval.comparing import BASE, baseline_dir, choose_suite
from cpt.eval.item_diff import diff_suites
from cpt.eval.results import SuiteResults, read_suite_results
from cpt.rundir import DataError, RunDir


def lost_items(
    run_dir: Path, *, baseline: str = BASE, suite: str | None = None, step: int | None = None, examples: int
) -> dict[str, Any]:
    """Per task and subset: items, right before and after, lost and gained, and so many examples of each.

    Raises:
        ConfigError: no such baseline or suite, or several suites and none is named.
        DataError: a checkpoint without results, or a damaged file.
    """
    other = None if baseline == BASE else baseline_dir(baseline, [run_dir])
    chosen = choose_suite([run_dir, *([other] if other else [])], suite)
    before = _results(other, chosen, None) if other else _results(run_dir, chosen, 0)
    after = _results(run_dir, chosen, step)
    diffs = diff_suites(before, after, examples=examples)
    return {
        "run": run_dir.resolve().name,
        "baseline": other.resolve().name if other else BASE,
        "suite": chosen,
        "step": after.record.step,
        "lost": sum(diff.lost for diff in diffs),
        "gained": sum(diff.gained for diff in diffs),
        "subsets": [diff.to_dict() for diff in diffs],
    }


def _results(run_dir: Path, suite: str | None, step: int | None) -> SuiteResults:
    folder = RunDir(run_dir).evals / (suite or "")
    found = read_suite_results(folder, step) if suite else None
    if found is None:
        of = "the base" if step == 0 else "any checkpoint" if step is None else f"step {step}"
        fix = "run `cpt eval RUN_DIR/checkpoints/step_N --suite SUITE.yaml`, which evaluates the base, too"
        raise DataError(f"{folder}: no results of {of}; {fix}")
    return found
