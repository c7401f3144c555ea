"""Web archives: WARC, and WET with the plain text that Common Crawl extracted. A position is the number of a page.

A *page* is a ``response``, ``resource`` or ``conversion`` record; other records (requests, metadata) are passed over.
Plain text is taken as it is, of HTML what ``page_text`` leaves. Pages without text (images, error answers) count as
records without text. The framing of records is read here and strictly, because warcio skips over damage with a
warning; so are the encodings of HTTP bodies (``http_body``).
"""

import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cpt.rundir import DataError
from data_tools.readers.http_body import http_answer
from data_tools.readers.page_text import html_text
from data_tools.readers.records import Damage, Fields, Input, ReadOptions, Record, judge
from data_tools.readers.streams import Collector, Oversize, file_chunks

_PAGES = ("response", "resource", "conversion")
_VERSION = re.compile(rb"WARC/\d\.\d{1,2}\s*")
_MAX_HEADER_BYTES = 1 << 20
_CHARSET = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)


# Codecs that Python has and the web has not: they make lone surrogates of plain characters, or take quadratic time.
_NO_CHARSETS = frozenset({"unicode-escape", "raw-unicode-escape", "utf-7", "punycode", "idna", "undefined"})


@dataclass(frozen=True)
class _Page:
    """``kind``: the WARC type; ``block``: what the record holds, HTTP headers included."""

    kind: str
    headers: dict[str, str]
    block: bytes | Oversize


def read_web_archive(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    pages = (page for page in _frames(source) if page.kind in _PAGES)
    for number, page in enumerate(itertools.islice(pages, start, None), start + 1):
        yield _document(page, options.text_key, f"page {number}")


# --- framing


def _frames(source: Input) -> Iterator[_Page]:
    stream = _Buffer(file_chunks(source))
    number = 0
    while not stream.at_end():
        number += 1
        where = f"{source.name}: WARC record {number} near byte {source.done_bytes}"
        headers = _read_headers(stream, where)
        kind = headers.get("warc-type", "").lower()
        length = headers.get("content-length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise DataError(f"{where}: Content-Length is {length[:40]!r}, not a number; fix: copy the file again")
        block = stream.take(int(length))
        if block is None or not stream.skip_line_ends():
            raise DataError(
                f"{where}: truncated, or its Content-Length {length} is wrong: the next record does not follow; "
                "fix: copy the file again"
            )
        yield _Page(kind, headers, block)


def _read_headers(stream: "_Buffer", where: str) -> dict[str, str]:
    head = stream.take_head()
    first, *lines = (head or b"").splitlines()[:1000] or [b""]
    if head is None or not _VERSION.fullmatch(first):
        raise DataError(f"{where}: no WARC record starts here ({first[:40]!r}); fix: copy the file again")
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.decode("utf-8", "replace").partition(":")
        if colon:
            headers.setdefault(name.strip().lower(), value.strip())
    return headers


class _Buffer:
    """A stream of chunks from which heads and counted blocks are taken."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._held = b""
        self._at = 0  # what lies before is taken; cutting it off for each record would copy the chunk each time

    def _more(self) -> bool:
        chunk = next(self._chunks, b"")
        self._held, self._at = self._held[self._at :] + chunk, 0
        return bool(chunk)

    def at_end(self) -> bool:
        return self._at == len(self._held) and not self._more()

    def take_head(self) -> bytes | None:
        """Up to the first blank line, which is taken too; None if there is none near."""
        while True:
            ends = [(at, len(mark)) for mark in (b"\r\n\r\n", b"\n\n") if (at := self._held.find(mark, self._at)) >= 0]
            if ends:
                at, size = min(ends)
                head, self._at = self._held[self._at : at], at + size
                return head
            if len(self._held) - self._at > _MAX_HEADER_BYTES or not self._more():
                return None

    def take(self, size: int) -> bytes | Oversize | None:
        """The next ``size`` bytes; None if the stream is shorter. Of a block that is too long only the beginning."""
        held, missing = Collector(), size
        while missing:
            if self._at == len(self._held) and not self._more():
                return None
            piece = self._held[self._at : self._at + missing]
            self._at += len(piece)
            missing -= len(piece)
            held.add(piece)
        return held.take()

    def skip_line_ends(self) -> bool:
        """Over the blank lines behind a record; False if something else than a record follows."""
        while True:
            while self._at < len(self._held) and self._held[self._at] in b"\r\n":
                self._at += 1
            if len(self._held) - self._at >= len(b"WARC/"):
                return self._held.startswith(b"WARC/", self._at)
            if not self._more():
                return self._at == len(self._held)


# --- documents


def _document(page: _Page, key: str, place: str) -> Record | Damage:
    if isinstance(page.block, Oversize):
        return page.block.damage(place)
    content, kind = page.block, page.headers.get("content-type", "")
    if kind.lower().startswith("application/http"):
        answer = http_answer(page.block, place)
        if isinstance(answer, Damage):
            return answer
        content, kind = answer
    media = kind.partition(";")[0].strip().lower()
    if media not in ("text/plain", "text/html", "application/xhtml+xml"):
        return Damage(content, "bad_record.not_text", f"a page of type {media or 'unknown'}", place, absent=True)
    text = _decode(content, kind, place)
    if isinstance(text, Damage):
        return text
    if media != "text/plain":
        text = html_text(text)
    facts = {"url": page.headers.get("warc-target-uri", ""), "date": page.headers.get("warc-date", "")}
    return judge({key: text, **{name: value for name, value in facts.items() if name != key}}, key, place, content)


def _decode(content: bytes, kind: str, place: str) -> str | Damage:
    """By the declared charset, else UTF-8; what does not decode is damage, never replaced by marks."""
    declared = _CHARSET.search(kind)
    in_page = None if declared else _META_CHARSET.search(content[:2048])
    charset = declared[1] if declared else in_page[1].decode("ascii", "replace") if in_page else "utf-8"
    try:
        if codecs.lookup(charset).name in _NO_CHARSETS:
            raise LookupError
        return content.decode(charset)
    except LookupError:
        problem = f"unknown charset {charset!r}"
    except ValueError as error:
        problem = f"not {charset}: {str(error)[:100]}"
    return Damage(content, "bad_record.invalid_utf8", problem, place)
