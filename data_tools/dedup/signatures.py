"""First pass: every document read once, to 32 bytes of facts and 8 bytes per band, in one file per unit."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.units import advance
from data_tools.dedup.columns import read_column, write_columns
from data_tools.dedup.minhash import Banding, band_keys, band_keys_of_pieces
from data_tools.dedup.request import Unit, read_unit
from data_tools.dedup.shingles import PIECE_CHARS, Hashes, Shingler, exact_key
from data_tools.sources import ReadOptions

EXACT_HIGH, EXACT_LOW, TEXT_BYTES, RECORD, FIRST_BAND = range(5)
_BATCH_DOCUMENTS = 2048
_BATCH_CHARS = 1 << 20


@dataclass
class SignaturePass:
    """One unit to its column file. ``banding`` None: exact keys only."""

    units: tuple[Unit, ...]
    read: ReadOptions
    banding: Banding | None
    shingle_size: int
    folder: Path
    _shingler: Shingler | None = field(default=None, init=False)

    def __call__(self, number: int) -> dict[str, Any]:
        unit = self.units[number]
        text_bytes = 0
        with write_columns(signature_file(self.folder, number), num_columns(self.banding)) as writer:
            done = 0
            for records, texts in _batches(unit, self.read):
                rows = self._rows(records, texts)
                text_bytes += int(rows[TEXT_BYTES].sum())
                writer.append(rows)
                advance(unit.input.done_bytes - done)
                done = unit.input.done_bytes
            advance(unit.input.size_bytes - done)
        return {"input": unit.input.name, "documents": writer.documents, "bytes": text_bytes}

    def _rows(self, records: list[int], texts: list[str]) -> NDArray[np.uint64]:
        rows = np.empty((num_columns(self.banding), len(texts)), np.uint64)
        keys = np.frombuffer(b"".join(exact_key(text) for text in texts), ">u8").reshape(-1, 2)
        rows[EXACT_HIGH], rows[EXACT_LOW] = keys[:, 0], keys[:, 1]
        rows[TEXT_BYTES] = [len(text) if text.isascii() else len(text.encode()) for text in texts]
        rows[RECORD] = records
        if self.banding:
            rows[FIRST_BAND:] = self._bands(texts, self.banding)
        return rows

    def _bands(self, texts: list[str], banding: Banding) -> Hashes:
        self._shingler = self._shingler or Shingler(self.shingle_size)
        if len(texts[0]) > PIECE_CHARS:  # alone in its batch
            return band_keys_of_pieces(self._shingler.of_document(texts[0]), banding)[:, None]
        return band_keys(self._shingler.of_batch(texts), banding)


def num_columns(banding: Banding | None) -> int:
    return FIRST_BAND + (banding.bands if banding else 0)


def signature_file(folder: Path, unit: int) -> Path:
    return folder / f"{unit:05d}.u64"


@dataclass(frozen=True)
class Signatures:
    """The columns that the first pass left, of all units."""

    folder: Path
    counts: tuple[int, ...]
    num_columns: int

    def column(self, unit: int, column: int) -> Hashes:
        return read_column(
            signature_file(self.folder, unit), column, num_columns=self.num_columns, num_documents=self.counts[unit]
        )


def _batches(unit: Unit, read: ReadOptions) -> Iterator[tuple[list[int], list[str]]]:
    """Records and texts, bounded by number and size; a document that goes through in pieces comes alone."""
    records: list[int] = []
    texts: list[str] = []
    chars = 0
    for record, document in read_unit(unit, read):
        text = document.text
        if texts and (chars + len(text) > _BATCH_CHARS or len(texts) == _BATCH_DOCUMENTS):
            yield records, texts
            records, texts, chars = [], [], 0
        records.append(record)
        texts.append(text)
        chars += len(text)
    if texts:
        yield records, texts
