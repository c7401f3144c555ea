"""Who may use a run folder: a new run claims it, a resumed one must find its own config and data in it, two at a time
never.
"""

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

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
    "data.pack_dir",
    "eval.",
    "log.",
)

# What may change from the newest checkpoint on: the mixture of the tokens that are still to come.
MIXTURE = (
    "replay.share_general",
    "data.weights",
    "data.max_epochs",
    "data.stages",
    "data.mix",
    "data.stores.",
)


def check_changeable(overrides: Sequence[str]) -> None:
    """Raises ConfigError for every override that would make a resumed run another run."""
    fixed = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if fixed:
        rule = f"a resumed run keeps it; only {', '.join(CHANGEABLE)} may change"
        apart = "start a new run from its checkpoint with model.init_from"
        before = (
            "change the mixture before the ranks start: cpt resume RUN_DIR, or cpt data preview-mix RUN_DIR --apply"
        )
        problems = [
            Problem(name, value, rule, before if name.startswith(MIXTURE) else apart)
            for name, _, value in (text.partition("=") for text in fixed)
        ]
        raise ConfigError(*problems)


def read_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run folder was started with, where it lies now, with overrides."""
    raw = read_raw_config(run_dir)
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


def read_raw_config(run_dir: Path) -> dict[str, Any]:
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
    return raw


def claim(rundir: RunDir, prepared: Prepared, *, resume: bool) -> IO[str]:
    """Find the folder free for this run: no other process, config or data in it. Returns the lock, held while open.

    Raises:
        ConfigError: the folder holds another run, or this one already.
        DataError: a resumed run would see other data than it was planned with.
        RuntimeError: another process is at work in it.
    """
    rundir.root.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(rundir)
    if resume:
        _finish_change(rundir, prepared)
        check_same_plan(rundir, prepared.plan)
        return lock
    if rundir.config.exists():
        raise ConfigError(_folder_in_use(rundir, prepared.config))
    return lock


def lock_folder(rundir: RunDir) -> IO[str]:
    """Raises RuntimeError where another process is at work in the run folder."""
    lock = (rundir.root / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{rundir.root}: another process is training in this run folder; wait for it or stop it"
        ) from None
    return lock


def settle(rundir: RunDir, prepared: Prepared) -> None:
    """Make a claimed folder a run folder; the config comes last, it is what says that this is one."""
    for folder in (rundir.checkpoints, rundir.evals):
        folder.mkdir(exist_ok=True)
    write_plan(rundir.plan, prepared.plan)
    if prepared.recommendation:
        write_recommendation(rundir.recommendation, prepared.recommendation)
    write_atomic(rundir.config, to_yaml(prepared.config))


def write_change(rundir: RunDir, prepared: Prepared) -> None:
    """Give a run another mixture from the last ``until_step`` on. Old plans are kept beside the new one.

    The new plan lies in ``plans/`` before the config asks for it, so a change that was cut short is either not made,
    or finished by the next resume.
    """
    rundir.plans.mkdir(exist_ok=True)
    if not rundir.plan_from(0).exists():
        write_atomic(rundir.plan_from(0), rundir.plan.read_bytes())
    write_plan(_newest_plan(rundir, prepared), prepared.plan)
    write_atomic(rundir.config, to_yaml(prepared.config))
    write_plan(rundir.plan, prepared.plan)


def _finish_change(rundir: RunDir, prepared: Prepared) -> None:
    newest, wanted = _newest_plan(rundir, prepared), prepared.plan.fingerprint
    if newest.is_file() and read_plan(rundir.plan).fingerprint != wanted == read_plan(newest).fingerprint:
        write_plan(rundir.plan, prepared.plan)


def _newest_plan(rundir: RunDir, prepared: Prepared) -> Path:
    past = prepared.config.data.past
    return rundir.plan_from(past[-1].until_step if past else 0)


def note_event(name: str, step: int, rundir: RunDir, **details: object) -> None:
    """Add a line to events.jsonl."""
    line = {"time": time.time(), "step": step, "event": name, **details}
    with rundir.events.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
