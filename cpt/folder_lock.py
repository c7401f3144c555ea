"""One process at work in a folder, or on one thing in it: who holds it, whether that holder lives, and how it is taken
over.

Owns the content of lock files: a run folder's ``.lock``, and what watchers claim. The kernel's lock (flock) decides
among the processes of one machine. It may not reach over a shared folder, so the file also says who holds it, with a
number that its holder raises every few seconds: a holder on another machine lives while that number changes. No clock
is compared, neither with another machine's nor with itself: clocks differ, and go backwards. Refuses a folder whose
holder lives, or that cannot be written.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

BEAT_SECONDS = 5.0
PATIENCE_SECONDS = 20.0  # without a new number for so long, a holder on another machine is dead
LINE_BYTES = 512  # the content is always rewritten in place and in one length: a reader never finds the file empty
NO_FLOCK = frozenset({errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK})
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Holder:
    """Who has the folder. ``machine`` tells two machines of one name apart, and two containers of one machine not."""

    host: str
    pid: int
    since: str  # for people: UTC by the holder's clock
    machine: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_same(self, other: "Holder | None") -> bool:
        """The same process, whatever it said last."""
        return other is not None and (self.machine, self.pid, self.since) == (other.machine, other.pid, other.since)


class FolderLock:
    """A held lock: says every ``BEAT_SECONDS`` that its holder lives, until it is closed."""

    def __init__(self, handle: int, path: Path, holder: Holder) -> None:
        self.holder = holder
        self._handle = handle
        self._path = path
        self._closed = threading.Event()
        self._say(0)
        self._thread = threading.Thread(target=self._beat, name="run-folder-lock", daemon=True)
        self._thread.start()

    @property
    def is_held(self) -> bool:
        """Whether the file still names this process: one that was suspended for long may have been taken over."""
        return self.holder.is_same(read_holder(self._path))

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        self._thread.join()
        if self.is_held:
            os.ftruncate(self._handle, 0)
        os.close(self._handle)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _beat(self) -> None:
        number = 0
        while not self._closed.wait(BEAT_SECONDS):
            now = read_holder(self._path)
            if not self.holder.is_same(now):
                other = now or "an unknown process"
                print(f"WARNING: {self._path}: this process held it, now {other} does; stop one of the two",
                      file=sys.stderr, flush=True)  # fmt: skip
                return
            number += 1
            try:
                self._say(number)
            except OSError as error:  # the run goes on without: only a machine that wants the folder is misled
                print(f"WARNING: {self._path}: {error}", file=sys.stderr, flush=True)

    def _say(self, number: int) -> None:
        line = json.dumps({**asdict(self.holder), "beat": number})
        os.pwrite(self._handle, f"{line:<{LINE_BYTES - 1}}\n".encode(), 0)


def acquire(path: Path) -> FolderLock:
    """Take the lock file ``path``.

    Raises:
        RuntimeError: a living process holds it; names its host and pid.
        OSError: the folder cannot be written.
    """
    try:
        # O_DSYNC: over a network a sign of life must not wait in this machine's cache until it looks like death
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DSYNC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        fix = "a run needs to write there: mend its permissions, or copy it to where you may write"
        raise OSError(f"{path.parent}: the run folder cannot be written ({error.strerror}); {fix}") from None
    try:
        locked = _flock(handle, path)
        _wait_for_life(path, locked=locked)
        return FolderLock(handle, path, myself())
    except BaseException:
        os.close(handle)
        raise


def living(paths: Iterable[Path]) -> set[Path]:
    """The lock files whose holder lives, without taking them. Waits up to ``PATIENCE_SECONDS``, once for all of them,
    where a holder is on another machine: it lives if it says something meanwhile.

    Raises:
        OSError: a file is there and cannot be read.
    """
    found, silent = set(), {}
    for path in paths:
        if holder := read_holder(path):
            locked = _is_locked(path)
            if locked:
                found.add(path)
            elif locked is None or holder.machine != _machine():
                silent[path] = holder
    deadline = time.monotonic() + PATIENCE_SECONDS
    while silent and time.monotonic() < deadline:
        time.sleep(min(0.2, PATIENCE_SECONDS))
        for path, holder in list(silent.items()):
            now = read_holder(path)
            if now != holder:
                del silent[path]
                found |= {path} if now else set()
    return found


def read_holder(path: Path) -> Holder | None:
    """Who the lock file names; None for nobody, or a line that is not whole."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _is_locked(path: Path) -> bool | None:
    """Whether this kernel knows of a process that has the file; None where this file system has no such locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        raise
    finally:
        os.close(handle)
    return False


def _flock(handle: int, path: Path) -> bool:
    """Whether this file system has such locks; raises RuntimeError where another process holds it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(_in_use(path, read_holder(path))) from None
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        raise
    return True


def _wait_for_life(path: Path, *, locked: bool) -> None:
    """The holder that the file names is dead if the kernel of its machine gave us its lock; elsewhere it is watched."""
    holder = read_holder(path)
    if holder is None or (locked and holder.machine == _machine()):
        return
    print(f"{path}: held by {holder}; waiting up to {PATIENCE_SECONDS:g} s for a sign of life", flush=True)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        now = read_holder(path)
        if now is not None and now != holder:  # lives, or somebody else was as patient
            raise RuntimeError(_in_use(path, now))
        if path.stat().st_size == 0:  # it let go
            return
        if time.monotonic() >= deadline:
            break
        time.sleep(min(0.2, PATIENCE_SECONDS))
    words = f"{holder} gave no sign of life; this process takes over. If that one still runs, stop it"
    print(f"WARNING: {path}: {words}", file=sys.stderr, flush=True)


def _in_use(path: Path, holder: Holder | None) -> str:
    who = f": {holder}" if holder else ""
    return f"{path.parent}: another process is training in this run folder{who}; wait for it or stop it"


def myself() -> Holder:
    """This process, as it names itself from now on."""
    since = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    return Holder(socket.gethostname()[:200], os.getpid(), since, _machine())


def _machine() -> str:
    """The running kernel: containers on one machine share it, and with it the kernel's locks."""
    try:
        return _BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()[:64]
