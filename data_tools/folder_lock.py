"""One writer per folder: an advisory lock that the kernel drops when its holder dies, so none is ever stale."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from cpt.rundir import DataError

LOCK_NAME = "writer.lock"


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for the length of the block.

    Raises:
        DataError: another process holds it; the message says which one, and where.
    """
    file = folder / LOCK_NAME
    handle = _acquire(file)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
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
