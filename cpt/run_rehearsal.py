"""Before the first step: one forward and backward pass, and one update at rate 0, on each source alone.

The micro-batches have the size of the largest ones to come, in the longest rows, and where gradients accumulate, on top
of another one's gradients. So memory that does not suffice shows now, not in an hour; and a source on which the base
model's loss or gradient is not finite, or far from the others', shows by name. Nothing is left of it: the weights do
not move, the moments are cleared, and no step's random numbers or rows depend on what came before.

Only a new run rehearses. In one that goes on, the first step comes as soon as a rehearsal would; memory that does not
suffice is explained there just the same.
"""

import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from cpt.announce import cost_of, model_config
from cpt.checkpoint.portable import Fragment
from cpt.data.batch import Batch
from cpt.data.loader import Loader
from cpt.fit_memory import Device, settings_that_fit
from cpt.live_run import Run
from cpt.train.guard import NonFiniteError
from cpt.train.trainer import Forward

GIB = 2**30
ROOM = 0.95  # of the memory: a setting predicted to need more is not proposed
# torch's words where the operating system refuses memory on a CPU; a GPU has an exception of its own.
_REFUSED = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory", re.IGNORECASE)


def rehearse(run: Run, loader: Loader, forward: Forward) -> None:
    """Raises RuntimeError: a loss or gradient is not finite, by the source's name."""
    lines = []
    for index, source in enumerate(run.prepared.plan.sources):
        if run.stop.agreed(run.topology.device):
            break
        run.phases.beat()
        lines.append(f"{source.name} {_pass_over(run, loader.first_rows(index), forward, name=source.name)}")
    run.engine.restore(_forget_moments, optimizer_steps=0)
    if run.topology.rank == 0:
        print(f"before the first step: {'; '.join(lines)}", flush=True)


def _pass_over(run: Run, batch: Batch, forward: Forward, *, name: str) -> str:
    """Loss per token over all ranks and gradient norm, in words."""
    device, sums = run.topology.device, torch.zeros(2, dtype=torch.float64)
    there = batch.to(device)

    def loss() -> torch.Tensor:
        losses = forward(run.engine.model, there)
        sums[0], sums[1] = float(losses.total.detach()), batch.num_counted
        return losses.total / max(1, batch.num_counted)

    try:
        norm = run.engine.rehearse(loss)
    except NonFiniteError as error:
        found = f"loss {float(sums[0]) / max(1.0, float(sums[1])):.3g} nats per token, gradient not finite"
        fix = "look at its rows (cpt data inspect), or at the weights; with train.precision=fp32 too?"
        raise RuntimeError(f"before the first step: source {name}: {found}; {fix}") from error
    summed = sums.to(device)
    if run.topology.world_size > 1:
        dist.all_reduce(summed)
    return f"{float(summed[0]) / max(1.0, float(summed[1])):.2f} nats norm {norm:.3g}"


def _forget_moments(fragment: Fragment) -> None:
    for kind, tensor in fragment.state.items():
        if kind != "param":
            tensor.zero_()


@contextmanager
def explaining_memory(run: Run) -> Iterator[None]:
    """Turns "out of memory" into the numbers and the settings that would fit.

    Raises:
        RuntimeError: the explanation.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(memory_words(run, str(error))) from error
    except RuntimeError as error:
        if not _REFUSED.search(str(error)):
            raise
        raise RuntimeError(memory_words(run, str(error))) from error


def memory_words(run: Run, refusal: str) -> str:
    """What was asked for, what there is, what the run should need by formula, and what would need less."""
    there = available_bytes(run.topology.device)
    prediction = cost_of(run.prepared, run.loaded, run.topology).memory
    lines = [f"out of memory on rank {run.topology.rank}: {' '.join(refusal.split())[:300]}"]
    lines.append(f"  this {run.topology.device.type} process may use {there / GIB:.2f} GiB")
    if prediction is not None:
        terms = ", ".join(f"{name} {value / GIB:.2f}" for name, value in prediction.terms.items())
        lines.append(f"  by formula the run needs {prediction.total / GIB:.2f} GiB per process: {terms}")
    lines.append("  settings that need less:")
    lines += [f"    {words}" for words in cheaper_settings(run, there)]
    return "\n".join(lines)


def cheaper_settings(run: Run, available: int) -> list[str]:
    """Changes that by formula fit, the mildest first; what saves memory in general where none is known to fit."""
    device = Device(run.topology.world_size, int(ROOM * available), on_gpu=run.topology.on_gpu)
    offers = settings_that_fit(run.config, model_config(run.loaded), device)
    if offers:
        return [f"{' '.join(each.overrides)}   (by formula {each.needs.total / GIB:.2f} GiB)" for each in offers]
    return [
        f"train.micro_batch_size={max(1, run.config.train.micro_batch_size // 2)} or less   (not known to suffice)",
        "train.activation_checkpointing=full   (not known to suffice)",
        "a smaller model, shorter rows (data.seq_len), or more processes with deepspeed.zero_stage=3",
    ]


def available_bytes(device: torch.device) -> int:
    """Memory that this process may use in all: of its GPU, or what limit and machine leave it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine if limit == resource.RLIM_INFINITY else min(limit, machine)
