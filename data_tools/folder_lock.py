"""One writer per folder: an advisory lock that the kernel drops when its holder dies, so none is ever stale. And one
command per folder: what a folder was made for, against what is asked now.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpt.rundir import DataError

LOCK_NAME = "writer.lock"


def task_folder(folder: Path, task: tuple[int, int]) -> Path:
    """What task i of n holds for itself: tasks of one command share its folder, two of the same task never."""
    held = folder if task[1] == 1 else folder / "tasks" / f"{task[0]:05d}-of-{task[1]:05d}"
    held.mkdir(parents=True, exist_ok=True)
    return held


def differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``eos_id: 0 there, 2 now; ...``, empty where both are one request."""
    changed = [key for key in now if there.get(key) != now[key]]
    return "; ".join(f"{key}: {_short(there.get(key))} there, {_short(now[key])} now" for key in changed)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for the length of the block.

    Raises:
        DataError: another process holds it; the message says which one, and where.
        RuntimeError: the disk became full in the block.
    """
    file = folder / LOCK_NAME
    handle = _acquire(file)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise RuntimeError(
            f"{folder}: {os.strerror(error.errno)}, {free:,} bytes are free there; fix: free some and run the same "
            "command again, it goes on from what is done"
        ) from error
    finally:
        file.unlink(missing_ok=True)  # while still held: see _acquire
        os.close(handle)


def _acquire(file: Path) -> int:
    """An exclusively locked handle of the file that has this name now.

    The holder before us may have removed the file between our open and our lock; then the lock is on a nameless file:
    try again.
    """
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
            os.close(handle)
            raise DataError(f"{file.parent}: {holder} is writing here; fix: wait for it, or stop it") from None
        if _is_same_file(handle, file):
            return handle
        os.close(handle)


def _is_same_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False
