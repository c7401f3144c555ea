"""Sixth pass: what exact and near duplicates give together, one row per document that goes, sorted by document.

An exact duplicate of a document that went as a near duplicate itself is written down against the one that stayed: its
shingles are the same, so the similarity is.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.dedup.clusters import REMOVED
from data_tools.dedup.columns import open_array, save_array
from data_tools.dedup.request import Numbering
from data_tools.dedup.signatures import RECORD, TEXT_BYTES, Signatures

REMOVAL = np.dtype([*REMOVED.descr, ("near", "?"), ("text_bytes", "<i8"), ("partner_record", "<i8")])


@dataclass(frozen=True)
class RemovalPass:
    """Pairs of both kinds -> ``removals.npy``. References are no part of it: they all stay."""

    signatures: Signatures
    numbering: Numbering
    exact: Path
    clusters: Path
    num_chunks: int
    num_references: int
    folder: Path

    def __call__(self, number: int) -> dict[str, Any]:
        near = np.concatenate(
            [
                np.empty(0, REMOVED),
                *(open_array(self.clusters / f"{chunk:05d}.npy") for chunk in range(self.num_chunks)),
            ]
        )
        near = near[np.argsort(near["document"])]
        pairs = open_array(self.exact / "pairs.npy")
        table = np.zeros(len(near) + pairs.shape[1], REMOVAL)
        self._fill_near(table[: len(near)], near)
        self._fill_exact(table[len(near) :], pairs, near)
        table = table[table["document"] >= self.num_references]
        table = table[np.argsort(table["document"])]
        for unit in range(len(self.signatures.counts)):
            self._look_up(table, unit)
        save_array(self.folder / "removals.npy", table)
        return {"documents": len(table)}

    def _fill_near(self, table: NDArray[Any], near: NDArray[Any]) -> None:
        for name in REMOVED.names or ():
            table[name] = near[name]
        table["near"] = True

    def _fill_exact(self, table: NDArray[Any], pairs: NDArray[np.int64], near: NDArray[Any]) -> None:
        table["document"], table["partner"] = pairs
        table["similarity"] = 1
        if not len(near):
            return
        where = np.minimum(np.searchsorted(near["document"], pairs[1]), len(near) - 1)
        gone = near["document"][where] == pairs[1]
        for name in ("partner", "similarity"):
            table[name] = np.where(gone, near[name][where], table[name])
        table["near"] = gone

    def _look_up(self, table: NDArray[Any], unit: int) -> None:
        """Sizes of the unit's removed documents, record numbers of its documents that others went for."""
        offset, end = self.numbering.offsets[unit : unit + 2]
        mine = self.numbering.slice_of(unit, table["document"])
        if mine.start < mine.stop:
            sizes = self.signatures.column(unit, TEXT_BYTES)
            table["text_bytes"][mine] = sizes[table["document"][mine] - offset]
        partners = (table["partner"] >= offset) & (table["partner"] < end)
        if partners.any():
            records = self.signatures.column(unit, RECORD)
            table["partner_record"][partners] = records[table["partner"][partners] - offset]
