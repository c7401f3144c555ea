"""The training loop. Finished objects come in; nothing is built here, and no feature has a branch here.

Loss of a step = sum over the counted tokens of the global batch / their number, whatever the accumulation, the masks
or the world size. Beside the gradients, ranks talk once a step: loss sums, whether one of them was asked to stop, and
the counts of the next step, whose rows are fetched before.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpt.data.batch import Batch
from cpt.data.loader import Loader
from cpt.data.skipping import SkippingLoader
from cpt.rundir import DataError
from cpt.train.engine import Engine
from cpt.train.guard import BadStep, Guard, StopFlag
from cpt.train.hooks import Hook
from cpt.train.losses import Losses, sums_by_source
from cpt.train.phases import Phases
from cpt.train.spikes import SpikeDetector
from cpt.train.stepinfo import StepInfo

Forward = Callable[[torch.nn.Module, Batch], Losses]
Seen = list[tuple[Batch, torch.Tensor]]  # micro-batches of a step and their per-token losses (B, T)


@dataclass(frozen=True)
class Job:
    """The constants of a run that the loop needs."""

    num_steps: int
    tokens_per_step: int
    source_names: Sequence[str]
    seed: int
    lr_at: Callable[[int], float]  # number of the update, from 1 -> learning rate
    pairs_of: Callable[[Batch], int] = lambda batch: batch.attended_pairs  # sliding windows count as such


@dataclass(frozen=True)
class Work:
    """What one step is made of: this rank's micro-batches, and over all ranks their counted tokens and attended pairs.

    ``error``: why they could not be read; it is raised when their step comes, not while the one before is unfinished.
    """

    step: int
    batches: Sequence[Batch]
    counted: int
    attended: int
    error: Exception | None = None


def give_up(bad: BadStep, seen: Seen) -> StepInfo:
    """What becomes of a bad step where nobody knows better."""
    raise bad


class Trainer:
    """Trains from a step to the last one; after each step runs the hooks that are due."""

    def __init__(
        self, engine: Engine, loader: Loader | SkippingLoader, *, forward: Forward, job: Job, stop: StopFlag
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.forward = forward
        self.job = job
        self.stop = stop
        self.hooks: list[Hook] = []
        self.phases = Phases()
        self.guard = Guard(SpikeDetector(None, 1))
        self.recover: Callable[[BadStep, Seen], StepInfo] = give_up  # -> the step that training goes on from
        self._ahead: Work | None = None
        self._seen: Seen = []

    def fit(self, first_step: int) -> StepInfo:
        """Train until the plan ends or all ranks agree to stop; returns the last step's record.

        Raises:
            BadStep: as ``recover`` lets it through.
        """
        info = StepInfo.before_training(first_step, tokens_seen=first_step * self.job.tokens_per_step)
        if first_step == 0:
            self._run_hooks(info)
        self.stop.agreed(self.engine.topology.device)
        while info.step < self.job.num_steps and not self.stop.is_agreed:
            try:
                info = self.step(info.step)
            except BadStep as bad:
                self._ahead = None
                info = self.recover(bad, self._seen)
                continue
            self.guard.accept(info)
            self._run_hooks(info)
        return info

    def step(self, done: int) -> StepInfo:
        """Take one optimizer update on the rows of step ``done`` (counted from 0), or none where no token counts.

        Raises:
            BadStep: this step must not stand; under ZeRO 0, or where it shows in the loss, it has not been taken.
        """
        topology, names = self.engine.topology, self.job.source_names
        started = time.perf_counter()
        # Dropout and the like depend on (seed, step, rank) alone, so there is no generator state to save.
        torch.manual_seed(hash((self.job.seed, done, topology.rank)) & 0x7FFF_FFFF_FFFF_FFFF)
        work = self._work_of(done)
        sums = torch.zeros(2, len(names), dtype=torch.float64, device=topology.device)
        self._seen = []
        self.engine.expect(len(work.batches))
        for cpu_batch in work.batches if work.counted else ():
            batch = cpu_batch.to(topology.device)
            with self.phases("forward"):
                losses = self.forward(self.engine.model, batch)
            with self.phases("backward"):
                self.engine.backward(losses.total / work.counted)
            sums += sums_by_source(losses.per_token_BT, batch.labels_BT, batch.source_ids_B, num_sources=len(names))
            self._seen.append((cpu_batch, losses.per_token_BT))
        totals, counts = self._exchange(sums, done + 1)
        loss_sums = dict(zip(names, totals, strict=True))
        counted = dict(zip(names, map(int, counts), strict=True))
        self.guard.check_losses(done + 1, loss_sums, counted)
        lr, grad_norm = self.job.lr_at(done + 1), 0.0
        if work.counted:
            with self.phases("optimizer"):
                grad_norm = self.engine.step(lr, judge=lambda norm: self.guard.check_norm(done + 1, norm))
        return StepInfo(
            step=done + 1,
            tokens_seen=(done + 1) * self.job.tokens_per_step,
            loss_sums=loss_sums,
            counted=counted,
            lr=lr,
            grad_norm=grad_norm,
            step_seconds=time.perf_counter() - started,
            seconds=self.phases.take(),
            attended_pairs=work.attended,
        )

    def _work_of(self, step: int) -> Work:
        """The rows of ``step``: fetched by the step before, or now after a start or a rollback."""
        if self._ahead is None or self._ahead.step != step:
            self._exchange(torch.zeros(2, 0, dtype=torch.float64, device=self.engine.topology.device), step)
        work, self._ahead = self._ahead, None
        assert work is not None
        if work.error:
            raise work.error
        return work

    def _exchange(self, sums: torch.Tensor, coming: int) -> tuple[list[float], list[float]]:
        """The one small collective call of a step: adds up ``sums`` (2, S), spreads a request to stop, and fetches and
        counts the rows of the ``coming`` step.
        """
        batches, error = self._read(coming)
        own = [sum(batch.num_counted for batch in batches), sum(map(self.job.pairs_of, batches))]
        extra = torch.tensor([*own, self.stop.is_raised], dtype=torch.float64, device=sums.device)
        packed = torch.cat([sums.flatten(), extra])  # float64 holds counts exactly up to 2^53
        with self.phases("communication"):
            if self.engine.topology.world_size > 1:
                dist.all_reduce(packed)
            *added, counted, attended, stops = packed.tolist()
        self.stop.is_agreed = self.stop.is_agreed or stops > 0
        self._ahead = Work(coming, batches, int(counted), int(attended), error)
        half = len(added) // 2
        return added[:half], added[half:]

    def _read(self, step: int) -> tuple[Sequence[Batch], Exception | None]:
        if step >= self.job.num_steps:
            return [], None
        try:
            with self.phases("data"):
                return self.loader.step(step), None
        except (DataError, RuntimeError, OSError) as error:  # raised by _work_of
            return [], error

    def _run_hooks(self, info: StepInfo) -> None:
        for hook in self.hooks:
            if hook.is_due(info.step):
                hook.function(info)
