"""Documents from one format to another, one file per input file, local or behind a URL.

    OUT/00000.parquet     the documents of input file 0, with all their fields
    OUT/convert.json      what was asked for, and the counts of the files that are done

A run that was killed goes on with the files that are missing; the folder of another command is refused. Damaged records
end it, unless they are to be left out and counted; they are kept by the other tools, not here.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.text import Text

from cpt.rundir import DataError, write_atomic
from data_tools.corpus.document import BadRecord, Document
from data_tools.corpus.writers import open_writer
from data_tools.folder_lock import differences, hold_folder
from data_tools.readers.remote import filesystem_of, is_url, local_name
from data_tools.sources import Input, ReadOptions, read_documents, resolve_inputs

STATE_NAME = "convert.json"
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
    """Counts: files, those found done, documents and damaged records left out by reason, of all files.

    Raises:
        DataError: a damaged record with ``bad_records`` "fail", a damaged file, the folder of another command.
    """
    sources = resolve_inputs(request.inputs)
    behind, total = 0, sum(source.size_bytes for source in sources)
    out = local_name(request.out).rstrip("/")
    with _hold(out):
        state = _open_state(out, request, sources)
        found = len(state["done"])
        for number, source in enumerate(sources):
            if str(number) not in state["done"]:
                tell = (lambda done, behind=behind: progress(behind + done, total)) if progress else None
                state["done"][str(number)] = _convert_one(source, f"{out}/{number:05d}{request.suffix}", request, tell)
                _save(out, state)
            behind += source.size_bytes
    done = state["done"].values()
    left_out = sum((Counter(counts["left_out"]) for counts in done), Counter[str]())
    counts = {"files": len(sources), "already_there": found, "documents": sum(each["documents"] for each in done)}
    return {"out": out, **counts, "left_out": dict(left_out)}


def _convert_one(
    source: Input, target: str, request: ConvertRequest, tell: Callable[[int], Any] | None
) -> dict[str, Any]:
    left_out: Counter[str] = Counter()
    written = 0
    with open_writer(target) as writer:
        for document in _documents(source, request, left_out):
            writer.write(document)
            written += 1
            if tell and written % _TELL_EVERY == 0:
                tell(source.done_bytes)
    return {"documents": written, "left_out": dict(left_out)}


def _documents(source: Input, request: ConvertRequest, left_out: Counter[str]) -> Iterator[Document]:
    for record in read_documents(source, request.read):
        if not isinstance(record, BadRecord):
            yield record
        elif request.bad_records == "reject":
            left_out[record.reason] += 1
        else:
            raise DataError(f"{record.origin}: {record.detail}; fix: mend the file, or --bad-records reject")


# --- what is done


def _hold(out: str) -> contextlib.AbstractContextManager[None]:
    if is_url(out):
        return contextlib.nullcontext()
    Path(out).mkdir(parents=True, exist_ok=True)
    return hold_folder(Path(out))


def _open_state(out: str, request: ConvertRequest, sources: list[Input]) -> dict[str, Any]:
    files = [[source.name, source.size_bytes] for source in sources]
    options = {"suffix": request.suffix, "read": asdict(request.read), "bad_records": request.bad_records}
    now = {"inputs": files, **options}
    raw = _load(out)
    if raw is None:
        return {"asked": now, "done": {}}
    try:
        state = json.loads(raw)
        asked, _ = state["asked"], dict(state["done"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}/{STATE_NAME}: no record of a conversion ({error!r}); fix: use a new folder") from None
    if changes := differences(asked, now):
        raise DataError(f"{out}: holds the output of another command ({changes}); fix: --out with a new folder")
    assert isinstance(state, dict)
    return state


def _load(out: str) -> bytes | None:
    if not is_url(out):
        file = Path(out) / STATE_NAME
        return file.read_bytes() if file.is_file() else None
    filesystem, path = filesystem_of(f"{out}/{STATE_NAME}")
    return bytes(filesystem.cat_file(path)) if filesystem.exists(path) else None


def _save(out: str, state: dict[str, Any]) -> None:
    raw = json.dumps(state, indent=1).encode() + b"\n"
    if is_url(out):
        filesystem, path = filesystem_of(f"{out}/{STATE_NAME}")
        filesystem.pipe_file(path, raw)  # object stores show an object whole or not at all
    else:
        write_atomic(Path(out) / STATE_NAME, raw)


def render_counts(facts: dict[str, Any]) -> Text:
    there = f", {facts['already_there']:,} of them were there" if facts["already_there"] else ""
    out = "".join(f"; left out {count:,} {reason}" for reason, count in facts["left_out"].items())
    return Text(f"{facts['out']}: {facts['documents']:,} documents in {facts['files']:,} files{there}{out}")
