"""What all readers share: an input, how to read it, one record of it, and the judgement whether that is a document.

A reader yields, in order, one item per *record* (a line, a row, a blank-line separated piece, a page of a web archive):
a dict that has a non-empty string under the text key, or a ``Damage``. So no caller can meet a record that another
caller reads differently.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

HUB_PREFIX = "hf://"
MAX_RECORD_BYTES = 1 << 30
TxtDocuments = Literal["file", "blank-line"]
Fields = Literal["text", "all"]

Record = dict[str, Any]


@dataclass(frozen=True)
class ReadOptions:
    """``text_key``: JSON key or table column of the text; ``txt_documents``: what one document of a .txt file is."""

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"


@dataclass
class Input:
    """One file, URL, saved dataset or hub name; ``done_bytes`` of ``size_bytes`` stored are read (0 of 0: unknown)."""

    name: str
    kind: str
    size_bytes: int = 0
    done_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Damage:
    """A record without usable text. ``raw``: its bytes; ``place``: line or row from 1; ``detail``: problem and fix.

    ``absent``: nothing is broken, there is just no text (a blank line, null, an image in a web archive).
    """

    raw: bytes
    reason: str
    detail: str
    place: str
    absent: bool = False


Reader = Callable[[Input, ReadOptions, int, Fields], Iterator[Record | Damage]]


def judge(record: Any, key: str, place: str, raw: bytes | None = None) -> Record | Damage:
    """The record if it holds text under ``key``, else what is wrong with it; ``raw`` None: as JSON of the record."""
    if type(record) is not dict:
        problem = f"a JSON {type(record).__name__}, not an object with the key {key!r}; fix: one object per record"
        return Damage(_raw(record, raw), "bad_record.not_json", problem, place)
    if key not in record:
        return Damage(_raw(record, raw), "bad_record.no_text_key", no_such_key(key, record), place)
    text = record[key]
    if text is None or text == "":
        return Damage(_raw(record, raw), "bad_record.empty", f"{key!r} is empty", place, absent=True)
    if type(text) is not str:
        problem = f"{key!r} is {text!r:.60}, a {type(text).__name__}; fix: text must be a string (see --text-key)"
        return Damage(_raw(record, raw), "bad_record.not_text", problem, place)
    return record


def _raw(record: Any, raw: bytes | None) -> bytes:
    return dump_json(record) if raw is None else raw


def dump_json(record: Any) -> bytes:
    """One line of JSON; what tables hold and JSON does not (bytes, decimals, durations) as readable text."""
    try:
        return orjson.dumps(record, default=_plain, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        if "Recursion" not in str(error):
            raise
    return _dump_deep(record) + b"\n"


def _dump_deep(record: Any) -> bytes:
    """orjson reads 1,024 levels and writes 254 (Python's own writer about 990); so the innermost are written first."""
    containers = [record]
    for value in containers:  # grows on the way: every container stands behind the one that holds it
        children = value.values() if isinstance(value, dict) else value
        containers += [child for child in children if isinstance(child, dict | list)]
    written: dict[int, orjson.Fragment] = {}

    def inner(value: Any) -> Any:
        return written.get(id(value), value) if isinstance(value, dict | list) else value

    for value in reversed(containers):
        flat = {key: inner(item) for key, item in value.items()} if isinstance(value, dict) else [*map(inner, value)]
        raw = orjson.dumps(flat, default=_plain, option=orjson.OPT_NON_STR_KEYS)
        written[id(value)] = orjson.Fragment(raw)
    return raw


def _plain(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def invalid_utf8(raw: bytes, error: UnicodeDecodeError, place: str) -> Damage:
    bad = error.object[error.start : error.end]
    problem = f"invalid UTF-8 ({bad!r}, {error.reason}); fix: re-encode, e.g. iconv -t UTF-8"
    return Damage(raw, "bad_record.invalid_utf8", problem, place)


def no_such_key(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = difflib.get_close_matches(key, names, 1, cutoff=0.3)
    hint = f"did you mean --text-key {nearest[0]}?" if nearest else "fix: --text-key NAME"
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return f"no text under {key!r}, there is {shown or 'nothing'}; {hint}"
