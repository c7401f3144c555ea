"""`cpt eval watch`: a watcher of ``cpt.eval.watch`` joined with what evaluates, where results go, and what is kept.

Owns which run folder is meant, one on a disk or one under a URL, and what becomes of a checkpoint: its suite, its
held-out losses where they are missing and the stores are here, wandb as the run says, the pin of the best. Refuses
``--keep-best`` for a URL: nothing prunes there.
"""

import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cpt.config import ConfigError, Problem
from cpt.eval.best import Rule, parse_rule
from cpt.eval.remote_run import RemoteRun
from cpt.eval.suite import Suite, load_suite
from cpt.eval.wandb_records import WandbRecords, wandb_mode
from cpt.eval.watch import Outcome, Work, watch
from cpt.eval.watched_run import LocalRun
from cpt.eval_checkpoints import (
    SuiteRun,
    checkpoint_hash,
    downloaded,
    evaluate_base,
    evaluate_on_suite,
    held_out_if_missing,
)
from cpt.rundir import DataError
from cpt.runfolder import read_run_config


@dataclass(frozen=True)
class Watching:
    """What was asked for; ``where`` is a run folder or its URL, ``keep_best`` a rule or empty."""

    where: str
    suite: Path
    device: str | None = None
    cache: Path | None = None
    once: bool = False
    keep_best: str = ""

    @property
    def is_url(self) -> bool:
        """Also of file://, where ``checkpoint.upload_to`` may have put copies."""
        return "://" in self.where


def watch_run(asked: Watching) -> Outcome:
    """Evaluate every complete checkpoint, and the base; ends as ``cpt.eval.watch`` says.

    Raises:
        ConfigError: the suite, the rule, or a run that this machine cannot evaluate.
        DataError: no run folder, or results in it that cannot be read.
        RuntimeError: a checkpoint that could not be evaluated in several tries.
    """
    suite = load_suite(asked.suite)
    rule = _rule(asked, suite)
    with ExitStack() as leaving:
        run: LocalRun | RemoteRun
        if asked.is_url:
            scratch = Path(leaving.enter_context(TemporaryDirectory())) / asked.where.rstrip("/").rpartition("/")[2]
            run = RemoteRun(asked.where, suite.name, scratch)
            run.look()  # brings the config
        else:
            run = LocalRun(Path(asked.where), suite.name, weights_hash=checkpoint_hash)
        mode = wandb_mode(run.rundir.config)
        offline_in_scratch = mode == "offline" and asked.is_url  # which goes away with the scratch folder
        sender = WandbRecords(run.rundir, suite.name, "disabled" if offline_in_scratch else mode)
        leaving.callback(sender.close)
        root, suite_run = run.rundir.root, SuiteRun(suite, asked.device, asked.cache)
        work = Work(
            evaluate=lambda folder: _evaluate(folder, root, suite_run, held_out=not asked.is_url),
            base=root if _has_base(root) else None,
            keep_best=rule,
            tell=sender.tell,
        )
        outcome = watch(run, work, once=asked.once)
    if outcome.problem:
        raise RuntimeError(outcome.problem)
    return outcome


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """For --json: steps evaluated by this watcher, given up, pruned meanwhile, and not complete at the end."""
    return asdict(outcome)


def _rule(asked: Watching, suite: Suite) -> Rule | None:
    if not asked.keep_best:
        return None
    if asked.is_url:
        rule = "nothing is pruned at a URL, so there is nothing to keep"
        raise ConfigError(Problem("--keep-best", asked.keep_best, rule, "watch the run folder itself with it"))
    return parse_rule(asked.keep_best, {*suite.groups, *(task.label for _, task in suite.tasks())})


def _has_base(root: Path) -> bool:
    """Whether the model that the run started from can be evaluated here; another host may be without it."""
    try:
        origin = read_run_config(root).model.init_from
        if origin is None or Path(origin).is_dir():
            return origin is not None
        downloaded(origin)
    except (ConfigError, DataError, OSError) as error:
        print(f"WARNING: the base is not evaluated here: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _evaluate(folder: Path, root: Path, suite_run: SuiteRun, *, held_out: bool) -> None:
    """A checkpoint, or for the run folder itself its base."""
    if folder == root:
        evaluate_base(root, suite_run)
        return
    evaluate_on_suite(folder, suite_run)
    if not held_out:
        return
    try:
        trouble = held_out_if_missing(folder, device=suite_run.device)
    except (OSError, RuntimeError) as error:  # the benchmarks are written: this is no failure of theirs
        trouble = f"no held-out losses of {folder.name}: {type(error).__name__}: {error}"
    if trouble:
        print(f"WARNING: {trouble}", file=sys.stderr, flush=True)
