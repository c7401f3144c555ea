"""When a run saves itself, what becomes of older checkpoints and of copies elsewhere, and the way back to what was
saved.

A periodic save goes on in the background, and one that fails is reported and the run goes on. The last one, and one to
stop at, are waited for and must succeed. What ended in the background is reported by the main thread, before the next
update.
"""

import math
import sys
from collections.abc import Mapping

from cpt.announce import environment, model_config
from cpt.checkpoint.agreed import from_first, newest_good
from cpt.checkpoint.background import Saved
from cpt.checkpoint.marker import is_usable
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta
from cpt.checkpoint.retention import Policy, apply, decide, read_pins, survey
from cpt.eval.claims import steps_being_evaluated
from cpt.eval.records import read_evals
from cpt.live_run import Run
from cpt.train.stepinfo import StepInfo

UPLOAD_SECONDS = 1800.0  # that the end of a run waits for copies
CLOSE_SECONDS = 60.0  # that a run which fails waits for the save in flight


def save(run: Run, info: StepInfo) -> None:
    """Save the state after a step; older checkpoints are given up once this one is complete.

    Raises:
        OSError: on all ranks, where the save must succeed.
    """
    must_succeed = info.step == run.prepared.plan.num_steps or run.stop.agreed(run.topology.device)
    with run.phases("checkpoint"):
        error = _begin(run, info)
        if must_succeed:
            error = error or run.saver.wait()
            report_saves(run)
    if error and must_succeed:
        raise OSError(error)


def finish_saves(run: Run, info: StepInfo) -> None:
    """Return once the state after this step is completely saved, by a save in flight or by one made now.

    Raises:
        OSError: on all ranks; it could not be saved.
    """
    with run.phases("checkpoint"):
        run.saver.wait()
        report_saves(run)
    folder = run.rundir.checkpoint(info.step)
    if not from_first(is_usable(folder) if run.topology.rank == 0 else None, run.topology.world_size):
        with run.phases("checkpoint"):
            error = _begin(run, info) or run.saver.wait()
            report_saves(run)
        if error:
            raise OSError(error)


def finish_uploads(run: Run, step: int) -> bool:
    """Wait for copies that are under way, for a bounded time; what is missing then is reported. False where the run
    was asked to stop meanwhile: the next start goes on with them.
    """
    if run.uploader is None:
        return True

    def asked_to_stop() -> bool:
        run.phases.beat()
        return run.stop.is_raised

    print(f"waiting for copies at {run.uploader.url}, at most {UPLOAD_SECONDS:.0f} s", flush=True)
    with run.phases("checkpoint"):  # bounded, so that waiting may count as progress
        whole = run.uploader.finish(timeout=UPLOAD_SECONDS, should_stop=asked_to_stop)
    report_saves(run)
    if not whole and run.stop.is_raised:
        return False
    if not whole:
        url, reason = run.uploader.url, f"still under way {UPLOAD_SECONDS:.0f} s after the end of the run"
        text = f"not everything was copied to {url}: {reason}; copy {run.rundir.checkpoints} by hand"
        _warn("upload_failed", run, step, text, url=url, reason=reason)
    return True


def close_saves(run: Run) -> None:
    """However a run ends: finish a save in flight within a bounded time or abandon it. No collective call."""
    run.saver.close(timeout=CLOSE_SECONDS)
    report_saves(run)


def restore_newest(run: Run, *, at_most: int | None = None) -> tuple[CheckpointMeta | None, list[str]]:
    """Put the engine back to the newest good checkpoint (of a step ``at_most``, where that is given), a save in flight
    included, and say why newer ones were passed over; None, and nothing is changed, where none was ever saved. A
    collective call.

    Raises:
        DataError: saves were completed, but none can be used.
    """
    run.saver.wait()
    report_saves(run)
    topology = run.topology
    checkpoint, skipped = newest_good(
        run.rundir.checkpoints, rank=topology.rank, world_size=topology.world_size, at_most=at_most
    )
    if checkpoint is None:
        return None, skipped
    go_on_from(run, checkpoint)
    return checkpoint.meta, skipped


def go_on_from(run: Run, checkpoint: Checkpoint) -> None:
    """Put the engine and the guard where the run stood when it saved this. A collective call."""
    run.engine.restore(checkpoint.fill, optimizer_steps=checkpoint.meta.optimizer_steps)
    run.detector.go_back_to(checkpoint.meta.recent_steps)


def upload_existing(run: Run) -> None:
    """Copy what an earlier start saved and could not copy; what is there already is not copied again."""
    if run.uploader is not None:
        for step, kind in sorted(survey(run.rundir.checkpoints).items()):
            if kind != "broken":
                run.uploader.add(run.rundir.checkpoint(step))


def report_saves(run: Run) -> None:
    """Note what ended in the background since the last call, by events and warnings."""
    for saved in run.saver.poll():
        if not saved.error:  # one that failed at once tells nothing
            run.stop.save_seconds = saved.copy_seconds + saved.write_seconds  # a time limit leaves room for it
        if run.topology.rank == 0:
            _report(run, saved)
    for upload in run.uploader.poll() if run.uploader else ():
        if upload.error:
            text = f"checkpoint {upload.step} was not copied to {upload.url}: {upload.error}"
            _warn("upload_failed", run, upload.step, text, url=upload.url, reason=upload.error)
        else:
            facts = {"url": upload.url, "seconds": upload.seconds, "bytes": upload.bytes}
            run.event("upload", upload.step, **facts)


def _begin(run: Run, info: StepInfo) -> str | None:
    """Start saving, or say why not."""
    run.engine.before_update = lambda: _before_update(run)
    report_saves(run)
    try:
        run.saver.begin(
            run.rundir.checkpoint(info.step),
            run.engine.owned_fragments(),
            _meta(run, info),
            after=lambda: _after(run, info.step),
        )
    except OSError as error:
        report_saves(run)  # of the save before, which was waited for
        _warn("checkpoint_failed", run, info.step, f"no checkpoint after step {info.step}: {error}", reason=str(error))
        return str(error)
    report_saves(run)
    return None


def _before_update(run: Run) -> None:
    if run.saver.in_flight:
        with run.phases("checkpoint"):
            run.saver.wait_copied()
    report_saves(run)


def _after(run: Run, step: int) -> Mapping[str, object]:
    """At rank 0, in the background, after a checkpoint is complete: give up older ones, copy this one elsewhere."""
    checkpoints, section = run.rundir.checkpoints, run.config.checkpoint
    found, uploader = survey(checkpoints), run.uploader
    losses = held_out_losses(run, section.keep_best) if section.keep_best else {}
    policy = Policy(section.keep_last, section.keep_weights_every)
    if uploader is not None:
        uploader.add(run.rundir.checkpoint(step))
    busy = uploader.busy if uploader else frozenset()
    leaving = [step for step, action in decide(found, policy, losses=losses, busy=busy).items() if action != "keep"]
    busy |= steps_being_evaluated(run.rundir.evals, leaving)
    # Pins come after claims: a watcher pins the best before it gives its claim back.
    pinned = {pin.step for pin in read_pins(checkpoints).values()}
    return apply(checkpoints, decide(found, policy, losses=losses, pinned=pinned, busy=busy))


def held_out_losses(run: Run, name: str) -> dict[int, float]:
    """By step, of a source or a group, as far as it was evaluated and is finite."""
    losses = {}
    for record in read_evals(run.rundir.evals):
        measured = record.sources.get(name) or record.groups.get(name)
        if measured is not None and measured.loss is not None and math.isfinite(measured.loss):
            losses[record.step] = measured.loss
    return losses


def _report(run: Run, saved: Saved) -> None:
    if saved.error:
        text = f"no checkpoint after step {saved.step}: {saved.error}"
        _warn("checkpoint_failed", run, saved.step, text, reason=saved.error)
        return
    seconds = ("stall_seconds", "waited_seconds", "copy_seconds", "write_seconds")
    facts: dict[str, object] = {name: round(getattr(saved, name), 3) for name in seconds}
    facts |= {"bytes": saved.bytes, "pruned": [], "reduced": []} | saved.details
    warning = facts.pop("warning", None)
    run.event("checkpoint", saved.step, **facts)
    if warning:
        text = f"older checkpoints could not be given up after step {saved.step}: {warning}"
        _warn("retention_failed", run, saved.step, text, reason=warning)


def _warn(event: str, run: Run, step: int, text: str, **details: object) -> None:
    run.event(event, step, **details)
    if run.topology.rank == 0:
        print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _meta(run: Run, info: StepInfo) -> CheckpointMeta:
    return CheckpointMeta(
        step=info.step,
        tokens_seen=info.tokens_seen,
        tokens_by_source=run.skipped.tokens_seen(run.prepared.plan, info.step),
        optimizer_steps=run.engine.optimizer_steps,
        seed=run.config.run.seed,
        plan_fingerprint=run.prepared.plan.fingerprint,
        parameter_shapes={name: list(shape) for name, shape in run.engine.parameter_shapes().items()},
        model_config=model_config(run.loaded),
        run_config=run.config.model_dump(mode="json"),
        written_by={**environment(run.topology), "zero_stage": run.config.deepspeed.zero_stage},
        recent_steps=run.detector.history(),
    )
