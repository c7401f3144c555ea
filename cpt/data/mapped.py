"""Files of numbers that are read while others may cut them short: as an error that can be told, never as a signal.

Owns the two ways to read one. ``map`` gives the whole file as an array, for look-ups in sorted positions; a page of it
that is gone (a file truncated by a copy, a disk that fails) kills the process with SIGBUS, so the file's size is asked
for before every use. ``read`` asks the system for a range of numbers, and a range that is gone comes back short; tokens
come that way, since they are most of what is read. Refuses to hold many files open: the least recently used are closed.
"""

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError

OPEN_FILES = 64  # of one store


class NumberFiles:
    """The files of a folder, by name. Safe in threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._maps: dict[str, NDArray[Any]] = {}
        self._opened = lru_cache(maxsize=OPEN_FILES)(_OpenFile)

    def map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        """All numbers of a file, mapped at first use.

        Raises:
            DataError: the file is shorter than it was.
        """
        path = self.folder / name
        if name not in self._maps:
            # asarray: slicing np.memmap objects costs microseconds per slice in subclass hooks
            self._maps[name] = np.asarray(np.memmap(path, dtype=dtype, mode="r"))
        found = self._maps[name]
        if (size := os.stat(path).st_size) < found.nbytes:
            raise _cut_short(path, found.nbytes, size)
        return found

    def read(self, name: str, dtype: np.dtype[Any], start: int, stop: int) -> NDArray[Any]:
        """Numbers ``[start, stop)`` of a file, copied.

        Raises:
            DataError: the file does not hold them.
        """
        path, item = self.folder / name, dtype.itemsize
        raw = self._opened(path).read((stop - start) * item, start * item)
        if len(raw) < (stop - start) * item:
            raise _cut_short(path, stop * item, start * item + len(raw))
        return np.frombuffer(raw, dtype)


class _OpenFile:
    """Closed when nobody holds it any more: also the thread that reads from it while it is crowded out."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        raw = os.pread(self._descriptor, size, offset)
        while len(raw) < size and (more := os.pread(self._descriptor, size - len(raw), offset + len(raw))):
            raw += more  # a signal or a limit of 2 GiB may cut a read short, the end of the file comes as nothing
        return raw

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _cut_short(path: Path, expected: int, found: int) -> DataError:
    return DataError(
        f"{path}: was cut short while it is in use, {found} bytes where {expected} are needed; copy it again, or make "
        "it anew with the command that wrote it, and go on with cpt resume"
    )
