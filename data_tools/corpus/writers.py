"""Documents to files: .jsonl, .jsonl.gz, .jsonl.zst, .parquet; local or behind a URL.

The text comes first, under ``text``, then the other fields as they were (one that is called ``text`` itself becomes
``fields.text``). The same documents give the same bytes: fixed compression levels, no time stamps. A file has its name
only when it is whole: it is written beside it and renamed.
Refused: a suffix that is none of these; in parquet, a field that the first 10,000 documents do not have or with
another type there.
"""

import contextlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

from cpt.rundir import DataError
from data_tools.corpus.document import Document
from data_tools.readers.records import dump_json
from data_tools.readers.remote import driver_errors, filesystem_of, is_url, local_name
from data_tools.whole_file import part_name, whole_file

_ZSTD_LEVEL = 3
_GZIP_LEVEL = 6
_BUFFER_BYTES = 1 << 20
_ROWS_PER_GROUP = 10_000
_GROUP_BYTES = 64 << 20


@contextlib.contextmanager
def open_writer(path: Path | str) -> Iterator["JsonLinesWriter | ParquetWriter"]:
    """A writer for the length of the block; the file appears when the block ends without an exception.

    Raises:
        DataError: an unknown suffix, or a field that does not fit into the file's columns.
        RuntimeError: a URL whose driver is missing.
        OSError: disk full and the like; nothing is left behind.
    """
    name = local_name(str(path))
    suffix = next((suffix for suffix in _WRITERS if name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"{name}: unknown suffix to write; fix: one of {', '.join(_WRITERS)}")
    with _remote_file(name) if is_url(name) else whole_file(Path(name)) as file:
        writer = _WRITERS[suffix](file, name)
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abandon()
            raise


@contextlib.contextmanager
def _remote_file(name: str) -> Iterator[BinaryIO]:
    filesystem, path = filesystem_of(name)
    folder, _, last = path.rpartition("/")
    temporary = f"{folder}/{part_name(last)}"  # a killed process leaves it; nothing here can tell that it is dead
    with driver_errors(name):
        if folder:
            filesystem.makedirs(folder, exist_ok=True)
        file = filesystem.open(temporary, "wb")
    try:
        with file:
            yield cast(BinaryIO, file)
        with driver_errors(name):
            filesystem.mv(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            filesystem.rm(temporary)
        raise


def _record_of(document: Document) -> dict[str, Any]:
    """The record that stands for a document in a file."""
    record = {"text": document.text, **document.fields}
    if "text" in document.fields:
        record |= {"text": document.text, "fields.text": document.fields["text"]}
    return record


class JsonLinesWriter:
    def __init__(self, file: BinaryIO, name: str, compressor: Any = None) -> None:
        self._file, self._compressor = file, compressor
        self._held: list[bytes] = []
        self._size = 0

    def write(self, document: Document) -> None:
        line = dump_json(_record_of(document))
        self._held.append(line)
        self._size += len(line)
        if self._size >= _BUFFER_BYTES:
            self._flush()

    def _flush(self) -> None:
        raw = b"".join(self._held)
        self._file.write(self._compressor.compress(raw) if self._compressor else raw)
        self._held, self._size = [], 0

    def finish(self) -> None:
        self._flush()
        if self._compressor:
            self._file.write(self._compressor.flush())

    def abandon(self) -> None:
        self._held = []


def _gzip_lines(file: BinaryIO, name: str) -> JsonLinesWriter:
    return JsonLinesWriter(file, name, zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31))


def _zstd_lines(file: BinaryIO, name: str) -> JsonLinesWriter:
    import zstandard

    return JsonLinesWriter(
        file, name, zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True, threads=0).compressobj()
    )


class ParquetWriter:
    """Row groups of at most 10,000 documents or 64 MB of text; the first one decides the columns."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._held: list[dict[str, Any]] = []
        self._size = 0
        self._writer: Any = None

    def write(self, document: Document) -> None:
        self._held.append(_record_of(document))
        self._size += len(document.text)
        if len(self._held) >= _ROWS_PER_GROUP or self._size >= _GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._writer is None:
            names = dict.fromkeys(name for record in self._held for name in record) or {"text": None}
            columns = {name: self._array([record.get(name) for record in self._held], name, None) for name in names}
            columns["text"] = columns["text"].cast(pa.large_string())
            table = pa.table(columns)
            self._writer = pq.ParquetWriter(self._file, table.schema, compression="zstd")
        else:
            schema = self._writer.schema
            unknown = {name for record in self._held for name in record} - set(schema.names)
            if unknown:
                self._refuse(min(unknown), "appears first behind the first row group")
            table = pa.table(
                [self._array([record.get(f.name) for record in self._held], f.name, f.type) for f in schema],
                schema=schema,
            )
        self._writer.write_table(table)
        self._held, self._size = [], 0

    def _array(self, values: list[Any], name: str, kind: Any) -> Any:
        import pyarrow as pa

        try:
            return pa.array(values, kind)
        except (pa.ArrowException, OverflowError) as error:
            self._refuse(name, f"has values of several types ({str(error)[:120]})")

    def _refuse(self, name: str, problem: str) -> NoReturn:
        raise DataError(f"{self._name}: field {name!r} {problem}; fix: write .jsonl.zst, which has no columns")

    def finish(self) -> None:
        if self._held or self._writer is None:
            self._flush()
        self._writer.close()

    def abandon(self) -> None:
        if self._writer is not None:  # else it writes its footer when it is collected, into a closed file
            with contextlib.suppress(OSError, ValueError):
                self._writer.close()


_WRITERS: dict[str, Callable[[BinaryIO, str], JsonLinesWriter | ParquetWriter]] = {
    ".jsonl": JsonLinesWriter,
    ".jsonl.gz": _gzip_lines,
    ".jsonl.zst": _zstd_lines,
    ".parquet": ParquetWriter,
}
