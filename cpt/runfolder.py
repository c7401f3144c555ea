"""Who may use a run folder: a new run claims it, a resumed one must find its own config and data in it, two at a time
never.
"""

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import yaml

from cpt.config import ConfigError, Problem, RunConfig, apply_override, to_yaml, validate
from cpt.plan import Plan, read_plan, write_plan
from cpt.prepare import Prepared
from cpt.recommendation import write_recommendation
from cpt.rundir import DataError, RunDir, write_atomic

# What may differ when a run goes on: where and how it computes and what it tells, never what it computes.
CHANGEABLE = (
    "deepspeed.",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "model.attention",
    "checkpoint.",
    "eval.",
    "log.",
)


def check_changeable(overrides: Sequence[str]) -> None:
    """Raises ConfigError for every override that would make a resumed run another run."""
    fixed = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if fixed:
        rule = f"a resumed run keeps it; only {', '.join(CHANGEABLE)} may change"
        fix = "start a new run from its checkpoint with model.init_from"
        raise ConfigError(*(Problem(text.partition("=")[0], text.partition("=")[2], rule, fix) for text in fixed))


def read_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run folder was started with, where it lies now, with overrides."""
    path = RunDir(run_dir).config
    if not path.is_file():
        raise DataError(f"{run_dir}: not a run folder, it has no {path.name}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable YAML ({error})") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("run"), dict):
        raise DataError(f"{path}: holds no run section; restore it from a checkpoint's meta.json (run_config)")
    raw["run"]["dir"] = str(run_dir.absolute().parent)  # a run folder may have been moved
    raw["run"]["name"] = run_dir.absolute().name
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def claim(rundir: RunDir, prepared: Prepared, *, resume: bool) -> IO[str]:
    """Find the folder free for this run: no other process, config or data in it. Returns the lock, held while open.

    Raises:
        ConfigError: the folder holds another run, or this one already.
        DataError: a resumed run would see other data than it was planned with.
        RuntimeError: another process is at work in it.
    """
    rundir.root.mkdir(parents=True, exist_ok=True)
    lock = (rundir.root / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{rundir.root}: another process is training in this run folder; wait for it or stop it"
        ) from None
    if resume:
        check_same_plan(rundir, prepared.plan)
        return lock
    if rundir.config.exists():
        raise ConfigError(_folder_in_use(rundir, prepared.config))
    return lock


def settle(rundir: RunDir, prepared: Prepared) -> None:
    """Make a claimed folder a run folder; the config comes last, it is what says that this is one."""
    for folder in (rundir.checkpoints, rundir.evals):
        folder.mkdir(exist_ok=True)
    write_plan(rundir.plan, prepared.plan)
    if prepared.recommendation:
        write_recommendation(rundir.recommendation, prepared.recommendation)
    write_atomic(rundir.config, to_yaml(prepared.config))


def check_same_plan(rundir: RunDir, plan: Plan) -> None:
    stored = read_plan(rundir.plan)
    if stored.fingerprint != plan.fingerprint:
        rule = f"the stores or the config changed: the run was planned as {stored.fingerprint}, now {plan.fingerprint}"
        raise DataError(f"{rundir.plan}: {rule}; put the stores back, or start a new run with model.init_from")


def changed_fields(rundir: RunDir, config: RunConfig) -> list[str]:
    """Fields of ``config`` that differ from the one the run folder was started with."""
    old, new = yaml.safe_load(rundir.config.read_text(encoding="utf-8")), yaml.safe_load(to_yaml(config))
    return sorted(
        f"{section}.{field}"
        for section in new
        for field in (new[section] or {})  # plan, a section of its own, is null for a run without a recommendation
        if (old.get(section) or {}).get(field) != new[section][field]
    )


def _folder_in_use(rundir: RunDir, config: RunConfig) -> Problem:
    changed = changed_fields(rundir, config)
    rule = (
        f"the folder holds another config (differs in {', '.join(changed)})" if changed else "this run exists already"
    )
    fix = f"choose another run.name, or continue it with: cpt resume {rundir.root}"
    return Problem("run.name", str(rundir.root), rule, fix)
