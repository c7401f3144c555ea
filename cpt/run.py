"""The only place that turns a config and a plan into objects, and a run folder into a run that goes on."""

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.announce import announce, announce_resume, cost_of, environment, model_config, size_warnings
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, is_usable, latest_complete
from cpt.checkpoint.prune import prune
from cpt.checkpoint.save import save_checkpoint
from cpt.config import ConfigError, RunConfig
from cpt.data.loader import Loader
from cpt.data.sampler import tokens_seen
from cpt.eval.perplexity import EvalSpec, evaluate, held_out
from cpt.eval.records import write_eval
from cpt.model.build import LoadedModel, Needs, build_from_config, build_model, load_tensors
from cpt.model.kernels import forward_logits, verify_packing
from cpt.model.vocab import extend_vocabulary, with_vocabulary
from cpt.new_tokens import find_extension
from cpt.prepare import Prepared, check_world, prepare
from cpt.rundir import DataError, RunDir, write_atomic
from cpt.runfolder import changed_fields, claim, note_event, settle
from cpt.train.engine import Engine, EngineSpec, Topology, start_process_group, stop_process_group
from cpt.train.guard import EXIT_STOPPED, StopFlag
from cpt.train.hooks import Hook
from cpt.train.metrics import ConsoleSink, JsonlSink, MetricsHook, Sink, Throughput, WandbSink, device_peak_flops
from cpt.train.optim import build_adamw
from cpt.train.schedules import build_schedule
from cpt.train.stepinfo import StepInfo
from cpt.train.trainer import Job, Trainer


@dataclass
class Run:
    """What a run's hooks work with."""

    prepared: Prepared
    rundir: RunDir
    topology: Topology
    engine: Engine
    loaded: LoadedModel
    stop: StopFlag
    metrics: MetricsHook | None = None  # rank 0 alone writes metrics
    evaluation_cut_short: bool = False

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def event(self, name: str, step: int, **details: object) -> None:
        """Add a line to events.jsonl, from rank 0."""
        if self.topology.rank != 0:
            return
        try:
            note_event(name, step, self.rundir, **details)
        except OSError as error:  # a full disk must not end a run over its diary
            print(f"WARNING: could not note {name}, {json.dumps(details)}: {error}", file=sys.stderr, flush=True)


def train(config: RunConfig, *, resume: bool = False) -> int:
    """Run the job that the launcher's environment describes; returns the exit code.

    Raises:
        ConfigError, DataError: the user can fix it; nothing was trained.
        RuntimeError, OSError: the environment is at fault; complete checkpoints are intact.
    """
    stop = StopFlag()
    stop.install()  # before anything slow, so that a signal during start-up is obeyed too
    prepared = prepare(config)
    topology = start_process_group()
    try:
        check_world(config, topology.world_size)
        with _claim(prepared, topology, resume=resume):
            run, first_step = _build(prepared, topology, stop, resume=resume)
            return _fit(run, first_step)
    finally:
        stop_process_group()


def _claim(prepared: Prepared, topology: Topology, *, resume: bool) -> AbstractContextManager[object]:
    """The lock on the run folder, at rank 0. Where it is refused, all ranks raise the reason: the others would wait
    for rank 0 in their next collective call, and bury its message under their own.
    """
    lock: AbstractContextManager[object] = nullcontext()
    refusal: list[Exception | None] = [None]
    if topology.rank == 0:
        try:
            lock = claim(RunDir(prepared.config.run_dir), prepared, resume=resume)
        except (ConfigError, DataError, RuntimeError, OSError) as error:
            refusal = [error]
    if topology.world_size > 1:
        dist.broadcast_object_list(refusal)
    if refusal[0] is not None:
        raise refusal[0]
    return lock


def _build(prepared: Prepared, topology: Topology, stop: StopFlag, *, resume: bool) -> tuple[Run, int]:
    config, rundir = prepared.config, RunDir(prepared.config.run_dir)
    checkpoint, skipped = _find_checkpoint(rundir, topology) if resume else (None, [])
    loaded = _load_model(prepared, topology, checkpoint)
    optimizer = build_adamw(
        loaded.model, weight_decay=config.train.weight_decay, betas=config.train.betas, eps=config.train.eps
    )
    if config.train.activation_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    engine = Engine(loaded.model, optimizer, spec=_engine_spec(config, topology), topology=topology)
    run = Run(prepared, rundir, topology, engine, loaded, stop)
    first_step = checkpoint.meta.step if checkpoint else 0
    if checkpoint:
        engine.restore(checkpoint.fill, optimizer_steps=checkpoint.meta.optimizer_steps)
    vocab_size, backend = prepared.vocab_size, loaded.report.attention
    verify_packing(engine.model, backend, vocab_size=vocab_size, device=topology.device)
    if topology.rank == 0:
        if not resume:
            settle(rundir, prepared)  # only now: a start that was refused leaves its name free
        write_atomic(rundir.environment, json.dumps(environment(topology), indent=1))
        announce(prepared, loaded, topology)
        if resume:
            announce_resume(prepared, first_step, skipped)
    warnings = (*prepared.warnings, *size_warnings(prepared, loaded))
    details = {"world_size": topology.world_size, "warnings": warnings, "skipped_checkpoints": skipped}
    details["recommendation"] = config.plan.fingerprint if config.plan else None
    if resume:
        details["changed"] = changed_fields(rundir, config)
    run.event("resume" if resume else "start", first_step, **details)
    return run, first_step


def _find_checkpoint(rundir: RunDir, topology: Topology) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to go on from: rank 0 chooses, so that a slow file system cannot show different ones to the
    ranks.
    """
    checkpoint, skipped = latest_complete(rundir.checkpoints) if topology.rank == 0 else (None, [])
    if topology.world_size == 1:
        return checkpoint, skipped
    chosen = [checkpoint.path if checkpoint else None]
    dist.broadcast_object_list(chosen)
    return (Checkpoint.open(chosen[0]) if chosen[0] else None), skipped


def _load_model(prepared: Prepared, topology: Topology, checkpoint: Checkpoint | None) -> LoadedModel:
    """The model's weights: of this run's checkpoint, of another run's (init_from), from Hugging Face, or fresh."""
    config = prepared.config
    needs = needs_of(prepared)
    if checkpoint is not None:  # the engine fills in the weights, each rank its own part
        return build_from_meta(config, checkpoint.meta, needs, topology.device)
    origin = config.model.init_from
    if not origin:
        return build_model(config.model, needs, device=topology.device)
    extension = find_extension(config)
    if extension is not None:
        needs = replace(needs, vocab_size=extension.base_vocab_size)
    if (Path(origin) / "meta.json").is_file():
        other = Checkpoint.open(Path(origin))
        loaded = build_from_meta(config, other.meta, needs, topology.device)
        load_tensors(loaded.model, other.tensors(), origin=origin)
    else:
        loaded = build_model(config.model, needs, device=topology.device)
    if extension is not None:  # now, while the weights are whole: sharded ones cannot be resized
        return extend_vocabulary(loaded, extension)
    return with_vocabulary(loaded, tokens=prepared.vocab_size)


def needs_of(prepared: Prepared) -> Needs:
    """What this run asks of any model."""
    config = prepared.config
    return Needs(
        seq_len=config.data.seq_len,
        vocab_size=prepared.vocab_size,
        seed=config.run.seed,
        compute_dtype=torch.bfloat16 if config.train.precision == "bf16" else torch.float32,
    )


def build_from_meta(config: RunConfig, meta: CheckpointMeta, needs: Needs, device: torch.device) -> LoadedModel:
    """A model of the shape that a checkpoint was written from, its weights still to be filled in."""
    return build_from_config(meta.model_config, config.model, needs, device=device)


def _engine_spec(config: RunConfig, topology: Topology) -> EngineSpec:
    return EngineSpec(
        zero_stage=config.deepspeed.zero_stage,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=config.global_batch_rows // (config.train.micro_batch_size * topology.world_size),
        max_grad_norm=config.train.max_grad_norm,
        extra=config.deepspeed.extra,
    )


def _fit(run: Run, first_step: int) -> int:
    config, plan, topology = run.config, run.prepared.plan, run.topology
    scale = build_schedule(config.train.schedule, total_steps=plan.num_steps)
    job = Job(
        num_steps=plan.num_steps,
        tokens_per_step=plan.global_batch_rows * plan.seq_len,
        source_names=[source.name for source in plan.sources],
        seed=config.run.seed,
        lr_at=lambda update: config.train.peak_lr * scale(update),
    )
    loader = Loader(
        plan,
        run.prepared.rows,
        rank=topology.rank,
        world_size=topology.world_size,
        micro_batch_size=config.train.micro_batch_size,
    )
    backend = run.loaded.report.attention
    trainer = Trainer(
        run.engine, loader, forward=lambda model, batch: forward_logits(model, batch, backend), job=job, stop=run.stop
    )
    run.metrics = _metrics(run) if topology.rank == 0 else None
    trainer.hooks = _hooks(run)
    try:
        # a stop cut it short; the checkpoint was still saved
        if first_step and _evaluation_is_missing(run, first_step):
            _evaluate(run, StepInfo.before_training(first_step, tokens_seen=first_step * job.tokens_per_step))
        last = trainer.fit(first_step)
        return _end(run, last)
    finally:
        loader.close()
        if run.metrics:
            run.metrics.close()


def _hooks(run: Run) -> list[Hook]:
    """In order: metrics, evaluation, checkpoint."""
    config, last = run.config, run.prepared.plan.num_steps
    hooks = [Hook(run.metrics, every=1)] if run.metrics else []
    hooks.append(_evaluation_hook(run))
    hooks.append(Hook(lambda info: _save(run, info), every=config.checkpoint.every_steps, at=frozenset({last})))
    return hooks


def _evaluation_hook(run: Run) -> Hook:
    at = frozenset({0, run.prepared.plan.num_steps, *run.config.eval.at_steps})
    return Hook(lambda info: _evaluate(run, info), every=run.config.eval.every_steps, at=at)


def _evaluation_is_missing(run: Run, step: int) -> bool:
    """Due at ``step`` but not in the run folder; as rank 0 sees it, for all ranks must evaluate or none."""
    answer = [_evaluation_hook(run).is_due(step) and not run.rundir.eval_file(step).exists()]
    if run.topology.world_size > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def _metrics(run: Run) -> MetricsHook:
    config, plan = run.config, run.prepared.plan
    sinks: list[Sink] = [JsonlSink(run.rundir.metrics), ConsoleSink(num_steps=plan.num_steps, title=config.run.name)]
    if config.log.wandb != "disabled":
        details = config.model_dump(mode="json")
        sinks.append(WandbSink(mode=config.log.wandb, name=config.run.name, folder=run.rundir.root, config=details))
    flops = cost_of(run.prepared, run.loaded, run.topology).flops_per_token
    peak = device_peak_flops(run.topology.device)
    throughput = Throughput(
        tokens_per_step=plan.global_batch_rows * plan.seq_len,
        flops_per_token=float(flops or 0),
        peak_flops=peak * run.topology.world_size if peak and flops else None,
    )
    return MetricsHook(sinks, config.log.every_steps, throughput, lambda step: tokens_seen(plan, step))


def _evaluate(run: Run, info: StepInfo) -> None:
    spec = EvalSpec(
        seq_len=run.prepared.plan.seq_len,
        tokens_per_source=run.config.eval.tokens_per_source,
        micro_batch_size=run.config.train.micro_batch_size,
        backend=run.loaded.report.attention,
        device=run.topology.device,
    )
    sources = {name: held_out(store) for name, store in run.prepared.heldout_stores.items()}
    started = time.perf_counter()
    record = evaluate(
        run.engine.model,
        sources,
        spec,
        step=info.step,
        tokens_seen=info.tokens_seen,
        should_stop=lambda: run.stop.is_raised,
    )
    run.evaluation_cut_short = record is None
    if record is not None and run.topology.rank == 0:
        write_eval(run.rundir.eval_file(info.step), record)
        losses = {name: source.loss for name, source in record.sources.items()}
        run.event("eval", info.step, seconds=round(time.perf_counter() - started, 3), losses=losses)
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        print(f"held-out loss after step {info.step}: {shown}", flush=True)


def _save(run: Run, info: StepInfo) -> None:
    """Save and prune. A periodic save that fails is reported and the run goes on; the last one, or one to stop at,
    must succeed.
    """
    must_succeed = info.step == run.prepared.plan.num_steps or run.stop.agreed(run.topology.device)
    started = time.perf_counter()
    try:
        _write_checkpoint(run, info)
    except OSError as error:
        run.event("checkpoint_failed", info.step, reason=str(error))
        if must_succeed:
            raise
        if run.topology.rank == 0:
            print(f"WARNING: no checkpoint after step {info.step}: {error}", file=sys.stderr, flush=True)
        return
    seconds = round(time.perf_counter() - started, 3)
    pruned = prune(run.rundir.checkpoints, keep_last=run.config.checkpoint.keep_last) if run.topology.rank == 0 else []
    run.event("checkpoint", info.step, seconds=seconds, pruned=[folder.name for folder in pruned])


def _write_checkpoint(run: Run, info: StepInfo) -> None:
    meta = CheckpointMeta(
        step=info.step,
        tokens_seen=info.tokens_seen,
        tokens_by_source=tokens_seen(run.prepared.plan, info.step),
        optimizer_steps=run.engine.optimizer_steps,
        seed=run.config.run.seed,
        plan_fingerprint=run.prepared.plan.fingerprint,
        parameter_shapes={name: list(shape) for name, shape in run.engine.parameter_shapes().items()},
        model_config=model_config(run.loaded),
        run_config=run.config.model_dump(mode="json"),
        written_by={**environment(run.topology), "zero_stage": run.config.deepspeed.zero_stage},
    )
    folder = run.rundir.checkpoint(info.step)
    topology = run.topology
    save_checkpoint(folder, run.engine.owned_fragments(), meta, rank=topology.rank, world_size=topology.world_size)


def _end(run: Run, info: StepInfo) -> int:
    """Finish, or save and leave because all ranks agreed to stop."""
    if run.metrics:
        run.metrics.flush()  # before the last words, not behind them
    if info.step >= run.prepared.plan.num_steps and not run.evaluation_cut_short:
        run.event("finish", info.step)
        if run.topology.rank == 0:
            print(f"finished: {run.rundir.root}", flush=True)
        return 0
    if not is_usable(run.rundir.checkpoint(info.step)):
        _save(run, info)
    run.event("sigterm", info.step, signal=run.stop.signal_name)
    if run.topology.rank == 0:
        print(f"stopped after step {info.step}, saved; continue with: cpt resume {run.rundir.root}", flush=True)
    return EXIT_STOPPED
