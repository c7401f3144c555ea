"""Second pass: equal keys found by sorting, for exact duplicates first, then for each band of the others.

The numbers of a column are cut into *parts* by value, about ``PART_DOCUMENTS`` documents each, and one part is sorted
at a time: some 40 bytes per document of a part, whatever the size of the corpus.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.dedup.columns import open_array, save_array
from data_tools.dedup.request import Numbering
from data_tools.dedup.shingles import Hashes
from data_tools.dedup.signatures import EXACT_HIGH, EXACT_LOW, FIRST_BAND, Signatures

PART_DOCUMENTS = 1 << 25
_BUCKETS_PER_UNIT = 1 << 40

Numbers = NDArray[np.int64]


def num_parts(documents: int) -> int:
    return max(-(-documents // PART_DOCUMENTS), 1)


@dataclass(frozen=True)
class ExactPass:
    """A part of the exact keys -> (2, n): a document, and the first one with the same normalised text."""

    signatures: Signatures
    numbering: Numbering
    parts: int
    folder: Path

    def __call__(self, part: int) -> dict[str, Any]:
        found = [self._read(unit, part) for unit in range(len(self.signatures.counts))]
        high, low, documents = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.lexsort((low, high))  # stable: documents ascend where keys are equal
        high, low, documents = high[order], low[order], documents[order]
        repeats = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1])) + 1
        firsts = _run_starts(len(documents), repeats)
        save_array(self.folder / f"{part:05d}.npy", np.stack([documents[repeats], documents[firsts[repeats]]]))
        return {"duplicates": len(repeats)}

    def _read(self, unit: int, part: int) -> tuple[Hashes, Hashes, Numbers]:
        high = self.signatures.column(unit, EXACT_HIGH)
        mine = np.flatnonzero(high % np.uint64(self.parts) == part)
        low = self.signatures.column(unit, EXACT_LOW)
        return high[mine], low[mine], mine + self.numbering.offsets[unit]


@dataclass(frozen=True)
class JoinExactPass:
    """All parts to one (2, n) array, sorted by document."""

    source: Path
    parts: int
    folder: Path

    def __call__(self, number: int) -> dict[str, Any]:
        pairs = np.concatenate([open_array(self.source / f"{part:05d}.npy") for part in range(self.parts)], axis=1)
        save_array(self.folder / "pairs.npy", pairs[:, np.argsort(pairs[0])])
        return {"duplicates": pairs.shape[1]}


@dataclass(frozen=True)
class BucketPass:
    """A part of one band's keys -> (2, n): a document and its bucket, for buckets of two and more."""

    signatures: Signatures
    numbering: Numbering
    parts: int
    exact: Path  # of JoinExactPass: these documents are gone already
    folder: Path

    def __call__(self, number: int) -> dict[str, Any]:
        band, part = divmod(number, self.parts)
        gone = open_array(self.exact / "pairs.npy")[0]
        found = [self._read(unit, band, part, gone) for unit in range(len(self.signatures.counts))]
        keys, documents = (np.concatenate(column) for column in zip(*found, strict=True))
        order = np.argsort(keys, kind="stable")  # stable: documents ascend inside a bucket
        keys, documents = keys[order], documents[order]
        repeats = np.flatnonzero(keys[1:] == keys[:-1]) + 1
        firsts = _run_starts(len(keys), repeats)
        members = np.union1d(repeats, repeats - 1)
        buckets = firsts[members] + number * _BUCKETS_PER_UNIT
        save_array(self.folder / f"{number:05d}.npy", np.stack([documents[members], buckets]))
        return {"members": len(members)}

    def _read(self, unit: int, band: int, part: int, gone: Numbers) -> tuple[Hashes, Numbers]:
        keys = self.signatures.column(unit, FIRST_BAND + band)
        mine = (keys % np.uint64(self.parts) == part) & (keys != 0)
        offset = self.numbering.offsets[unit]
        mine[gone[self.numbering.slice_of(unit, gone)] - offset] = False
        where = np.flatnonzero(mine)
        return keys[where], where + offset


def _run_starts(count: int, repeats: Numbers) -> Numbers:
    """For each position the first of its run; ``repeats`` are the positions that equal the one before."""
    starts = np.arange(count)
    starts[repeats] = 0
    return np.maximum.accumulate(starts)
