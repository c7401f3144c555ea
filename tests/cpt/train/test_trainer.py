"""The loop: one exchange a step, a bad step handed on, and no update where no token counts."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cpt.train.trainer
from cpt.data.batch import Batch, collate
from cpt.data.packing import IGNORE_INDEX, PackedRow
from cpt.rundir import DataError
from cpt.train.deepspeed_config import EngineSpec
from cpt.train.engine import Engine, Topology, start_process_group, stop_process_group
from cpt.train.guard import BadStep, NonFiniteError, StopFlag
from cpt.train.hooks import Hook
from cpt.train.losses import Losses
from cpt.train.optim import OptimizerSpec, build_optimizer
from cpt.train.stepinfo import StepInfo
from cpt.train.trainer import Job, Trainer


@pytest.fixture(scope="module")
def topology() -> Iterator[Topology]:
    yield start_process_group()
    stop_process_group()


class Numbers(torch.nn.Module):
    """A model of one weight: the loss of a token is weight x its id."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1, 1))


def forward(model: Any, batch: Batch) -> Losses:
    counts = (batch.labels_BT != IGNORE_INDEX).float()
    losses_BT = model.module.weight * batch.input_ids_BT * counts
    return Losses(losses_BT.sum(), losses_BT.detach())


class Rows:
    """A loader of one row of two tokens per micro-batch, whose ids are the step; some have no label."""

    def __init__(self, *, blank: tuple[int, ...] = (), missing: tuple[int, ...] = ()) -> None:
        self.blank = blank
        self.missing = missing
        self.asked: list[int] = []

    def step(self, step: int) -> list[Batch]:
        self.asked.append(step)
        if step in self.missing:
            raise DataError(f"step {step} cannot be read")
        labels = np.full(2, IGNORE_INDEX if step in self.blank else 1)
        return [collate([PackedRow(np.full(2, step + 1), labels, np.arange(2), np.zeros(2, np.int64))], [0])]


def trainer(topology: Topology, loader: Rows, *, steps: int = 4, stop: StopFlag | None = None) -> Trainer:
    model = Numbers()
    optimizer = build_optimizer(model, OptimizerSpec("adamw", weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8))
    spec = EngineSpec(0, "fp32", micro_batch_size=1, grad_accum_steps=1, max_grad_norm=1e9, extra={})
    job = Job(steps, 2, ["web"], seed=1, lr_at=lambda update: 0.1)
    made: Any = loader
    return Trainer(
        Engine(model, optimizer, spec=spec, topology=topology), made, forward=forward, job=job, stop=stop or StopFlag()
    )


def weight(trainer: Trainer) -> float:
    (fragment,) = trainer.engine.fragments()
    return float(fragment.state["param"])


def test_fit_and_step_fit_on_one_screen_and_the_file_stays_small() -> None:
    assert all(len(inspect.getsource(function).splitlines()) <= 60 for function in (Trainer.fit, Trainer.step))
    assert len(Path(cpt.train.trainer.__file__).read_text().splitlines()) <= 300


def test_losses_are_those_of_each_step_and_the_rows_of_the_next_one_are_read_before(topology: Topology) -> None:
    made, seen = trainer(topology, loader := Rows()), []
    made.hooks = [Hook(seen.append, every=1)]
    last = made.fit(0)
    assert loader.asked == [0, 1, 2, 3]
    assert [info.step for info in seen] == [1, 2, 3, 4] and last is seen[-1]
    assert [info.counted for info in seen] == [{"web": 2}] * 4
    assert seen[0].loss_sums == {"web": 2.0} and seen[0].grad_norm == 1.0


def test_a_step_without_a_counted_token_makes_no_update(topology: Topology) -> None:
    made = trainer(topology, Rows(blank=(1,)))
    weights = []
    made.hooks = [Hook(lambda info: weights.append(weight(made)), every=1)]
    made.fit(0)
    assert weights[0] == weights[1] and weights[2] < weights[1]
    assert made.engine.optimizer_steps == 3


def test_rows_that_cannot_be_read_end_the_run_only_when_their_step_comes(topology: Topology) -> None:
    made, done = trainer(topology, Rows(missing=(2,))), []
    made.hooks = [Hook(done.append, every=1)]
    with pytest.raises(DataError, match="step 2 cannot be read"):
        made.fit(0)
    assert [info.step for info in done] == [1, 2]


def test_a_request_that_comes_in_a_step_ends_the_run_after_that_step(topology: Topology) -> None:
    stop, made = StopFlag(), None
    made = trainer(topology, Rows(), stop=stop)

    def ask(info: StepInfo) -> None:
        stop.reason = "SIGTERM" if info.step == 2 else stop.reason

    made.hooks = [Hook(ask, every=1)]
    assert made.fit(0).step == 3  # the hook came after step 2 had asked everybody


def test_a_request_before_the_first_step_is_obeyed_before_it(topology: Topology) -> None:
    stop = StopFlag()
    stop.reason = "SIGTERM"
    loader = Rows()
    assert trainer(topology, loader, stop=stop).fit(0).step == 0 and loader.asked == []


@pytest.mark.parametrize("recovers", [True, False])
def test_a_bad_step_is_handed_on_with_its_losses_before_the_weights_move(topology: Topology, recovers: bool) -> None:
    made = trainer(topology, Rows())
    begin = weight(made)
    met: list[tuple[BadStep, float, float]] = []

    def nan_at_step_2(model: Any, batch: Batch) -> Losses:
        losses = forward(model, batch)
        factor = torch.nan if batch.input_ids_BT[0, 0] == 2 and not met else 1.0
        return Losses(losses.total * factor, losses.per_token_BT * factor)

    def recover(bad: BadStep, seen: Any) -> StepInfo:
        ((_, losses_BT),) = seen
        met.append((bad, float(losses_BT.sum()), weight(made)))

        def at_the_beginning(fragment: Any) -> None:
            for kind, tensor in fragment.state.items():
                tensor.fill_(begin if kind == "param" else 0.0)

        made.engine.restore(at_the_beginning, optimizer_steps=0)
        return StepInfo.before_training(0, tokens_seen=0)

    made.forward = nan_at_step_2
    if not recovers:
        with pytest.raises(NonFiniteError, match="step 2: the loss of web is not finite"):
            made.fit(0)
        return
    made.recover = recover
    seen: list[StepInfo] = []
    made.hooks = [Hook(seen.append, every=1)]
    made.fit(0)
    ((bad, loss, at),) = met
    assert bad.step == 2 and np.isnan(loss) and at == pytest.approx(begin - 0.1 - 0.01, rel=1e-4)
    assert [info.step for info in seen] == [1, 1, 2, 3, 4]
    untroubled = trainer(topology, Rows())
    untroubled.fit(0)
    assert weight(made) == weight(untroubled)  # nothing of the gradient that was refused is left
