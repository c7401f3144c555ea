"""JSON lines, one object per line. A position is a line number, blank lines included.

Not accepted, though some programs write them: NaN and Infinity, lone surrogates (``"\\ud800"``). They are no JSON and
no text, and would break every tool behind this one. Integers beyond 64 bits come as floats (orjson's rule).
"""

import itertools
from collections.abc import Iterator

import orjson

from data_tools.readers.records import Damage, Fields, Input, ReadOptions, Record, invalid_utf8, judge
from data_tools.readers.streams import Oversize, file_chunks, split_lines

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_json_lines(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    loads, key = orjson.loads, options.text_key
    lines = split_lines(file_chunks(source))
    for number, line in enumerate(itertools.islice(lines, start, None), start + 1):
        try:
            record = loads(line)  # type: ignore[arg-type]  # orjson refuses an Oversize like any other non-JSON
            text = record[key]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            yield _odd_line(line, number, key)
            continue
        yield record if type(text) is str and text else _odd_line(line, number, key)


def _odd_line(line: bytes | Oversize, number: int, key: str) -> Record | Damage:
    """The rare lines: blank, with a byte order mark, or wrong; kept out of the fast path."""
    place = f"line {number}"
    if isinstance(line, Oversize):
        return line.damage(place)
    raw = line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line
    if not raw.strip():
        return Damage(line, "bad_record.empty", "a blank line", place, absent=True)
    try:
        return judge(orjson.loads(raw), key, place, line)
    except orjson.JSONDecodeError as error:
        problem = f"not JSON ({error}): {line[:60]!r}; fix: one JSON object per line"
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return invalid_utf8(line, error, place)
    return Damage(line, "bad_record.not_json", problem, place)
