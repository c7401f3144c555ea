"""Another mixture for a run that has begun: from its newest checkpoint on, by ``cpt resume RUN_DIR a.b=c``.

Owns what such a change is. The run file states the new mixture where it stated the old one; the old one moves to
``data.past``, so the plan can still be made from the run file alone. No row before the change moves, and each source
goes on where it stands. Refuses a run that is at work (stop it first, SIGTERM saves), one that has ended, and stores
that hold something else than what the run has read.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt.config import ConfigError, Problem, RunConfig, apply_override, load_config, validate
from cpt.data.sampler import rows_seen, tokens_seen
from cpt.mixtures import epoch_caps, mixture_of, num_steps
from cpt.plan import Plan, read_plan
from cpt.planner.preview_mix import mix_facts
from cpt.prepare import Prepared, prepare
from cpt.rundir import DataError, RunDir, note_event, step_of
from cpt.runfolder import (
    MIXTURE,
    check_changeable,
    check_same_plan,
    lock_folder,
    read_raw_config,
    read_run_config,
    write_change,
)


def split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that change the mixture, and the others."""
    mixture = [text for text in overrides if text.startswith(MIXTURE)]
    return mixture, [text for text in overrides if text not in mixture]


def remix(run_dir: Path, overrides: Sequence[str], step: int) -> Prepared:
    """The run as it would be with another mixture after ``step`` steps; writes nothing.

    Raises:
        ConfigError, DataError: the mixture cannot be had, or the run has no steps left.
    """
    raw = read_raw_config(run_dir)
    old = validate(raw)
    rundir, stored = RunDir(run_dir), read_plan(RunDir(run_dir).plan)
    check_same_plan(rundir, prepare(old).plan)
    if step >= stored.num_steps:
        name, _, value = overrides[0].partition("=")
        rule = f"the run has done all of its {stored.num_steps} steps, no mixture is left to change"
        fix = "cpt extend RUN_DIR --tokens +N gives it more, with this mixture; or start a new run with model.init_from"
        raise ConfigError(Problem(name, value, rule, fix))
    for override in overrides:
        apply_override(raw, override)
    make_stores_absolute(raw)
    same_place = prepare(validate(raw))
    if same_place.plan == stored:
        return same_place  # a store that was moved, a default that was spelled out: every row is what it was
    raw["data"]["past"] = [past.model_dump(mode="json") for past in past_of(old, step)]
    found = prepare(validate(raw))
    check_same_rows(stored, found.plan, step, rundir)
    return found


def change_mixture(run_dir: Path, overrides: Sequence[str], step: int) -> dict[str, Any]:
    """Make the change that ``remix`` describes, and note it in events.jsonl.

    Raises:
        RuntimeError: a process is at work in the run folder.
    """
    if not overrides:
        raise ConfigError(Problem(str(run_dir), None, "no other mixture is given", "e.g. replay.share_general=0.4"))
    read_raw_config(run_dir)  # a folder that is no run's gets no lock file
    rundir = RunDir(run_dir)
    with lock_folder(rundir):
        stored = read_plan(rundir.plan)
        prepared = remix(run_dir, overrides, step)
        facts = {
            "changes": list(overrides),
            "plan_before": stored.fingerprint,
            "plan_after": prepared.plan.fingerprint,
            "shares_before": rest_shares(stored, step),
            "shares_after": rest_shares(prepared.plan, step),
            "warnings": list(prepared.warnings),
        }
        write_change(rundir, prepared)
        if prepared.plan != stored:
            note_event("mix_changed", step, rundir, **facts)
    return {"run_dir": str(run_dir), "step": step, **facts}


def past_of(config: RunConfig, step: int) -> list[Any]:
    """The mixtures that led to ``step``, each with the step that it ends at.

    What was to follow after ``step`` is forgotten: a run that went back to an older checkpoint never had it.
    """
    mixtures = [*config.data.past, mixture_of(config, until_step=num_steps(config))]
    kept = [mixture for mixture in mixtures if mixture.until_step < step]
    if step:
        kept.append(mixtures[len(kept)].model_copy(update={"until_step": step}))
    return kept


def rest_shares(plan: Plan, step: int) -> dict[str, float]:
    """Share of each source in the tokens after ``step`` steps, as the sampler will give them."""
    seen, planned = tokens_seen(plan, step), tokens_seen(plan, plan.num_steps)
    left = {name: planned[name] - seen[name] for name in planned}
    return {name: round(tokens / sum(left.values()), 6) for name, tokens in left.items()}


def newest_step(run_dir: Path) -> int:
    """Of the newest checkpoint with a COMPLETE marker; 0 where there is none. Opens none, so it needs no torch."""
    found = (step_of(marker.parent) for marker in RunDir(run_dir).checkpoints.glob("*/COMPLETE"))
    return max((step for step in found if step is not None), default=0)


def make_stores_absolute(raw: dict[str, Any]) -> None:
    """A store that was typed lies where the command runs; all others are absolute in a run folder."""
    stores = raw["data"].get("stores")
    if isinstance(stores, dict):
        raw["data"]["stores"] = {
            name: str(Path.cwd() / Path(path).expanduser()) if isinstance(path, str) else path
            for name, path in stores.items()
        }


def check_same_rows(stored: Plan, plan: Plan, step: int, rundir: RunDir) -> None:
    """Raises DataError where rows that the run has read would be others now."""
    same = [replace(source, rows_by_length=()) for source in plan.sources[: len(stored.sources)]]
    if same == [replace(source, rows_by_length=()) for source in stored.sources] and rows_seen(plan, step).items() >= {
        (name, rows) for name, rows in rows_seen(stored, step).items() if rows
    }:
        return
    rule = "the stores are not those that the run has read, or they come in another order"
    raise DataError(f"{rundir.plan}: {rule}; put them back, and add new ones behind them")


def preview(run: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What a run file, or the rest of a run folder, will be fed with these overrides; for ``cpt data preview-mix``.

    Raises:
        ConfigError, DataError: nothing that can be trained.
    """
    if not run.is_dir():
        return _facts(prepare(load_config(run, overrides)), done_step=0)
    step, (mixture, others) = newest_step(run), split_overrides(overrides)
    check_changeable(others)
    return _facts(remix(run, mixture, step) if mixture else prepare(read_run_config(run, others)), done_step=step)


def apply_preview(run_dir: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """``preview``, and then the run has that mixture.

    Raises:
        ConfigError: also for a field that is not of the mixture, which would be shown and not kept.
    """
    mixture, others = split_overrides(overrides)
    if others:
        rule, fix = "--apply changes the mixture alone", "leave it out here, and give it to cpt resume RUN_DIR"
        parts = (text.partition("=") for text in others)
        raise ConfigError(*(Problem(name, value, rule, fix) for name, _, value in parts))
    facts, step = preview(run_dir, mixture), newest_step(run_dir)
    change_mixture(run_dir, mixture, step)
    return {**facts, "run_dir": str(run_dir), "applied_from_step": step}


def _facts(prepared: Prepared, *, done_step: int) -> dict[str, Any]:
    config = prepared.config
    return mix_facts(
        prepared.plan,
        epoch_caps(mixture_of(config, until_step=num_steps(config))),
        done_step=done_step,
        changes=[past.until_step for past in config.data.past],
        warnings=prepared.warnings,
    )
