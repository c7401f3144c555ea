"""What a deduplication is asked for, the files it goes over, and the numbers of their documents.

A *unit* is one input file. Documents are numbered through all units in the order of the sources, references first, so
the number is the priority as well: of two duplicates the one with the lower number stays.

    against 0..2 | medical 3, 4, 5 | general 6, 7      5 and 7 are equal: 7 goes. 1 and 3 are equal: 3 goes.

Refused: no source, a source named twice over, names that are no folder names, a threshold outside 0.4 .. 1.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError, write_atomic
from data_tools.corpus.document import BadRecord, Document
from data_tools.dedup.minhash import Banding, choose_banding
from data_tools.folder_lock import differences
from data_tools.sources import Input, ReadOptions, read_documents, resolve_inputs

REQUEST_NAME = "dedup.json"
REPORT_NAME = "report.json"
WORK_NAME = "work"
REFERENCE_NAME = "against"
FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Source:
    """Files under one name. ``reference``: read, never written; its documents all stay."""

    name: str
    patterns: tuple[str, ...]
    reference: bool = False


@dataclass(frozen=True)
class LineRule:
    """Lines of at least ``min_chars`` characters that come more than ``max_repeats`` times are removed everywhere."""

    min_chars: int = 40
    max_repeats: int = 6


@dataclass(frozen=True)
class DedupRequest:
    """What ``cpt data dedup`` asks for; workers, task and wait have no influence on the output."""

    sources: tuple[Source, ...]
    out: Path
    near: bool = True
    lines: LineRule | None = None
    threshold: float = 0.8
    shingle_size: int = 5
    read: ReadOptions = field(default_factory=ReadOptions)
    workers: int = 2
    task: tuple[int, int] = (0, 1)
    wait_minutes: float = 0

    @property
    def banding(self) -> Banding | None:
        return choose_banding(self.threshold) if self.near else None


@dataclass(frozen=True)
class Unit:
    """Input file ``number`` of a source."""

    source: int
    number: int
    input: Input


@dataclass(frozen=True)
class Numbering:
    """Documents of unit u have the numbers ``offsets[u]`` .. ``offsets[u + 1] - 1``."""

    offsets: tuple[int, ...]

    @classmethod
    def of(cls, counts: Sequence[int]) -> "Numbering":
        return cls((0, *accumulate(counts)))

    @property
    def total(self) -> int:
        return self.offsets[-1]

    def unit_of(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(np.array(self.offsets), documents, "right") - 1

    def slice_of(self, unit: int, documents: NDArray[np.int64]) -> slice:
        """Where the documents of a unit stand in a sorted array of numbers."""
        first, last = np.searchsorted(documents, self.offsets[unit : unit + 2])
        return slice(int(first), int(last))


def parse_sources(sources: Sequence[str], against: Sequence[str]) -> tuple[Source, ...]:
    """``["general=web/*.jsonl", ...]``; a name given again adds files to its source. References come first.

    Raises:
        DataError: not NAME=FILES, or a name that is no folder name.
    """
    patterns: dict[str, list[str]] = {}
    for text in sources:
        name, equals, pattern = text.partition("=")
        if not equals or not pattern or not _NAME.fullmatch(name):
            raise DataError(f"--source {text!r}: must be NAME=FILES, e.g. --source general='web/*.jsonl.zst'")
        if name in (WORK_NAME, REFERENCE_NAME, REQUEST_NAME, REPORT_NAME):
            raise DataError(f"--source {text!r}: the name {name!r} is taken by the tool; fix: another name")
        patterns.setdefault(name, []).append(pattern)
    references = (Source(REFERENCE_NAME, tuple(against), True),) if against else ()
    return (*references, *(Source(name, tuple(files)) for name, files in patterns.items()))


def check_request(request: DedupRequest) -> None:
    """Raises DataError that lists every wrong value."""
    lines = request.lines or LineRule()
    rules = (
        (any(not source.reference for source in request.sources), "--source", "nothing", "given at least once"),
        (0.4 <= request.threshold <= 1, "--threshold", request.threshold, "0.4 <= x <= 1"),
        (1 <= request.shingle_size <= 100, "--shingle-size", request.shingle_size, "1 <= x <= 100"),
        (lines.min_chars >= 1, "--line-chars", lines.min_chars, "at least 1"),
        (lines.max_repeats >= 1, "--line-repeats", lines.max_repeats, "at least 1"),
        (request.workers >= 1, "--workers", request.workers, "at least 1"),
    )
    problems = [f"{name} is {value!r}, must be {rule}" for good, name, value, rule in rules if not good]
    kinds = [source.reference for source in request.sources]
    assert kinds == sorted(kinds, reverse=True), "references come first: their documents have the lowest numbers"
    if problems:
        raise DataError("; ".join(problems))


def list_units(request: DedupRequest) -> tuple[Unit, ...]:
    """Every input file of every source, in order of priority."""
    return tuple(
        Unit(number, place, entry)
        for number, source in enumerate(request.sources)
        for place, entry in enumerate(_resolve(source))
    )


def _resolve(source: Source) -> list[Input]:
    try:
        return resolve_inputs(source.patterns)
    except DataError as error:
        raise DataError(f"{source.name}: {error}") from None


def settle(request: DedupRequest, units: Sequence[Unit]) -> dict[str, Any]:
    """Make the output folder this request's, or find that it is; the identity of the request.

    Raises:
        DataError: the folder holds something else.
    """
    identity = _identity(request, units)
    file = request.out / REQUEST_NAME
    request.out.mkdir(parents=True, exist_ok=True)
    foreign = sorted(entry.name for entry in request.out.iterdir() if not entry.name.startswith("."))
    if not file.is_file():  # looked at after the folder: another task may just have begun
        if foreign:
            raise DataError(f"{request.out}: holds {foreign[:5]} but no {REQUEST_NAME}; fix: --out with a new folder")
        write_atomic(file, json.dumps({"format_version": FORMAT_VERSION, **identity}, indent=1) + "\n")
        return identity
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version = found.pop("format_version")
    except (ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{file}: no record of a deduplication ({error!r}); fix: --out with a new folder") from None
    changes = differences({**found, "format_version": version}, {"format_version": FORMAT_VERSION, **identity})
    if changes:
        raise DataError(
            f"{request.out}: holds the output of another command ({changes}); fix: --out with a new "
            "folder, or delete this one"
        )
    return identity


def _identity(request: DedupRequest, units: Sequence[Unit]) -> dict[str, Any]:
    """All that decides the output, as JSON; files count with their sizes, so a changed one is noticed."""
    files: list[dict[str, Any]] = [{"name": source.name, "files": []} for source in request.sources]
    for unit in units:
        files[unit.source]["files"].append([unit.input.name, unit.input.size_bytes])
    return {
        "sources": files,
        "near": [request.threshold, request.shingle_size] if request.near else None,
        "lines": asdict(request.lines) if request.lines else None,
        "read": asdict(request.read),
    }


def read_unit(unit: Unit, read: ReadOptions) -> Iterator[tuple[int, Document]]:
    """(record number, document) of a unit; bad records are left to the filter pass, which rejects them."""
    for record, document in enumerate(read_documents(unit.input, read)):
        if not isinstance(document, BadRecord):
            yield record, document
