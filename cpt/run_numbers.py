"""What a run measures of itself: its metrics and where they go, and a trace where one is asked for."""

from collections.abc import Callable

from cpt.announce import cost_of, model_config
from cpt.data.batch import Batch
from cpt.live_run import Run
from cpt.model.size import layer_windows
from cpt.train.metrics import ConsoleSink, JsonlSink, MetricsHook, Sink, Throughput, device_peak_flops
from cpt.train.profiling import StepProfiler
from cpt.train.wandb_sink import WandbSink


def build_metrics(run: Run) -> MetricsHook:
    """The hook that rank 0 calls after every step."""
    config, plan = run.config, run.prepared.plan
    sinks: list[Sink] = [JsonlSink(run.rundir.metrics), ConsoleSink(num_steps=plan.num_steps, title=config.run.name)]
    if config.log.wandb != "disabled":
        details = config.model_dump(mode="json")
        sinks.append(WandbSink(mode=config.log.wandb, name=config.run.name, folder=run.rundir.root, config=details))
    flops = cost_of(run.prepared, run.loaded, run.topology).flops
    peak = device_peak_flops(run.topology.device)
    throughput = Throughput(
        tokens_per_step=plan.global_batch_rows * plan.seq_len,
        flops_per_token=float(flops.per_token if flops else 0),
        flops_per_pair=float(flops.per_pair if flops else 0),
        peak_flops=peak * run.topology.world_size if peak and flops else None,
        num_devices=run.topology.world_size,
    )
    return MetricsHook(sinks, config.log.every_steps, throughput, lambda step: run.skipped.tokens_seen(plan, step))


def build_profiler(run: Run, steps: int) -> StepProfiler | None:
    """Of rank 0, whose steps wait for all others'."""
    if not steps or run.topology.rank != 0:
        return None
    return StepProfiler(run.rundir.profile, steps=steps, phases=run.phases)


def pairs_of(run: Run) -> Callable[[Batch], int]:
    """Counts the (query, key) pairs of a batch that attention has to compute, as the mean over the layers, each with
    its window.
    """
    windows = layer_windows(model_config(run.loaded))
    if not any(windows):
        return lambda batch: batch.attended_pairs

    def count(batch: Batch) -> int:
        pairs = {window: batch.pairs_within(window) if window else batch.attended_pairs for window in set(windows)}
        return round(sum(pairs[window] for window in windows) / len(windows))

    return count
