"""Records of the inputs, in order, as jobs for encoders: batches of whole documents, and pieces of long ones.

The input is cut into *segments* of at least ``segment_bytes`` of text and rejects, at document borders. Where a batch
ends inside a segment has no influence on the store; where a segment ends depends on the records alone. At most
one document is in memory as a whole, and a long one goes on in pieces.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from data_tools.corpus.document import BadRecord, Document
from data_tools.sources import Input, ReadOptions, read_documents, read_texts
from data_tools.tokenizing.cutting import Cut
from data_tools.tokenizing.request import BadRecords

LONG_TEXT = 1 << 20  # characters; longer ones are cut
PIECE = 1 << 19
BATCH_BYTES = 2 << 20
BATCH_TEXTS = 1 << 15
_REJECT_BYTES = 1 << 9  # what a reject takes in memory besides its raw bytes


@dataclass(frozen=True)
class Piece:
    """Which part of a long document a text is; ``side``: 0 for train, 1 for held out."""

    side: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Job:
    """Texts to encode, and where the input stands behind them: after ``record`` records of input ``input_index``."""

    texts: list[bytes]
    piece: Piece | None
    input_index: int
    record: int
    done_bytes: int
    ends_segment: bool
    empty_documents: int
    rejects: list[BadRecord]


@dataclass(frozen=True)
class Reading:
    """How to read the inputs and where to cut what is read."""

    options: ReadOptions
    bad_records: BadRecords
    heldout_fraction: float
    segment_bytes: int
    cut: Cut | None


def is_heldout(text: bytes, fraction: float) -> bool:
    """By the text alone: the same document falls on the same side in every corpus, order and run."""
    return _is_below(hashlib.blake2b(text, digest_size=8).digest(), fraction)


def _is_below(digest: bytes, fraction: float) -> bool:
    return int.from_bytes(digest, "big") < fraction * 2**64


def read_records(
    source: Input, options: ReadOptions, bad_records: BadRecords, start: int = 0
) -> Iterator[str | BadRecord]:
    """One item per record from ``start`` on, "" for one without text; with ``fail`` a damaged one raises DataError."""
    if bad_records == "fail":
        return read_texts(source, options, start=start)
    return map(_text_of, read_documents(source, options, start=start))


def _text_of(item: Document | BadRecord) -> str | BadRecord:
    if isinstance(item, Document):
        return item.text
    return "" if item.reason == "bad_record.empty" else item


def make_jobs(inputs: Sequence[Input], reading: Reading, input_index: int, record: int) -> Iterator[Job]:
    """Jobs for everything behind the given position; every segment and the input end with ``ends_segment``."""
    held = _Held(reading, behind=sum(entry.size_bytes for entry in inputs[:input_index]))
    for index in range(input_index, len(inputs)):
        source = inputs[index]
        held.input_index, held.record = index, record
        for item in read_records(source, reading.options, reading.bad_records, record):
            held.record += 1
            if type(item) is str and 0 < len(item) <= LONG_TEXT:
                if held.add(item.encode()):
                    yield held.job(source)
            else:
                yield from held.odd(item, source)
        held.behind += source.size_bytes
        record = 0
    held.input_index, held.record = len(inputs), 0
    if held.segment_bytes or held.empty_documents or held.rejects:
        yield held.job(None)


@dataclass
class _Held:
    """What waits for the next job, and where the input stands."""

    reading: Reading
    input_index: int = 0
    record: int = 0
    behind: int = 0
    texts: list[bytes] = field(default_factory=list)
    batch_bytes: int = 0
    segment_bytes: int = 0
    empty_documents: int = 0
    rejects: list[BadRecord] = field(default_factory=list)

    def add(self, raw: bytes) -> bool:
        """Take a document; true where a job is due."""
        self.texts.append(raw)
        return self._count(len(raw))

    def _count(self, size: int) -> bool:
        """True where a job is due."""
        self.batch_bytes += size
        self.segment_bytes += size
        return (
            self.batch_bytes >= BATCH_BYTES
            or self.segment_bytes >= self.reading.segment_bytes
            or len(self.texts) >= BATCH_TEXTS
        )

    def odd(self, item: str | BadRecord, source: Input) -> Iterator[Job]:
        """The rare items: no text, a bad record, a long document."""
        if isinstance(item, BadRecord):
            # counted like texts: nothing but rejects must neither fill the memory nor end without a segment
            self.rejects.append(item)
            if self._count(len(item.raw) + _REJECT_BYTES):
                yield self.job(source)
        elif not item:
            self.empty_documents += 1
        else:
            if self.texts:
                yield self.job(source)
            yield from self._long(item, source)

    def _long(self, text: str, source: Input) -> Iterator[Job]:
        digest = hashlib.blake2b(digest_size=8)
        for start in range(0, len(text), PIECE):
            digest.update(text[start : start + PIECE].encode())
        side = int(_is_below(digest.digest(), self.reading.heldout_fraction))
        pieces = self.reading.cut.pieces(text, PIECE) if self.reading.cut else iter((text,))
        current, first = next(pieces), True
        for following in pieces:
            self.add(current.encode())
            yield self.job(source, Piece(side, first, False))
            current, first = following, False
        del text
        self.add(current.encode())
        yield self.job(source, Piece(side, first, True))

    def job(self, source: Input | None, piece: Piece | None = None) -> Job:
        """Everything held, as one job; ``source`` None: the inputs are at their end."""
        full = self.segment_bytes >= self.reading.segment_bytes
        ends = source is None or (full and (piece is None or piece.last))
        done_bytes = self.behind + (source.done_bytes if source else 0)
        job = Job(
            self.texts, piece, self.input_index, self.record, done_bytes, ends, self.empty_documents, self.rejects
        )
        self.texts, self.batch_bytes, self.empty_documents, self.rejects = [], 0, 0, []
        self.segment_bytes = 0 if ends else self.segment_bytes
        return job
