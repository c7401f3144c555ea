"""Megatron's `PREFIX.bin` + `PREFIX.idx`: tokens end to end, and where sequences and documents lie in them.

    9 bytes MMIDIDX\\0\\0 | u64 1 | u8 dtype code | u64 S | u64 D
    i32[S] tokens per sequence | i64[S] byte where each begins | i64[D] sequence at which each document begins, then S

Documents [5 7 0] [9 0], one sequence each, as uint16: S 2, D 3, lengths 3 2, pointers 0 6, documents 0 1 2.
Read memory-mapped and checked piece by piece, so an index of any size costs a few megabytes. Refused: indices whose
numbers do not fit each other or the .bin file, sequences with gaps between them, multimodal ones, floats.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError

MAGIC = b"MMIDIDX\0\0"
HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
_NOT_IDS = {6: "float64", 7: "float32"}
_PIECE = 1 << 18


@dataclass(frozen=True)
class MegatronIndex:
    """A checked index. ``documents`` is the number of documents, ``tokens`` of all of them."""

    bin_path: Path
    dtype: np.dtype[Any]
    tokens: int
    documents: int
    lengths: NDArray[np.int32]
    document_sequences: NDArray[np.int64]

    def document_ends(self, first: int = 0) -> Iterator[NDArray[np.int64]]:
        """Token position behind each document from number ``first`` on, in pieces."""
        position = self.tokens_before(first)
        for low in range(first, self.documents, _PIECE):
            borders = self.document_sequences[low : min(low + _PIECE, self.documents) + 1]
            lengths = self.lengths[borders[0] : borders[-1]].astype(np.int64)
            sums = np.concatenate([np.zeros(1, np.int64), lengths.cumsum()]) + position
            yield sums[borders[1:] - borders[0]]
            position = int(sums[-1])

    def tokens_before(self, document: int) -> int:
        sequence = int(self.document_sequences[document])
        pieces = range(0, sequence, _PIECE)
        return sum(int(self.lengths[at : min(at + _PIECE, sequence)].sum(dtype=np.int64)) for at in pieces)

    def map_tokens(self) -> NDArray[Any]:
        if not self.tokens:
            return np.empty(0, self.dtype)
        return np.asarray(np.memmap(self.bin_path, dtype=self.dtype, mode="r"))


def with_suffix(prefix: Path, suffix: str) -> Path:
    """``corpus.v1`` + ``.bin``: a prefix may have dots, and may be given with either suffix.

    Raises:
        DataError: a folder where a prefix belongs.
    """
    name = prefix.name.removesuffix(".bin").removesuffix(".idx")
    if name in ("", ".."):
        raise DataError(f"{prefix}: no prefix of file names; fix: end it with a name, e.g. {prefix / 'corpus'}")
    return prefix.with_name(f"{name}{suffix}")


def open_index(prefix: Path) -> MegatronIndex:
    """Read and check ``prefix.idx`` against ``prefix.bin``.

    Raises:
        DataError: a missing file, or an index that is truncated, damaged or of another kind; names what is wrong.
    """
    index_path, bin_path = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
    for file in (index_path, bin_path):
        if not file.is_file():
            raise DataError(f"{file}: no such file; fix: name the common prefix of a .bin and an .idx file")
    sequences, borders, dtype = _read_header(index_path)
    lengths, pointers, documents = (
        _map_section(index_path, kind, count, offset)
        for kind, count, offset in (
            ("<i4", sequences, HEADER.size),
            ("<i8", sequences, HEADER.size + 4 * sequences),
            ("<i8", borders, HEADER.size + 12 * sequences),
        )
    )
    _check_documents(documents, sequences, index_path)
    tokens = _check_sequences(lengths, pointers, dtype.itemsize, index_path)
    if bin_path.stat().st_size != tokens * dtype.itemsize:
        raise DataError(
            f"{bin_path}: has {bin_path.stat().st_size} bytes, the index says {tokens * dtype.itemsize}; "
            "fix: copy both files again"
        )
    return MegatronIndex(bin_path, dtype, tokens, borders - 1, lengths, documents)


def _read_header(path: Path) -> tuple[int, int, np.dtype[Any]]:
    """(sequences, borders of documents, dtype)"""
    with path.open("rb") as file:
        raw = file.read(HEADER.size)
    size = path.stat().st_size
    if len(raw) < HEADER.size or raw[: len(MAGIC)] != MAGIC:
        raise DataError(f"{path}: no Megatron index (it starts with {raw[:9]!r}); fix: copy it again")
    _, version, code, sequences, borders = HEADER.unpack(raw)
    if version != 1 or code not in CODES:
        what = f"tokens of type {_NOT_IDS.get(code, code)}" if version == 1 else f"version {version}"
        raise DataError(f"{path}: {what} cannot be read; fix: an index of version 1 with integers")
    expected = HEADER.size + 12 * sequences + 8 * borders
    if size == expected + sequences and sequences:
        raise DataError(f"{path}: a multimodal index (it has modes); fix: only text can be imported")
    if size != expected or not borders:
        raise DataError(
            f"{path}: has {size} bytes, {sequences} sequences and {borders} document borders make {expected}; "
            "fix: truncated or damaged, copy it again"
        )
    return sequences, borders, np.dtype(CODES[code]).newbyteorder("<")


def _map_section(path: Path, kind: str, count: int, offset: int) -> NDArray[Any]:
    if not count:
        return np.empty(0, kind)
    return np.asarray(np.memmap(path, dtype=kind, mode="r", offset=offset, shape=(count,)))


def _check_documents(documents: NDArray[np.int64], sequences: int, path: Path) -> None:
    problem = ""
    if documents[0] != 0 or documents[-1] != sequences:
        problem = f"documents span sequences {documents[0]} to {documents[-1]}, there are {sequences}"
    for at in range(0, len(documents) - 1, _PIECE):
        if (np.diff(documents[at : at + _PIECE + 1]) < 0).any():
            problem = f"document borders go back behind document {at}"
    if problem:
        raise DataError(f"{path}: {problem}; fix: the index is damaged, copy it again")


def _check_sequences(lengths: NDArray[np.int32], pointers: NDArray[np.int64], itemsize: int, path: Path) -> int:
    """Total tokens; sequences must lie one behind the other."""
    tokens = 0
    for at in range(0, len(lengths), _PIECE):
        piece = lengths[at : at + _PIECE].astype(np.int64)
        ends = piece.cumsum() + tokens
        if (piece < 0).any() or not np.array_equal(pointers[at : at + _PIECE], (ends - piece) * itemsize):
            raise DataError(
                f"{path}: sequence lengths and positions do not fit each other behind sequence {at}; "
                "fix: the index is damaged or its .bin has gaps: copy it again, or merge it again with Megatron"
            )
        tokens = int(ends[-1])
    return tokens
