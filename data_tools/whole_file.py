"""A large file that has its name only when it is whole; small ones are written by ``cpt.rundir.write_atomic``."""

import contextlib
import functools
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def part_name(name: str) -> str:
    """``a.bin`` -> ``.a.bin.1f2e3d4c-77.part``: of this process alone, also among hosts that share the folder."""
    return f".{name}.{_where()}-{os.getpid()}.part"


@functools.cache
def _where() -> str:
    """Among which processes a process number means one of them: those of a boot of a machine, or of a container."""
    try:
        place = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        place = socket.gethostname()
    return hashlib.blake2b(place.encode(), digest_size=4).hexdigest()


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write for the length of the block; renamed to ``path`` at its end, removed if an exception ends it.

    Two processes that write the same file at once both finish it; the later one stays. What processes killed here left
    in the folder is removed; what was left by another host, or before a reboot, stays.
    """
    _remove_left_overs(path.parent)
    temporary = path.with_name(part_name(path.name))
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache  # once per folder: looking through a large one for every file in it would take long
def _remove_left_overs(folder: Path) -> None:
    pattern = re.compile(rf"\..+\.{_where()}-(\d+)\.part")
    for entry in os.scandir(folder):
        match = pattern.fullmatch(entry.name)
        if match and not _is_alive(int(match[1])):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                os.unlink(entry.path)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
