"""What can be known of ``eval.suite`` before any GPU is touched: its file, its tasks, what it needs to run.

Owns these rules. Refuses benchmarks that generate: a model in training scores answers that are given, and what it
would write is left to ``cpt eval watch`` on the checkpoints. Which of lm_eval's own tasks exist, and which of those
generate, is asked when the run has started and lm_eval is loaded (``cpt.run_benchmarks``).
"""

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from cpt.config import ConfigError, Problem, RunConfig
from cpt.eval.suite import LocalTask, load_suite

FIELD = "eval.suite"


def suite_problems(config: RunConfig, tokenizer: Path | None) -> list[Problem]:
    """Where the suite cannot run in training. ``tokenizer``: the one that belongs to the model, if it is known."""
    path = config.eval.suite
    if path is None:
        return []
    problems = []
    if importlib.util.find_spec("lm_eval") is None:
        problems.append(Problem(FIELD, str(path), "needs lm_eval, which is not installed", "pip install 'cpt[eval]'"))
    if tokenizer is None:
        rule = f"{FIELD} has texts to tokenize, and no tokenizer lies with the model"
        problems.append(Problem("model.tokenizer", None, rule, "name the folder of the one that made the stores"))
    try:
        suite = load_suite(path)
    except ConfigError as error:
        return [*problems, *error.problems]
    generating = [task.label for _, task in suite.tasks() if isinstance(task, LocalTask) and task.kind == "exact_match"]
    return problems + ([cannot_generate(path, generating)] if generating else [])


def cannot_generate(path: Path, tasks: Iterable[str]) -> Problem:
    """Tasks for which the model would have to write."""
    fix = "leave them to `cpt eval watch RUN_DIR --suite ...` beside the run, and give training a suite without them"
    return Problem(FIELD, str(path), f"a model in training does not generate, as {', '.join(tasks)} asks", fix)
