"""What becomes of a run whose step went wrong: back to the last good checkpoint, on without the rows to blame, a
bounded number of times, then a clean end with a diagnosis.

Training is exact, so going back and on again leads to the same weights before the bad step; what changes is only what
is left out. That is, as precisely as the evidence allows, the rows whose own loss is not finite or stands out, or else
all rows of the step. A step may also be the victim of the one before, whose update broke the weights: where leaving out
did not help, every further attempt there leaves out one more step before the first bad one. Progress is a checkpoint
behind the last bad step; ``guard.max_rollbacks`` counts attempts without it, and so bounds the work that can be lost.

Before there is a checkpoint, a run goes back to the weights it began with, which are read or drawn once more.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from cpt.checkpoint.agreed import from_first, together
from cpt.checkpoint.marker import delete_checkpoint
from cpt.checkpoint.portable import Fragment
from cpt.checkpoint.retention import survey
from cpt.data.packing import IGNORE_INDEX
from cpt.data.skipping import SkippedRow, SkippingLoader, identities, identities_of_step, write_skipped
from cpt.live_run import Run
from cpt.plan import Plan
from cpt.run_model import load_model
from cpt.run_saving import restore_newest
from cpt.rundir import step_of
from cpt.train.engine import Topology
from cpt.train.guard import BadStep, Guard
from cpt.train.spikes import CENTRE_STEPS, SpikeDetector, outlying_rows
from cpt.train.stepinfo import StepInfo
from cpt.train.trainer import Seen, Trainer

SHOWN_ROWS = 5
NEAR_STEPS = 8  # a bad step so soon after the last one may have the same cause
SAVE_BYTES_PER_SECOND = 2e8  # of a slow disk: what the first save is expected to take, until one has been measured


def build_guard(run: Run, lr_at: Callable[[int], float]) -> Guard:
    """The judge of this run's steps."""
    plan = run.prepared.plan
    borders = [plan.first_step(stage) for stage in range(1, len(plan.stages))]

    def settled(step: int) -> bool:
        """Step ``step`` (from 1) is not in a warm-up, nor among the first of a stage."""
        return lr_at(step) <= lr_at(max(1, step - 1)) and not any(0 < step - b <= CENTRE_STEPS for b in borders)

    return Guard(run.detector, settled=settled)


@dataclass(frozen=True)
class RowLoss:
    """What one row of a bad step lost, over all ranks: nats and counted tokens."""

    source: str
    row: int
    nats: float
    tokens: int

    @property
    def mean(self) -> float:
        return self.nats / self.tokens


class Recovery:
    """Called with a bad step; answers with the step from which training goes on."""

    def __init__(self, run: Run, loader: SkippingLoader) -> None:
        self._run = run
        self._loader = loader
        self._attempts = 0  # without progress
        self._tries = 0  # of them, about the same place
        self._first_bad = 0  # step of that place
        self._last_bad = 0

    def __call__(self, bad: BadStep, seen: Seen) -> StepInfo:
        """Roll back, and leave out the rows to blame.

        Raises:
            RuntimeError: enough is enough; says what was seen, where to look and what to try. Checkpoints are intact.
            OSError: on all ranks; what is left out cannot be written down.
        """
        started = time.perf_counter()
        run, plan = self._run, self._run.prepared.plan
        losses = _row_losses(run, self._loader.global_rows(bad.step - 1), seen)
        blamed = to_blame(losses, bad, sigma=run.config.guard.spike_sigma or math.inf)
        run.saver.wait()
        saved = _saved_steps(run)
        self._count(bad.step, newest=max(saved, default=0))
        reason = "; ".join(bad.reasons)
        rows = [_skipped(run, bad.step, row.source, row.row, reason, row.mean) for row in blamed]
        if self._attempts > run.config.guard.max_rollbacks:
            self._give_up(bad, rows, saved)
        if len(blamed) == len(losses):  # no row stands out: perhaps the fault lies before
            for step in range(max(1, self._first_bad - self._tries + 1), bad.step):
                why = f"step {bad.step} went wrong although its rows were left out; an update before it may be why"
                rows += [_skipped(run, step, name, row, why) for name, row in identities_of_step(plan, step - 1)]
        before = [step for step in saved if step < min(row.step for row in rows)]
        step = self._go_back(max(before) if before else min(saved, default=0))
        new = run.skipped.add(row for row in rows if row.step > step)
        together(lambda: self._put_down(step), run.topology.world_size)
        if run.metrics:
            run.metrics.forget_after(step)
        self._tell(bad, to=step, new=new, seconds=time.perf_counter() - started)
        return StepInfo.before_training(step, tokens_seen=step * plan.global_batch_tokens)

    def _count(self, bad_step: int, *, newest: int) -> None:
        if newest > self._last_bad:
            self._attempts = self._tries = 0
        if self._tries == 0 or bad_step > self._last_bad + NEAR_STEPS:
            self._tries, self._first_bad = 0, bad_step
        self._attempts += 1
        self._tries += 1
        self._last_bad = max(self._last_bad, bad_step)

    def _go_back(self, at_most: int) -> int:
        with self._run.phases("checkpoint"):
            meta, _ = restore_newest(self._run, at_most=at_most)
            if meta is None:
                self._run.engine.restore(initial_state(self._run), optimizer_steps=0)
                self._run.detector.go_back_to({})
            return meta.step if meta else 0

    def _put_down(self, step: int) -> None:
        """First what is left out from now on, then the way back: cut short, the next start takes one or both."""
        if self._run.topology.rank == 0:
            write_skipped(self._run.rundir.skipped_rows, self._run.skipped.rows)
            _undo_after(self._run, step)

    def _tell(self, bad: BadStep, *, to: int, new: Sequence[SkippedRow], seconds: float) -> None:
        run = self._run
        rows = [asdict(row) for row in new[:SHOWN_ROWS]]
        facts = {"reasons": bad.reasons, "attempt": self._attempts, "seconds": round(seconds, 3)}
        run.event("rollback", bad.step, to=to, **facts, num_rows=len(new), rows=rows)
        if run.topology.rank == 0:
            left_out = f"{len(new)} {'row is' if len(new) == 1 else 'rows are'} left out from now on"
            words = f"{bad}; back to step {to}, {left_out} ({run.rundir.skipped_rows})"
            print(f"WARNING: {words}", file=sys.stderr, flush=True)

    def _give_up(self, bad: BadStep, rows: Sequence[SkippedRow], saved: Sequence[int]) -> NoReturn:
        run, detector, rollbacks = self._run, self._run.detector, self._attempts - 1
        facts = {"reasons": bad.reasons, "rollbacks": rollbacks, "losses": detector.recent_losses()}
        run.event("guard_stop", bad.step, **facts, rows=[asdict(row) for row in rows[:SHOWN_ROWS]])
        words = diagnosis(run, bad, rows, detector=detector, saved=saved, rollbacks=rollbacks)
        raise RuntimeError(words if run.topology.rank == 0 else f"{bad}; the guard stops the run")


def diagnosis(
    run: Run, bad: BadStep, rows: Sequence[SkippedRow], *, detector: SpikeDetector, saved: Sequence[int], rollbacks: int
) -> str:
    """What a person needs who has to decide now."""
    stores = " ".join(str(run.config.data.stores[name]) for name in dict.fromkeys(row.source for row in rows))
    often = f"after {rollbacks} rollbacks without progress" if rollbacks else "at the first bad step, as it is told to"
    newest = run.rundir.checkpoint(max(saved)) if saved else None
    sigma = 2 * (run.config.guard.spike_sigma or 8)
    return "\n".join(
        [
            f"{bad}; the guard stops the run {often}; {f'{newest} is complete' if newest else 'no checkpoint yet'}",
            "  rows to blame:",
            *(f"    {_in_words(row)}" for row in rows[:SHOWN_ROWS]),
            *([f"    and {len(rows) - SHOWN_ROWS} more"] if len(rows) > SHOWN_ROWS else []),
            "  losses of the steps before, nats per token:",
            *(f"    {name}: {_listed(losses)}" for name, losses in detector.recent_losses().items()),
            f"  gradient norms: {_listed(detector.recent_norms())}",
            f"  to look at the text: cpt data inspect {stores}",
            f"  to try: a new run (model.init_from={newest or 'the base'}), lower train.peak_lr, longer warm-up",
            f"    or, where the step looks harmless: cpt resume {run.rundir.root} guard.spike_sigma={sigma:g}",
        ]
    )


def _in_words(row: SkippedRow) -> str:
    document = "" if row.document is None else f" (document {row.document})"
    loss = "loss not finite" if row.loss is None else f"{row.loss:.3f} nats per token"
    return f"step {row.step}: {row.source}, row {row.row}{document}, {loss}"


def _listed(values: Sequence[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def to_blame(rows: Sequence[RowLoss], bad: BadStep, *, sigma: float) -> list[RowLoss]:
    """The rows whose own loss is not finite, or that lift their source above its limit; all rows where that explains
    nothing, as for a gradient.
    """
    infinite = [row for row in rows if not math.isfinite(row.nats)]
    if infinite:
        return infinite if 2 * len(infinite) <= len(rows) else list(rows)
    found: list[RowLoss] = []
    for name, limit in bad.limits.items():
        own = [row for row in rows if row.source == name]
        apart = set(outlying_rows([row.mean for row in own], sigma=sigma))
        rest = [row for place, row in enumerate(own) if place not in apart]
        explained = sum(row.nats for row in rest) <= limit * sum(row.tokens for row in rest)
        if not apart or not explained:
            return list(rows)
        found += [own[place] for place in sorted(apart)]
    return found or list(rows)


def _row_losses(run: Run, global_rows: Sequence[Sequence[int]], seen: Seen) -> list[RowLoss]:
    """Of every row of the step that has a label, in order of the plan. A collective call."""
    held = []
    for rows, (batch, losses_BT) in zip(global_rows, seen, strict=True):
        nats_B = losses_BT.sum(dim=1, dtype=torch.float64).tolist()
        tokens_B = (batch.labels_BT != IGNORE_INDEX).sum(dim=1).tolist()
        held += list(zip(rows, nats_B, tokens_B, strict=True))
    of_ranks = [held]
    if run.topology.world_size > 1:
        of_ranks = [[] for _ in range(run.topology.world_size)]
        dist.all_gather_object(of_ranks, held)
    sums: dict[int, tuple[float, int]] = {}
    for row, nats, tokens in (entry for held in of_ranks for entry in held):  # ranks may share a row
        before = sums.get(row, (0.0, 0))
        sums[row] = before[0] + nats, before[1] + tokens
    order = sorted(row for row, (_, tokens) in sums.items() if tokens)
    names = identities(run.prepared.plan, order)
    return [RowLoss(source, number, *sums[row]) for row, (source, number) in zip(order, names, strict=True)]


def _skipped(run: Run, step: int, source: str, row: int, reason: str, loss: float = math.nan) -> SkippedRow:
    document = _document(run, step, source, row)
    return SkippedRow(step, source, row, document, loss if math.isfinite(loss) else None, reason)


def _document(run: Run, step: int, source: str, row: int) -> int | None:
    """The first document of a row, as `cpt data inspect` counts them; None where packing is not arithmetic."""
    if run.config.data.packing != "concat":
        return None
    token = row * _seq_len(run.prepared.plan, step)
    store = run.prepared.train_stores[source]
    low, high = 0, store.num_documents  # the document that holds the token: the last one that starts at or before it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if store.document_bounds(middle, middle + 1)[0] <= token else (low, middle)
    return low


def _seq_len(plan: Plan, step: int) -> int:
    return plan.seq_len_of(plan.stage_of_step(step - 1))


def _saved_steps(run: Run) -> list[int]:
    """Steps of the checkpoints that a run can go on from, as rank 0 sees it. A collective call."""
    kinds = survey(run.rundir.checkpoints) if run.topology.rank == 0 else {}
    steps: list[int] = from_first([step for step, kind in kinds.items() if kind == "full"], run.topology.world_size)
    return sorted(steps)


def _undo_after(run: Run, step: int) -> None:
    """Take away what updates that were undone have left: a crash must not find it and go on from there."""
    for folder in run.rundir.checkpoints.glob("step_*"):
        if (step_of(folder) or 0) > step:
            delete_checkpoint(folder)
    for file in run.rundir.evals.rglob("step_*.*"):  # of suites, too; a watcher's claims stay, for they may be held
        if (step_of(Path(file.name.partition(".")[0])) or 0) > step and file.suffix != ".lock":
            file.unlink(missing_ok=True)


def initial_state(run: Run) -> Callable[[Fragment], None]:
    """Fills the engine as it was before the first step: the weights that the run began with, no moments.

    They are made on the CPU, as they were at the start; the plain attention is chosen because any one will do.
    """
    section = run.config.model.model_copy(update={"attention": "sdpa", "kernels": "torch"})
    plain = run.config.model_copy(update={"model": section})
    here = Topology(run.topology.rank, run.topology.world_size, torch.device("cpu"))
    model = load_model(replace(run.prepared, config=plain), here, None).model
    flat = {name: parameter.detach().float().view(-1) for name, parameter in model.named_parameters()}

    def fill(fragment: Fragment) -> None:
        for kind, tensor in fragment.state.items():
            if kind == "param":
                tensor.copy_(flat[fragment.name][fragment.start : fragment.start + fragment.numel])
            else:
                tensor.zero_()

    return fill


def watch_over(trainer: Trainer, run: Run, loader: SkippingLoader) -> None:
    """Have a trainer judged, rescued and stopped as the run asks."""
    run.stop.save_seconds = 12.0 * run.loaded.report.parameters / SAVE_BYTES_PER_SECOND  # fp32 weights and two moments
    stop_file = run.rundir.stop_file if run.topology.rank == 0 else None
    run.stop.also_at(file=stop_file, limit_seconds=run.config.guard.stop_after_seconds)
    trainer.guard = build_guard(run, trainer.job.lr_at)
    trainer.recover = Recovery(run, loader)
