"""Tables: parquet, and Arrow IPC as files (.arrow, .feather) and as streams (.arrow as `datasets` writes it).

Only the text column is read where only texts are asked for. IPC buffers are used as they lie in the file, so every
batch is validated first: offsets of a damaged file would point anywhere. An IPC stream must have its end mark: without
it a cut file reads like a shorter one.
"""

import contextlib
import io
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from cpt.rundir import DataError
from data_tools.readers.records import (
    Damage,
    Fields,
    Input,
    ReadOptions,
    Record,
    dump_json,
    invalid_utf8,
    judge,
    no_such_key,
)
from data_tools.readers.remote import is_url
from data_tools.readers.streams import open_input

_BATCH_ROWS = 256
_FILE_MAGIC = b"ARROW1"
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_parquet(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    import pyarrow.parquet as pq

    with open_input(source) as stored, table_errors(source, "parquet"):
        file = pq.ParquetFile(stored if is_url(source.name) else source.name)  # by name: no Python call per read
        require_text_column(file.schema_arrow, options.text_key, source)
        columns = [options.text_key] if fields == "text" else file.schema_arrow.names
        _require_row_counts(file.metadata, source)
        row = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row + rows > start:
                batches = file.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns)
                yield from batch_records(_all_rows(batches, rows, source), options.text_key, row, start)
            row += rows
            source.done_bytes = source.size_bytes * row // max(file.metadata.num_rows, 1)
    source.done_bytes = source.size_bytes


def _all_rows(batches: Iterable[Any], rows: int, source: Input) -> Iterator[Any]:
    """pyarrow takes the rows of a group from its shortest column: a damaged one makes the whole group vanish."""
    found = 0
    for batch in batches:
        found += batch.num_rows
        yield batch
    if found != rows:
        raise DataError(f"{source.name}: {found} rows in a row group of {rows}; fix: damaged, copy it again")


def _require_row_counts(metadata: Any, source: Input) -> None:
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or sum(counts) != metadata.num_rows:
        problem = f"{metadata.num_rows} rows, its row groups have {sum(counts)}"
        raise DataError(f"{source.name}: {problem}; fix: damaged, copy it again")


def read_arrow(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    with open_input(source) as stored, table_errors(source, "Arrow IPC"):
        first = stored.read(len(_FILE_MAGIC))
        batches = _file_batches(stored, source) if first == _FILE_MAGIC else _stream_batches(stored, source)
        schema = next(batches)
        require_text_column(schema, options.text_key, source)
        columns = [options.text_key] if fields == "text" else schema.names
        row = 0
        for batch in batches:
            require_valid(batch, source)
            if row + batch.num_rows > start:
                pieces = (batch.slice(at, _BATCH_ROWS) for at in range(0, batch.num_rows, _BATCH_ROWS))
                yield from batch_records((piece.select(columns) for piece in pieces), options.text_key, row, start)
            row += batch.num_rows
            source.done_bytes = min(stored.tell(), source.size_bytes)
    source.done_bytes = source.size_bytes


def _file_batches(stored: BinaryIO, source: Input) -> Iterator[Any]:
    """The schema, then the batches: read as the stream that an IPC file contains, and counted by its footer."""
    import pyarrow as pa

    expected = pa.ipc.open_file(stored).num_record_batches
    stored.seek(8)
    found = 0
    with pa.ipc.open_stream(stored) as stream:
        yield stream.schema
        for batch in stream:
            found += 1
            yield batch
    if found != expected:
        raise DataError(f"{source.name}: {found} batches, its footer says {expected}; fix: damaged, copy it again")


def _stream_batches(stored: BinaryIO, source: Input) -> Iterator[Any]:
    import pyarrow as pa

    require_end_mark(stored, source.name)
    stored.seek(0)
    with pa.ipc.open_stream(stored) as stream:
        yield stream.schema
        yield from stream
    if stored.tell() != stored.seek(0, io.SEEK_END):
        raise DataError(f"{source.name}: damaged, the Arrow stream ends before the file does; fix: copy it again")


def require_end_mark(stored: BinaryIO, name: str) -> None:
    size = stored.seek(0, io.SEEK_END)
    stored.seek(max(size - len(_END_OF_STREAM), 0))
    if stored.read() != _END_OF_STREAM:
        raise DataError(
            f"{name}: truncated, or no Arrow file: it has neither the file mark at its start nor the stream mark at "
            "its end; fix: copy it again, or write it again and close the writer"
        )


def require_valid(batch: Any, source: Input) -> None:
    """Offsets and lengths inside their buffers. Invalid UTF-8 in a text column is left to its row."""
    import pyarrow as pa

    as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    for column in batch.columns:
        try:
            column.validate()
            plain = column.view(as_bytes[column.type]) if column.type in as_bytes else column
            plain.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" in str(error) and is_text(column.type):
                continue
            raise DataError(f"{source.name}: damaged Arrow batch ({str(error)[:200]}); fix: copy it again") from None


@contextlib.contextmanager
def table_errors(source: Input, format_name: str) -> Iterator[None]:
    """What pyarrow raises for damaged files; a damaged file may also ask for more memory than there is."""
    import pyarrow as pa

    try:
        yield
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, EOFError, MemoryError) as error:
        problem = f"truncated or damaged {format_name} ({str(error)[:200]})"
        raise DataError(f"{source.name}: {problem}; fix: copy it again") from None


def is_text(kind: Any) -> bool:
    import pyarrow as pa

    value = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(value) or pa.types.is_large_string(value) or pa.types.is_string_view(value))


def require_text_column(schema: Any, key: str, source: Input) -> None:
    if schema.names.count(key) != 1:
        twice = f"{schema.names.count(key)} columns are called {key!r}"
        raise DataError(f"{source.name}: {twice if key in schema.names else no_such_key(key, schema.names)}")
    kind = schema.field(key).type
    if not is_text(kind):
        raise DataError(f"{source.name}: column {key!r} holds {kind}, not text; fix: --text-key with a string column")


def batch_records(batches: Iterable[Any], key: str, row: int, start: int) -> Iterator[Record | Damage]:
    """Rows from number ``start`` on of batches of which the first begins at ``row``."""
    for batch in batches:
        skip = min(max(start - row, 0), batch.num_rows)
        names = batch.schema.names
        try:
            columns = [column.to_pylist() for column in batch.slice(skip).columns]
        except (ValueError, OverflowError):  # text that is no UTF-8, dates outside of Python's
            yield from itertools.islice(_rows_one_by_one(batch, key, row), skip, None)
        else:
            for number, values in enumerate(zip(*columns, strict=True), row + skip + 1):
                record = dict(zip(names, values, strict=True))
                yield record if record[key] else judge(record, key, f"row {number}")
        row += batch.num_rows


def _rows_one_by_one(batch: Any, key: str, row: int) -> Iterator[Record | Damage]:
    for index in range(batch.num_rows):
        place = f"row {row + index + 1}"
        try:
            [record] = batch.slice(index, 1).to_pylist()
        except (ValueError, OverflowError) as error:
            yield _unreadable_row(batch, index, key, place, error)
        else:
            yield judge(record, key, place)


def _unreadable_row(batch: Any, index: int, key: str, place: str, error: Exception) -> Damage:
    try:
        text = batch.column(key)[index].as_py()
    except UnicodeDecodeError as in_text:
        return invalid_utf8(bytes(in_text.object), in_text, place)
    problem = f"a value beside the text cannot be read ({str(error)[:100]}); fix: drop that column or mend it"
    return Damage(dump_json({key: text}), "bad_record.unreadable", problem, place)
