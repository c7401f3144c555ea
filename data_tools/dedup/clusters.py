"""Fifth pass: near duplicates removed, each against a document that stays and that it was compared with.

Documents are judged in order of priority. One that is similar to a *kept* document of a bucket they share goes; any
other is kept, and put into its buckets for those behind it. A removed document has no say any more: in a chain
A ~ B ~ C where C is unlike A, only B goes. Hence running over what was kept removes nothing more, and the result
depends on nothing but the documents and their order.

Bounds for boilerplate, where thousands share a bucket and few are alike: a bucket remembers the last ``BUCKET_MEMORY``
kept documents, a document is compared with at most ``COMPARED`` of them, those that share most buckets first.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.corpus.units import advance
from data_tools.dedup.buckets import Numbers
from data_tools.dedup.candidates import Sketches
from data_tools.dedup.columns import open_array, save_array
from data_tools.dedup.minhash import at_most, similarity
from data_tools.dedup.request import Numbering

BUCKET_MEMORY = 64
COMPARED = 64
REMOVED = np.dtype([("document", "<i8"), ("partner", "<i8"), ("similarity", "<f8")])


@dataclass(frozen=True)
class ClusterPass:
    """A chunk of components -> the documents to remove, with partner and similarity.

    ``num_references``: documents below this number are those of the references, which all stay.
    """

    joined: Path
    sketches: Path
    numbering: Numbering
    threshold: float
    num_references: int
    folder: Path

    def __call__(self, chunk: int) -> dict[str, Any]:
        first, last = open_array(self.joined / "chunks.npy")[chunk : chunk + 2]
        documents, buckets = np.array(open_array(self.joined / "members.npy")[:, first:last])
        judge = _Judge(
            Sketches(self.sketches, self.joined / "wanted.npy", self.numbering), self.threshold, self.num_references
        )
        removed = []
        for document, own in _by_document(documents, buckets):
            found = judge.judge(document, own)
            if found:
                removed.append((document, *found))
            advance(1)
        save_array(self.folder / f"{chunk:05d}.npy", np.array(removed, REMOVED))
        return {"removed": len(removed), "compared": judge.num_compared}


class _Judge:
    """What is kept so far, by bucket."""

    def __init__(self, sketches: Sketches, threshold: float, num_references: int) -> None:
        self.num_compared = 0
        self._sketches = sketches
        self._threshold = threshold
        self._num_references = num_references
        self._kept: dict[int, deque[int]] = {}

    def judge(self, document: int, buckets: Sequence[int]) -> tuple[int, float] | None:
        """(partner, similarity) of a document that is to go; None keeps it."""
        if document >= self._num_references:
            found = self._partner(document, buckets)
            if found:
                return found
        for bucket in buckets:
            self._kept.setdefault(bucket, deque(maxlen=BUCKET_MEMORY)).append(document)
        return None

    def _partner(self, document: int, buckets: Sequence[int]) -> tuple[int, float] | None:
        shared: Counter[int] = Counter()
        for bucket in buckets:
            shared.update(self._kept.get(bucket, ()))
        if not shared:
            return None
        mine = self._sketches.sketch(document)
        for other, _ in sorted(shared.items(), key=lambda item: (-item[1], item[0]))[:COMPARED]:
            theirs = self._sketches.sketch(other)
            if at_most(mine, theirs) < self._threshold:
                continue
            self.num_compared += 1
            found = similarity(mine, theirs)
            if found >= self._threshold:
                return other, found
        return None


def _by_document(documents: Numbers, buckets: Numbers) -> Iterator[tuple[int, list[int]]]:
    """Members are sorted by component, then document: each document once, with its buckets."""
    borders = np.flatnonzero(np.diff(documents)) + 1
    starts = [0, *borders.tolist()] if len(documents) else []
    for first, last in zip(starts, [*starts[1:], len(documents)], strict=False):
        yield int(documents[first]), buckets[first:last].tolist()
