"""Training with faults built in, for tests and benchmarks: the product has no branch for them, so they are patched on.

In this process::

    with faults({"kind": "nan_rows", "step": 7, "rows": [0, 3]}):
        shop.cpt("train", run_file)

In processes of their own, with any verb and any number of ranks::

    python tests/end_to_end/faulty_training.py '[{"kind": "kill", "step": 5, "rank": 1}]' train RUN.yaml --nproc 2

A fault is a mapping:

    kind      nan_rows   the loss of these rows of the step is NaN (as long as they are not blank)
              spike      the labels of the step are shuffled, its rate is 100 times higher ("factor")
              high_rate  the rate alone
              sleep      the rank sleeps for "seconds"; with "every_step" in every step: a slow rank
              stop       the rank stops itself: SIGSTOP
              kill       the rank kills itself: SIGKILL
              signal     the rank sends itself "signal", SIGTERM by default
              raise      the rank raises RuntimeError("injected")
              no_memory  the rank raises torch.OutOfMemoryError
    step      counted from 1; 0: before the first. What follows a step (evaluation, checkpoint) belongs to it
    phase     of cpt.train.phases, "forward" by default, for those kinds that do something at a moment
    rank      default: every rank for what is done to data and rates, 0 for what is done at a moment
    rows      places in the step, for nan_rows; default: all
    once      a file: the fault happens only while it is not there, and makes it. For runs that are restarted
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

VARIABLE = "CPT_TEST_FAULTS"
Fault = Mapping[str, Any]


class Injector:
    """Knows where the run stands and does what the faults say."""

    def __init__(self, given: tuple[Fault, ...]) -> None:
        self.faults = given
        self.step: int | None = None  # None: not training yet
        self.micro_step = 0
        self.rank = int(os.environ.get("RANK", "0"))

    def due(self, *kinds: str, rank: int | None = None) -> list[Fault]:
        return [
            fault
            for fault in self.faults
            if fault["kind"] in kinds
            and (fault["step"] == self.step or (fault.get("every_step") and self.step))
            and fault.get("rank", rank) in (None, self.rank)
        ]

    def happen(self, fault: Fault) -> bool:
        marker = fault.get("once")
        if marker is None:
            return True
        if Path(marker).exists():
            return False
        Path(marker).touch()
        return True

    def at_phase(self, name: str) -> None:
        for fault in self.due("sleep", "stop", "kill", "signal", "raise", "no_memory", rank=0):
            if fault.get("phase", "forward") == name and self.happen(fault):
                self.act(fault)

    def act(self, fault: Fault) -> None:
        import torch

        kind = fault["kind"]
        if kind == "sleep":
            time.sleep(fault["seconds"])
        elif kind == "raise":
            raise RuntimeError("injected")
        elif kind == "no_memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB (injected)")
        else:
            names = {"stop": "SIGSTOP", "kill": "SIGKILL", "signal": fault.get("signal", "SIGTERM")}
            os.kill(os.getpid(), getattr(signal, names[kind]))
            time.sleep(0.05)  # a signal to oneself arrives soon, not at once

    def wrap_forward(self, forward: Callable[..., Any], trainer: Any) -> Callable[..., Any]:
        def faulty(model: Any, batch: Any) -> Any:
            import torch

            if self.step is None:
                return forward(model, batch)
            rows = trainer.loader.global_rows(self.step - 1)
            first = self.first_row(trainer, self.step - 1)
            places = [row - first for row in rows[self.micro_step]]
            self.micro_step += 1
            blank = (batch.labels_BT == -100).all(dim=1).tolist()
            for _ in self.due("spike"):
                generator = torch.Generator().manual_seed(self.step)
                labels = batch.labels_BT.clone()
                shuffled = torch.randperm(labels.shape[1], generator=generator)
                labels[:, :] = torch.where(labels == -100, labels, labels[:, shuffled].clamp(min=0))
                batch = replace(batch, labels_BT=labels)
            losses = forward(model, batch)
            for fault in self.due("nan_rows"):
                wanted = fault.get("rows")
                hit = [i for i, place in enumerate(places) if not blank[i] and (wanted is None or place in wanted)]
                if hit:
                    per_token = losses.per_token_BT.clone()
                    per_token[hit] = torch.nan
                    losses = replace(losses, total=losses.total * torch.nan, per_token_BT=per_token)
            return losses

        return faulty

    @staticmethod
    def first_row(trainer: Any, step: int) -> int:
        from cpt.data.sampler import rows_of_step

        return int(rows_of_step(trainer.loader._plan, step)[0])

    def rate(self, lr_at: Callable[[int], float]) -> Callable[[int], float]:
        factors = {f["step"]: f.get("factor", 100.0) for f in self.faults if f["kind"] in ("spike", "high_rate")}
        return lambda update: lr_at(update) * (factors.get(update, 1.0) if update == self.step else 1.0)


@contextmanager
def faults(*given: Fault) -> Iterator[Injector]:
    """Patch the trainer of this process."""
    from cpt.train.phases import Phases
    from cpt.train.trainer import Trainer

    injector = Injector(given)
    begin, fit, step, phase = Trainer.__init__, Trainer.fit, Trainer.step, Phases.__call__

    def new_begin(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.forward = injector.wrap_forward(self.forward, self)
        self.job = replace(self.job, lr_at=injector.rate(self.job.lr_at))

    def new_fit(self: Any, first_step: int) -> Any:
        injector.step = first_step
        return fit(self, first_step)

    def new_step(self: Any, done: int) -> Any:
        injector.step, injector.micro_step = done + 1, 0
        return step(self, done)

    def new_phase(self: Any, name: str) -> Any:
        injector.at_phase(name)
        return phase(self, name)

    with ExitStack() as patches:
        for where, name, function in (
            (Trainer, "__init__", new_begin),
            (Trainer, "fit", new_fit),
            (Trainer, "step", new_step),
            (Phases, "__call__", new_phase),
        ):
            patches.enter_context(patch.object(where, name, function))
        yield injector


def command(given: list[Fault], *arguments: object) -> list[str]:
    """The command line of a faulty `cpt`."""
    return [sys.executable, __file__, json.dumps(given), *map(str, arguments)]


def _as_rank() -> None:
    from cpt.failures import leave
    from cpt.train.main import main

    with faults(*json.loads(os.environ[VARIABLE])):
        leave(main())


def _as_cpt() -> None:
    import launch.local.ranks
    from cpt.cli import main

    given = sys.argv.pop(1)
    here = str(Path(__file__).parent)
    os.environ[VARIABLE] = given
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    launch.local.ranks.TRAIN_MODULE = Path(__file__).stem
    if any(argument.startswith("--nproc") or argument == "--supervise" for argument in sys.argv):
        main()  # it starts ranks, which run this file as a module
    else:
        with faults(*json.loads(given)):
            main()


if __name__ == "__main__":
    _as_rank() if VARIABLE in os.environ else _as_cpt()
