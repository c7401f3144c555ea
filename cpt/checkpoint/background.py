"""Saving while training goes on: a thread copies the state to host memory, then writes it.

The state does not change between two optimizer updates, so the copy runs beside the next step's forward and backward
passes; ``wait_copied``, called before every update, is all that the loop may wait for. Then the thread writes this
rank's shards from the copy and says so in a *receipt*, a small file in the checkpoint folder: what it wrote, or why it
could not. Rank 0's thread waits for all receipts, then writes meta.json and the marker. No thread takes part in a
collective call: those belong to the main thread, and their order is the same on all ranks.

Owns one save at a time: a second one waits for the first. Refuses to hold up the end of the process: what is not
complete by then has no marker, and the next save sweeps it up.
"""

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt.checkpoint.agreed import from_first, gather, together
from cpt.checkpoint.hostcopy import HostCopy
from cpt.checkpoint.marker import FileFacts, delete_checkpoint
from cpt.checkpoint.portable import CheckpointMeta, Fragment
from cpt.checkpoint.writing import Receipt, finish_checkpoint, predicted_bytes, start_checkpoint, write_shard
from cpt.rundir import write_atomic

PATIENCE_SECONDS = 1800.0  # for the receipts of the other ranks, after rank 0 has written its own part
_POLL_SECONDS = 0.05

AfterSave = Callable[[], Mapping[str, object]]


@dataclass
class Saved:
    """How a save went. Rank 0 knows whether it is complete; another rank, until ``wait``, only of its own part."""

    folder: Path
    step: int
    bytes: int = 0
    waited_seconds: float = 0.0  # for the save before it
    stall_seconds: float = 0.0  # that the loop was held up, that wait included
    copy_seconds: float = 0.0
    write_seconds: float = 0.0  # from the end of the copy until complete
    error: str | None = None
    details: dict[str, object] = field(default_factory=dict)  # what was done after it


@dataclass
class _Task:
    """A save in flight."""

    saved: Saved
    fragments: list[Fragment]
    meta: CheckpointMeta
    nonce: str  # of this attempt; a receipt of another one does not count
    after: AfterSave | None
    copied: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def receipt(self, rank: int) -> Path:
        return self.saved.folder / f".receipt_{self.nonce}_{rank:05d}.json"


class Saver:
    """Saves of one process, one after the other; every rank of a job has one and calls it alike."""

    def __init__(self, *, rank: int = 0, world_size: int = 1, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.rank = rank
        self.world_size = world_size
        self.patience_seconds = patience_seconds
        self.on_progress: Callable[[], None] = lambda: None  # while one waits here for a save that grows on disk
        self._host = HostCopy()
        self._task: _Task | None = None
        self._finished: list[Saved] = []
        self._last: Saved | None = None

    @property
    def in_flight(self) -> bool:
        return self._task is not None

    def begin(
        self, folder: Path, fragments: Iterable[Fragment], meta: CheckpointMeta, *, after: AfterSave | None = None
    ) -> None:
        """Start saving; every rank calls it with the fragments it owns, which must not change until ``wait_copied``.

        ``after`` runs on rank 0 once the checkpoint is complete, still in the background.

        Raises:
            OSError: on every rank, with the first rank's reason (no space, folder not writable); older checkpoints
            are untouched.
        """
        started = time.perf_counter()
        self._collect(block=True)
        waited = time.perf_counter() - started
        held: list[Fragment] = []
        together(lambda: held.extend(fragments), self.world_size)
        parts = gather(predicted_bytes(held, meta if self.rank == 0 else None), self.world_size)
        together(lambda: start_checkpoint(folder, sum(parts)) if self.rank == 0 else None, self.world_size)
        nonce = from_first(secrets.token_hex(4), self.world_size)
        task = _Task(Saved(folder, meta.step, waited_seconds=waited), held, meta, nonce, after)
        task.thread = threading.Thread(target=self._work, args=(task,), name=f"save-{folder.name}", daemon=True)
        self._host.mark_ready(held)
        self._task, self._last = task, task.saved
        task.thread.start()
        task.saved.stall_seconds += time.perf_counter() - started

    def wait_copied(self) -> None:
        """Return once the state may change."""
        task = self._task
        if task is not None and task.fragments:
            started = time.perf_counter()
            task.copied.wait()
            self._host.let_device_wait()
            task.fragments = []
            task.saved.stall_seconds += time.perf_counter() - started

    def poll(self) -> list[Saved]:
        """Saves that ended since the last call; does not wait."""
        self._collect(block=False)
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> str | None:
        """Wait for a save in flight; returns why the last one failed, or None. A collective call, all ranks agree."""
        started = time.perf_counter()
        self._collect(block=True)
        error: str | None = from_first(self._last.error if self._last else None, self.world_size)
        if self._last:
            self._last.stall_seconds += time.perf_counter() - started
        return error

    def close(self, *, timeout: float) -> None:
        """Give a save in flight ``timeout`` seconds to finish, then abandon it. No collective call."""
        task = self._task
        if task is not None and task.thread is not None:
            task.thread.join(timeout)
            task.cancelled.set()
            task.thread.join(1.0)
            self._collect(block=False)

    def _collect(self, *, block: bool) -> None:
        task = self._task
        if task is None or task.thread is None:
            return
        if block:
            self._join(task.thread, task.saved.folder)
        if not task.thread.is_alive():
            self._task = None
            self._finished.append(task.saved)

    def _join(self, thread: threading.Thread, folder: Path) -> None:
        seen = -1
        while thread.is_alive():
            thread.join(1.0)
            written = _bytes_in(folder)
            if written != seen:
                seen = written
                self.on_progress()

    def _work(self, task: _Task) -> None:
        try:
            self._write(task, self._copied(task))
        except BaseException as error:  # nobody above this frame would see it
            own = f"rank {self.rank}: {type(error).__name__}: {error}"
            self._fail(task, str(error) if isinstance(error, _PartFailed) else own)
        if self.rank == 0 and task.after and task.saved.error is None:
            try:
                task.saved.details |= task.after()
            except Exception as error:  # the checkpoint is complete all the same
                task.saved.details["warning"] = f"{type(error).__name__}: {error}"

    def _copied(self, task: _Task) -> list[Fragment]:
        started = time.perf_counter()
        try:
            copies = self._host.copy(task.fragments)
        finally:
            task.copied.set()
        self._host.wait()
        task.saved.copy_seconds = time.perf_counter() - started
        return copies

    def _write(self, task: _Task, copies: list[Fragment]) -> None:
        started, folder = time.perf_counter(), task.saved.folder
        own = write_shard(folder, copies, rank=self.rank, world_size=self.world_size)
        if self.rank != 0:
            self._leave_receipt(task, asdict(own))
        else:
            receipts = [own, *self._others(task)]
            for path in folder.glob(".receipt_*"):
                path.unlink()
            task.saved.bytes = finish_checkpoint(folder, task.meta, receipts)
        task.saved.write_seconds = time.perf_counter() - started

    def _fail(self, task: _Task, reason: str) -> None:
        """Wherever this rank's part failed: rank 0 must hear of it, or it waits for the receipt."""
        task.saved.error = reason
        try:
            if self.rank == 0:  # a part of a checkpoint is of no use, and the space may be what was missing
                delete_checkpoint(task.saved.folder)
            else:
                self._leave_receipt(task, {"error": reason})
        except OSError as error:  # another rank may still be writing in it; the next save sweeps up
            task.saved.error = f"{reason} (and what was written could not be removed or told: {error})"

    def _leave_receipt(self, task: _Task, content: Mapping[str, Any]) -> None:
        if "error" in content:  # make room for the receipt itself, where the disk is full
            for path in task.saved.folder.glob(f"shard_{self.rank:05d}-of-*"):
                path.unlink(missing_ok=True)
        write_atomic(task.receipt(self.rank), json.dumps(content))

    def _others(self, task: _Task) -> list[Receipt]:
        """Receipts of ranks 1, 2, ..., as they come in.

        Raises:
            OSError: a rank could not write its part, or says nothing for too long.
        """
        deadline = time.monotonic() + self.patience_seconds
        missing, receipts = set(range(1, self.world_size)), []
        while missing:
            here = {path.name for path in task.saved.folder.iterdir()}
            for rank in sorted(missing):
                if task.receipt(rank).name in here:
                    receipts.append(_read_receipt(task.receipt(rank)))
                    missing.remove(rank)
            if missing and (task.cancelled.is_set() or time.monotonic() > deadline):
                raise _PartFailed(_unheard(missing, self.patience_seconds, abandoned=task.cancelled.is_set()))
            if missing:
                task.cancelled.wait(_POLL_SECONDS)
        return receipts


def _bytes_in(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:  # being tidied away
        return -1


class _PartFailed(OSError):
    """Another rank's part of the save; the message names the rank."""


def _read_receipt(path: Path) -> Receipt:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "error" in content:
        raise _PartFailed(content["error"])
    files = {name: FileFacts(**facts) for name, facts in content["files"].items()}
    return Receipt(files, content["kinds"])


def _unheard(ranks: set[int], patience: float, *, abandoned: bool) -> str:
    who = ", ".join(f"rank {rank}" for rank in sorted(ranks)[:8])
    if abandoned:
        return f"{who}: not done when the run ended"
    return f"{who}: no word within {patience:.0f} s of rank 0; do all hosts share the run folder's file system?"
