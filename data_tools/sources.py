"""Raw corpora as streams of texts, one per record: JSON lines, parquet, plain text, saved or hub Hugging Face datasets.

A *record* is a line, a row or a blank-line separated piece. Readers answer "the texts from record number n on", so a
position in the input is (input index, record number) and a killed job can go on anywhere. A reader yields "" where a
record holds no text (null, blank); the caller counts those. Memory is bounded by the longest document, never by the
file.
Refused, naming file and line or row: truncated or damaged files, invalid UTF-8, JSON without the text key, text
that is no string.
"""

import difflib
import glob
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import orjson

from cpt.rundir import DataError

HUB_PREFIX = "hf://"
TxtDocuments = Literal["file", "blank-line"]
_READ_BYTES = 1 << 18
_BATCH_ROWS = 256


@dataclass(frozen=True)
class ReadOptions:
    """``text_key``: JSON key or table column of the text; ``txt_documents``: what one document of a .txt file is."""

    text_key: str = "text"
    txt_documents: TxtDocuments = "file"


@dataclass
class Input:
    """One file, saved dataset or hub name; ``done_bytes`` of ``size_bytes`` on disk are read (0 of 0: unknown)."""

    name: str
    kind: str
    size_bytes: int = 0
    done_bytes: int = field(default=0, compare=False)


def resolve_inputs(patterns: Sequence[str]) -> list[Input]:
    """Inputs in the order given, globs expanded and sorted.

    Raises:
        DataError: a missing file, a glob that matches nothing, an unknown suffix, the same file twice.
    """
    inputs = [_describe(name) for pattern in patterns for name in _expand(pattern)]
    if not inputs:
        raise DataError("no input given; fix: name files, e.g. --input 'corpus/*.jsonl.zst'")
    seen: set[str] = set()
    for entry in inputs:
        if entry.name in seen:
            raise DataError(f"{entry.name}: given twice, its documents would count double; fix: name it once")
        seen.add(entry.name)
    return inputs


def _expand(pattern: str) -> list[str]:
    if pattern.startswith(HUB_PREFIX) or Path(pattern).exists():
        return [pattern]
    if not glob.has_magic(pattern):
        folder = Path(pattern).parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        nearest = difflib.get_close_matches(Path(pattern).name, names, 1)
        hint = f"did you mean {folder / nearest[0]}?" if nearest else f"folder {folder} holds {len(names)} entries"
        raise DataError(f"{pattern}: no such file; {hint}")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise DataError(f"{pattern}: the pattern matches no file; fix: check the folder and the suffix")
    return matches


def _describe(name: str) -> Input:
    if name.startswith(HUB_PREFIX):
        return Input(name, HUB_PREFIX)
    path = Path(name).absolute()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file():
            splits = sorted(child.name for child in path.iterdir() if child.is_dir())
            raise DataError(f"{name}: a saved dataset with the splits {splits}; fix: name one, e.g. {path / splits[0]}")
        if not (path / "state.json").is_file():
            raise DataError(
                f"{name}: a folder but no saved Hugging Face dataset; fix: name its files, e.g. {name}/*.jsonl"
            )
        return Input(str(path), "folder", sum(file.stat().st_size for file in path.glob("*.arrow")))
    for suffix in READERS:
        if suffix.startswith(".") and path.name.endswith(suffix):
            return Input(str(path), suffix, path.stat().st_size)
    known = ", ".join(suffix for suffix in READERS if suffix.startswith("."))
    raise DataError(
        f"{name}: unknown suffix; known are {known}, saved dataset folders and {HUB_PREFIX}NAME[/CONFIG][:SPLIT]"
    )


def read_texts(source: Input, options: ReadOptions, *, start: int = 0) -> Iterator[str]:
    """The texts of all records from number ``start`` on; "" stands for a record without text.

    Raises:
        DataError: the input is damaged or has no such text; names the file and the line or row (counted from 1).
    """
    return READERS[source.kind](source, options, start)


# --- JSON lines


def _read_jsonl(source: Input, options: ReadOptions, start: int) -> Iterator[str]:
    lines = _lines(_file_chunks(source))
    for number, line in enumerate(itertools.islice(lines, start, None), start + 1):
        try:
            text = orjson.loads(line)[options.text_key]
        except (orjson.JSONDecodeError, KeyError, TypeError, IndexError):
            text = _parse_odd_line(line, number, source, options)
        if type(text) is not str:
            text = _require_text(text, f"{source.name}: line {number}: {options.text_key!r}")
        yield text


def _parse_odd_line(line: bytes, number: int, source: Input, options: ReadOptions) -> Any:
    """The rare lines: blank, with a byte order mark, or wrong; kept out of the fast path."""
    where = f"{source.name}: line {number}"
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    if not line.strip():
        return ""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _decode(line, source, number)
        raise DataError(f"{where}: not JSON ({error}): {line[:60]!r}; fix: one JSON object per line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}, not an object with the key {options.text_key!r}")
    if options.text_key not in record:
        raise DataError(f"{where}: {_no_such_key(options.text_key, record)}")
    return record[options.text_key]


# --- plain text


def _read_txt(source: Input, options: ReadOptions, start: int) -> Iterator[str]:
    if options.txt_documents == "blank-line":
        return itertools.islice(_blank_line_documents(source), start, None)
    return itertools.islice(_whole_file(source), start, None)


def _whole_file(source: Input) -> Iterator[str]:
    yield _decode(b"".join(_file_chunks(source)), source, 1)


def _blank_line_documents(source: Input) -> Iterator[str]:
    """Runs of non-blank lines; blank lines are separators, not records."""
    held: list[str] = []
    for number, line in enumerate(_lines(_file_chunks(source)), 1):
        text = _decode(line, source, number)
        if text.strip():
            held.append(text)
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _decode(raw: bytes, source: Input, first_line: int) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        # "utf-8-sig" reports positions without the mark; only its length matters for the excerpt
        line = first_line + raw[: error.start].count(b"\n")
        bad = error.object[error.start : error.end]
        raise DataError(
            f"{source.name}: line {line}: invalid UTF-8 ({bad!r}, {error.reason}); fix: re-encode, e.g. iconv -t UTF-8"
        ) from None


# --- bytes of files


def _file_chunks(source: Input) -> Iterator[bytes]:
    """Decompressed content in pieces; ``source.done_bytes`` follows the position in the file on disk."""
    make_decoder = DECODERS.get(Path(source.name).suffix)
    try:
        with Path(source.name).open("rb") as file:
            raw = _raw_chunks(iter(lambda: file.read(_READ_BYTES), b""), source)
            yield from _decompress(raw, source, make_decoder) if make_decoder else raw
    except OSError as error:
        raise DataError(
            f"{source.name}: cannot be read ({error.strerror}); fix: check the path and its permissions"
        ) from None


def _raw_chunks(chunks: Iterable[bytes], source: Input) -> Iterator[bytes]:
    source.done_bytes = 0
    for chunk in chunks:
        source.done_bytes += len(chunk)
        yield chunk


def _decompress(chunks: Iterable[bytes], source: Input, make_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Frames one after another, as `cat a.gz b.gz` and multi-threaded compressors write them.

    The libraries' own stream readers are not used: zstandard's ends a cut file without a word.
    """
    from zstandard import ZstdError

    decoder = None
    for chunk in chunks:
        while chunk:
            decoder = decoder or make_decoder()
            try:
                text = decoder.decompress(chunk)
            except (ZstdError, zlib.error) as error:
                raise DataError(
                    f"{source.name}: damaged near byte {source.done_bytes} ({error}); fix: copy it again"
                ) from None
            if text:
                yield text
            chunk = b""
            if decoder.eof:
                chunk, decoder = decoder.unused_data.lstrip(b"\0"), None
    if decoder is not None or not source.done_bytes:
        raise DataError(
            f"{source.name}: truncated, the stream stops short at byte {source.done_bytes}; fix: copy the file again"
        )


def _new_zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # files of `zstd --long=31` too


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their end; linear also where one line fills many chunks."""
    held: list[bytes] = []
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        held.append(first)
        if rest:
            yield b"".join(held)
            yield from rest[:-1]
            held = [rest[-1]]
    last = b"".join(held)
    if last:
        yield last


DECODERS: dict[str, Callable[[], Any]] = {".gz": lambda: zlib.decompressobj(31), ".zst": _new_zstd}


# --- tables


def _read_parquet(source: Input, options: ReadOptions, start: int) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(source.name)
        _require_text_column(file.schema_arrow, options.text_key, source)
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows > start:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=[options.text_key])
                yield from itertools.islice(_column_texts(batches, source, options, row), max(start - row, 0), None)
            row += rows
            source.done_bytes = source.size_bytes * row // max(file.metadata.num_rows, 1)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{source.name}: truncated or damaged parquet ({str(error)[:200]}); fix: copy it again"
        ) from None


def _require_text_column(schema: Any, key: str, source: Input) -> None:
    import pyarrow as pa

    if key not in schema.names:
        raise DataError(f"{source.name}: {_no_such_key(key, schema.names)}")
    kind = schema.field(key).type
    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value)):
        raise DataError(f"{source.name}: column {key!r} holds {kind}, not text; fix: --text-key with a string column")


def _column_texts(batches: Iterable[Any], source: Input, options: ReadOptions, row: int) -> Iterator[str]:
    for batch in batches:
        for scalar in batch.column(0):
            row += 1
            try:
                text = scalar.as_py()
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{source.name}: row {row}: invalid UTF-8 ({error.reason}); fix: re-encode it"
                ) from None
            yield text or ""


def _read_saved_dataset(source: Input, options: ReadOptions, start: int) -> Iterator[str]:
    import datasets
    import pyarrow as pa

    try:
        table = datasets.load_from_disk(source.name)
    except (pa.ArrowInvalid, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{source.name}: not a complete saved dataset ({str(error)[:200]}); fix: save it again"
        ) from None
    if options.text_key not in table.column_names:
        raise DataError(f"{source.name}: {_no_such_key(options.text_key, table.column_names)}")
    column = table.select_columns([options.text_key])
    for first in range(start, len(column), _BATCH_ROWS):
        for number, text in enumerate(column[first : first + _BATCH_ROWS][options.text_key], first + 1):
            yield _require_text(text, f"{source.name}: row {number}: {options.text_key!r}")
        source.done_bytes = source.size_bytes * first // len(column)
    source.done_bytes = source.size_bytes


def _read_hub(source: Input, options: ReadOptions, start: int) -> Iterator[str]:
    import datasets

    name, config, split = parse_hub_name(source.name)
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except ConnectionError as error:
        raise RuntimeError(
            f"{source.name}: the hub cannot be reached ({error}); fix: check the network, or HF_ENDPOINT"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"{source.name}: {str(error)[:300]}; fix: {HUB_PREFIX}NAME[/CONFIG][:SPLIT]") from None
    for number, record in enumerate(stream.skip(start), start + 1):
        if options.text_key not in record:
            raise DataError(f"{source.name}: row {number}: {_no_such_key(options.text_key, record)}")
        yield _require_text(record[options.text_key], f"{source.name}: row {number}: {options.text_key!r}")


def parse_hub_name(address: str) -> tuple[str, str | None, str]:
    """``hf://org/name/config:split`` -> (``org/name``, ``config``, ``split``); the split is ``train`` unless given.

    A name without an organisation takes no config: the hub has none left of that kind that needs one.
    """
    path, _, split = address.removeprefix(HUB_PREFIX).partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(
            f"{address}: not a hub name; fix: {HUB_PREFIX}NAME[/CONFIG][:SPLIT], e.g. {HUB_PREFIX}org/name:train"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"


# --- shared checks


def _require_text(value: Any, where: str) -> str:
    """Text as it is, null as "" (tables use it for absent text), anything else refused."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise DataError(f"{where} is {value!r:.60}, a {type(value).__name__}; fix: text must be a string (see --text-key)")


def _no_such_key(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    nearest = difflib.get_close_matches(key, names, 1, cutoff=0.3)
    hint = f"did you mean --text-key {nearest[0]}?" if nearest else "fix: --text-key NAME"
    return f"no text under {key!r}, there is {', '.join(names) or 'nothing'}; {hint}"


READERS: dict[str, Callable[[Input, ReadOptions, int], Iterator[str]]] = {
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".jsonl.zst": _read_jsonl,
    ".parquet": _read_parquet,
    ".txt": _read_txt,
    "folder": _read_saved_dataset,
    HUB_PREFIX: _read_hub,
}
