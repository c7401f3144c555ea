"""MinHash signatures in bands, and the similarity of two documents.

``bands`` x ``rows`` minima are taken over a document's shingles; documents that agree in all rows of some band are
candidates, which for a similarity s happens with probability ``1 - (1 - s**rows) ** bands``. A candidate is not yet a
duplicate: the *similarity*, |A and B| / |A or B| of the two shingle sets, is computed for every pair that decides.
It is exact up to ``SKETCH`` distinct shingles in each; beyond, it is estimated from the ``SKETCH`` smallest hashes of
the union, with a standard error of at most 0.004.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_tools.dedup.shingles import Hashes, Shingles, constants, mix

SKETCH = 1 << 14
BANDS = 16
_MAX_ROWS = 16
_RECALL = 0.98  # of pairs that are just as similar as the threshold
_CHUNK = 1 << 15  # shingles permuted at a time: they stay in the second-level cache


@dataclass(frozen=True)
class Banding:
    bands: int
    rows: int

    def recall(self, similarity: float) -> float:
        """Probability that two documents of this similarity are candidates."""
        return float(1 - (1 - similarity**self.rows) ** self.bands)


def choose_banding(threshold: float) -> Banding:
    """As many rows, hence as few false candidates, as leave ``_RECALL`` at the threshold: 16 x 6 for 0.8."""
    fitting = [rows for rows in range(1, _MAX_ROWS + 1) if Banding(BANDS, rows).recall(threshold) >= _RECALL]
    return Banding(BANDS, max(fitting, default=1))


def band_keys(shingles: Shingles, banding: Banding) -> Hashes:
    """(bands, documents) keys; 0 for a document without shingles, which is nobody's candidate."""
    counts = np.diff(shingles.starts)
    minima = np.empty((banding.bands * banding.rows, len(counts)), np.uint32)
    filled = np.flatnonzero(counts)
    starts = shingles.starts[:-1][filled]
    short = (shingles.hashes >> np.uint64(32)).astype(np.uint32)
    for first, last in _chunks(starts, len(short)):
        end = starts[last] if last < len(starts) else len(short)
        minima[:, filled[first:last]] = _minima(short[starts[first] : end], starts[first:last] - starts[first], banding)
    keys = _keys_of(minima, banding)
    keys[:, counts == 0] = 0
    return keys


def band_keys_of_pieces(pieces: Iterable[Hashes], banding: Banding) -> Hashes:
    """(bands,) keys of one document that comes in pieces."""
    minima = None
    for piece in pieces:
        found = _minima((piece >> np.uint64(32)).astype(np.uint32), np.zeros(1, np.int64), banding)
        minima = found if minima is None else np.minimum(minima, found)
    return np.zeros(banding.bands, np.uint64) if minima is None else _keys_of(minima, banding)[:, 0]


def sketch(pieces: Iterable[Hashes]) -> Hashes:
    """The ``SKETCH`` smallest distinct shingles, sorted; all of them where there are fewer."""
    held = np.empty(0, np.uint64)
    for piece in pieces:
        held = np.unique(np.concatenate([held, piece]))[:SKETCH]
    return held


def similarity(a: Hashes, b: Hashes) -> float:
    """Jaccard similarity of two documents, from their sketches."""
    if max(len(a), len(b)) >= SKETCH:
        union = np.union1d(a, b)[:SKETCH]
        a, b = a[: np.searchsorted(a, union[-1], "right")], b[: np.searchsorted(b, union[-1], "right")]
        return _num_shared(a, b) / len(union)
    shared = _num_shared(a, b)
    return shared / (len(a) + len(b) - shared)


def at_most(a: Hashes, b: Hashes) -> float:
    """What their sizes alone allow the similarity to be."""
    if max(len(a), len(b)) >= SKETCH:
        return 1.0
    return min(len(a), len(b)) / max(len(a), len(b))


def _num_shared(a: Hashes, b: Hashes) -> int:
    if not len(a) or not len(b):
        return 0
    where = np.searchsorted(a, b)
    where[where == len(a)] = 0
    return int(np.count_nonzero(a[where] == b))


def _chunks(starts: NDArray[np.int64], total: int) -> Iterable[tuple[int, int]]:
    """Ranges of documents that hold about ``_CHUNK`` shingles each."""
    first = 0
    while first < len(starts):
        last = max(int(np.searchsorted(starts, starts[first] + _CHUNK, "right")) - 1, first + 1)
        if total <= starts[first] + _CHUNK:
            last = len(starts)
        yield first, last
        first = last


def _minima(short: NDArray[np.uint32], starts: NDArray[np.int64], banding: Banding) -> NDArray[np.uint32]:
    """(permutations, documents) minima. A permutation of 32-bit values is a multiplication by an odd number."""
    factors = (constants(2, banding.bands * banding.rows) >> np.uint64(31)).astype(np.uint32) | np.uint32(1)
    minima = np.empty((len(factors), len(starts)), np.uint32)
    permuted = np.empty_like(short)
    for row, factor in enumerate(factors):
        np.multiply(short, factor, out=permuted)
        np.minimum.reduceat(permuted, starts, out=minima[row])
    return minima


def _keys_of(minima: NDArray[np.uint32], banding: Banding) -> Hashes:
    """One 64-bit key per band; another band gives another key for the same rows."""
    by_band = minima.reshape(banding.bands, banding.rows, -1)
    keys = np.zeros((banding.bands, by_band.shape[2]), np.uint64)
    for row, factor in enumerate(constants(3, banding.rows)):
        keys += by_band[:, row].astype(np.uint64) * factor
    return np.maximum(mix(keys), np.uint64(1))
