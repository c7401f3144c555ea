"""A suite on the model in training: its tasks found once, before the first step, then scored as often as asked.

Rank 0 alone has one of these; the other ranks follow its forward passes (``cpt.eval.scoring``). What it gives is what
``cpt eval`` gives of the exported checkpoint, by the same functions: the process that runs lm_eval there is only
replaced by this one. Tells which tasks generate, for those it cannot score. lm_eval is imported where it is used: only
rank 0 needs it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cpt.eval.copying import CopyTask, Shares, probe_by
from cpt.eval.harness import SuiteOutcome, harness_name, join_outcomes
from cpt.eval.model_tokenizer import tokenizer_as_exported
from cpt.eval.scored_rows import Question
from cpt.eval.scoring import Scorer
from cpt.eval.suite import Suite

CAN_SCORE = frozenset({"loglikelihood", "loglikelihood_rolling", "multiple_choice"})  # output types of lm_eval's tasks


@dataclass(frozen=True)
class LiveSuite:
    """A suite with its tasks as lm_eval's and the tokenizer that they are read with. ``scratch`` holds files made for
    the tasks, until ``close``.
    """

    suite: Suite
    found: Sequence[Any]  # harness_tasks.FoundTask
    tokenizer: Any
    scratch: tempfile.TemporaryDirectory[str]

    @property
    def generating(self) -> list[str]:
        """Names of the tasks for which the model would have to write."""
        tasks = [(name, task) for found in self.found for name, task in found.tasks.items()]
        return [name for name, task in tasks if task.OUTPUT_TYPE not in CAN_SCORE]

    def close(self) -> None:
        self.scratch.cleanup()

    def measure(self, scorer: Scorer, model_config: Any) -> SuiteOutcome:
        """Score every task; called inside ``Scorer.lead``."""
        from cpt.eval.harness_tasks import score
        from cpt.eval.live_model import LiveModel

        live = LiveModel(scorer, self.tokenizer, model_config)
        parts = []
        for (group, entry), found in zip(self.suite.tasks(), self.found, strict=True):
            live.truncated.clear()
            with _without_bars():
                outcome = score(found, live, seed=self.suite.seed, truncated=live.truncated)
            parts.append((group, entry, outcome))
        copying = None
        if self.suite.copying_probe:
            config = model_config.get_text_config()
            size = min(len(self.tokenizer), config.vocab_size)
            copying = probe_by(lambda task: _copied(task, scorer), config, size, seed=self.suite.seed)
        return join_outcomes(parts, self.suite, harness=harness_name(), scored=len(parts), copying=copying)


@contextmanager
def _without_bars() -> Iterator[None]:
    """lm_eval draws a bar for every task while it builds prompts; a run's output has lines."""
    from lm_eval.api import task

    bar, task.tqdm = task.tqdm, lambda items, **settings: items
    try:
        yield
    finally:
        task.tqdm = bar


def _copied(task: CopyTask, scorer: Scorer) -> Shares:
    """Whether the model copies each scored token of a task's rows; NaN where it gives no probability."""
    first = int(task.scored[0])
    rows = task.rows[:, : int(task.scored[-1]) + 1].tolist()
    answers = scorer.answer([Question(tuple(row[:-1]), tuple(row[first:])) for row in rows])
    right = np.array([answer.likeliest for answer in answers], dtype=np.float64)
    right[~np.isfinite([answer.log_ps for answer in answers])] = np.nan
    return right[:, task.scored - first]


def open_live_suite(suite: Suite, tokenizer: Path, model_config: Any) -> LiveSuite:
    """Find the tasks of a suite and load the tokenizer.

    Raises:
        ConfigError: tasks that lm_eval does not have, or what cannot be asked of them; a tokenizer without a token that
        can stand before a text.
        DataError: items that do not fit their task.
        RuntimeError: a task's own dataset is not here.
    """
    from cpt.eval.harness_tasks import find_tasks

    scratch = tempfile.TemporaryDirectory(prefix="cpt-suite-")
    try:
        found = find_tasks([entry for _, entry in suite.tasks()], Path(scratch.name))
        return LiveSuite(suite, found, tokenizer_as_exported(tokenizer, model_config), scratch)
    except BaseException:
        scratch.cleanup()
        raise
