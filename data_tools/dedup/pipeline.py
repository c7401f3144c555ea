"""Deduplication from raw files to one stage folder per source: passes with files between them.

    signatures   per file   32 bytes + 8 per band and document             work/signatures/
    exact        per part   equal texts, sorted by key                     work/exact/
    buckets      per band   equal band keys among the others               work/buckets/
    joined       once       components of candidates                       work/joined/
    sketches     per file   shingles of candidates (files read again)      work/sketches/
    clusters     per chunk  who goes, and for whom                         work/clusters/
    removals     once       one table                                      work/removals/
    lines        per file   only with --lines: counts, then sums           work/lines/, work/repeated/
    filter       per file   documents and rejects                          OUT/<source>/
    report       once       report.json, written last; then work/ goes

Every pass is units with markers (see ``corpus.units``): killed anywhere, it goes on and ends with the same bytes,
whatever the number of workers and tasks.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpt.rundir import DataError, write_atomic
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.corpus.units import Work, read_markers, run_units
from data_tools.dedup import report as reporting
from data_tools.dedup.buckets import BucketPass, ExactPass, JoinExactPass, num_parts
from data_tools.dedup.candidates import JoinBucketsPass, Sketches, SketchPass
from data_tools.dedup.clusters import ClusterPass
from data_tools.dedup.columns import open_array
from data_tools.dedup.filtering import RepeatedLines, UnitFilter
from data_tools.dedup.lines import CountLinesPass, SumLinesPass, num_line_parts
from data_tools.dedup.removals import RemovalPass
from data_tools.dedup.request import (
    FORMAT_VERSION,
    REPORT_NAME,
    WORK_NAME,
    DedupRequest,
    Numbering,
    check_request,
    list_units,
    settle,
)
from data_tools.dedup.signatures import SignaturePass, Signatures, num_columns
from data_tools.folder_lock import hold_folder

PassProgress = Callable[[str, int, int], None]
_POLL_SECONDS = 2.0


class _OthersToDo(Exception):
    """Units of other tasks are missing, and there is no more time to wait for them."""


def dedup(request: DedupRequest, *, progress: PassProgress | None = None) -> dict[str, Any]:
    """The report; {} while other tasks have to go on first. ``progress(pass, done, total)``: bytes or units.

    Raises:
        DataError: bad input, a folder that holds something else, another writer in it.
    """
    check_request(request)
    run = _Run(request, progress or (lambda name, done, total: None))
    finished = request.out / REPORT_NAME
    if finished.is_file():
        shutil.rmtree(run.work, ignore_errors=True)  # where the run that wrote the report was killed just then
        return _read(finished)
    holder = run.work / "tasks" / f"{request.task[0]:05d}-of-{request.task[1]:05d}"
    holder.mkdir(parents=True, exist_ok=True)
    try:
        with hold_folder(holder):
            run.find()
            run.filter()
            return run.finish()
    except _OthersToDo:
        return {}
    except (FileNotFoundError, DataError):
        if not finished.is_file():  # else another task finished, and took the files between the passes away
            raise
        shutil.rmtree(run.work, ignore_errors=True)
        return _read(finished)


class _Run:
    """One task's way through the passes; what a pass needs of earlier ones is read from their markers."""

    def __init__(self, request: DedupRequest, progress: PassProgress) -> None:
        self.request = request
        self.units = list_units(request)
        self.identity = settle(request, self.units)
        self.work = request.out / WORK_NAME
        self.removals = self.work / "removals" / "removals.npy"
        self.facts: dict[str, Any] = {}
        self._progress = progress
        self._deadline = time.monotonic() + 60 * request.wait_minutes

    def find(self) -> None:
        """All passes up to the table of what goes."""
        request, units, banding = self.request, self.units, self.request.banding
        signatures = SignaturePass(units, request.read, banding, request.shingle_size, self.work / "signatures")
        total_bytes = sum(unit.input.size_bytes for unit in units)
        self.markers = self._pass("signatures", len(units), signatures, total_bytes)
        counts = tuple(marker["documents"] for marker in self.markers)
        self.numbering = Numbering.of(counts)
        self.columns = Signatures(self.work / "signatures", counts, num_columns(banding))
        self.num_references = sum(
            count for count, unit in zip(counts, units, strict=True) if request.sources[unit.source].reference
        )
        parts = num_parts(self.numbering.total)
        exact = self.work / "exact"
        self._pass("exact_parts", parts, ExactPass(self.columns, self.numbering, parts, self.work / "exact_parts"))
        self._pass("exact", 1, JoinExactPass(self.work / "exact_parts", parts, exact))
        num_buckets = parts * (banding.bands if banding else 0)
        buckets = BucketPass(self.columns, self.numbering, parts, exact, self.work / "buckets")
        self._pass("buckets", num_buckets, buckets)
        self._find_near(num_buckets, exact, total_bytes)
        if request.lines:
            self._find_lines()

    def _find_near(self, num_buckets: int, exact: Path, total_bytes: int) -> None:
        """Candidates, their sketches, who goes; without ``near`` only the texts of examples are read."""
        request, joined, sketches = self.request, self.work / "joined", self.work / "sketches"
        sources = tuple(unit.source for unit in self.units)
        join = JoinBucketsPass(self.work / "buckets", num_buckets, exact, self.numbering, sources, joined)
        candidates = self._pass("joined", 1, join)[0]
        sketching = SketchPass(
            self.units, request.read, request.shingle_size, self.numbering, joined / "wanted.npy", sketches
        )
        self._pass("sketches", len(self.units), sketching, total_bytes)
        clusters = ClusterPass(
            joined, sketches, self.numbering, request.threshold, self.num_references, self.work / "clusters"
        )
        judged = self._pass("clusters", candidates["chunks"], clusters, candidates["candidates"])
        self.facts |= {
            "candidates": candidates["candidates"],
            "compared_pairs": sum(marker["compared"] for marker in judged),
        }
        removal = RemovalPass(
            self.columns,
            self.numbering,
            exact,
            self.work / "clusters",
            candidates["chunks"],
            self.num_references,
            self.work / "removals",
        )
        self._pass("removals", 1, removal)

    def _find_lines(self) -> None:
        """References are not counted: what repeats there is no reason to cut a line here."""
        rule, units = self.request.lines, self.units
        assert rule is not None
        sources = self.request.sources
        first = next(number for number, unit in enumerate(units) if not sources[unit.source].reference)
        counting = CountLinesPass(
            units, self.request.read, rule, self.numbering, first, self.removals, self.work / "lines"
        )
        num_counted = len(units) - first
        counted = self._pass("lines", num_counted, counting, sum(unit.input.size_bytes for unit in units[first:]))
        self.line_parts = num_line_parts(sum(marker["lines"] for marker in counted))
        summing = SumLinesPass(self.work / "lines", num_counted, self.line_parts, rule, self.work / "repeated")
        summed = self._pass("repeated", self.line_parts, summing)
        self.facts |= {
            key: sum(marker[key] for marker in summed) for key in ("repeated_lines", "repeated_line_occurrences")
        }
        self.line_sums = summed

    def filter(self) -> None:
        """Each source to its stage folder; first this task's part of all, then it waits for the others' parts."""
        stages = self._stages()
        self.stages = {name: self._run_stage(name, stage) for name, stage in stages.items()}
        for name, stage in stages.items():
            while not self.stages[name]:
                self._wait()
                self.stages[name] = self._run_stage(name, stage)

    def _stages(self) -> dict[str, StageRequest]:
        rule = self.request.lines
        lines = RepeatedLines(self.work / "repeated", self.line_parts, rule.min_chars) if rule else None
        names = tuple(source.name for source in self.request.sources)
        fingerprint = hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()
        stages = {}
        for number, source in enumerate(self.request.sources):
            if source.reference:
                continue
            first = next(place for place, unit in enumerate(self.units) if unit.source == number)
            stages[source.name] = StageRequest(
                verb="dedup",
                inputs=source.patterns,
                out=self.request.out / source.name,
                identity={"source": source.name, "request_sha256": fingerprint},
                make_unit_step=UnitFilter(self.units, names, self.numbering, self.removals, first, lines),
                read=self.request.read,
                workers=self.request.workers,
                task=self.request.task,
            )
        return stages

    def _run_stage(self, name: str, stage: StageRequest) -> dict[str, Any]:
        return run_stage(stage, progress=lambda done, total: self._progress(f"filter {name}", done, total))

    def finish(self) -> dict[str, Any]:
        """``report.json`` of all sources; the files between the passes go."""
        file = self.request.out / REPORT_NAME
        write_atomic(file, json.dumps(self._report(), indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(self.work, ignore_errors=True)  # another task may be at it too
        return _read(file)

    def _report(self) -> dict[str, Any]:
        request, units, sources = self.request, self.units, self.request.sources
        table = open_array(self.removals)
        rows = reporting.source_rows(sources, units, self.markers, self.stages)
        for row in rows:
            self._require_all_seen(row)
        banding = request.banding
        return {
            "format_version": FORMAT_VERSION,
            "threshold": request.threshold if banding else None,
            "shingle_size": request.shingle_size if banding else None,
            "bands": [banding.bands, banding.rows] if banding else None,
            "expected_recall_at_threshold": round(banding.recall(request.threshold), 4) if banding else None,
            "sources": rows,
            "matrix": reporting.source_matrix(table, self.numbering, units, sources),
            "cluster_sizes": reporting.cluster_sizes(table),
            "examples": reporting.examples(
                table,
                self.numbering,
                units,
                sources,
                Sketches(self.work / "sketches", self.work / "joined" / "wanted.npy", self.numbering),
            ),
            "repeated_line_examples": self._line_examples(),
            **self.facts,
            "work_bytes": sum(entry.stat().st_size for entry in self.work.rglob("*") if entry.is_file()),
            "warnings": self._warnings(),
        }

    def _require_all_seen(self, row: dict[str, Any]) -> None:
        if row["reference"]:
            return
        stage = self.stages[row["name"]]
        if stage["records"] - row["bad_records"] != row["documents"]:
            raise DataError(
                f"{row['name']}: {row['documents']} documents in the first pass, "
                f"{stage['records'] - row['bad_records']} in the last; the files changed meanwhile; fix: delete "
                f"{self.request.out} and run again"
            )

    def _line_examples(self) -> list[dict[str, Any]]:
        rule = self.request.lines
        if rule is None:
            return []
        written = [unit for unit in self.units if not self.request.sources[unit.source].reference]
        return reporting.line_examples(self.line_sums, written, self.request.read, rule)

    def _warnings(self) -> list[str]:
        seen: dict[str, str] = {}
        warnings = []
        for unit in self.units:
            name = self.request.sources[unit.source].name
            if unit.input.name in seen:
                warnings.append(f"{unit.input.name}: in {seen[unit.input.name]} and in {name}, which loses all of it")
            seen.setdefault(unit.input.name, name)
        return warnings

    def _pass(self, name: str, num_units: int, work: Work, total: int | None = None) -> list[dict[str, Any]]:
        """Do this task's units, then have everybody's; the markers of all."""
        total = num_units if total is None else total
        folder = self.work / name
        run_units(
            folder,
            num_units,
            work,
            workers=self.request.workers,
            task=self.request.task,
            progress=lambda done: self._progress(name, done, total),
        )
        while self.request.task[1] > 1 and _num_done(folder) < num_units:
            self._wait()
        return read_markers(folder, num_units)

    def _wait(self) -> None:
        if time.monotonic() + _POLL_SECONDS > self._deadline:
            raise _OthersToDo
        time.sleep(_POLL_SECONDS)


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _num_done(folder: Path) -> int:
    return sum(1 for file in (folder / "done").iterdir() if file.suffix == ".json")
