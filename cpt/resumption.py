"""What a run that goes on says before it starts: where it stands, from which checkpoint, and what has changed since.

Owns the words. Refuses to choose the checkpoint or to judge the changes: ``cpt.runfolder`` says what may change.
"""

import time
from collections.abc import Sequence

from cpt.checkpoint.portable import Checkpoint
from cpt.data.sampler import epochs_seen, tokens_seen
from cpt.plan import read_plan
from cpt.planner.wording import amount
from cpt.prepare import Prepared
from cpt.report.cells import duration
from cpt.rundir import DataError, RunDir
from cpt.runfolder import field_changes
from cpt.train.schedules import learning_rates


def check_own(checkpoint: Checkpoint, prepared: Prepared) -> None:
    """Raises DataError for a checkpoint that lies in the run folder and is not of this run: of another model, or
    trained on other rows.
    """
    meta, config, rundir = checkpoint.meta, prepared.config, RunDir(prepared.config.run_dir)
    fix = "move it out of the run folder, and put the run's own checkpoint back"
    for name in ("fresh", "init_from"):
        was, now = (meta.run_config.get("model") or {}).get(name), getattr(config.model, name)
        if was != now:
            rule = f"is a checkpoint of another model: model.{name} was {_short(was)}, this run has {_short(now)}"
            raise DataError(f"{checkpoint.path}: {rule}; {fix}")
    known = {prepared.plan.fingerprint, *(read_plan(path).fingerprint for path in rundir.plans.glob("step_*.json"))}
    if meta.plan_fingerprint not in known:
        rule = f"was trained on the rows of plan {meta.plan_fingerprint}, which this run never had"
        raise DataError(f"{checkpoint.path}: {rule} (it has {', '.join(sorted(known))}); {fix}")


def announce_resume(prepared: Prepared, checkpoint: Checkpoint | None, skipped: Sequence[str], world_size: int) -> None:
    """Say what a run goes on from, what has changed since that was written, and where each source stands."""
    plan, train = prepared.plan, prepared.config.train
    for reason in skipped:
        print(f"checkpoint skipped: {reason}", flush=True)
    step = checkpoint.meta.step if checkpoint else 0
    seen = tokens_seen(plan, step)
    at = f"{sum(seen.values()):,} of {train.tokens:,} tokens"
    rate = f"; the next step has learning rate {learning_rates(train, total_steps=plan.num_steps)(step + 1):.6g}"
    lines = [f"resumes after step {step} of {plan.num_steps}: {at}{rate if step < plan.num_steps else ''}"]
    changes = changes_since(checkpoint, prepared, world_size) if checkpoint else []
    lines.append(f"  from      {written(checkpoint)}" if checkpoint else "  from      the start: nothing was saved")
    lines.append(f"  changed   {'; '.join(changes) or 'nothing'}")
    lines += [f"  {'data' if i == 0 else '':<9} {text}" for i, text in enumerate(positions(prepared, step))]
    print("\n".join(lines), flush=True)


def positions(prepared: Prepared, step: int) -> list[str]:
    """``general: 3.2 B of 10 B tokens, epoch 0.32`` for each source: what was read of one pass over it."""
    plan = prepared.plan
    found = []
    for source in plan.sources:
        tokens, one_pass = tokens_seen(plan, step)[source.name], source.num_rows * plan.seq_len
        epochs = epochs_seen(plan, step)[source.name]
        of = "of" if tokens <= one_pass else "tokens from"
        found.append(f"{source.name}: {amount(tokens)} {of} {amount(one_pass)} tokens, epoch {epochs:.2f}")
    if len(plan.seq_lens) > 1 and step < plan.num_steps:
        found.append(f"rows of {plan.seq_len_of(plan.stage_of_step(step)):,} tokens now")
    return found


def written(checkpoint: Checkpoint) -> str:
    """Which checkpoint, how old it is, and who wrote it."""
    by = checkpoint.meta.written_by
    seconds = time.time() - (checkpoint.path / "COMPLETE").stat().st_mtime
    age = f"{duration(seconds)} old" if seconds >= 0 else "its time lies in the future: a clock was set back"
    return f"{checkpoint.path}, {age}, written by {ranks(by.get('world_size'))} under ZeRO {by.get('zero_stage')}"


def changes_since(checkpoint: Checkpoint, prepared: Prepared, world_size: int) -> list[str]:
    """``field: before → now`` of everything that differs from the process that wrote the checkpoint."""
    before, config = checkpoint.meta, prepared.config.model_dump(mode="json")
    changes = [f"{name}: {_short(old)} → {_short(new)}" for name, old, new in field_changes(before.run_config, config)]
    if (was := before.written_by.get("world_size")) != world_size:
        changes.insert(0, f"{ranks(was)} → {world_size}")
    return changes


def ranks(count: object) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
