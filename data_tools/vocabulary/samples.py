"""Texts to learn a vocabulary from and texts to measure it on: a bounded, deterministic part of each source.

The byte budget is spread evenly over the sources, and inside a source over its files: each gives its first documents,
what a small file leaves over goes to the files after it. A document in twenty, chosen by its hash, is held back: it is
measured on and never learned from, and a copy of it elsewhere is held back too. Nothing is drawn at random.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from cpt.rundir import DataError
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

HOLD_BACK = 20  # one document in so many
HELD_BACK_BYTES = 4_000_000  # of one source, at most; enough for three digits of a fertility


@dataclass
class Sample:
    """One source. ``taught()`` streams the documents to learn from; ``held_back`` fills up while it runs."""

    name: str
    patterns: Sequence[str]
    max_bytes: int
    read: ReadOptions = field(default_factory=ReadOptions)
    held_back: list[str] = field(default_factory=list)
    taught_bytes: int = 0
    documents: int = 0

    def taught(self) -> Iterator[str]:
        """What to learn from; all of a source where everything was held back. Raises DataError where it has no text."""
        self.held_back, self.taught_bytes, self.documents = [], 0, 0
        held_bytes = 0
        for text in self._bounded():
            if not _is_held_back(text):
                self.taught_bytes += len(text.encode())
                self.documents += 1
                yield text
            elif held_bytes < HELD_BACK_BYTES:
                self.held_back.append(text[:HELD_BACK_BYTES])
                held_bytes += len(text.encode())
        if not self.documents:  # a source of one document or two
            self.documents, self.taught_bytes = len(self.held_back), held_bytes
            yield from self.held_back
            self.held_back = []
        if not self.documents:
            raise DataError(f"source {self.name!r}: no document with text in {', '.join(self.patterns)}")

    def measured_on(self) -> list[str]:
        """The held-back texts; of a source too small to hold one back, its first documents."""
        if self.held_back:
            return self.held_back
        return list(islice(self._bounded(), 100))

    def _bounded(self) -> Iterator[str]:
        inputs = resolve_inputs(list(self.patterns))
        left = self.max_bytes
        for number, source in enumerate(inputs):
            share = left // (len(inputs) - number)
            for text in _nonempty(read_texts(source, self.read)):
                if share <= 0:
                    break
                size = len(text.encode())
                if size > share:  # a huge document must not bring more than its file's share
                    text = text.encode()[:share].decode(errors="ignore")
                    size = share
                share -= size
                left -= size
                if text:
                    yield text


def parse_sources(stated: Sequence[str], *, named: bool = False) -> dict[str, list[str]]:
    """``["medical=a/*.jsonl", "medical=b.parquet", "law.txt"]`` -> ``{"medical": [...], "law": ["law.txt"]}``.

    Raises:
        DataError: no files; no name although it must be ``named``; one name for files of two folders.
    """
    sources: dict[str, list[str]] = {}
    unnamed: dict[str, str] = {}
    for entry in stated:
        name, separator, pattern = entry.partition("=")
        if not separator or "/" in name:
            name, pattern = Path(entry).name.split(".")[0].strip("*?") or Path(entry).parent.name, entry
            if named:
                raise DataError(f"source {entry!r}: has no name, which decides what is done with it; fix: NAME={entry}")
            first = unnamed.setdefault(name, entry)
            if Path(first).parent != Path(entry).parent:
                raise DataError(f"sources {first!r} and {entry!r}: both would be {name!r}; fix: name them NAME=PATTERN")
        if not name or not pattern:
            raise DataError(f"source {entry!r}: names no files; fix: NAME=PATTERN, e.g. medical='corpus/med*.jsonl'")
        sources.setdefault(name, []).append(pattern)
    return sources


def make_samples(stated: Sequence[str], *, sample_bytes: int, read: ReadOptions, named: bool = False) -> list[Sample]:
    """One sample per source name, the budget spread evenly."""
    sources = parse_sources(stated, named=named)
    return [Sample(name, patterns, sample_bytes // len(sources), read) for name, patterns in sources.items()]


def batches(texts: Iterable[str], characters: int = 500_000) -> Iterator[list[str]]:
    """Lists of texts, each of about so many characters or of one longer text: the libraries need 100 times as much."""
    batch: list[str] = []
    held = 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def cut(texts: Iterable[str], characters: int = 100_000) -> Iterator[str]:
    """Long texts in pieces; a word lost at a cut does not matter to what is counted over millions."""
    for text in texts:
        yield from (text[start : start + characters] for start in range(0, len(text), characters))


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    return (text for text in texts if text)


def _is_held_back(text: str) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HOLD_BACK == 0
