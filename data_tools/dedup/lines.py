"""Repeated lines: counted over the documents that stay, then removed from all of them.

A line counts by its text after NFC, case folding and white space made one space; shorter ones are left alone. Copies of
a document are gone before lines are counted: else the lines of a document copied often enough would all be repeats, and
the last copy would vanish with them.
Memory: a buffer of ``_BUFFER`` lines while counting, one part of the distinct lines while summing up, and all repeated
lines, 8 bytes each, while filtering.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.units import advance
from data_tools.dedup.columns import open_array, save_array, write_whole
from data_tools.dedup.request import LineRule, Numbering, Unit, read_unit
from data_tools.dedup.shingles import Hashes, fold, require_xxhash
from data_tools.sources import ReadOptions

PART_LINES = 1 << 25
_BUFFER = 1 << 20
_MOST_FREQUENT = 20
_ADVANCE_EVERY = 256  # documents

_NONE: Hashes = np.empty(0, np.uint64)


def hash_lines(lines: list[str], min_chars: int) -> Hashes:
    """One hash per line; 0 for a line that is too short to count."""
    digest = require_xxhash().xxh3_64_intdigest
    hashes = np.zeros(len(lines), np.uint64)
    for place, line in enumerate(lines):
        if len(line) >= min_chars:
            normal = " ".join(fold(line).split())
            if len(normal) >= min_chars:
                hashes[place] = digest(normal.encode()) or 1
    return hashes


@dataclass(frozen=True)
class CountLinesPass:
    """The kept documents of a unit -> (hash, count) pairs; a hash may come several times. Units before ``first`` are
    those of the references.
    """

    units: tuple[Unit, ...]
    read: ReadOptions
    rule: LineRule
    numbering: Numbering
    first: int
    removals: Path
    folder: Path

    def __call__(self, number: int) -> dict[str, Any]:
        unit, offset = self.units[self.first + number], self.numbering.offsets[self.first + number]
        removed = unit_removals(self.removals, self.numbering, self.first + number)
        leaving = set((removed["document"] - offset).tolist())
        held: list[Hashes] = []
        num_held = written = done = 0
        with write_whole(line_file(self.folder, number)) as file:
            for place, (_, document) in enumerate(read_unit(unit, self.read)):
                hashes = _NONE if place in leaving else hash_lines(document.text.split("\n"), self.rule.min_chars)
                if hashes.any():  # a document of short lines must not cost memory
                    held.append(hashes[hashes != 0])
                    num_held += len(held[-1])
                if num_held >= _BUFFER:
                    written += _write_counts(file, held)
                    held, num_held = [], 0
                if place % _ADVANCE_EVERY == 0:
                    advance(unit.input.done_bytes - done)
                    done = unit.input.done_bytes
            written += _write_counts(file, held)
        advance(unit.input.size_bytes - done)
        return {"lines": written}


def _write_counts(file: Any, held: list[Hashes]) -> int:
    if not held:
        return 0
    hashes, counts = np.unique(np.concatenate(held), return_counts=True)
    file.write(np.stack([hashes, counts.astype(np.uint64)], axis=1).tobytes())
    return len(hashes)


def line_file(folder: Path, unit: int) -> Path:
    return folder / f"{unit:05d}.u64"


def num_line_parts(lines: int) -> int:
    return max(-(-lines // PART_LINES), 1)


@dataclass(frozen=True)
class SumLinesPass:
    """A part of all line hashes -> those that repeat too often, sorted."""

    counts: Path
    num_units: int
    parts: int
    rule: LineRule
    folder: Path

    def __call__(self, part: int) -> dict[str, Any]:
        found = [np.empty((0, 2), np.uint64)]
        for unit in range(self.num_units):
            file = line_file(self.counts, unit)
            if file.stat().st_size:
                pairs = np.memmap(file, np.uint64, "r").reshape(-1, 2)
                found.append(np.array(pairs[pairs[:, 0] % np.uint64(self.parts) == part]))
        pairs = np.concatenate(found)
        hashes, where = np.unique(pairs[:, 0], return_inverse=True)
        sums = np.bincount(where, weights=pairs[:, 1], minlength=len(hashes)) if len(hashes) else np.empty(0)
        repeated = sums > self.rule.max_repeats
        save_array(self.folder / f"{part:05d}.npy", hashes[repeated])
        most = np.argsort(-sums, kind="stable")[: min(_MOST_FREQUENT, int(repeated.sum()))]
        return {
            "repeated_lines": int(repeated.sum()),
            "repeated_line_occurrences": int(sums[repeated].sum()),
            "most_frequent": [[str(hashes[place]), int(sums[place])] for place in most],
        }


def repeated_lines(folder: Path, parts: int) -> Hashes:
    return np.sort(np.concatenate([open_array(folder / f"{part:05d}.npy") for part in range(parts)]))


def without_lines(text: str, repeated: Hashes, min_chars: int) -> str:
    """The text without its repeated lines; the same object if it has none."""
    lines = text.split("\n")
    hashes = hash_lines(lines, min_chars)
    if not len(repeated):
        return text
    where = np.minimum(np.searchsorted(repeated, hashes), len(repeated) - 1)
    goes = (repeated[where] == hashes) & (hashes != 0)
    return "\n".join(line for line, gone in zip(lines, goes, strict=True) if not gone) if goes.any() else text


def unit_removals(file: Path, numbering: Numbering, unit: int) -> NDArray[Any]:
    """The rows of ``removals.npy`` that concern a unit."""
    table = open_array(file)
    return np.array(table[numbering.slice_of(unit, table["document"])])
