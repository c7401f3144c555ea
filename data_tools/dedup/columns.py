"""Numbers about documents in files: the columns of a unit, and small arrays beside them.

A column file holds 64-bit numbers, ``num_columns`` for each document, in blocks of ``BLOCK`` documents, column after
column inside a block. It is written in one go with one block in memory, and one column is read without the others.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 16
_WIDTH = 8


class ColumnWriter:
    """Collects documents to blocks; see ``write_columns``."""

    def __init__(self, file: BinaryIO, num_columns: int) -> None:
        self.documents = 0
        self._file = file
        self._block = np.empty((num_columns, BLOCK), np.uint64)
        self._filled = 0

    def append(self, rows: NDArray[np.uint64]) -> None:
        """``rows`` is (num_columns, documents)."""
        self.documents += rows.shape[1]
        while rows.shape[1]:
            taken = min(rows.shape[1], BLOCK - self._filled)
            self._block[:, self._filled : self._filled + taken] = rows[:, :taken]
            self._filled += taken
            rows = rows[:, taken:]
            if self._filled == BLOCK:
                self.flush()

    def flush(self) -> None:
        self._file.write(self._block[:, : self._filled].tobytes())
        self._filled = 0


@contextmanager
def write_columns(path: Path, num_columns: int) -> Iterator[ColumnWriter]:
    """The file appears under its name when the block ends without an error."""
    with write_whole(path) as file:
        writer = ColumnWriter(file, num_columns)
        yield writer
        writer.flush()


def read_column(path: Path, column: int, *, num_columns: int, num_documents: int) -> NDArray[np.uint64]:
    values = np.empty(num_documents, np.uint64)
    with path.open("rb") as file:
        for first in range(0, num_documents, BLOCK):
            size = min(BLOCK, num_documents - first)
            file.seek((first * num_columns + column * size) * _WIDTH)
            values[first : first + size] = np.fromfile(file, np.uint64, size)
    return values


@contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under its name whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process number keeps two hosts that mistake themselves for the same task from writing one file
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_array(path: Path, array: NDArray[Any]) -> None:
    with write_whole(path) as file:
        np.save(file, array, allow_pickle=False)


def open_array(path: Path) -> NDArray[Any]:
    """Mapped, not read: pages come as they are touched."""
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
