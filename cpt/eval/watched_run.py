"""A run folder as a watcher sees it: which checkpoints are complete, which have results, and whether the run has ended.
No torch.

``LocalRun`` is a run folder on this machine or on a disk that it shares, ``cpt.eval.remote_run.RemoteRun`` one under a
URL; both answer to the same calls. A copy is a run folder like any other: nothing here needs a process that writes
events. A checkpoint that is being copied or was cut short is told apart from a complete one by the sizes that its
marker promises, whichever file arrived first. Refuses a folder that is none.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cpt.checkpoint.marker import read_marker
from cpt.eval.claims import claim, holder_of
from cpt.eval.results import read_suite_record, record_file
from cpt.folder_lock import FolderLock
from cpt.rundir import DataError, RunDir, read_events, step_of

# Events that say whether a run is at work; the last of them counts.
ENDS, GOES_ON = "finish", frozenset({"start", "resume", "restart", "extended", "mix_changed", "rollback"})


@dataclass(frozen=True)
class Partial:
    """A checkpoint that is not complete: why, and how much of it is there."""

    reason: str
    bytes: int


@dataclass(frozen=True)
class Sight:
    """What one look at a run found. ``evaluated``: complete checkpoints that have results of this suite."""

    complete: frozenset[int]
    evaluated: frozenset[int]
    partial: Mapping[int, Partial] = field(default_factory=dict)
    finished_at: int | None = None  # the last step of a run that has ended

    @property
    def all_arrived(self) -> bool:
        """The run has ended, and its last checkpoint and all others are here."""
        return self.finished_at in self.complete and not self.partial


class LocalRun:
    """A run folder, and the results of one suite in it.

    ``weights_hash`` names the weights of a checkpoint as its results do. With it, results of a checkpoint that was
    since trained anew (after a rollback) do not count.

    Raises:
        DataError: no run folder.
        OSError: it cannot be written.
    """

    def __init__(self, root: Path, suite: str, *, weights_hash: Callable[[Path], str] | None = None) -> None:
        self.rundir = RunDir(root)
        self.results = self.rundir.evals / suite
        self._weights_hash = weights_hash
        if not self.rundir.config.is_file() and not self.rundir.checkpoints.is_dir():
            missing = f"it has neither {self.rundir.config.name} nor {self.rundir.checkpoints.name}/"
            raise DataError(f"{root}: not a run folder, {missing}; give the folder that cpt train made, or a copy")
        self.results.mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return str(self.rundir.root)

    def look(self) -> Sight:
        """Raises OSError where the disk does not answer."""
        complete, partial = set(), {}
        missing = [path.name for path in (self.rundir.config, self.rundir.plan) if not path.is_file()]
        for folder in self.rundir.checkpoints.glob("step_*"):
            step = step_of(folder)
            if step is None or not folder.is_dir():
                continue
            try:
                if missing:
                    raise DataError(f"{self.rundir.root} has no {' and no '.join(missing)} yet")
                read_marker(folder)
                complete.add(step)
            except DataError as error:
                partial[step] = Partial(str(error), _bytes_in(folder))
        evaluated = frozenset(step for step in complete | {0} if self.has_results(step))
        return Sight(frozenset(complete), evaluated, partial, finished_step(self.rundir))

    def has_results(self, step: int) -> bool:
        """Whether results of these very weights lie here. Those that cannot be read count for nothing: they are
        written anew.
        """
        try:
            record = read_suite_record(record_file(self.results, step))
        except DataError:  # none yet, damaged, or of another version
            return False
        if step == 0 or self._weights_hash is None or record.weights_hash is None:  # None: measured while it trained
            return True
        try:
            return record.weights_hash == self._weights_hash(self.rundir.checkpoint(step))
        except (DataError, OSError):  # pruned this moment: there is nothing left to evaluate
            return True

    def is_claimed(self, step: int) -> bool:
        """Whether somebody, living or dead, is named as its evaluator."""
        return holder_of(self.results, step) is not None

    def claim(self, step: int) -> FolderLock | None:
        return claim(self.results, step)

    @contextmanager
    def bring(self, step: int) -> Iterator[Path]:
        """The checkpoint's folder on this machine."""
        yield self.rundir.checkpoint(step)

    def has_unsent(self, step: int) -> bool:
        """Whether results lie here that others cannot see yet."""
        return False

    def publish(self, files: Sequence[Path]) -> None:
        """Show others what changed in ``results``; here they see it anyway."""


def finished_step(rundir: RunDir) -> int | None:
    """The last step of a run that has ended, by its events; None for one that goes on or was cut short."""
    for event in reversed(read_events(rundir)):
        if event.get("event") == ENDS:
            return event["step"] if isinstance(event.get("step"), int) else None
        if event.get("event") in GOES_ON:
            return None
    return None


def _bytes_in(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # renamed by whoever copies, or being deleted
            continue
    return total
