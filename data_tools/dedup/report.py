"""What a deduplication found: counts per source, source x source, cluster sizes, pairs to look at."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_tools.dedup.candidates import EXCERPT_BYTES, Sketches, choose_examples
from data_tools.dedup.filtering import EXACT, NEAR, ONLY_REPEATED_LINES
from data_tools.dedup.lines import hash_lines
from data_tools.dedup.request import LineRule, Numbering, Source, Unit, read_unit
from data_tools.sources import ReadOptions

_REASONS = (EXACT, NEAR, ONLY_REPEATED_LINES)
_SHOWN_EXAMPLES = 6
_EXCERPT = 70
_SHOWN_LINES = 5
_SEARCHED_FILES = 16
_SEARCHED_DOCUMENTS = 2000


def source_rows(
    sources: Sequence[Source], units: Sequence[Unit], markers: Sequence[Mapping[str, Any]], stages: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Documents and bytes read, removed by reason, and kept; a reference has only what was read."""
    rows = []
    for number, source in enumerate(sources):
        own = [marker for unit, marker in zip(units, markers, strict=True) if unit.source == number]
        row: dict[str, Any] = {"name": source.name, "reference": source.reference, "files": len(own)}
        row |= {key: sum(marker[key] for marker in own) for key in ("documents", "bytes")}
        if not source.reference:
            row |= _outcome(stages[source.name])
        rows.append(row)
    return rows


def _outcome(stage: Mapping[str, Any]) -> dict[str, Any]:
    reasons = stage["reasons"]
    removed = {
        reason: {"documents": entry["documents"], "bytes": entry["bytes"]}
        for reason in _REASONS
        if (entry := reasons.get(reason, {"documents": 0, "bytes": 0}))
    }
    dropped = sum(entry["bytes"] for entry in reasons.values())
    return {
        "bad_records": sum(e["documents"] for reason, e in reasons.items() if reason.startswith("bad_record.")),
        "removed": removed,
        "removed_line_bytes": stage["bytes_read"] - dropped - stage["bytes_kept"],
        "kept_documents": stage["documents"],
        "kept_bytes": stage["bytes_kept"],
    }


def source_matrix(
    table: NDArray[Any], numbering: Numbering, units: Sequence[Unit], sources: Sequence[Source]
) -> list[dict[str, Any]]:
    """For each pair of sources with duplicates: what went from one for what stays in the other."""
    of_unit = np.array([unit.source for unit in units])
    kept, removed = of_unit[numbering.unit_of(table["partner"])], of_unit[numbering.unit_of(table["document"])]
    cells = kept * len(sources) + removed
    rows = []
    for cell in np.unique(cells).tolist():
        mine = table[cells == cell]
        rows.append(
            {
                "kept": sources[cell // len(sources)].name,
                "removed": sources[cell % len(sources)].name,
                "exact": int((~mine["near"]).sum()),
                "near": int(mine["near"].sum()),
                "bytes": int(mine["text_bytes"].sum()),
            }
        )
    return rows


def cluster_sizes(table: NDArray[Any]) -> dict[str, int]:
    """How many kept documents stand for 2, 3-4, 5-8, ... documents, themselves among them."""
    sizes = np.unique(table["partner"], return_counts=True)[1] + 1
    powers, counts = np.unique(np.ceil(np.log2(sizes)).astype(int), return_counts=True)
    names = [str(2**power) if power == 1 else f"{2 ** (power - 1) + 1}-{2**power}" for power in powers.tolist()]
    return dict(zip(names, counts.tolist(), strict=True))


def examples(
    table: NDArray[Any], numbering: Numbering, units: Sequence[Unit], sources: Sequence[Source], sketches: Sketches
) -> list[dict[str, Any]]:
    """A few pairs for every pair of sources and kind, with how both texts begin; among those that were read again."""
    found = []
    unit_sources = tuple(unit.source for unit in units)
    readable = table[sketches.has(table["document"]) & sketches.has(table["partner"])]
    for near in (False, True):
        rows = readable[readable["near"] == near]
        for row in rows[choose_examples(rows["document"], rows["partner"], numbering, unit_sources)]:
            pair: dict[str, Any] = {
                "kind": "near" if near else "exact",
                "similarity": round(float(row["similarity"]), 4),
            }
            for side, document in (("kept", int(row["partner"])), ("removed", int(row["document"]))):
                unit = units[int(numbering.unit_of(np.array([document]))[0])]
                excerpt = sketches.excerpt(document)
                pair[side] = {"source": sources[unit.source].name, "file": unit.input.name, "excerpt": excerpt}
            pair["kept"]["record"] = int(row["partner_record"]) + 1
            found.append(pair)
    return found


def line_examples(
    markers: Sequence[Mapping[str, Any]], units: Sequence[Unit], read: ReadOptions, rule: LineRule
) -> list[dict[str, Any]]:
    """The most frequent repeated lines that turn up among the first documents of some files, with their counts."""
    counts = {int(value): count for marker in markers for value, count in marker["most_frequent"]}
    found: dict[int, str] = {}
    for unit in units[:_SEARCHED_FILES]:
        for _, document in itertools.islice(read_unit(unit, read), _SEARCHED_DOCUMENTS):
            lines = document.text.split("\n")
            for value, line in zip(hash_lines(lines, rule.min_chars).tolist(), lines, strict=True):
                if value in counts:
                    found.setdefault(value, line.strip())
    most = sorted(found, key=lambda value: (-counts[value], value))[:_SHOWN_LINES]
    return [{"count": counts[value], "text": found[value][:EXCERPT_BYTES]} for value in most]


def render_report(report: Mapping[str, Any]) -> RenderableType:
    """The report as tables; {} stands for a deduplication that other tasks have to go on with."""
    if not report:
        return Text("this task has done its part; the same command again when the other tasks are as far")
    parts: list[RenderableType] = [_source_table(report), _matrix_table(report)]
    sizes = ", ".join(f"{name}: {count:,}" for name, count in report["cluster_sizes"].items())
    parts.append(Text(f"documents that one stands for: {sizes or 'no duplicates'}"))
    parts += [_example(pair) for pair in _one_of_each(report["examples"])[:_SHOWN_EXAMPLES]]
    parts += [Text(f"{line['count']:,} x {line['text'][:_EXCERPT]}") for line in report["repeated_line_examples"]]
    parts += [Text(f"warning: {warning}") for warning in report["warnings"]]
    return Group(*parts)


def _source_table(report: Mapping[str, Any]) -> Table:
    reasons = [reason for reason in _REASONS if reason != ONLY_REPEATED_LINES or report["repeated_line_examples"]]
    names = (reason.removeprefix("dedup.").replace("_", " ") for reason in reasons)
    table = Table(
        "source", "documents", "text", *names, "kept", "text kept", title="deduplicated", title_justify="left"
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for row in report["sources"]:
        read = [row["name"], f"{row['documents']:,}", _megabytes(row["bytes"])]
        if row["reference"]:
            table.add_row(*read, *("" for _ in reasons), "reference", "")
            continue
        removed = [f"{row['removed'][reason]['documents']:,}" for reason in reasons]
        table.add_row(*read, *removed, f"{row['kept_documents']:,}", _megabytes(row["kept_bytes"]))
    return table


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _matrix_table(report: Mapping[str, Any]) -> Table:
    names = [row["name"] for row in report["sources"]]
    removed = [row["name"] for row in report["sources"] if not row["reference"]]
    table = Table("stays in", *(f"goes from {name}" for name in removed), title_justify="left",
                  title="duplicates between sources")  # fmt: skip
    cells = {(row["kept"], row["removed"]): row for row in report["matrix"]}
    for name in names:
        found = [cells.get((name, other)) for other in removed]
        table.add_row(
            name, *(f"{cell['exact'] + cell['near']:,} ({_megabytes(cell['bytes'])})" if cell else "" for cell in found)
        )
    return table


def _one_of_each(pairs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The first pair for every kind and pair of sources; near ones first, they are what to look at."""
    firsts: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for pair in sorted(pairs, key=lambda pair: str(pair["kind"]), reverse=True):
        firsts.setdefault((pair["kind"], pair["kept"]["source"], pair["removed"]["source"]), pair)
    return list(firsts.values())


def _example(pair: Mapping[str, Any]) -> Text:
    text = Text(f"{pair['kind']} {pair['similarity']:.2f}")
    for side in ("kept", "removed"):
        excerpt = " ".join(pair[side]["excerpt"].split())[:_EXCERPT]
        text.append(f"\n  {side:7} {pair[side]['source']}: {excerpt}")
    return text
