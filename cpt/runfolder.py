"""Who may use a run folder: a new run claims it, a resumed one must find its own config and data in it, two at a time
never.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cpt.checkpoint.marker import is_usable
from cpt.config import ConfigError, Problem, RunConfig, apply_override, to_yaml, validate
from cpt.folder_lock import FolderLock, acquire
from cpt.plan import Plan, read_plan, write_plan
from cpt.prepare import Prepared
from cpt.recommendation import write_recommendation
from cpt.rundir import DataError, RunDir, read_events, write_atomic

# What may differ when a run goes on: where and how it computes and what it tells, never what it computes.
CHANGEABLE = (
    "deepspeed.",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.compile",
    "model.attention",
    "model.kernels",
    "guard.",
    "data.loader_threads",
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

# What cpt extend states of the steps to come.
EXTENDED = ("train.tokens", "train.peak_lr", "train.schedule")


def check_changeable(overrides: Sequence[str]) -> None:
    """Raises ConfigError for every override that would make a resumed run another run."""
    fixed = [text for text in overrides if not text.startswith(CHANGEABLE)]
    if fixed:
        rule = f"a resumed run keeps it; only {', '.join(CHANGEABLE)} may change"
        apart = "start a new run from its checkpoint with model.init_from"
        longer = "give the run more tokens, at rates that you state: cpt extend RUN_DIR --tokens +20M"
        before = (
            "change the mixture before the ranks start: cpt resume RUN_DIR, or cpt data preview-mix RUN_DIR --apply"
        )
        problems = [
            Problem(
                name,
                value,
                rule,
                before if name.startswith(MIXTURE) else longer if name.startswith(EXTENDED) else apart,
            )
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


def claim(rundir: RunDir, prepared: Prepared, *, resume: bool) -> FolderLock:
    """Find the folder free for this run: no other process, config or data in it. Returns the lock, held until closed.

    Raises:
        ConfigError: the folder holds another run, or this one already.
        DataError: a resumed run would see other data than it was planned with.
        RuntimeError: another process is at work in it.
        OSError: it cannot be written.
    """
    rundir.root.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(rundir)
    try:
        if resume:
            _finish_change(rundir, prepared)
            check_same_plan(rundir, prepared.plan)
        elif rundir.config.exists():
            raise ConfigError(_folder_in_use(rundir, prepared.config))
    except BaseException:
        lock.close()
        raise
    return lock


def lock_folder(rundir: RunDir) -> FolderLock:
    """Raises RuntimeError where another process is at work in the run folder, OSError where it cannot be written."""
    return acquire(rundir.root / ".lock")


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


def is_finished(run_dir: Path) -> bool:
    """Whether every step is trained, saved, evaluated and noted as such. Steps come from the config: an extension that
    was cut short has the old plan still.
    """
    rundir, config = RunDir(run_dir), read_run_config(run_dir)
    last = config.train.tokens // config.train.global_batch_tokens
    evaluated = rundir.eval_file(last).is_file()
    return evaluated and _is_noted("finish", last, rundir) and is_usable(rundir.checkpoint(last))


def finished_words(run_dir: Path) -> str:
    """What ``cpt resume`` says of a run that ``is_finished``."""
    train = read_run_config(run_dir).train
    done = f"all {train.tokens // train.global_batch_tokens:,} steps are done, nothing was started"
    return f"{run_dir}: this run is finished: {done}; for more tokens: cpt extend {run_dir} --tokens +N"


def _is_noted(name: str, step: int, rundir: RunDir) -> bool:
    return any((event.get("event"), event.get("step")) == (name, step) for event in read_events(rundir))


def _finish_change(rundir: RunDir, prepared: Prepared) -> None:
    newest, wanted = _newest_plan(rundir, prepared), prepared.plan.fingerprint
    if newest.is_file() and read_plan(rundir.plan).fingerprint != wanted == read_plan(newest).fingerprint:
        write_plan(rundir.plan, prepared.plan)


def _newest_plan(rundir: RunDir, prepared: Prepared) -> Path:
    past = prepared.config.data.past
    return rundir.plan_from(past[-1].until_step if past else 0)


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


def field_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, object, object]]:
    """(dotted field, value before, value now) of two resolved configs, leaf by leaf; where the run folder lies is no
    change, and neither is the diary of earlier changes.
    """
    before, now = _leaves(old), _leaves(new)
    fields = [field for field in {**before, **now} if not field.startswith(("run.", "data.past", "train.past"))]
    return [(field, before.get(field), now.get(field)) for field in fields if before.get(field) != now.get(field)]


def _leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in section.items():
        found |= _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {prefix + name: value}
    return found


def _folder_in_use(rundir: RunDir, config: RunConfig) -> Problem:
    changed = changed_fields(rundir, config)
    rule = (
        f"the folder holds another config (differs in {', '.join(changed)})" if changed else "this run exists already"
    )
    fix = f"choose another run.name, or continue it with: cpt resume {rundir.root}"
    return Problem("run.name", str(rundir.root), rule, fix)
