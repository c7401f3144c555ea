"""`cpt data decontaminate`: index, scan, then the stage that drops or cuts what the scan found.

    OUT/index/                   the n-grams looked for
    OUT/scan/                    what overlaps where, per input file (see scan.py)
    OUT/report.json, contaminated_items.json
    OUT/documents, rejects ...   a stage folder (see corpus/stage.py); none after a dry run

Every part is made once: a run that was killed, or a real one after a dry one, goes on from what is there.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError, write_atomic
from data_tools.corpus.document import Document, Reject, Step
from data_tools.corpus.stage import StageRequest, read_stage, run_stage
from data_tools.corpus.units import read_markers, run_units
from data_tools.decontaminate.cut import cut
from data_tools.decontaminate.gram_index import GramIndex
from data_tools.decontaminate.overlaps import common_grams, write_report
from data_tools.decontaminate.protected_texts import Protected
from data_tools.decontaminate.scan import MOST_HITS, Scan, read_overlaps
from data_tools.folder_lock import differences, hold_folder, task_folder
from data_tools.sources import STAGE_NAME, ReadOptions, resolve_inputs

Action = Literal["drop", "cut"]
Progress = Callable[[str, int, int], None]
VERB = "decontaminate"
REQUEST_NAME = "request.json"
_SHOWN = 200  # characters of an overlap
_OTHERS = ("scan", "logs")  # one that was killed as it began; of a scheduler's tasks


@dataclass(frozen=True)
class DecontaminateRequest:
    """``max_documents``: n-grams in more documents than this do not count; 0 lets all count."""

    inputs: tuple[str, ...]
    out: Path
    protected: Protected
    action: Action = "drop"
    max_documents: int = 0
    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 1
    task: tuple[int, int] = (0, 1)
    dry_run: bool = False


def decontaminate(request: DecontaminateRequest, progress: Progress | None = None) -> dict[str, Any]:
    """``report``: what was found, None while other tasks have not scanned; ``summary``: of the stage, {} likewise or
    after a dry run.

    ``progress(what, bytes_done, bytes_total)`` follows both passes.

    Raises:
        DataError: bad input or benchmark files, a folder of another request.
    """
    inputs = tuple(resolve_inputs(request.inputs))
    total = sum(entry.size_bytes for entry in inputs)
    show: Progress = progress or (lambda what, done, total: None)
    scan_folder = request.out / "scan"
    identity = _settle(request, [[entry.name, entry.size_bytes] for entry in inputs], len(inputs))
    with hold_folder(task_folder(scan_folder, request.task)):
        scan = Scan(request.out, inputs, request.read)
        run_units(scan_folder, len(inputs), scan, workers=request.workers, task=request.task,
                  progress=lambda done: show("scanning", done, total))  # fmt: skip
    report = _report(request, len(inputs))
    if request.dry_run:
        return {"report": report, "summary": {}}
    summary = run_stage(
        StageRequest(
            verb=VERB,
            inputs=request.inputs,
            out=request.out,
            identity=identity,
            make_unit_step=_StepMaker(request.out, len(inputs), request.action, request.max_documents),
            read=request.read,
            workers=request.workers,
            task=request.task,
        ),
        progress=lambda done, total: show("writing", done, total),
    )
    return {"report": report, "summary": summary}


def _settle(request: DecontaminateRequest, files: list[list[Any]], num_units: int) -> dict[str, Any]:
    """Make the folder this request's, with the index in it, or find that it is; gives what decides the second pass.

    What is refused is refused before a byte is written: nothing is left in another command's folder, nor of a mistake.
    """
    index = request.protected.identity()
    fingerprint = hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()
    identity = {"index": fingerprint, "action": request.action, "max_documents": request.max_documents}
    asked = json.loads(json.dumps({"inputs": files, "read": asdict(request.read), "index": index}))
    file = request.out / "scan" / REQUEST_NAME
    there = sorted(entry.name for entry in request.out.iterdir()) if request.out.is_dir() else []
    known = file.is_file()  # looked at after the folder: another task may just have begun
    if known:
        _require_scan_of(asked, file, request.out)
    if (request.out / STAGE_NAME).is_file():
        _require_stage_of(request, asked, identity)
    elif not known and (foreign := [name for name in there if name not in _OTHERS and not name.startswith(".")]):
        raise DataError(f"{request.out}: holds {foreign[:5]} but no scan; fix: --out with a new folder")
    _require_scan_of_all(request, num_units)
    made = None if (request.out / "index").is_dir() else request.protected.build_index()
    (request.out / "scan" / "overlaps").mkdir(parents=True, exist_ok=True)
    if not known:
        write_atomic(file, json.dumps(asked, indent=1) + "\n")
        _require_scan_of(asked, file, request.out)  # another command may have begun as well
    if made is not None:
        made.save(request.out / "index")
    return identity


def _require_scan_of(asked: dict[str, Any], file: Path, out: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    changed = [key for key in asked if found.get(key) != asked[key]]
    if changed:
        raise DataError(
            f"{out}: holds the scan of another command (other {', '.join(changed)}: see {file}); fix: --out "
            "with a new folder, or delete this one"
        )


def _require_stage_of(request: DecontaminateRequest, asked: dict[str, Any], identity: dict[str, Any]) -> None:
    """A stage that is there must be this one: the report of another's scan would lie beside its documents."""
    expected = {"verb": VERB, "inputs": asked["inputs"], "read": asked["read"], "identity": identity}
    if changes := differences(read_stage(request.out), expected):
        raise DataError(
            f"{request.out}: holds the output of another command ({changes}); fix: --out with a new folder, or delete "
            "this one"
        )


def _require_scan_of_all(request: DecontaminateRequest, num_units: int) -> None:
    """How common an n-gram is shows only when all tasks have scanned."""
    if request.task[1] > 1 and request.max_documents and not request.dry_run:
        try:
            read_markers(request.out / "scan", num_units)
        except DataError as error:
            raise DataError(
                f"{error}; --max-documents with --task needs the scan of all: run all tasks with --dry-run first"
            ) from None


def _report(request: DecontaminateRequest, num_units: int) -> dict[str, Any] | None:
    try:
        read_markers(request.out / "scan", num_units)
    except DataError:
        if request.task[1] > 1:
            return None
        raise
    rules = {"ngram": request.protected.ngram, "heldout_ngram": request.protected.heldout_ngram,
             "max_documents": request.max_documents}  # fmt: skip
    return write_report(request.out, num_units, GramIndex.load(request.out / "index"), rules)


@dataclass
class _StepMaker:
    """For each input file the step that acts on what the scan found in it; documents come in the scan's order."""

    out: Path
    num_units: int
    action: Action
    max_documents: int
    _index: GramIndex | None = field(default=None, init=False)
    _common: NDArray[np.int64] | None = field(default=None, init=False)

    def __call__(self, unit: int) -> Step:
        if self._index is None or self._common is None:
            self._index = GramIndex.load(self.out / "index")
            self._common = common_grams(self.out, self.num_units, len(self._index.hashes), self.max_documents)
        return _Act(self.out, unit, self.action, self._index, frozenset(self._common.tolist())).step


class _Act:
    def __init__(self, out: Path, unit: int, action: Action, index: GramIndex, common: frozenset[int]) -> None:
        self._overlaps = read_overlaps(out, unit)
        self._next = next(self._overlaps, None)
        self._position = 0
        self._action, self._index, self._common = action, index, common

    def step(self, document: Document) -> Reject | None:
        overlap = self._next if self._next is not None and self._next["position"] == self._position else None
        self._position += 1
        if overlap is None:
            return None
        assert overlap["origin"] == document.origin, f"the scan saw {overlap['origin']} here, not {document.origin}"
        self._next = next(self._overlaps, None)
        hits = [hit for hit in overlap["hits"] if hit[2] not in self._common]
        if not hits:
            return None
        if self._action == "cut" and overlap["num_hits"] <= MOST_HITS:
            pieces = cut(document.text, [(start, end) for start, end, _ in hits])
            if pieces:
                document.text = "\n\n".join(pieces)
                return None
        start, end, gram = hits[0]
        item = int(self._index.owners(gram)[0])
        name = self._index.sets[self._index.item_sets[item]]
        detail = f"{self._index.item_keys[item]}: {document.text[start:end][:_SHOWN]!r} ({len(hits)} n-grams)"
        return Reject(f"contaminated.{name}", detail)
