"""The only place that turns a config and a plan into objects, and a run folder into a run that goes on."""

import json
import os
from contextlib import AbstractContextManager, nullcontext

import torch.distributed as dist

from cpt.announce import announce, environment, size_warnings
from cpt.checkpoint.agreed import from_first, newest_good
from cpt.config import ConfigError, RunConfig
from cpt.data.loader import Loader
from cpt.data.place import Place
from cpt.data.skipping import SkippingLoader, read_skipped
from cpt.exit_codes import EXIT_STOPPED
from cpt.heartbeats import clear_beats
from cpt.live_run import Run
from cpt.model.kernels import verify_packing
from cpt.model.ulysses import share_rows
from cpt.prepare import Prepared, prepare_job
from cpt.resumption import announce_resume, changes_since, check_own
from cpt.run_benchmarks import benchmark_hook, benchmarks_are_missing, measure_now, open_benchmarks
from cpt.run_evaluation import evaluate_now, evaluation_hook, evaluation_is_missing
from cpt.run_guard import watch_over
from cpt.run_model import for_training, load_sharded
from cpt.run_numbers import build_metrics, build_profiler, pairs_of
from cpt.run_rehearsal import explaining_memory, rehearse
from cpt.run_saving import close_saves, finish_saves, finish_uploads, go_on_from, save, upload_existing
from cpt.run_watch import watch_hooks
from cpt.rundir import DataError, RunDir, write_atomic
from cpt.runfolder import changed_fields, claim, settle
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Engine, Topology, check_machine, start_process_group, stop_process_group
from cpt.train.guard import StopFlag
from cpt.train.heartbeat import Heartbeat
from cpt.train.hooks import Hook
from cpt.train.loss_head import attach_loss_head, forward_losses
from cpt.train.optim import OptimizerSpec, build_optimizer
from cpt.train.schedules import learning_rates
from cpt.train.stepinfo import StepInfo
from cpt.train.trainer import Forward, Job, Trainer


def train(config: RunConfig, *, resume: bool = False, stop: StopFlag | None = None, profile_steps: int = 0) -> int:
    """Run the job that the launcher's environment describes; returns the exit code. ``stop``: a flag that hears
    signals already.

    Raises:
        ConfigError, DataError: the user can fix it; nothing was trained.
        RuntimeError, OSError: the environment is at fault; complete checkpoints are intact.
    """
    flag = stop or StopFlag()
    if stop is None:
        flag.install()
    prepared = prepare_job(config, int(os.environ.get("WORLD_SIZE", "1")))
    topology = start_process_group(hang_seconds=config.guard.hang_seconds, asked_to_stop=lambda: flag.is_raised)
    try:
        check_machine(_engine_spec(config, topology), topology)
        with _claim(prepared, topology, resume=resume), _heartbeat(config, topology) as heartbeat:
            run, first_step = _build(prepared, topology, flag, resume=resume)
            run.profiler = build_profiler(run, profile_steps)
            return _fit(run, first_step, heartbeat)
    finally:
        stop_process_group()


def _claim(prepared: Prepared, topology: Topology, *, resume: bool) -> AbstractContextManager[object]:
    """The lock on the run folder, at rank 0. Where it is refused, all ranks raise the reason: the others would wait
    for rank 0 in their next collective call, and bury its message under their own. A rank that was told of the folder
    otherwise than rank 0 must not go on either: the one would restore what the other has never saved.
    """
    lock: AbstractContextManager[object] = nullcontext()
    refusal: Exception | None = None
    if topology.rank == 0:
        try:
            lock = claim(RunDir(prepared.config.run_dir), prepared, resume=resume)
            clear_beats(RunDir(prepared.config.run_dir).heartbeats)
        except (ConfigError, DataError, RuntimeError, OSError) as error:
            refusal = error
    decided = [refusal, resume]
    if topology.world_size > 1:
        dist.broadcast_object_list(decided)
    if isinstance(decided[0], Exception):
        raise decided[0]
    if decided[1] != resume:
        told = ("continues", "begins") if decided[1] else ("begins", "continues")
        raise RuntimeError(
            f"rank 0 {told[0]} the run, rank {topology.rank} {told[1]} it: the run folder was made just now, or this "
            "host does not see it yet (or does not share it); start the job again"
        )
    return lock


def _heartbeat(config: RunConfig, topology: Topology) -> Heartbeat:
    seconds, rundir = config.guard.hang_seconds, RunDir(config.run_dir)
    return Heartbeat(rundir, rank=topology.rank, world_size=topology.world_size, hang_seconds=seconds)


def _build(prepared: Prepared, topology: Topology, stop: StopFlag, *, resume: bool) -> tuple[Run, int]:
    config, rundir = prepared.config, RunDir(prepared.config.run_dir)
    rank, world_size = topology.rank, topology.world_size
    checkpoint, skipped = newest_good(rundir.checkpoints, rank=rank, world_size=world_size) if resume else (None, [])
    if checkpoint:
        check_own(checkpoint, prepared)
    spec = _engine_spec(config, topology)
    loaded = for_training(load_sharded(spec, prepared, topology, checkpoint), config, topology.device)
    optimizer = build_optimizer(loaded.model, _optimizer_spec(config))
    engine = Engine(loaded.model, optimizer, spec=spec, topology=topology)
    vocab_size, backend = prepared.vocab_size, loaded.report.attention
    how = attach_loss_head(engine.model, backend, vocab_size=vocab_size, device=topology.device)
    loaded = loaded.noting(f"loss: {how}")
    run = Run(prepared, rundir, topology, engine, loaded, stop)
    engine.count_communication(run.phases)
    skipped_rows = read_skipped(rundir.skipped_rows) if resume else ()
    run.skipped.add(from_first(skipped_rows, world_size))  # a slow file system may show ranks another list
    first_step = checkpoint.meta.step if checkpoint else 0
    if checkpoint:
        go_on_from(run, checkpoint)
    verify_packing(engine.model, backend, vocab_size=vocab_size, device=topology.device)
    place = Place(topology.rank, topology.world_size, config.deepspeed.sequence_parallel)
    shared = share_rows(engine.model, backend, place, vocab_size=vocab_size, device=topology.device)
    run.loaded = loaded = loaded.noting(shared)
    run.suite = open_benchmarks(run)
    if topology.rank == 0:
        if not resume:
            settle(rundir, prepared)  # only now: a start that was refused leaves its name free
        write_atomic(rundir.environment, json.dumps(environment(topology), indent=1))
        announce(prepared, loaded, topology)
        if resume:
            announce_resume(prepared, checkpoint, skipped, topology.world_size)
    warnings = (*prepared.warnings, *size_warnings(prepared, loaded))
    details = {"world_size": topology.world_size, "warnings": warnings, "skipped_checkpoints": skipped}
    details["recommendation"] = config.plan.fingerprint if config.plan else None
    if resume:
        details["changed"] = changed_fields(rundir, config)
        details["since_checkpoint"] = changes_since(checkpoint, prepared, topology.world_size) if checkpoint else []
    details["startup_seconds"] = round(stop.age_seconds, 3)
    run.event("resume" if resume else "start", first_step, **details)
    return run, first_step


def _engine_spec(config: RunConfig, topology: Topology) -> EngineSpec:
    return EngineSpec(
        zero_stage=config.deepspeed.zero_stage,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=config.global_batch_rows
        * config.deepspeed.sequence_parallel
        // (config.train.micro_batch_size * topology.world_size),
        max_grad_norm=config.train.max_grad_norm,
        extra=config.deepspeed.extra,
        offload=config.deepspeed.offload,
        nvme_dir=config.deepspeed.nvme_dir,
        hpz_size=config.deepspeed.hpz_size,
        quantized_communication=config.deepspeed.quantized_communication,
    )


def _optimizer_spec(config: RunConfig) -> OptimizerSpec:
    train = config.train
    return OptimizerSpec(train.optimizer, weight_decay=train.weight_decay, betas=train.betas, eps=train.eps)


def _fit(run: Run, first_step: int, heartbeat: Heartbeat) -> int:
    config, plan, topology = run.config, run.prepared.plan, run.topology
    job = Job(
        num_steps=plan.num_steps,
        tokens_per_step=plan.global_batch_rows * plan.seq_len,
        source_names=[source.name for source in plan.sources],
        seed=config.run.seed,
        lr_at=learning_rates(config.train, total_steps=plan.num_steps),
        pairs_of=pairs_of(run),
    )
    loader = Loader(
        plan,
        run.prepared.rows,
        rank=topology.rank,
        world_size=topology.world_size,
        micro_batch_size=config.train.micro_batch_size,
        sequence_parallel=config.deepspeed.sequence_parallel,
        threads=config.data.loader_threads,
    )
    data = SkippingLoader(loader, plan, run.skipped)
    trainer = Trainer(run.engine, data, forward=_forward(run), job=job, stop=run.stop)
    watch_over(trainer, run, data)
    run.metrics = build_metrics(run) if topology.rank == 0 else None
    trainer.phases = run.phases
    trainer.hooks = [*watch_hooks(run, heartbeat), *_hooks(run)]
    try:
        upload_existing(run)
        if first_step:
            _catch_up(run, StepInfo.before_training(first_step, tokens_seen=first_step * job.tokens_per_step))
        with explaining_memory(run):
            if first_step == 0:
                rehearse(run, loader, trainer.forward)
                run.phases.take()  # no step's
            last = trainer.fit(first_step)
        return _end(run, last)
    finally:
        close_saves(run)
        loader.close()
        for each in (run.profiler, run.metrics, run.suite):
            if each:
                each.close()


def _catch_up(run: Run, info: StepInfo) -> None:
    """A stop may have cut the evaluations of this step short; the checkpoint was still saved."""
    if evaluation_is_missing(run, info.step):
        evaluate_now(run, info)
    if benchmarks_are_missing(run, info.step):
        measure_now(run, info)


def _forward(run: Run) -> Forward:
    backend = run.loaded.report.attention
    return lambda model, batch: forward_losses(model, batch, backend)


def _hooks(run: Run) -> list[Hook]:
    """In order: metrics, evaluation, benchmarks, checkpoint."""
    config, last = run.config, run.prepared.plan.num_steps
    hooks = [Hook(each, every=1) for each in (run.metrics, run.profiler) if each]
    hooks += [evaluation_hook(run), benchmark_hook(run)]
    hooks.append(Hook(lambda info: save(run, info), every=config.checkpoint.every_steps, at=frozenset({last})))
    return hooks


def _end(run: Run, info: StepInfo) -> int:
    """Finish, or save and leave because all ranks agreed to stop."""
    if run.metrics:
        run.metrics.flush()  # before the last words, not behind them
    is_done = info.step >= run.prepared.plan.num_steps and not run.evaluation_cut_short
    if is_done and evaluation_is_missing(run, info.step):
        raise OSError(f"all steps are done and saved, but {run.rundir.eval_file(info.step)} could not be written")
    if is_done and finish_uploads(run, info.step):
        run.stop.obey()  # a file STOP that came too late must not stop what follows, an extension
        run.event("finish", info.step, phase_seconds=run.phases.after_last_step())
        if run.topology.rank == 0:
            print(f"finished: {run.rundir.root}", flush=True)
        return 0
    if not is_done:
        finish_saves(run, info)
    run.stop.obey()
    told, seconds = run.stop.reason or "another rank", round(run.stop.seconds_ago, 3)
    run.event("sigterm", info.step, signal=told, seconds=seconds, phase_seconds=run.phases.after_last_step())
    if run.topology.rank == 0:
        print(f"stopped after step {info.step}, saved; continue with: cpt resume {run.rundir.root}", flush=True)
    return EXIT_STOPPED
