"""Documents from one format to another, one file per input file, local or behind a URL.

    OUT/00000.parquet     the documents of input file 0, with all their fields

A file has its name only when it is whole, so a run that was killed goes on with the files that are missing. Refused:
damaged records, unless they are to be left out and counted.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.corpus.writers import open_writer
from data_tools.readers.remote import filesystem_of, is_url
from data_tools.sources import Input, ReadOptions, read_documents, resolve_inputs

_TELL_EVERY = 256  # records


@dataclass(frozen=True)
class ConvertRequest:
    """``out``: a folder or a URL; ``suffix``: what `open_writer` writes, such as ``.parquet``."""

    inputs: tuple[str, ...]
    out: str
    suffix: str
    read: ReadOptions = field(default_factory=ReadOptions)
    bad_records: Literal["reject", "fail"] = "fail"


def convert(request: ConvertRequest, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Counts: files, those found there, documents written, damaged records left out by reason.

    Raises:
        DataError: a damaged record with ``bad_records`` "fail", a damaged file, a suffix that is not written.
    """
    sources = resolve_inputs(request.inputs)
    behind, total = 0, sum(source.size_bytes for source in sources)
    left_out: Counter[str] = Counter()
    found = documents = 0
    if not is_url(request.out):
        Path(request.out).mkdir(parents=True, exist_ok=True)
    for number, source in enumerate(sources):
        target = f"{request.out.rstrip('/')}/{number:05d}{request.suffix}"
        if _exists(target):
            found += 1
        else:
            with open_writer(target) as writer:
                for place, document in enumerate(_documents(source, request, left_out), 1):
                    writer.write(document)
                    documents += 1
                    if progress and place % _TELL_EVERY == 0:
                        progress(behind + source.done_bytes, total)
        behind += source.size_bytes
    counts = {"files": len(sources), "already_there": found, "documents": documents, "left_out": dict(left_out)}
    return {"out": request.out, **counts}


def _documents(source: Input, request: ConvertRequest, left_out: Counter[str]) -> Iterator[Document]:
    for record in read_documents(source, request.read):
        if not isinstance(record, BadRecord):
            yield record
        elif request.bad_records == "reject":
            left_out[record.reason] += 1
        else:
            raise DataError(f"{record.origin}: {record.detail}; fix: mend the file, or --bad-records reject")


def _exists(target: str) -> bool:
    if not is_url(target):
        return Path(target).is_file()
    filesystem, path = filesystem_of(target)
    return bool(filesystem.exists(path))


def render_counts(facts: dict[str, Any]) -> Text:
    done = f"{facts['out']}: {facts['documents']:,} documents in {facts['files'] - facts['already_there']:,} files"
    there = f", {facts['already_there']:,} files were there" if facts["already_there"] else ""
    out = "".join(f"; left out {count:,} {reason}" for reason, count in facts["left_out"].items())
    return Text(f"{done}{there}{out}")
