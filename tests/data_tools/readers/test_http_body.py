"""Bodies of HTTP responses: encodings are undone completely, or the page is unreadable; never a part of it."""

import gzip
import zlib

import pytest

from data_tools.readers import streams
from data_tools.readers.http_body import http_answer
from data_tools.readers.records import Damage

TEXT = b"".join(b"line %d of a page\n" % i for i in range(2000))
PACKED = gzip.compress(TEXT)


def answer(body: bytes, *headers: str) -> bytes | str:
    """The body, or why there is none."""
    head = "\r\n".join(["HTTP/1.1 200 OK", "Content-Type: text/plain", *headers, "", ""])
    found = http_answer(head.encode() + body, "page 1")
    return found.reason if isinstance(found, Damage) else found[0]


def chunked(body: bytes, size: int = 1000) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x;name=value\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\nTrailer: x\r\n\r\n"


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (TEXT, []),
        (TEXT, ["Content-Encoding: identity"]),
        (PACKED, ["Content-Encoding: gzip"]),
        (PACKED, ["Content-Encoding: X-GZIP"]),
        (gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:]), ["Content-Encoding: gzip"]),
        (zlib.compress(TEXT), ["Content-Encoding: deflate"]),
        (raw_deflate(TEXT), ["Content-Encoding: deflate"]),
        (chunked(TEXT), ["Transfer-Encoding: chunked"]),
        (chunked(PACKED, 1), ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]),
        (chunked(PACKED), ["Transfer-Encoding: gzip, chunked"]),
        (TEXT, ["Transfer-Encoding: chunked", "Content-Encoding: gzip"]),  # stored decoded, headers kept
    ],
)
def test_encodings_are_undone(body: bytes, headers: list[str]) -> None:
    assert answer(body, *headers) == TEXT


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (PACKED[: len(PACKED) // 2], ["Content-Encoding: gzip"]),
        (PACKED[:-1], ["Content-Encoding: gzip"]),
        (PACKED + PACKED[:-4], ["Content-Encoding: gzip"]),
        (b"\0" + PACKED, ["Content-Encoding: gzip"]),
        (zlib.compress(TEXT)[:-4], ["Content-Encoding: deflate"]),
        (raw_deflate(TEXT)[:-4], ["Content-Encoding: deflate"]),
        (TEXT, ["Content-Encoding: br"]),
        (gzip.compress(PACKED), ["Content-Encoding: gzip, gzip"]),
        (chunked(TEXT)[:5000], ["Transfer-Encoding: chunked"]),
        (chunked(TEXT).replace(b"3e8", b"3e7"), ["Transfer-Encoding: chunked"]),
        (b"3e8\r\n" + TEXT[:1000] + b"\r\n", ["Transfer-Encoding: chunked"]),
    ],
)
def test_a_body_that_is_not_whole_is_unreadable(body: bytes, headers: list[str]) -> None:
    assert answer(body, *headers) == "bad_record.unreadable"


def test_an_empty_body_is_empty_whatever_its_encoding() -> None:
    assert [answer(b"", f"Content-Encoding: {name}") for name in ("gzip", "deflate", "br")] == [b"", b"", b""]


def test_a_body_that_unpacks_beyond_the_limit_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1 << 20)
    assert answer(gzip.compress(bytes(8 << 20)), "Content-Encoding: gzip") == "bad_record.too_long"
