"""Plain text: a file is one document, or its blank-line separated pieces are."""

import itertools
from collections.abc import Iterable, Iterator

from data_tools.readers.records import MAX_RECORD_BYTES, Damage, Fields, Input, ReadOptions, Record, invalid_utf8
from data_tools.readers.streams import KEPT_OF_OVERSIZE, Collector, Oversize, file_chunks, split_lines

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_txt(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    pieces = _pieces(file_chunks(source)) if options.txt_documents == "blank-line" else _whole(file_chunks(source))
    for raw, line in itertools.islice(pieces, start, None):
        yield _document(raw, line, options.text_key)


def _whole(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | Oversize, int]]:
    held = Collector()
    for chunk in chunks:
        held.add(chunk)
    yield held.take(), 1


def _pieces(chunks: Iterable[bytes]) -> Iterator[tuple[bytes | Oversize, int]]:
    """(runs of non-blank lines, number of the first one); blank lines are separators, not records."""
    held: list[bytes] = []
    size = first = 0
    for number, line in enumerate(split_lines(chunks), 1):
        if isinstance(line, Oversize):
            first = first if held else number
            held.append(line.beginning)
            size += line.size
        elif (line and 32 < line[0] < 127) or not _is_blank(line, number):  # the first byte decides for nearly all
            first = first if held else number
            if size <= MAX_RECORD_BYTES:
                held.append(line)
            size += len(line) + 1
        elif held:
            yield _joined(held, size), first
            held, size = [], 0
    if held:
        yield _joined(held, size), first


def _joined(lines: list[bytes], size: int) -> bytes | Oversize:
    if size <= MAX_RECORD_BYTES:
        return b"\n".join(lines)
    return Oversize(b"\n".join(line[:KEPT_OF_OVERSIZE] for line in lines[:8])[:KEPT_OF_OVERSIZE], size)


def _is_blank(line: bytes, number: int) -> bool:
    text = line.decode("utf-8", "replace")
    return not (text.removeprefix("\ufeff") if number == 1 else text).strip()


def _document(raw: bytes | Oversize, line: int, key: str) -> Record | Damage:
    if isinstance(raw, Oversize):
        return raw.damage(f"line {line}")
    content = raw.removeprefix(_BYTE_ORDER_MARK) if line == 1 else raw
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        return invalid_utf8(raw, error, f"line {line + content[: error.start].count(10)}")
    return {key: text} if text else Damage(raw, "bad_record.empty", "an empty file", f"line {line}", absent=True)
