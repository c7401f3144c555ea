"""First pass: where each document overlaps with the index. One line per document that does; most do not.

``OUT/scan/overlaps/00012.jsonl`` belongs to input file 12, in order of its documents:

    {"position": 3, "origin": "a.jsonl:5", "hits": [[start, end, gram], ...], "excerpts": [[gram, "... text ..."], ...]}

``position`` counts the documents of the file (bad records left out), as the second pass does; start and end are
characters; ``gram`` is a number in the index. ``num_hits`` counts them all, ``MOST_HITS`` of them are kept.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from data_tools.corpus.document import BadRecord, Document
from data_tools.corpus.units import advance
from data_tools.decontaminate.gram_index import Found, GramIndex
from data_tools.sources import Input, ReadOptions, read_documents

MOST_HITS = 100_000  # kept of one document; one with more is mostly overlap and is never cut, but dropped
_AROUND = 60  # characters of context on each side of an excerpt
_EXCERPTS = 3  # per document
_ADVANCE_EVERY = 256


@dataclass
class Scan:
    """One unit: an input file to its overlaps. Picklable; opens the index once per process."""

    out: Path
    inputs: tuple[Input, ...]
    read: ReadOptions
    _index: GramIndex | None = field(default=None, init=False)

    def __call__(self, unit: int) -> dict[str, Any]:
        self._index = self._index or GramIndex.load(self.out / "index")
        target = overlaps_file(self.out, unit)
        partial = target.with_name(f".{os.getpid()}.{target.name}")
        counts = {"documents": 0, "overlapping": 0}
        try:
            with partial.open("wb") as file:
                for line in self._lines(self.inputs[unit], self._index, counts):
                    file.write(line)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return {"input": self.inputs[unit].name, **counts}

    def _lines(self, source: Input, index: GramIndex, counts: dict[str, int]) -> Iterator[bytes]:
        advanced = 0
        for number, record in enumerate(read_documents(source, self.read)):
            if not isinstance(record, BadRecord):
                found = index.find(record.text)
                if len(found):
                    counts["overlapping"] += 1
                    yield orjson.dumps(_line(counts["documents"], record, found), option=orjson.OPT_APPEND_NEWLINE)
                counts["documents"] += 1
            if number % _ADVANCE_EVERY == 0:
                advance(source.done_bytes - advanced)
                advanced = source.done_bytes
        advance(source.size_bytes - advanced)


def overlaps_file(out: Path, unit: int) -> Path:
    return out / "scan" / "overlaps" / f"{unit:05d}.jsonl"


def read_overlaps(out: Path, unit: int) -> Iterator[dict[str, Any]]:
    with overlaps_file(out, unit).open("rb") as lines:
        for line in lines:
            yield json.loads(line)


def _line(position: int, document: Document, found: Found) -> dict[str, Any]:
    columns = (column[:MOST_HITS].tolist() for column in (found.starts, found.ends, found.grams))
    hits = [list(hit) for hit in zip(*columns, strict=True)]
    step = max(1, len(hits) // _EXCERPTS)
    excerpts = [[gram, _excerpt(document.text, start, end)] for start, end, gram in hits[::step][:_EXCERPTS]]
    return {"position": position, "origin": document.origin, "hits": hits, "excerpts": excerpts,
            "num_hits": len(found)}  # fmt: skip


def _excerpt(text: str, start: int, end: int) -> list[str]:
    """[before, overlap, after]"""
    return [text[max(start - _AROUND, 0) : start], text[start : min(end, start + 400)], text[end : end + _AROUND]]
