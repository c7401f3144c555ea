"""Bytes of an input: local or remote, decompressed, in pieces; and the lines in them. Memory stays bounded throughout.

Refused: files that end inside a compressed stream, and damaged ones. A compressed bomb cannot fill the memory: four
kilobytes go into the decompressor at a time (zstd gives at most 128 KB for four bytes, so 128 MB at once; 0.3 MB
otherwise, and as fast as large pieces), and a line stops being collected at ``MAX_RECORD_BYTES``.
"""

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cpt.rundir import DataError
from data_tools.readers.records import MAX_RECORD_BYTES, Damage, Input
from data_tools.readers.remote import driver_errors, is_url, open_url

_READ_BYTES = 1 << 18
_FEED_BYTES = 1 << 12
KEPT_OF_OVERSIZE = 1 << 12


@dataclass(frozen=True)
class Oversize:
    """A record longer than ``MAX_RECORD_BYTES``: its beginning and its full length."""

    beginning: bytes
    size: int

    def damage(self, place: str) -> Damage:
        problem = f"{self.size:,} bytes, a record may have {MAX_RECORD_BYTES:,}; fix: cut it into documents"
        return Damage(self.beginning, "bad_record.too_long", problem, place)


@contextlib.contextmanager
def open_input(source: Input) -> Iterator[BinaryIO]:
    """The stored bytes, local or remote; a failing disk or driver becomes an error that names the input."""
    if is_url(source.name):
        with driver_errors(source.name), open_url(source.name) as file:
            yield file
        return
    try:
        with Path(source.name).open("rb") as file:
            yield file
    except OSError as error:
        problem = error.strerror or str(error)[:200]
        raise DataError(f"{source.name}: cannot be read ({problem}); fix: check the path and its permissions") from None


def file_chunks(source: Input) -> Iterator[bytes]:
    """Decompressed content in pieces; ``source.done_bytes`` follows the position in the stored file."""
    make_decoder = DECODERS.get(Path(source.name).suffix)
    with open_input(source) as file:
        raw = _raw_chunks(iter(lambda: file.read(_READ_BYTES), b""), source)
        yield from _decompress(raw, source, make_decoder) if make_decoder else raw


def _raw_chunks(chunks: Iterable[bytes], source: Input) -> Iterator[bytes]:
    source.done_bytes = 0
    for chunk in chunks:
        source.done_bytes += len(chunk)
        yield chunk


def _decompress(chunks: Iterable[bytes], source: Input, make_decoder: Callable[[], Any]) -> Iterator[bytes]:
    try:
        yield from decompress(chunks, make_decoder)
    except Truncated:
        raise DataError(
            f"{source.name}: truncated, the stream stops short at byte {source.done_bytes}; fix: copy the file again"
        ) from None
    except Damaged as error:
        raise DataError(f"{source.name}: damaged near byte {source.done_bytes} ({error}); fix: copy it again") from None


class Damaged(ValueError):
    """A compressed stream that cannot be decoded."""


class Truncated(ValueError):
    """A compressed stream that ends before it says so, or is empty."""


def decompress(chunks: Iterable[bytes], make_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Frames one after another, as `cat a.gz b.gz` and multi-threaded compressors write them; zeros behind them too.

    The libraries' own stream readers are not used: zstandard's ends a cut file without a word.

    Raises:
        Damaged, Truncated: at the place; what lies before it was yielded.
    """
    from zstandard import ZstdError

    decoder, frames = None, 0
    for chunk in itertools.chain.from_iterable(map(_slices, chunks)):
        if decoder is None and frames:
            chunk = chunk.lstrip(b"\0")
        while chunk:
            decoder = decoder or make_decoder()
            try:
                text = decoder.decompress(chunk)
            except (ZstdError, zlib.error) as error:
                raise Damaged(str(error)) from None
            if text:
                yield text
            chunk = b""
            if decoder.eof:
                chunk, decoder, frames = decoder.unused_data.lstrip(b"\0"), None, frames + 1
    if decoder is not None or not frames:
        raise Truncated("it stops short")


def _slices(chunk: bytes) -> Iterator[bytes]:
    return (chunk[start : start + _FEED_BYTES] for start in range(0, len(chunk), _FEED_BYTES))


def _new_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # files of `zstd --long=31` too


DECODERS: dict[str, Callable[[], Any]] = {".gz": lambda: zlib.decompressobj(31), ".zst": _new_zstd}


class Collector:
    """Pieces of one record, joined in linear time; of a record that grows too long only the beginning is kept."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._beginning = b""
        self._size = 0

    def add(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size <= MAX_RECORD_BYTES:
            self._pieces.append(piece)
        elif self._pieces or self._size == len(piece):
            few = itertools.islice(itertools.chain(self._pieces, [piece]), KEPT_OF_OVERSIZE)  # joining all doubles them
            self._beginning = b"".join(part[:KEPT_OF_OVERSIZE] for part in few)[:KEPT_OF_OVERSIZE]
            self._pieces = []

    def take(self) -> bytes | Oversize:
        pieces, size = self._pieces, self._size
        self._pieces, self._size = [], 0
        return b"".join(pieces) if size <= MAX_RECORD_BYTES else Oversize(self._beginning, size)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes | Oversize]:
    """Lines without their end; linear also where one line fills many chunks."""
    held = Collector()
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held.add(first)
        if rest:
            yield held.take()
            yield from rest[:-1]
            held.add(rest[-1])
    last = held.take()
    if last:
        yield last
