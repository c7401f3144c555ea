"""A stage: documents in, documents out, what was dropped beside them, and the counts of both.

    inputs -> [per input file: read, step, write] -> OUT/documents, OUT/rejects, OUT/done -> OUT/summary.json

One unit is one input file; memory is bounded by the longest document. A unit's files appear under their names when it
is done, so a killed stage started again redoes at most the files that were in work, and ends with the same bytes:

    stage.json                   what was asked for; the folder of another request is refused
    documents/00000.jsonl.zst    what is kept of input file 0
    rejects/00000.jsonl.zst      what is not: reason, detail, origin, text and all other fields
    done/00000.json              counts and hashes of unit 0
    summary.json                 written last: totals by reason, with examples. Its presence means: complete

Nothing is lost silently: records read = documents kept + rejects, bad records among them.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cpt.rundir import DataError, write_atomic
from data_tools.corpus.document import BadRecord, Document, Reject, Step
from data_tools.corpus.units import Progress, advance, read_markers, run_units
from data_tools.corpus.writers import open_writer
from data_tools.folder_lock import differences, hold_folder, task_folder
from data_tools.sources import STAGE_NAME, SUMMARY_NAME, Input, ReadOptions, read_documents, resolve_inputs
from data_tools.whole_file import sha256_of

STAGE_VERSION = 1
EXAMPLES = 3  # per reason
_EXCERPT = 240  # characters
_ADVANCE_EVERY = 256  # records
_FILE_KEYS = {"input", "documents_bytes", "rejects_bytes", "documents_sha256"}


@dataclass(frozen=True)
class StageRequest:
    """``identity``: all besides the inputs that decides the output, as JSON. Exactly one of the two makers is given.

    ``make_step`` is called once per process, ``make_unit_step`` at the start of every unit; both must pickle.
    """

    verb: str
    inputs: tuple[str, ...]
    out: Path
    identity: dict[str, Any]
    make_step: Callable[[], Step] | None = None
    make_unit_step: Callable[[int], Step] | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 1
    task: tuple[int, int] = (0, 1)
    bad_records: Literal["reject", "fail"] = "reject"


def run_stage(request: StageRequest, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Run the stage, or what is left of it; the summary, or {} while units of other tasks are missing.

    ``progress(bytes_done, bytes_total)`` counts bytes of the input files on disk.

    Raises:
        DataError: bad input, a folder that holds something else, another writer in it; with ``bad_records`` "fail" the
            first bad record.
    """
    assert (request.make_step is None) != (request.make_unit_step is None), "give one of make_step and make_unit_step"
    inputs = resolve_inputs(request.inputs)
    total = sum(entry.size_bytes for entry in inputs)
    request.out.mkdir(parents=True, exist_ok=True)
    for name in ("documents", "rejects", "done"):
        (request.out / name).mkdir(exist_ok=True)
    _settle(request, inputs)
    report: Progress | None = (lambda done: progress(done, total)) if progress else None
    with hold_folder(task_folder(request.out, request.task)):
        run_units(
            request.out,
            len(inputs),
            _UnitWork(request, tuple(inputs)),
            workers=request.workers,
            task=request.task,
            progress=report,
        )
    if request.task[1] > 1 and not _all_done(request.out, len(inputs)):
        return {}
    return finish_stage(request.out)


def finish_stage(out: Path, *, verify: bool = False) -> dict[str, Any]:
    """Sum up a stage whose units are all done, and write ``summary.json``; the same again where it exists.

    ``verify``: read the documents again and compare their hashes.

    Raises:
        DataError: no stage folder, units that are missing, files that are not as their unit left them.
    """
    asked = read_stage(out)
    markers = read_markers(out, len(asked["inputs"]))
    for unit, marker in enumerate(markers):
        _require_keys(marker, _Counts.__dataclass_fields__.keys() | _FILE_KEYS, out / "done" / f"{unit:05d}.json")
        for kind in ("documents", "rejects"):
            _require_size(out / kind / shard_name(unit), marker[f"{kind}_bytes"])
        if verify and sha256_of(out / "documents" / shard_name(unit)) != marker["documents_sha256"]:
            raise DataError(_damaged(out / "documents" / shard_name(unit), "is not what its unit wrote, by its hash"))
    summary = {"format_version": STAGE_VERSION, "verb": asked["verb"], "identity": asked["identity"]} | _totals(markers)
    write_atomic(out / SUMMARY_NAME, json.dumps(summary, indent=1) + "\n")
    return summary


def read_stage(out: Path) -> dict[str, Any]:
    """``stage.json`` of a folder: verb, inputs, identity.

    Raises:
        DataError: there is none, or of another version.
    """
    file = out / STAGE_NAME
    if not file.is_file():
        raise DataError(f"{out}: no {STAGE_NAME}, so no stage wrote this folder; fix: check the path")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a stage record ({error!r}); fix: delete the folder and run again") from None
    if version != STAGE_VERSION:
        raise DataError(f"{file}: format_version is {version!r}, this program reads {STAGE_VERSION}; fix: run it again")
    assert isinstance(content, dict)
    _require_keys(content, {"verb", "inputs", "identity"}, file)
    return content


def shard_name(unit: int) -> str:
    return f"{unit:05d}.jsonl.zst"


def _settle(request: StageRequest, inputs: Sequence[Input]) -> None:
    """Make the folder this stage's, or find that it is; files count with their sizes, so a changed one is noticed."""
    identity = {
        "verb": request.verb,
        "inputs": [[entry.name, entry.size_bytes] for entry in inputs],
        "read": asdict(request.read),
        "bad_records": request.bad_records,
        "identity": request.identity,
    }
    identity = json.loads(json.dumps(identity))
    foreign = [entry.name for kind in ("documents", "rejects", "done") for entry in (request.out / kind).iterdir()]
    if (request.out / STAGE_NAME).is_file():  # looked at after the folders: another task may just have begun
        found = read_stage(request.out)
        if changes := differences(found, identity):
            raise DataError(
                f"{request.out}: holds the output of another command ({changes}); fix: --out with a new "
                "folder, or delete this one"
            )
        return
    if foreign:
        raise DataError(f"{request.out}: holds {sorted(foreign)[:5]} but no {STAGE_NAME}; fix: --out with a new folder")
    write_atomic(request.out / STAGE_NAME, json.dumps({"format_version": STAGE_VERSION, **identity}, indent=1) + "\n")


def _all_done(out: Path, num_units: int) -> bool:
    return sum(1 for file in (out / "done").iterdir() if file.suffix == ".json") == num_units


class _UnitWork:
    """One unit: an input file to its documents, its rejects and its counts. Lives once in each process."""

    def __init__(self, request: StageRequest, inputs: tuple[Input, ...]) -> None:
        self.request = request
        self.inputs = inputs
        self._step: Step | None = None

    def __call__(self, unit: int) -> dict[str, Any]:
        counts = _Counts()
        targets = [self.request.out / kind / shard_name(unit) for kind in ("documents", "rejects")]
        with ExitStack() as stack:
            kept, dropped = (stack.enter_context(open_writer(target)) for target in targets)
            for document, reject in self._judged(unit, counts):
                if reject is None:
                    kept.write(document)
                else:
                    dropped.write(_reject_record(document, reject))
        return counts.as_marker(self.inputs[unit].name, *targets)

    def _judged(self, unit: int, counts: "_Counts") -> Iterator[tuple[Document, Reject | None]]:
        source, step = self.inputs[unit], self._step_for(unit)
        advanced = 0
        for number, record in enumerate(read_documents(source, self.request.read)):
            if isinstance(record, BadRecord):
                if self.request.bad_records == "fail":
                    raise DataError(f"{record.origin}: {record.detail}; fix: mend the file, or --bad-records reject")
                document = _readable(record)
                size = len(record.raw)
                reject: Reject | None = Reject(record.reason, record.detail)
            else:
                document, size = record, len(record.text.encode())
                reject = step(document)
            counts.add(document, size, reject)
            yield document, reject
            if number % _ADVANCE_EVERY == 0:
                advance(source.done_bytes - advanced)
                advanced = source.done_bytes
        advance(source.size_bytes - advanced)

    def _step_for(self, unit: int) -> Step:
        if self.request.make_unit_step is not None:
            return self.request.make_unit_step(unit)
        if self._step is None:
            assert self.request.make_step is not None
            self._step = self.request.make_step()
        return self._step


def _readable(record: BadRecord) -> Document:
    """Its bytes as text; where that is not all of them, themselves too."""
    text = record.raw.decode("utf-8", "replace")
    lost = text.encode() != record.raw
    return Document(text, {"raw_base64": base64.b64encode(record.raw).decode()} if lost else {}, record.origin)


def _reject_record(document: Document, reject: Reject) -> Document:
    """The record's own fields of these names become ``fields.reason`` and so on."""
    why = {"reason": reject.reason, "detail": reject.detail, "origin": document.origin}
    own = {f"fields.{name}" if name in why else name: value for name, value in document.fields.items()}
    return Document(document.text, why | own)


@dataclass
class _Counts:
    """What a unit's marker holds; bytes are UTF-8 bytes of text."""

    records: int = 0
    documents: int = 0
    bytes_read: int = 0
    bytes_kept: int = 0
    reasons: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, document: Document, size: int, reject: Reject | None) -> None:
        self.records += 1
        self.bytes_read += size
        if reject is None:
            self.documents += 1
            self.bytes_kept += len(document.text.encode())
            return
        entry = self.reasons.setdefault(reject.reason, {"documents": 0, "bytes": 0, "examples": []})
        entry["documents"] += 1
        entry["bytes"] += size
        if len(entry["examples"]) < EXAMPLES:
            entry["examples"].append(
                {"origin": document.origin, "detail": reject.detail, "excerpt": document.text[:_EXCERPT]}
            )

    def as_marker(self, name: str, documents: Path, rejects: Path) -> dict[str, Any]:
        files = {"documents_bytes": documents.stat().st_size, "rejects_bytes": rejects.stat().st_size}
        return {"input": name, **asdict(self), **files, "documents_sha256": sha256_of(documents)}


def _totals(markers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over units; ``content_hash`` is the sha256 of the units' document hashes in order."""
    reasons: dict[str, dict[str, Any]] = {}
    for marker in markers:
        for reason, entry in marker["reasons"].items():
            total = reasons.setdefault(reason, {"documents": 0, "bytes": 0, "examples": []})
            total["documents"] += entry["documents"]
            total["bytes"] += entry["bytes"]
            total["examples"] += entry["examples"][: EXAMPLES - len(total["examples"])]
    sums = {key: sum(marker[key] for marker in markers) for key in ("records", "documents", "bytes_read", "bytes_kept")}
    chain = hashlib.sha256("".join(marker["documents_sha256"] for marker in markers).encode()).hexdigest()
    by_count = sorted(reasons.items(), key=lambda item: (-item[1]["documents"], item[0]))
    return {"inputs": len(markers), **sums, "reasons": dict(by_count), "content_hash": chain}


def _require_keys(content: Mapping[str, Any], keys: Set[str], file: Path) -> None:
    if missing := sorted(keys - content.keys()):
        raise DataError(f"{file}: has no {', '.join(missing)}; fix: delete it and run the command again")


def _require_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise DataError(_damaged(file, f"{state}, {expected} were written"))


def _damaged(file: Path, problem: str) -> str:
    marker = file.parent.parent / "done" / f"{file.name.split('.')[0]}.json"
    return f"{file}: {problem}; fix: delete {marker} and run the command again"
