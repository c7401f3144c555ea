"""The run folders of a grid: what is done, what can start, and how a branch takes over its trunk's state.

A branch is made as a run folder that looks as if the branch had trained alone up to its first step: its own config
(schedule and tokens of the branch, the very shares that the trunk's plan came out with), the trunk's plan cut to its
length, and the trunk's checkpoint under hard links. `cpt resume` then goes on with weights, moments and data position
like after any stop, and its own check of the plan holds the branch to the trunk's rows. Refuses a folder that holds
other pilots than the file asks for, and a branch whose trunk never saved at its first step.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from cpt.checkpoint.marker import COMPLETE, delete_checkpoint, is_usable
from cpt.config import ConfigError, Problem, RunConfig, to_yaml, validate
from cpt.plan import Plan, read_plan, write_plan
from cpt.planner.pilots import Grid, Pilot
from cpt.rundir import DataError, RunDir, read_events, step_of, write_atomic

# What makes a pilot the one it is; the rest may change between two calls.
COMPARED = ("model.init_from", "data.stores", "data.seq_len", "run.seed", "train", "eval.tokens_per_source")
HOW_IT_COMPUTES = ("micro_batch_size", "activation_checkpointing", "compile")


def is_finished(pilot: Pilot) -> bool:
    rundir = RunDir(pilot.run_dir)
    if not rundir.eval_file(pilot.num_steps).exists():
        return False
    return any(event.get("event") == "finish" for event in read_events(rundir))


def is_held(pilot: Pilot) -> bool:
    """Whether a process trains in the folder, such as one that outlived the call that started it."""
    path = pilot.run_dir / ".lock"
    if not path.exists():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def can_start(grid: Grid, pilot: Pilot) -> bool:
    """A trunk at once, a branch as soon as its trunk has saved where it leaves."""
    return pilot.trunk is None or pilot.run_dir.exists() or is_usable(_branch_point(grid, pilot))


def write_run_files(grid: Grid) -> None:
    """A run file per pilot. That of a branch is what would train it alone, without a trunk, to the same result."""
    for pilot in grid.pilots:
        path = grid.run_file(pilot)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, to_yaml(pilot.config))


def trainer_arguments(grid: Grid, pilot: Pilot) -> list[str]:
    """What to give the trainer so that the pilot starts, or goes on; a branch is made first.

    Raises:
        DataError: a branch cannot be made, its trunk has no checkpoint of that step.
    """
    if pilot.trunk is not None:
        make_branch(grid, pilot)
    if RunDir(pilot.run_dir).config.exists():
        return ["--resume", str(pilot.run_dir)]
    return [str(grid.run_file(pilot))]


def make_branch(grid: Grid, pilot: Pilot) -> None:
    """The branch's run folder, whole or not at all; one that is there already stays as it is."""
    if pilot.run_dir.exists():
        return
    source = _branch_point(grid, pilot)
    if not is_usable(source):
        rule = f"there is no complete checkpoint {source}"
        raise DataError(f"{pilot.name}: it branches off {pilot.trunk}, but {rule}; train the trunk first")
    trunk_plan = read_plan(RunDir(source.parent.parent).plan)
    making = RunDir(pilot.run_dir.with_name(f".{pilot.name}.making"))
    shutil.rmtree(making.root, ignore_errors=True)  # of a call that was killed
    making.evals.mkdir(parents=True)
    _link(source, making.checkpoint(pilot.first_step))
    rows = trunk_plan.rows_before(pilot.num_steps)
    (stage,) = trunk_plan.stages
    write_plan(making.plan, replace(trunk_plan, stages=(replace(stage, end_row=rows),)))
    making.plans.mkdir()
    write_plan(making.plan_from(0), trunk_plan)  # whose rows the checkpoint was trained on
    write_atomic(making.config, to_yaml(branch_config(pilot.config, trunk_plan)))
    making.root.rename(pilot.run_dir)


def branch_config(config: RunConfig, trunk_plan: Plan) -> RunConfig:
    """The branch's config with the shares that the trunk's plan came out with.

    The share wished for is not enough: where a source is capped at ``max_epochs``, the longer trunk was given less of
    it than the shorter branch would plan for itself, and the branch would not go on with the trunk's rows.
    """
    (stage,) = trunk_plan.stages
    counts = {source.name: float(count) for source, count in zip(trunk_plan.sources, stage.block_counts, strict=True)}
    general = sum(counts[source.name] for source in trunk_plan.sources if source.group == "general")
    share = general / trunk_plan.block_rows
    raw = config.model_dump(mode="json")
    raw["replay"]["share_general"] = None
    raw["data"]["stages"] = [{"tokens": config.train.tokens, "share_general": share, "weights": counts}]
    return validate(raw)


def drop_checkpoints(grid: Grid) -> None:
    """Free the space of checkpoints that nothing needs any more: pilots are kept for their evaluations.

    A finished run's all, once its branches have theirs. Of an unfinished trunk those older than its newest complete
    one that no branch waits for. What is left of the last one is its meta.json, which states the model's size.
    """
    for pilot in grid.pilots:
        waiting = {branch.first_step for branch in grid.branches(pilot) if not branch.run_dir.exists()}
        folders = sorted(path for path in RunDir(pilot.run_dir).checkpoints.glob("step_*") if step_of(path) is not None)
        whole = [folder for folder in folders if is_usable(folder)]
        finished = is_finished(pilot)
        for folder in whole if finished else whole[:-1]:
            if step_of(folder) not in waiting:
                _drop(folder, keep_meta=finished and folder == folders[-1])


def check_folders(grid: Grid) -> None:
    """Refuse to go on with, or to show as results, runs of other settings.

    Raises:
        ConfigError: naming every run and what differs in it.
    """
    problems = []
    for pilot in grid.pilots:
        config = RunDir(pilot.run_dir).config
        if config.exists() and (changed := list(_differences(_read_yaml(config), pilot.config))):
            rule = f"{pilot.run_dir} holds a run with another {', '.join(changed)}"
            problems.append(
                Problem("pilots.name", grid.settings.name, rule, "choose another name, or delete that folder")
            )
    if problems:
        raise ConfigError(*problems)


def _differences(found: dict[str, Any], wanted: RunConfig) -> Iterator[str]:
    raw = wanted.model_dump(mode="json")
    for field in COMPARED:
        section, _, leaf = field.partition(".")
        ours, theirs = raw[section], found.get(section) or {}
        names = [leaf] if leaf else [name for name in ours if name not in HOW_IT_COMPUTES]
        yield from (f"{section}.{name}" for name in names if ours[name] != theirs.get(name))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable YAML ({error}); delete its folder, and the run is made again") from None
    return raw if isinstance(raw, dict) else {}


def _branch_point(grid: Grid, pilot: Pilot) -> Path:
    assert pilot.trunk is not None
    return RunDir(grid.pilot(pilot.trunk).run_dir).checkpoint(pilot.first_step)


def _link(source: Path, target: Path) -> None:
    """The same files under another folder; copied where the file system has no hard links."""
    target.mkdir(parents=True)
    names = [*json.loads((source / COMPLETE).read_text(encoding="utf-8")), COMPLETE]
    for name in names:
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copy2(source / name, target / name)


def _drop(folder: Path, *, keep_meta: bool) -> None:
    if not keep_meta:
        delete_checkpoint(folder)
        return
    (folder / COMPLETE).unlink(missing_ok=True)  # first: what is cut short here must not be taken for complete
    for path in folder.iterdir():
        if path.name != "meta.json":
            path.unlink(missing_ok=True)
