"""Raw text to a finished token store, in constant memory and in one order whatever the number of workers.

    records -> batches -> [worker threads: hash for the split, encode, EOS] -> in order -> shards -> manifests

The input is cut into *segments* of at least ``segment_bytes`` of text, at document borders. Each segment gives one
shard per split; then ``build.json`` records the position in the input and the finished shards, atomically. A killed job
started again with the same request goes on behind the last finished segment and ends with the same bytes. The folder of
another request is refused. Encoders release the GIL, so workers are threads: nothing is copied between processes.
"""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.token_store import SplitState, SplitWriter, StoreLabel
from cpt.rundir import DataError, write_atomic
from data_tools.encoders import Encoder, load_encoder
from data_tools.folder_lock import hold_folder
from data_tools.sources import Input, ReadOptions, read_texts, resolve_inputs

SPLITS = ("train", "heldout")
BUILD_NAME = "build.json"
BUILD_VERSION = 1
_BATCH_BYTES = 2 << 20
_IN_FLIGHT_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 19
_SAMPLE_INPUTS = 8

ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class StoreRequest:
    """What ``cpt data tokenize`` asks for; every field but ``workers`` decides the bytes of the store."""

    inputs: tuple[str, ...]
    tokenizer: Path
    out: Path
    source: str
    domain: str
    heldout_fraction: float = 0.01
    eos_token: str | None = None
    read: ReadOptions = field(default_factory=ReadOptions)
    segment_bytes: int = 128 << 20
    workers: int = 2


@dataclass(frozen=True)
class SplitResult:
    """Counts of one split; ``utf8_bytes`` without EOS."""

    documents: int
    tokens: int
    utf8_bytes: int
    content_hash: str


@dataclass(frozen=True)
class StoreResult:
    """What was built. ``resumed_segments``: segments found finished; ``already_done``: nothing was left to do."""

    splits: dict[str, SplitResult]
    empty_documents: int
    encoder: str
    warnings: tuple[str, ...]
    resumed_segments: int
    already_done: bool
    seconds: float


@dataclass
class _Build:
    """``build.json``: the request, the position behind the last finished segment and the shards up to there."""

    request: dict[str, Any]
    encoder: str = ""
    input_index: int = 0
    record: int = 0
    empty_documents: int = 0
    finished: bool = False
    splits: dict[str, SplitState] = field(default_factory=lambda: {split: SplitState() for split in SPLITS})

    def save(self, folder: Path) -> None:
        write_atomic(
            folder / BUILD_NAME, json.dumps({"format_version": BUILD_VERSION, **asdict(self)}, indent=1) + "\n"
        )


@dataclass(frozen=True)
class _Batch:
    """Consecutive documents, and where the input stands behind them."""

    texts: list[str]
    utf8_bytes: int
    empty_documents: int
    input_index: int
    record: int
    done_bytes: int
    ends_segment: bool


@dataclass(frozen=True)
class _Encoded:
    tokens: NDArray[Any]
    lengths: NDArray[np.int64]
    utf8_bytes: int


def build_store(request: StoreRequest, *, progress: ProgressCallback | None = None) -> StoreResult:
    """Build ``request.out``/{train,heldout}, or finish a build that was stopped, or find it finished.

    ``progress(bytes_done, bytes_total)`` counts bytes of the input files on disk; total 0: unknown (hub data sets).

    Raises:
        DataError: bad input or tokenizer, a folder that holds something else, another writer at work in it.
    """
    started = time.monotonic()
    _check(request)
    inputs = resolve_inputs(request.inputs)
    request.out.mkdir(parents=True, exist_ok=True)
    with hold_folder(request.out):
        sample = _sample(inputs, request.read)
        encoder = load_encoder(request.tokenizer, eos_token=request.eos_token, sample=sample)
        build = _open_build(request.out, _identity(request, inputs, encoder))
        resumed, done = len(build.splits["train"].shards), build.finished
        if not done:
            build.encoder = encoder.note
            _run(request, inputs, encoder, build, progress or (lambda done_bytes, total_bytes: None))
    return _result(build, resumed, done, time.monotonic() - started)


def is_heldout(text: bytes, fraction: float) -> bool:
    """By the text alone: the same document falls on the same side in every corpus, order and run."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < fraction * 2**64


def _check(request: StoreRequest) -> None:
    rules = (
        (0 <= request.heldout_fraction < 1, "heldout_fraction", request.heldout_fraction, "0 <= x < 1"),
        (request.workers >= 1, "workers", request.workers, "at least 1"),
        (request.segment_bytes >= 1, "segment_bytes", request.segment_bytes, "at least 1"),
        (bool(request.source), "source", request.source, "a name"),
        (bool(request.domain), "domain", request.domain, "a label such as general or medical"),
    )
    problems = [f"{name} is {value!r}, must be {rule}" for good, name, value, rule in rules if not good]
    if problems:
        raise DataError("; ".join(problems))


def _identity(request: StoreRequest, inputs: Sequence[Input], encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the bytes of the store; files count with their sizes, so a changed one is noticed."""
    return {
        "inputs": [[entry.name, entry.size_bytes] for entry in inputs],
        "text_key": request.read.text_key,
        "txt_documents": request.read.txt_documents,
        "tokenizer": encoder.facts.fingerprint,
        "eos_id": encoder.eos_id,
        "source": request.source,
        "domain": request.domain,
        "heldout_fraction": request.heldout_fraction,
        "segment_bytes": request.segment_bytes,
    }


def _open_build(folder: Path, identity: dict[str, Any]) -> _Build:
    """A new build, or the one found in the folder if it is of the same request."""
    file = folder / BUILD_NAME
    if not file.is_file():
        foreign = [entry.name for entry in folder.iterdir() if entry.name not in (*SPLITS, "writer.lock")]
        foreign += [f"{split}/manifest.json" for split in SPLITS if (folder / split / "manifest.json").exists()]
        if foreign:
            raise DataError(f"{folder}: holds {sorted(foreign)[:5]} but no {BUILD_NAME}; fix: --out with a new folder")
        return _Build(identity)
    raw = json.loads(file.read_text(encoding="utf-8"))
    version = raw.pop("format_version", None)
    if version != BUILD_VERSION:
        raise DataError(
            f"{file}: format_version is {version!r}, this program writes {BUILD_VERSION}; fix: use a new folder"
        )
    build = _Build(**raw | {"splits": {name: SplitState.from_dict(state) for name, state in raw["splits"].items()}})
    changes = [f"{key}: {_short(build.request.get(key))} there, {_short(identity[key])} now"
               for key in identity if build.request.get(key) != identity[key]]  # fmt: skip
    if changes:
        raise DataError(
            f"{folder}: holds the store of another command ({'; '.join(changes)}); "
            "fix: --out with a new folder, or delete this one"
        )
    return build


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def _sample(inputs: Sequence[Input], options: ReadOptions) -> list[str]:
    """The first documents of up to eight inputs spread over the list, about half a megabyte in all."""
    chosen = inputs[:: -(-len(inputs) // _SAMPLE_INPUTS)]
    texts: list[str] = []
    for entry in chosen:
        room = _SAMPLE_BYTES // len(chosen)
        for text in read_texts(entry, options):
            texts.append(text[: max(room, 1)])
            room -= len(text)
            if room <= 0:
                break
    return [text for text in texts if text]


def _run(
    request: StoreRequest, inputs: list[Input], encoder: Encoder, build: _Build, progress: ProgressCallback
) -> None:
    labels = {
        split: StoreLabel(request.source, request.domain, split, encoder.vocab_size, encoder.eos_id, encoder.facts)
        for split in SPLITS
    }
    writers = {split: SplitWriter(request.out / split, labels[split], build.splits[split]) for split in SPLITS}
    total_bytes = sum(entry.size_bytes for entry in inputs)
    try:
        for batch, encoded in _encoded_batches(request, inputs, encoder, build):
            for split, part in zip(SPLITS, encoded, strict=True):
                writers[split].append(part.tokens, part.lengths, utf8_bytes=part.utf8_bytes)
            build.empty_documents += batch.empty_documents
            if batch.ends_segment:
                _finish_segment(request.out, writers, build, batch)
            progress(batch.done_bytes, total_bytes)
    finally:
        for writer in writers.values():
            writer.close()
    if not any(state.documents for state in build.splits.values()):
        (request.out / BUILD_NAME).unlink(missing_ok=True)
        raise DataError(
            f"{', '.join(request.inputs)}: no document with text in {len(inputs)} inputs "
            f"({build.empty_documents} without text); fix: check the files and --text-key"
        )
    for writer in writers.values():
        writer.write_manifest()
    build.finished = True
    build.save(request.out)


def _finish_segment(folder: Path, writers: dict[str, SplitWriter], build: _Build, batch: _Batch) -> None:
    for writer in writers.values():
        writer.finish_shard()
    build.input_index, build.record = batch.input_index, batch.record
    build.save(folder)


def _encoded_batches(
    request: StoreRequest, inputs: list[Input], encoder: Encoder, build: _Build
) -> Iterator[tuple[_Batch, tuple[_Encoded, _Encoded]]]:
    """Batches with their encoded halves, in input order; bounded by bytes, so huge documents do not pile up."""
    waiting: deque[tuple[_Batch, Future[tuple[_Encoded, _Encoded]]]] = deque()
    in_flight = 0
    with ThreadPoolExecutor(request.workers) as pool:
        for batch in _batches(inputs, request, build.input_index, build.record):
            while waiting and (in_flight + batch.utf8_bytes > _IN_FLIGHT_BYTES or len(waiting) > 2 * request.workers):
                first, future = waiting.popleft()
                in_flight -= first.utf8_bytes
                yield first, future.result()
            waiting.append((batch, pool.submit(_encode, batch.texts, encoder, request.heldout_fraction)))
            in_flight += batch.utf8_bytes
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()


def _batches(inputs: list[Input], request: StoreRequest, input_index: int, record: int) -> Iterator[_Batch]:
    """Documents from the given position on, in batches; every segment and the input end with ``ends_segment``.

    Where a batch ends inside a segment has no influence on the store; where a segment ends depends on the texts alone.
    """
    texts: list[str] = []
    batch_bytes = segment_bytes = empty = 0
    behind = sum(entry.size_bytes for entry in inputs[:input_index])
    for index in range(input_index, len(inputs)):
        for text in read_texts(inputs[index], request.read, start=record):
            record += 1
            if not text:
                empty += 1
                continue
            size = len(text) if text.isascii() else len(text.encode())
            texts.append(text)
            batch_bytes += size
            segment_bytes += size
            ends_segment = segment_bytes >= request.segment_bytes
            if ends_segment or batch_bytes >= _BATCH_BYTES:
                done = behind + inputs[index].done_bytes
                yield _Batch(texts, batch_bytes, empty, index, record, done, ends_segment)
                texts, batch_bytes, empty = [], 0, 0
                segment_bytes = 0 if ends_segment else segment_bytes
        behind, record = behind + inputs[index].size_bytes, 0
    if segment_bytes or empty:
        yield _Batch(texts, batch_bytes, empty, len(inputs), 0, behind, True)


def _encode(texts: list[str], encoder: Encoder, heldout_fraction: float) -> tuple[_Encoded, _Encoded]:
    """(train, heldout) halves of a batch; runs in a worker thread."""
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for text in texts:
        raw = text.encode()
        side = is_heldout(raw, heldout_fraction)
        halves[side].append(text)
        sizes[side] += len(raw)
    return _encode_half(halves[0], sizes[0], encoder), _encode_half(halves[1], sizes[1], encoder)


def _encode_half(texts: list[str], utf8_bytes: int, encoder: Encoder) -> _Encoded:
    """Ids in the store's dtype with EOS behind every document."""
    dtype = np.uint16 if encoder.vocab_size <= 1 << 16 else np.uint32
    if not texts:
        return _Encoded(np.empty(0, dtype), np.empty(0, np.int64), 0)
    ids, lengths = encoder.encode_batch(texts)
    assert not len(ids) or ids.max() < encoder.vocab_size, f"id {ids.max()} from a vocabulary of {encoder.vocab_size}"
    lengths = lengths + 1
    tokens = np.empty(len(ids) + len(texts), dtype)
    is_text = np.ones(len(tokens), bool)
    is_text[lengths.cumsum() - 1] = False
    tokens[is_text] = ids
    tokens[~is_text] = encoder.eos_id
    return _Encoded(tokens, lengths, utf8_bytes)


def _result(build: _Build, resumed: int, done: bool, seconds: float) -> StoreResult:
    splits = {
        name: SplitResult(state.documents, state.tokens, state.utf8_bytes, state.content_hash)
        for name, state in build.splits.items()
    }
    warnings = tuple(
        f"the {name} split is empty: too few documents for heldout_fraction {build.request['heldout_fraction']}; "
        "give more documents, a larger --heldout-fraction, or --txt-documents blank-line for text files"
        for name, split in splits.items()
        if not split.documents and (name == "train" or build.request["heldout_fraction"] > 0)
    )
    return StoreResult(splits, build.empty_documents, build.encoder, warnings, resumed, done, seconds)
