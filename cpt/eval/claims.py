"""Which process evaluates which checkpoint: a claim per suite and checkpoint, free again when its holder ends or dies.
No torch.

Owns ``evals/SUITE/claims/``. In a run folder a claim is a lock file (``cpt.folder_lock``), so that a dead holder is
known by the kernel on its own machine, and by its silence on others. Under a URL there are no locks: a claim is an
object that its holder writes again every few seconds, and whoever reads himself out of it some time after writing has
it. Two who claim at one moment may both begin in the worst case, never write two results: a result is one file per
checkpoint, and its content does not depend on who writes it.
"""

import json
import secrets
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from cpt.folder_lock import FolderLock, Holder, acquire, living, myself, read_holder
from cpt.rundir import step_name, step_of

CONFIRM_SECONDS = 0.25  # in which another host's claim of the same moment shows, where the kernel's locks do not reach
URL_BEAT_SECONDS = 15.0
URL_PATIENCE_SECONDS = 90.0  # a claim at a URL that says nothing new for so long is of a dead process
URL_CONFIRM_SECONDS = 2.0


def lock_file(results: Path, step: int) -> Path:
    """The claim of a checkpoint; ``results`` is ``evals/SUITE``."""
    return results / "claims" / f"{step_name(step)}.lock"


def holder_of(results: Path, step: int) -> Holder | None:
    """Who claims it, living or dead; None for nobody."""
    return read_holder(lock_file(results, step))


def claim(results: Path, step: int) -> FolderLock | None:
    """Claim a checkpoint, from a dead holder too; None where a living process has it. Give it back by closing.

    Waits up to ``folder_lock.PATIENCE_SECONDS`` where a process on another machine is named: ask for checkpoints that
    nobody claims first.

    Raises:
        OSError: the folder cannot be written.
    """
    path = lock_file(results, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(path)
    except RuntimeError:  # says who has it; so does the file
        return None
    return _confirmed(lock, CONFIRM_SECONDS)


def steps_being_evaluated(evals: Path, steps: Iterable[int]) -> set[int]:
    """Those of ``steps`` that a living process claims for any suite; ``evals`` is the run's folder of that name."""
    files = [path for step in steps for path in evals.glob(f"*/claims/{step_name(step)}.lock")]
    return {step for path in living(files) if (step := step_of(path.with_suffix(""))) is not None}


class UrlClaim:
    """A held claim at a URL; says every ``URL_BEAT_SECONDS`` that its holder lives, until it is closed."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem = filesystem
        self._path = path
        self._nonce = secrets.token_hex(8)
        self._closed = threading.Event()
        self._say(0)
        self._thread = threading.Thread(target=self._beat, name="url-claim", daemon=True)
        self._thread.start()

    @property
    def is_held(self) -> bool:
        """Whether the object still names this process."""
        return (_read(self._filesystem, self._path) or {}).get("nonce") == self._nonce

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        try:
            if self.is_held:
                self._filesystem.rm_file(self._path)
        except Exception as error:  # drivers raise what they like; the others know it for dead after a while
            print(f"WARNING: {self._path}: not given back: {type(error).__name__}: {error}", flush=True)

    def __enter__(self) -> "UrlClaim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        number = 0
        while not self._closed.wait(URL_BEAT_SECONDS):
            number += 1
            try:
                if not self.is_held:
                    return
                self._say(number)
            except Exception as error:  # drivers raise what they like; only a missing sign of life follows
                print(f"WARNING: {self._path}: {type(error).__name__}: {error}", flush=True)

    def _say(self, number: int) -> None:
        content = {**asdict(myself()), "nonce": self._nonce, "beat": number}
        self._filesystem.pipe_file(self._path, json.dumps(content).encode())


Claim = TypeVar("Claim", FolderLock, UrlClaim)


class UrlClaims:
    """Claims under one folder of a URL, and since when each of the others' has said the same."""

    def __init__(self, filesystem: Any, folder: str) -> None:
        self._filesystem = filesystem
        self._folder = folder
        self._seen: dict[int, tuple[dict[str, Any], float]] = {}  # by step: what it said, and when that was new

    def claim(self, step: int) -> UrlClaim | None:
        """As ``claim``; never waits long: a dead holder is known once this has been asked for long enough.

        Raises:
            Exception: whatever the driver of the URL raises.
        """
        path = f"{self._folder}/{step_name(step)}.json"
        if (said := _read(self._filesystem, path)) and not self._is_dead(step, said):
            return None
        self._filesystem.makedirs(self._folder, exist_ok=True)
        return _confirmed(UrlClaim(self._filesystem, path), URL_CONFIRM_SECONDS)

    def _is_dead(self, step: int, said: dict[str, Any]) -> bool:
        now = time.monotonic()
        before, since = self._seen.get(step, (None, now))
        if before != said:
            since = now
        self._seen[step] = (said, since)
        return now - since >= URL_PATIENCE_SECONDS


def _confirmed(held: Claim, seconds: float) -> Claim | None:
    """The claim, if nobody else has written his own by then. Given back in every other case: one that was left would go
    on to say that it lives.
    """
    with ExitStack() as leaving:
        leaving.enter_context(held)
        time.sleep(seconds)
        if not held.is_held:
            return None
        leaving.pop_all()
    return held


def _read(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What a claim at a URL says; None where there is none, or none that is whole."""
    try:
        raw = json.loads(filesystem.cat_file(path))
    except (FileNotFoundError, ValueError):
        return None
    return raw if isinstance(raw, dict) else None
