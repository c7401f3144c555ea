"""HTTP responses inside web archives: status line, headers, and the body with its encodings undone.

The head is parsed by warcio; the body is decoded here and strictly, because warcio takes a cut gzip stream, or the
first of several, for the whole. Refused: bodies that are damaged or cut, encodings other than gzip and deflate. Memory
is bounded like that of any other record.
"""

import io
import itertools
import re
import zlib
from collections.abc import Iterator
from typing import Any

from data_tools.readers.records import Damage
from data_tools.readers.streams import Collector, Damaged, Oversize, Truncated, decompress

_CHUNK_HEAD = re.compile(rb"[ \t]*([0-9a-fA-F]{1,15})[ \t]*(?:;[^\n]{0,4096})?\r?\n")
_LINE_END = re.compile(rb"\r?\n")
_PIECE = 1 << 18
_HEAD = 1 << 10
_GZIP = ("gzip", "x-gzip")
_GZIP_MAGIC = b"\x1f\x8b"
_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")


def http_answer(block: bytes, place: str) -> tuple[bytes, str] | Damage:
    """(body, content type) of an HTTP response with status 200."""
    try:
        from warcio.statusandheaders import StatusAndHeadersParser, StatusAndHeadersParserException
    except ImportError as error:
        raise RuntimeError("reading WARC responses needs warcio; fix: pip install 'cpt[data]'") from error
    stream = io.BytesIO(block)
    try:
        answer = StatusAndHeadersParser(["HTTP/1.0", "HTTP/1.1", "HTTP/2", "HTTP/3"]).parse(stream)
    except (StatusAndHeadersParserException, ValueError, EOFError) as error:
        return _unreadable(block, f"no readable HTTP response ({str(error)[:100]})", place)
    status = (answer.statusline or "").split(" ")[0]
    if status != "200":
        return Damage(block, "bad_record.http_status", f"the server answered {status[:20]!r}", place, absent=True)
    held = Collector()
    try:
        for piece in _decoded(memoryview(block)[stream.tell() :], answer):
            held.add(piece)
    except (Damaged, Truncated) as error:
        return _unreadable(block, f"the body of the HTTP response cannot be decoded ({str(error)[:100]})", place)
    body = held.take()
    return body.damage(place) if isinstance(body, Oversize) else (body, answer.get_header("content-type") or "")


def _unreadable(block: bytes, problem: str, place: str) -> Damage:
    return Damage(block, "bad_record.unreadable", problem, place)


def _decoded(body: memoryview, answer: Any) -> Iterator[bytes]:
    transfer, content = (_encodings(answer, name) for name in ("transfer-encoding", "content-encoding"))
    pieces = _pieces(body)
    if transfer[-1:] == ["chunked"]:
        transfer.pop()
        # archives that store the body without its chunks often keep the header
        if _CHUNK_HEAD.match(body):
            pieces = _without_chunks(body)
    codings = content + transfer  # in the order in which they were applied
    if not codings:
        return pieces
    if len(codings) > 1:
        raise Damaged(f"encoded as {', '.join(codings)}; only gzip and deflate can be undone, one of them once")
    return _undo(codings[0], pieces)


def _encodings(answer: Any, name: str) -> list[str]:
    values = (part.strip().lower() for part in (answer.get_header(name) or "").split(","))
    return [value for value in values if value not in ("", "identity")]


def _undo(coding: str, pieces: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    while len(head) < _HEAD and (piece := next(pieces, b"")):
        head += piece
    body = itertools.chain((head,), pieces)
    # old crawls stored the decoded body and kept the header
    is_plain = head[: len(_GZIP_MAGIC)] != _GZIP_MAGIC and not _NO_TEXT.search(head)
    if not head or (coding in _GZIP and is_plain):
        return body
    if coding in _GZIP:
        return decompress(body, lambda: zlib.decompressobj(31))
    if coding == "deflate":
        # with zlib's two bytes of header, as the standard wants it, or without, as some servers send it
        has_header = len(head) > 1 and head[0] & 15 == 8 and (head[0] << 8 | head[1]) % 31 == 0
        return decompress(body, lambda: zlib.decompressobj(15 if has_header else -15))
    raise Damaged(f"encoded as {coding[:40]}; only gzip and deflate can be undone")


def _pieces(view: memoryview) -> Iterator[bytes]:
    return (bytes(view[start : start + _PIECE]) for start in range(0, len(view), _PIECE))


def _without_chunks(body: memoryview) -> Iterator[bytes]:
    """``4\\r\\nabcd\\r\\n0\\r\\n\\r\\n`` -> ``abcd``; what follows the chunk of size 0 are headers."""
    at = 0
    while head := _CHUNK_HEAD.match(body, at):
        start, size = head.end(), int(head[1], 16)
        if not size:
            return
        yield from _pieces(body[start : start + size])
        line_end = _LINE_END.match(body, start + size)
        if line_end is None:
            raise Damaged(f"cut, or a wrong size of the chunk at byte {at}")
        at = line_end.end()
    raise Damaged(f"cut, or no chunk at byte {at}")
