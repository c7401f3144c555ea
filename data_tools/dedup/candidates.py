"""Third and fourth pass: which documents have to be compared, and their shingles, read a second time.

Documents that share a bucket are candidates; candidates joined through buckets form a *component*, which can be
judged without the others. Components are put into chunks that are worked on in parallel.
Memory: some 64 bytes per candidate and bucket it is in while they are joined, and the buckets of a whole component
while it is judged. With some 50 bytes per removed document these are the only amounts that grow with the corpus, and
only with the part of it that looks like duplicates.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.corpus.units import advance
from data_tools.dedup.buckets import Numbers
from data_tools.dedup.columns import open_array, save_array, write_whole
from data_tools.dedup.minhash import sketch
from data_tools.dedup.request import Numbering, Unit, read_unit
from data_tools.dedup.shingles import Hashes, Shingler, mix
from data_tools.sources import ReadOptions

CHUNK_MEMBERS = 1 << 19
EXAMPLES = 3  # per pair of sources and kind
EXCERPT_BYTES = 300


@dataclass(frozen=True)
class JoinBucketsPass:
    """All buckets -> members (2, n) of document and bucket, by component; chunks of them; the documents to read."""

    buckets: Path
    num_files: int
    exact: Path
    numbering: Numbering
    unit_sources: tuple[int, ...]
    folder: Path

    def __call__(self, number: int) -> dict[str, Any]:
        empty = np.empty((2, 0), np.int64)
        found = [open_array(self.buckets / f"{index:05d}.npy") for index in range(self.num_files)]
        documents, buckets = np.concatenate([empty, *found], axis=1)
        candidates, roots = _components(documents, buckets)
        order = np.lexsort((buckets, documents, roots))
        save_array(self.folder / "members.npy", np.stack([documents[order], buckets[order]]))
        chunks = _cut(roots[order])
        save_array(self.folder / "chunks.npy", chunks)
        pairs = open_array(self.exact / "pairs.npy")
        shown = pairs[:, choose_examples(pairs[0], pairs[1], self.numbering, self.unit_sources)]
        save_array(self.folder / "wanted.npy", np.union1d(candidates, shown))
        return {"candidates": len(candidates), "members": len(documents), "chunks": len(chunks) - 1}


def choose_examples(
    removed: Numbers, kept: Numbers, numbering: Numbering, unit_sources: tuple[int, ...]
) -> NDArray[np.int64]:
    """Positions of a few pairs for every pair of sources, picked by hash: spread, and the same in every run."""
    sources = np.array(unit_sources)
    cells = sources[numbering.unit_of(kept)] * (1 << 20) + sources[numbering.unit_of(removed)]
    order = np.lexsort((mix(removed.astype(np.uint64)), cells))
    firsts = np.concatenate([[0], np.flatnonzero(np.diff(cells[order])) + 1])
    rank = np.arange(len(order)) - np.repeat(firsts, np.diff([*firsts, len(order)])) if len(order) else order
    return order[rank < EXAMPLES]


def _components(documents: Numbers, buckets: Numbers) -> tuple[Numbers, Numbers]:
    """(candidates, for each member the first document of its component)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    candidates, nodes = np.unique(documents, return_inverse=True)
    if not len(documents):
        return candidates, documents
    is_first = np.concatenate([[True], buckets[1:] != buckets[:-1]])  # members of a bucket come one after another
    firsts = nodes[np.maximum.accumulate(np.where(is_first, np.arange(len(buckets)), 0))]
    count = len(candidates)
    links = np.unique((firsts * count + nodes)[~is_first])  # the same pair in many bands is one link
    graph = coo_array((np.ones(len(links), bool), np.divmod(links, count)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1]
    roots = candidates[np.unique(labels, return_index=True)[1]]
    return candidates, roots[labels[nodes]]


def _cut(roots: Numbers) -> Numbers:
    """Borders of chunks: at the first component that begins ``CHUNK_MEMBERS`` or more behind the last border."""
    begins = np.flatnonzero(np.diff(roots)) + 1
    borders = [0]
    while True:
        place = np.searchsorted(begins, borders[-1] + CHUNK_MEMBERS)
        if place == len(begins):
            return np.array([*borders, len(roots)] if len(roots) else [0])
        borders.append(int(begins[place]))


@dataclass
class SketchPass:
    """The wanted documents of a unit -> their sketches, and how their texts begin."""

    units: tuple[Unit, ...]
    read: ReadOptions
    shingle_size: int
    numbering: Numbering
    wanted: Path
    folder: Path
    _shingler: Shingler | None = field(default=None, init=False)

    def __call__(self, number: int) -> dict[str, Any]:
        wanted = open_array(self.wanted)
        wanted = np.array(wanted[self.numbering.slice_of(number, wanted)])
        lengths = np.zeros(len(wanted), np.int64)
        excerpts = np.zeros(len(wanted), f"S{EXCERPT_BYTES}")
        if len(wanted):
            self._read(number, wanted - self.numbering.offsets[number], lengths, excerpts)
        save_array(self.folder / f"{number:05d}.documents.npy", wanted)
        save_array(self.folder / f"{number:05d}.ends.npy", lengths.cumsum())
        save_array(self.folder / f"{number:05d}.excerpts.npy", excerpts)
        return {"documents": len(wanted), "shingles": int(lengths.sum())}

    def _read(self, number: int, places: Numbers, lengths: Numbers, excerpts: NDArray[np.bytes_]) -> None:
        self._shingler = self._shingler or Shingler(self.shingle_size)
        unit, found, done = self.units[number], 0, 0
        with write_whole(self.folder / f"{number:05d}.u64") as file:
            for place, (_, document) in enumerate(read_unit(unit, self.read)):
                if place != places[found]:
                    continue
                hashes = sketch(self._shingler.of_document(document.text))
                file.write(hashes.tobytes())
                lengths[found], excerpts[found] = len(hashes), document.text[:EXCERPT_BYTES].encode()[:EXCERPT_BYTES]
                found += 1
                if found == len(places):
                    break
                if found % 256 == 0:
                    advance(unit.input.done_bytes - done)
                    done = unit.input.done_bytes
        assert found == len(places), f"{unit.input.name}: changed while it was read"


class Sketches:
    """What ``SketchPass`` left, of all units."""

    def __init__(self, folder: Path, wanted: Path, numbering: Numbering) -> None:
        self._folder = folder
        self._wanted = wanted
        self._numbering = numbering
        self._open: dict[int, tuple[Numbers, Numbers, Hashes]] = {}

    def has(self, documents: Numbers) -> NDArray[np.bool_]:
        return np.isin(documents, open_array(self._wanted))

    def sketch(self, document: int) -> Hashes:
        unit = int(np.searchsorted(self._offsets, document, "right")) - 1
        documents, ends, hashes = self._unit(unit)
        place = int(np.searchsorted(documents, document))
        return hashes[ends[place - 1] if place else 0 : ends[place]]

    def excerpt(self, document: int) -> str:
        unit = int(np.searchsorted(self._offsets, document, "right")) - 1
        place = int(np.searchsorted(self._unit(unit)[0], document))
        raw: bytes = open_array(self._folder / f"{unit:05d}.excerpts.npy")[place]
        return raw.decode("utf-8", "ignore")

    @property
    def _offsets(self) -> tuple[int, ...]:
        return self._numbering.offsets

    def _unit(self, unit: int) -> tuple[Numbers, Numbers, Hashes]:
        if unit not in self._open:
            name = self._folder / f"{unit:05d}"
            documents = np.asarray(open_array(name.with_name(f"{name.name}.documents.npy")))
            ends = np.asarray(open_array(name.with_name(f"{name.name}.ends.npy")))
            size = int(ends[-1]) if len(ends) else 0
            hashes = np.memmap(f"{name}.u64", np.uint64, "r") if size else np.empty(0, np.uint64)
            self._open[unit] = (documents, ends, np.asarray(hashes))
        return self._open[unit]
