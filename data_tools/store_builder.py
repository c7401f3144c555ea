"""Raw text to a finished token store, in constant memory and in one order whatever the number of workers.

    records -> jobs -> [worker processes: hash for the split, encode, BOS, EOS] -> in order -> shards -> manifests

Each segment of the input (see ``tokenizing.jobs``) gives one shard per split; then ``build.json`` records the position
in the input and the finished shards, atomically. A killed job started again with the same request goes on behind the
last finished segment and ends with the same bytes. The folder of another request is refused.
Memory: about 170 MB per process and four times the longest document, whatever the size of the input; sixteen times
where a rare character makes Python keep that document in four bytes per character.
"""

import base64
import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Self

import orjson

from cpt.data.manifest import VIEW_NAME
from cpt.data.store_selection import open_split
from cpt.data.token_store import MANIFEST_NAME, SplitWriter, StoreLabel
from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord
from data_tools.encoders import Encoder, load_encoder
from data_tools.folder_lock import hold_folder
from data_tools.sources import Input, resolve_inputs
from data_tools.tokenizing.build_file import BUILD_NAME, REJECTS_NAME, Build, open_build
from data_tools.tokenizing.crew import in_order
from data_tools.tokenizing.documents import DocumentEncoder, Halves
from data_tools.tokenizing.jobs import Job, Reading, is_heldout, make_jobs
from data_tools.tokenizing.parts import merge_parts, part_folder, share_of
from data_tools.tokenizing.prediction import Prediction, predict, readable, require_space, take_sample
from data_tools.tokenizing.request import SPLITS, StoreRequest, identity_of

__all__ = [
    "SplitResult",
    "StoreRequest",
    "StoreResult",
    "build_store",
    "is_heldout",
    "merge_store",
    "predict_store",
    "verify_store",
]

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class SplitResult:
    """Counts of one split; ``utf8_bytes`` without BOS and EOS."""

    documents: int
    tokens: int
    utf8_bytes: int
    content_hash: str


@dataclass(frozen=True)
class StoreResult:
    """What was built. ``rejected``: bad records by reason; ``resumed_segments``: segments found finished;
    ``already_done``: nothing was left to do."""

    splits: dict[str, SplitResult]
    empty_documents: int
    rejected: dict[str, int]
    encoder: str
    warnings: tuple[str, ...]
    resumed_segments: int
    already_done: bool
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """A request made concrete: its inputs, its encoder, where it is built and the build as it is at its start."""

    request: StoreRequest
    inputs: list[Input]
    encoder: Encoder
    folder: Path
    fresh: Build
    prediction: Prediction


def build_store(request: StoreRequest, *, progress: ProgressCallback | None = None) -> StoreResult:
    """Build ``request.out``/{train,heldout}, or its part of them, or finish a build that was stopped, or find it done.

    ``progress(bytes_done, bytes_total)`` counts bytes of the input files on disk; total 0: unknown (hub data sets).

    Raises:
        DataError: bad input or tokenizer, a folder that holds something else, another writer at work in it.
        RuntimeError: no room on the disk, a worker process that died.
    """
    started = time.monotonic()
    plan = _plan(request)
    merged = _merged_before(plan)
    if merged is not None:
        return _result(merged, 0, True, time.monotonic() - started)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with hold_folder(plan.folder):
        build = open_build(plan.folder, plan.fresh)
        resumed, done = len(build.splits["train"].shards), build.finished
        if not done:
            require_space(plan.prediction, plan.folder, build.stored_bytes)
            _run(plan, build, progress or (lambda done_bytes, total_bytes: None))
    return _result(build, resumed, done, time.monotonic() - started)


def predict_store(request: StoreRequest) -> Prediction:
    """What ``build_store`` would make, without writing anything. Raises DataError as that does."""
    return _plan(request).prediction


def merge_store(out: Path) -> StoreResult:
    """One store of the parts that tasks built in ``out``. Raises DataError where a part is missing or damaged."""
    started = time.monotonic()
    return _result(merge_parts(out), 0, False, time.monotonic() - started)


def verify_store(path: Path) -> dict[str, SplitResult]:
    """Read a store or a view, or one split of it, completely and compare every hash.

    Raises:
        DataError: names the damaged file.
    """
    is_split = any((path / name).is_file() for name in (MANIFEST_NAME, VIEW_NAME))
    folders = [path] if is_split else [path / split for split in SPLITS]
    found = {}
    for folder in folders:
        store = open_split(folder)
        store.verify()
        manifest = store.manifest
        found[manifest.split] = SplitResult(
            manifest.documents, manifest.tokens, manifest.utf8_bytes, manifest.content_hash
        )
    return found


def _plan(request: StoreRequest) -> _Plan:
    request.check()
    inputs = resolve_inputs(request.inputs)
    share = share_of([entry.size_bytes for entry in inputs], request.task)
    # the sample is of all inputs, so that every task of an array decides alike
    sample = take_sample(inputs, request.read, request.bad_records)
    encoder = load_encoder(
        request.tokenizer, eos_token=request.eos_token, bos_token=request.bos_token, sample=sample.texts
    )
    label = StoreLabel(
        request.source, request.domain, "", encoder.vocab_size, encoder.eos_id, encoder.facts, encoder.bos_id
    )
    fresh = Build(identity_of(request, inputs, encoder), asdict(label), encoder.note)
    folder = part_folder(request.out, request.task) if request.is_part else request.out
    own = [inputs[index] for index in share]
    return _Plan(request, own, encoder, folder, fresh, predict(sample, own, encoder, folder))


def _merged_before(plan: _Plan) -> Build | None:
    """The whole store, where a task is asked for parts of one that is merged already."""
    if not plan.request.is_part or not (plan.request.out / BUILD_NAME).is_file():
        return None
    build = open_build(plan.request.out, plan.fresh)
    if not build.finished:
        raise DataError(
            f"{plan.request.out}: a store is being built here without --task; fix: finish it without --task, or --out "
            "with a new folder"
        )
    return build


def _run(plan: _Plan, build: Build, progress: ProgressCallback) -> None:
    request, work = plan.request, DocumentEncoder(plan.encoder, plan.request.heldout_fraction)
    reading = Reading(
        request.read, request.bad_records, request.heldout_fraction, request.segment_bytes, plan.encoder.cut
    )
    total_bytes = sum(entry.size_bytes for entry in plan.inputs)
    jobs = make_jobs(plan.inputs, reading, build.input_index, build.record)
    build.encoder = plan.encoder.note
    with _Writers(plan.folder, build) as writers:
        try:
            for job, halves in in_order(jobs, work, request.workers):
                writers.append(job, halves)
                progress(job.done_bytes, total_bytes)
            _finish(plan, build, writers)
        except OSError as error:
            _explain_full_disk(plan, build, error)
            raise


def _finish(plan: _Plan, build: Build, writers: "_Writers") -> None:
    # a task may have got nothing but empty files; `merge` asks for documents in all parts together
    if not plan.request.is_part and not any(state.documents for state in build.splits.values()):
        writers.close()
        (plan.folder / BUILD_NAME).unlink(missing_ok=True)
        rejected = f", {sum(build.rejected.values())} rejected" if build.rejected else ""
        raise DataError(
            f"{', '.join(plan.request.inputs)}: no document with text in {len(plan.inputs)} inputs "
            f"({build.empty_documents} without text{rejected}); fix: check the files and --text-key"
        )
    writers.write_manifests()
    build.finished = True
    build.save(plan.folder)


def _explain_full_disk(plan: _Plan, build: Build, error: OSError) -> None:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return
    left = (plan.prediction.store_bytes or 0) - build.stored_bytes
    raise RuntimeError(
        f"{plan.folder}: {os.strerror(error.errno)}; about {readable(max(left, 0))} more are needed, "
        f"{readable(shutil.disk_usage(plan.folder).free)} are free; fix: free some space and run the same command "
        "again, it goes on behind the last finished segment"
    ) from error


class _Writers:
    """The files of one build: a shard of each split, and rejects.jsonl; all of them at the same position."""

    def __init__(self, folder: Path, build: Build) -> None:
        self._folder = folder
        self._build = build
        self._splits = [SplitWriter(folder / split, build.split_label(split), build.splits[split]) for split in SPLITS]
        self._rejects: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, job: Job, halves: Halves) -> None:
        """Write a job's tokens and bad records; at the end of a segment, make it count."""
        build = self._build
        for record in job.rejects:
            self._open_rejects().write(_reject_line(record))
            build.rejected[record.reason] = build.rejected.get(record.reason, 0) + 1
        build.empty_documents += job.empty_documents
        for number, (writer, half) in enumerate(zip(self._splits, halves, strict=True)):
            if job.piece is None:
                writer.append(half.tokens, half.lengths, utf8_bytes=half.utf8_bytes)
            elif job.piece.side == number:
                writer.append_piece(half.tokens, utf8_bytes=half.utf8_bytes, ends_document=job.piece.last)
        if job.ends_segment:
            self._finish_segment(job)

    def _finish_segment(self, job: Job) -> None:
        for writer in self._splits:
            writer.finish_shard()
        if self._rejects is not None:
            self._rejects.flush()
            os.fsync(self._rejects.fileno())
            self._build.rejects_bytes = self._rejects.tell()
        self._build.input_index, self._build.record = job.input_index, job.record
        self._build.save(self._folder)

    def _open_rejects(self) -> BinaryIO:
        """Where the last finished segment left it: what an unfinished one wrote is cut off."""
        if self._rejects is None:
            file = self._folder / REJECTS_NAME
            file.touch()
            self._rejects = file.open("r+b")
            self._rejects.truncate(self._build.rejects_bytes)
            self._rejects.seek(0, os.SEEK_END)
        return self._rejects

    def write_manifests(self) -> None:
        for writer in self._splits:
            writer.write_manifest()

    def close(self) -> None:
        """Let go of an unfinished segment; its files are overwritten by the next run."""
        for writer in self._splits:
            writer.close()
        if self._rejects is not None:
            self._rejects.close()
            self._rejects = None


def _reject_line(record: BadRecord) -> bytes:
    """The record as it was: as text, or in base64 where it is none."""
    kept = {"reason": record.reason, "detail": record.detail, "origin": record.origin}
    try:
        return orjson.dumps(kept | {"raw": record.raw.decode()}) + b"\n"
    except UnicodeDecodeError:
        return orjson.dumps(kept | {"raw_base64": base64.b64encode(record.raw).decode()}) + b"\n"


def _result(build: Build, resumed: int, done: bool, seconds: float) -> StoreResult:
    splits = {
        name: SplitResult(state.documents, state.tokens, state.utf8_bytes, state.content_hash)
        for name, state in build.splits.items()
    }
    warnings = tuple(_warnings(build, splits))
    return StoreResult(splits, build.empty_documents, build.rejected, build.encoder, warnings, resumed, done, seconds)


def _warnings(build: Build, splits: dict[str, SplitResult]) -> Sequence[str]:
    fraction = build.request["heldout_fraction"]
    return [
        f"the {name} split is empty: too few documents for heldout_fraction {fraction}; "
        "give more documents, a larger --heldout-fraction, or --txt-documents blank-line for text files"
        for name, split in splits.items()
        if not split.documents and (name == "train" or fraction > 0)
    ]
