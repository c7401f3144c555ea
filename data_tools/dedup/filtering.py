"""Last pass: one stage folder per source, without the duplicates and without repeated lines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.corpus.document import Document, Reject, Step
from data_tools.dedup.lines import repeated_lines, unit_removals, without_lines
from data_tools.dedup.request import Numbering, Unit
from data_tools.dedup.shingles import Hashes

EXACT = "dedup.exact"
NEAR = "dedup.near"
ONLY_REPEATED_LINES = "dedup.only_repeated_lines"


@dataclass(frozen=True)
class RepeatedLines:
    """Where ``SumLinesPass`` left what to remove."""

    folder: Path
    parts: int
    min_chars: int


@dataclass
class UnitFilter:
    """Makes the step of each unit of one source. ``first_unit``: that source's first among all units."""

    units: tuple[Unit, ...]
    source_names: tuple[str, ...]
    numbering: Numbering
    removals: Path
    first_unit: int
    lines: RepeatedLines | None
    _repeated: Hashes | None = field(default=None, init=False)

    def __call__(self, number: int) -> Step:
        unit = self.first_unit + number
        rows = unit_removals(self.removals, self.numbering, unit)
        places = (rows["document"] - self.numbering.offsets[unit]).tolist()
        partner_units = self.numbering.unit_of(rows["partner"]).tolist()
        place = next_row = 0

        def step(document: Document) -> Reject | None:
            nonlocal place, next_row
            place += 1
            if next_row == len(places) or places[next_row] != place - 1:
                return self._remove_lines(document)
            row, partner = rows[next_row], partner_units[next_row]
            next_row += 1
            return Reject(NEAR if row["near"] else EXACT, self._detail(row, partner))

        return step

    def _detail(self, row: Any, partner_unit: int) -> str:
        unit = self.units[partner_unit]
        origin = f"{unit.input.name}:{row['partner_record'] + 1}"
        return f"{row['similarity']:.3f} like {self.source_names[unit.source]} {origin}"

    def _remove_lines(self, document: Document) -> Reject | None:
        if self.lines is None:
            return None
        if self._repeated is None:
            self._repeated = repeated_lines(self.lines.folder, self.lines.parts)
        rest = without_lines(document.text, self._repeated, self.lines.min_chars)
        if not rest.strip() and document.text.strip():
            return Reject(ONLY_REPEATED_LINES, f"{document.text.count(chr(10)) + 1} lines")
        document.text = rest
        return None
