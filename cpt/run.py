"""The only place that turns a config and a plan into objects, and a run folder into a run that goes on."""

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from rich.console import Console

from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, latest_complete
from cpt.checkpoint.prune import prune
from cpt.checkpoint.save import save_checkpoint
from cpt.config import ConfigError, Problem, RunConfig, apply_override, to_yaml, validate
from cpt.data.loader import Loader
from cpt.data.sampler import tokens_seen
from cpt.eval.perplexity import EvalSpec, evaluate, held_out
from cpt.eval.records import write_eval
from cpt.model import size
from cpt.model.build import LoadedModel, Needs, build_model, load_tensors
from cpt.model.kernels import forward_logits
from cpt.plan import Plan, read_plan, write_plan
from cpt.prepare import Prepared, plan_facts, prepare, render_plan
from cpt.rundir import DataError, RunDir, write_atomic
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

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def event(self, name: str, step: int, **details: object) -> None:
        """Add a line to events.jsonl, from rank 0."""
        if self.topology.rank == 0:
            line = {"time": time.time(), "step": step, "event": name, **details}
            with self.rundir.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_run_config(run_dir: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config that a run folder was started with, with overrides that leave the plan as it is (such as deepspeed.zero_stage)."""
    path = RunDir(run_dir).config
    if not path.is_file():
        raise DataError(f"{run_dir}: not a run folder, it has no {path.name}")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable YAML ({error})") from None
    raw["run"]["dir"] = str(run_dir.absolute().parent)  # a run folder may have been moved
    raw["run"]["name"] = run_dir.absolute().name
    for override in overrides:
        apply_override(raw, override)
    return validate(raw)


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
        _check_world(config, topology.world_size)
        rundir = RunDir(config.run_dir)
        with_lock = _claim(rundir, prepared, resume=resume) if topology.rank == 0 else None
        run, first_step = _build(prepared, topology, stop, resume=resume)
        code = _fit(run, first_step)
        if with_lock:
            with_lock.close()
        return code
    finally:
        stop_process_group()


def _check_world(config: RunConfig, world_size: int) -> None:
    rows, micro = config.global_batch_rows, config.train.micro_batch_size
    if rows % (micro * world_size):
        unit = micro * world_size * config.data.seq_len
        nearest = max(1, round(config.train.global_batch_tokens / unit)) * unit
        rule = f"{rows} rows do not divide into {world_size} ranks x {micro} rows (train.micro_batch_size)"
        fix = f"the nearest that does is {nearest}"
        raise ConfigError(Problem("train.global_batch_tokens", config.train.global_batch_tokens, rule, fix))


def _claim(rundir: RunDir, prepared: Prepared, *, resume: bool) -> IO[str]:
    """Make the folder this run's own: no other process, config or data may be in it. Returns the lock, held while open."""
    rundir.root.mkdir(parents=True, exist_ok=True)
    lock = (rundir.root / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(f"{rundir.root}: another process is training in this run folder; wait for it or stop it") from None
    if resume:
        _check_same_plan(rundir, prepared.plan)
        return lock
    if rundir.config.exists():
        raise ConfigError(_folder_in_use(rundir, prepared.config))
    for folder in (rundir.checkpoints, rundir.evals, rundir.logs):
        folder.mkdir(exist_ok=True)
    write_plan(rundir.plan, prepared.plan)
    write_atomic(rundir.config, to_yaml(prepared.config))
    return lock


def _check_same_plan(rundir: RunDir, plan: Plan) -> None:
    stored = read_plan(rundir.plan)
    if stored.fingerprint != plan.fingerprint:
        rule = f"the stores or the config changed: the run was planned as {stored.fingerprint}, now {plan.fingerprint}"
        raise DataError(f"{rundir.plan}: {rule}; put the stores back, or start a new run with model.init_from")


def _folder_in_use(rundir: RunDir, config: RunConfig) -> Problem:
    old, new = yaml.safe_load(rundir.config.read_text()), yaml.safe_load(to_yaml(config))
    changed = sorted(
        f"{section}.{field}"
        for section in new
        for field in new[section]
        if old.get(section, {}).get(field) != new[section][field]
    )
    rule = f"the folder holds another config (differs in {', '.join(changed)})" if changed else "this run exists already"
    fix = f"choose another run.name, or continue it with: cpt resume {rundir.root}"
    return Problem("run.name", str(rundir.root), rule, fix)


def _build(prepared: Prepared, topology: Topology, stop: StopFlag, *, resume: bool) -> tuple[Run, int]:
    config, rundir = prepared.config, RunDir(prepared.config.run_dir)
    checkpoint, skipped = latest_complete(rundir.checkpoints) if resume else (None, [])
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
    _announce(run, first_step, skipped, resume=resume)
    return run, first_step


def _load_model(prepared: Prepared, topology: Topology, checkpoint: Checkpoint | None) -> LoadedModel:
    """The model's weights: of this run's checkpoint, of another run's (init_from), from Hugging Face, or fresh."""
    config = prepared.config
    needs = Needs(seq_len=config.data.seq_len, vocab_size=prepared.vocab_size, seed=config.run.seed)
    origin = config.model.init_from
    if checkpoint is None and origin and (Path(origin) / "meta.json").is_file():
        other = Checkpoint.open(Path(origin))
        loaded = build_from_meta(config, other.meta, needs, topology.device)
        load_tensors(loaded.model, other.tensors(), origin=origin)
        return loaded
    if checkpoint is not None:  # the engine fills in the weights, each rank its own part
        return build_from_meta(config, checkpoint.meta, needs, topology.device)
    return build_model(config.model, needs, device=topology.device)


def build_from_meta(config: RunConfig, meta: CheckpointMeta, needs: Needs, device: torch.device) -> LoadedModel:
    """A model of the shape that a checkpoint was written from, its weights still to be filled in."""
    section = config.model.model_copy(update={"init_from": None, "fresh": meta.model_config})
    return build_model(section, needs, device=device)


def _engine_spec(config: RunConfig, topology: Topology) -> EngineSpec:
    return EngineSpec(
        zero_stage=config.deepspeed.zero_stage,
        precision=config.train.precision,
        micro_batch_size=config.train.micro_batch_size,
        grad_accum_steps=config.global_batch_rows // (config.train.micro_batch_size * topology.world_size),
        max_grad_norm=config.train.max_grad_norm,
        extra=config.deepspeed.extra,
    )


def _announce(run: Run, first_step: int, skipped: list[str], *, resume: bool) -> None:
    """Say what starts: the plan, the model, its cost, and where each source stands; record the environment."""
    run.event("resume" if resume else "start", first_step, world_size=run.topology.world_size, skipped_checkpoints=skipped)
    if run.topology.rank != 0:
        return
    write_atomic(run.rundir.environment, json.dumps(_environment(run.topology), indent=1))
    console = Console(soft_wrap=True, highlight=False)
    console.print(render_plan(plan_facts(run.prepared)))
    console.print(run.loaded.report.render())
    config, model = run.config, _model_config(run)
    flops = size.flops_per_token(model, run.config.data.seq_len, num_params=run.loaded.report.parameters)
    memory = size.training_memory_bytes(
        run.loaded.report.parameters,
        zero_stage=config.deepspeed.zero_stage,
        world_size=run.topology.world_size,
        precision=config.train.precision,
        activations=size.activation_bytes(
            model,
            seq_len=config.data.seq_len,
            micro_batch_size=config.train.micro_batch_size,
            precision=config.train.precision,
        )
        or 0,
    )
    console.print(size.render_size(run.loaded.report.parameters, flops, memory))
    for reason in skipped:
        console.print(f"[yellow]checkpoint skipped:[/] {reason}")
    if resume:
        seen = tokens_seen(run.prepared.plan, first_step)
        epochs = {s.name: seen[s.name] / (s.num_rows * run.prepared.plan.seq_len) for s in run.prepared.plan.sources}
        position = ", ".join(f"{name} {tokens:,} tokens (epoch {epochs[name]:.2f})" for name, tokens in seen.items())
        console.print(f"resumes after step {first_step} of {run.prepared.plan.num_steps}: {position}")


def _model_config(run: Run) -> dict[str, Any]:
    config: Any = run.loaded.model.config
    return dict(json.loads(config.to_json_string(use_diff=False)))


def _environment(topology: Topology) -> dict[str, object]:
    """What is needed to make sense of the numbers later; no host names, no environment variables, no secrets."""
    packages = ("cpt", "torch", "deepspeed", "transformers", "numpy")
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name(topology.device) if topology.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in packages},
        "git_commit": git.stdout.strip() or None,
        "device": device,
        "world_size": topology.world_size,
        "command": " ".join(["cpt", *sys.argv[1:]]),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
        run.prepared.train_stores,
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
        last = trainer.fit(first_step)
        return _end(run, last)
    finally:
        loader.close()
        if run.metrics:
            run.metrics.close()


def _hooks(run: Run) -> list[Hook]:
    """In order: metrics, evaluation, checkpoint; a checkpoint that exists has been evaluated."""
    config, last = run.config, run.prepared.plan.num_steps
    hooks = [Hook(run.metrics, every=1)] if run.metrics else []
    at = frozenset({0, last, *config.eval.at_steps})
    hooks.append(Hook(lambda info: _evaluate(run, info), every=config.eval.every_steps, at=at))
    hooks.append(Hook(lambda info: _save(run, info), every=config.checkpoint.every_steps, at=frozenset({last})))
    return hooks


def _metrics(run: Run) -> MetricsHook:
    config, plan = run.config, run.prepared.plan
    sinks: list[Sink] = [JsonlSink(run.rundir.metrics), ConsoleSink(num_steps=plan.num_steps, title=config.run.name)]
    if config.log.wandb != "disabled":
        details = config.model_dump(mode="json")
        sinks.append(WandbSink(mode=config.log.wandb, name=config.run.name, folder=run.rundir.root, config=details))
    flops = size.flops_per_token(_model_config(run), plan.seq_len, num_params=run.loaded.report.parameters)
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
    if record is not None and run.topology.rank == 0:
        write_eval(run.rundir.eval_file(info.step), record)
        losses = {name: source.loss for name, source in record.sources.items()}
        run.event("eval", info.step, seconds=round(time.perf_counter() - started, 3), losses=losses)
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        print(f"held-out loss after step {info.step}: {shown}", flush=True)


def _save(run: Run, info: StepInfo) -> None:
    """Save and prune. A periodic save that fails is reported and the run goes on; the last save must succeed."""
    final = info.step == run.prepared.plan.num_steps
    started = time.perf_counter()
    try:
        save_now(run, info)
    except OSError as error:
        run.event("checkpoint_failed", info.step, reason=str(error))
        if final:
            raise
        print(f"WARNING: no checkpoint after step {info.step}: {error}", file=sys.stderr, flush=True)
        return
    seconds = round(time.perf_counter() - started, 3)
    pruned = prune(run.rundir.checkpoints, keep_last=run.config.checkpoint.keep_last) if run.topology.rank == 0 else []
    run.event("checkpoint", info.step, seconds=seconds, pruned=[folder.name for folder in pruned])


def save_now(run: Run, info: StepInfo) -> None:
    meta = CheckpointMeta(
        step=info.step,
        tokens_seen=info.tokens_seen,
        tokens_by_source=tokens_seen(run.prepared.plan, info.step),
        optimizer_steps=run.engine.optimizer_steps,
        seed=run.config.run.seed,
        plan_fingerprint=run.prepared.plan.fingerprint,
        parameter_shapes={name: list(shape) for name, shape in run.engine.parameter_shapes().items()},
        model_config=_model_config(run),
        run_config=run.config.model_dump(mode="json"),
        written_by={**_environment(run.topology), "zero_stage": run.config.deepspeed.zero_stage},
    )
    folder = run.rundir.checkpoint(info.step)
    topology = run.topology
    save_checkpoint(folder, run.engine.owned_fragments(), meta, rank=topology.rank, world_size=topology.world_size)


def _end(run: Run, info: StepInfo) -> int:
    """Finish, or save and leave because all ranks agreed to stop."""
    if info.step >= run.prepared.plan.num_steps:
        run.event("finish", info.step)
        if run.topology.rank == 0:
            print(f"finished: {run.rundir.root}", flush=True)
        return 0
    if not (run.rundir.checkpoint(info.step) / "COMPLETE").is_file():
        save_now(run, info)
    run.event("sigterm", info.step, signal=run.stop.signal_name)
    if run.topology.rank == 0:
        print(f"stopped after step {info.step}, saved; continue with: cpt resume {run.rundir.root}", flush=True)
    return EXIT_STOPPED
