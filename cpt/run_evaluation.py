"""When a run evaluates itself on held-out text, and what becomes of the record."""

import sys
import time

import torch.distributed as dist

from cpt.eval.held_out_files import keep_beginnings, keep_evaluation
from cpt.eval.perplexity import EvalSpec, evaluate, held_out
from cpt.live_run import Run
from cpt.prepare import tokenizer_path
from cpt.train.hooks import Hook
from cpt.train.stepinfo import StepInfo


def evaluation_hook(run: Run) -> Hook:
    at = frozenset({0, run.prepared.plan.num_steps, *run.config.eval.at_steps})
    return Hook(lambda info: evaluate_now(run, info), every=run.config.eval.every_steps, at=at)


def evaluation_is_missing(run: Run, step: int) -> bool:
    """Due at ``step`` but not in the run folder; as rank 0 sees it, for all ranks must evaluate or none."""
    answer = [evaluation_hook(run).is_due(step) and not run.rundir.eval_file(step).exists()]
    if run.topology.world_size > 1:
        dist.broadcast_object_list(answer)
    return answer[0]


def evaluate_now(run: Run, info: StepInfo) -> None:
    spec = EvalSpec(
        seq_len=run.prepared.plan.seq_len,
        tokens_per_source=run.config.eval.tokens_per_source,
        micro_batch_size=run.config.train.micro_batch_size,
        backend=run.loaded.report.attention,
        device=run.topology.device,
        sequence_parallel=run.config.deepspeed.sequence_parallel,
    )
    sources = {name: held_out(store) for name, store in run.prepared.heldout_stores.items()}
    started = time.perf_counter()
    with run.phases("evaluation"):
        found = evaluate(
            run.engine.model,
            sources,
            spec,
            step=info.step,
            tokens_seen=info.tokens_seen,
            should_stop=lambda: _asked_to_stop(run),
        )
    run.evaluation_cut_short = found is None
    run.stop.is_agreed = run.stop.is_agreed or found is None  # it is all ranks that left
    if found is not None and run.topology.rank == 0:
        losses = {name: source.loss for name, source in found.record.sources.items()}
        try:
            keep_evaluation(run.rundir, found)
        except OSError as error:  # a full disk: the run goes on, but does not finish without the last record
            run.event("eval_failed", info.step, reason=str(error), losses=losses)
            print(f"WARNING: no record of the evaluation after step {info.step}: {error}", file=sys.stderr, flush=True)
        else:
            run.event("eval", info.step, seconds=round(time.perf_counter() - started, 3), losses=losses)
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        print(f"held-out loss after step {info.step}: {shown}", flush=True)
        trouble = keep_beginnings(run.rundir, found, run.prepared.heldout_stores, tokenizer_path(run.config))
        if trouble:
            print(f"WARNING: {trouble}", file=sys.stderr, flush=True)


def _asked_to_stop(run: Run) -> bool:
    """Asked before every forward pass, and so the place to say that the evaluation goes on."""
    run.phases.beat()
    return run.stop.is_raised
