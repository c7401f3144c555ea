"""The training loop. Finished objects come in; nothing is built here, and no feature has a branch here.

Loss of a step = sum over the counted tokens of the global batch / their number, whatever the accumulation, the masks
or the world size.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpt.data.batch import Batch
from cpt.data.loader import Loader
from cpt.train.engine import Engine
from cpt.train.guard import StopFlag, check_finite
from cpt.train.hooks import Hook
from cpt.train.losses import sums_by_source, token_losses
from cpt.train.stepinfo import StepInfo

Forward = Callable[[torch.nn.Module, Batch], torch.Tensor]


@dataclass(frozen=True)
class Job:
    """The constants of a run that the loop needs."""

    num_steps: int
    tokens_per_step: int
    source_names: Sequence[str]
    seed: int
    lr_at: Callable[[int], float]  # number of the update, from 1 -> learning rate


class Trainer:
    """Trains from a step to the last one; after each step runs the hooks that are due."""

    def __init__(self, engine: Engine, loader: Loader, *, forward: Forward, job: Job, stop: StopFlag) -> None:
        self.engine = engine
        self.loader = loader
        self.forward = forward
        self.job = job
        self.stop = stop
        self.hooks: list[Hook] = []

    def fit(self, first_step: int) -> StepInfo:
        """Train until the plan ends or all ranks agree to stop; returns the last step's record.

        Raises:
            NonFiniteError: before the optimizer has used such a loss or gradient.
        """
        info = StepInfo.before_training(first_step, tokens_seen=first_step * self.job.tokens_per_step)
        if first_step == 0:
            self._run_hooks(info)
        stopping = self.stop.agreed(self.engine.topology.device)
        while info.step < self.job.num_steps and not stopping:
            info = self.step(info.step)
            self._run_hooks(info)
            stopping = self.stop.agreed(self.engine.topology.device)
        return info

    def step(self, done: int) -> StepInfo:
        """Take one optimizer update on the rows of step ``done`` (counted from 0)."""
        topology, names = self.engine.topology, self.job.source_names
        started = time.perf_counter()
        # Dropout and the like depend on (seed, step, rank) alone, so there is no generator state to save.
        torch.manual_seed(hash((self.job.seed, done, topology.rank)) & 0x7FFF_FFFF_FFFF_FFFF)
        batches = self.loader.step(done)
        data_seconds = time.perf_counter() - started
        counted = self._global_count(batches)
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=topology.device)
        for batch in batches:
            batch = batch.to(topology.device)
            losses_BT = token_losses(self.forward(self.engine.model, batch), batch.labels_BT)
            self.engine.backward(losses_BT.sum() / counted)
            sums += sums_by_source(losses_BT.detach(), batch.labels_BT, batch.source_ids_B, num_sources=len(names))
        if topology.world_size > 1:
            dist.all_reduce(sums)
        totals, counts = sums.tolist()
        check_finite([(f"the loss of {name}", total) for name, total in zip(names, totals, strict=True)], step=done + 1)
        lr = self.job.lr_at(done + 1)
        grad_norm = self.engine.step(lr)
        return StepInfo(
            step=done + 1,
            tokens_seen=(done + 1) * self.job.tokens_per_step,
            loss_sums=dict(zip(names, totals, strict=True)),
            counted=dict(zip(names, map(int, counts), strict=True)),
            lr=lr,
            grad_norm=grad_norm,
            step_seconds=time.perf_counter() - started,
            data_seconds=data_seconds,
        )

    def _global_count(self, batches: Sequence[Batch]) -> int:
        count = torch.tensor(sum(batch.num_counted for batch in batches), device=self.engine.topology.device)
        if self.engine.topology.world_size > 1:
            dist.all_reduce(count)
        return max(1, int(count))

    def _run_hooks(self, info: StepInfo) -> None:
        for hook in self.hooks:
            if hook.is_due(info.step):
                hook.function(info)
