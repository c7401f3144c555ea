"""What the scan found, counted: per benchmark, per item, per input file; n-grams that are too common to count.

``report.json`` has a summary of all, ``contaminated_items.json`` every item found with the documents that hold it:

    {"mmlu|anatomy_test|20": ["corpora/med_textbook/train.jsonl.zst:17"], ...}

so that an evaluation can report the items that were seen apart from those that were not.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import write_atomic
from data_tools.corpus.units import read_markers
from data_tools.decontaminate.gram_index import GramIndex
from data_tools.decontaminate.scan import read_overlaps

REPORT_NAME = "report.json"
ITEMS_NAME = "contaminated_items.json"
ORIGINS_PER_ITEM = 100
_EXAMPLES = 5
_COMMON_NGRAMS = 10


def common_grams(out: Path, num_units: int, num_grams: int, max_documents: int) -> NDArray[np.int64]:
    """N-grams that more than ``max_documents`` documents hold; 0 stands for no limit."""
    if not max_documents:
        return np.empty(0, np.int64)
    return np.flatnonzero(_documents_of_grams(out, num_units, num_grams) > max_documents)


def _documents_of_grams(out: Path, num_units: int, num_grams: int) -> NDArray[np.int32]:
    counts = np.zeros(num_grams, np.int32)
    for unit in range(num_units):
        for overlap in read_overlaps(out, unit):
            counts[np.unique([gram for _, _, gram in overlap["hits"]])] += 1
    return counts


def write_report(out: Path, num_units: int, index: GramIndex, rules: dict[str, int]) -> dict[str, Any]:
    """Write both files from the finished scan; the report. ``rules``: ``max_documents``, and others to be noted."""
    counts = _documents_of_grams(out, num_units, len(index.hashes))
    counted = counts <= (rules["max_documents"] or counts.max(initial=0))
    tally = _Tally(index, counted)
    scanned = read_markers(out / "scan", num_units)
    for unit, marker in enumerate(scanned):
        for overlap in read_overlaps(out, unit):
            tally.add(marker["input"], overlap)
    report = {
        **rules,
        "documents": sum(marker["documents"] for marker in scanned),
        "overlapping_documents": tally.documents,
        "common_ngrams_ignored": int(np.count_nonzero(~counted)),
        "sets": [tally.set_facts(name) for name in index.sets],
        "most_frequent_ngrams": tally.most_frequent(counts),
    }
    write_atomic(out / REPORT_NAME, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    items = {index.item_keys[item]: origins for item, origins in sorted(tally.origins.items())}
    write_atomic(out / ITEMS_NAME, json.dumps(items, indent=1, ensure_ascii=False) + "\n")
    return report


@dataclass
class _SetTally:
    documents: int = 0
    by_input: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


class _Tally:
    def __init__(self, index: GramIndex, counted: NDArray[np.bool_]) -> None:
        self._index = index
        self._counted = counted
        self.documents = 0
        self.origins: dict[int, list[str]] = defaultdict(list)
        self._sets: dict[str, _SetTally] = {name: _SetTally() for name in index.sets}
        self._texts: dict[int, str] = {}

    def add(self, source: str, overlap: dict[str, Any]) -> None:
        found = np.unique([gram for _, _, gram in overlap["hits"]])
        found = found[self._counted[found]]
        for gram, (_, text, _) in overlap["excerpts"]:
            self._texts.setdefault(gram, text)
        if not len(found):
            return
        self.documents += 1
        items = np.unique(np.concatenate([self._index.owners(gram) for gram in found.tolist()]))
        for item in items.tolist():
            if len(self.origins[item]) < ORIGINS_PER_ITEM:
                self.origins[item].append(overlap["origin"])
        for number in np.unique(self._index.item_sets[items]).tolist():
            tally = self._sets[self._index.sets[number]]
            tally.documents += 1
            tally.by_input[source] += 1
        self._keep_examples(overlap)

    def _keep_examples(self, overlap: dict[str, Any]) -> None:
        for gram, excerpt in overlap["excerpts"]:
            for item in self._index.owners(gram)[:1].tolist() if self._counted[gram] else ():
                tally = self._sets[self._index.sets[self._index.item_sets[item]]]
                if len(tally.examples) < _EXAMPLES:
                    key = self._index.item_keys[item]
                    tally.examples.append({"item": key, "origin": overlap["origin"], "excerpt": excerpt})

    def set_facts(self, name: str) -> dict[str, Any]:
        number = self._index.sets.index(name)
        members = self._index.item_sets == number
        matchable = self._index.items_with_grams()
        found = np.array(sorted(self.origins), np.int64)
        contaminated = int(np.count_nonzero(members[found])) if len(found) else 0
        total = int(np.count_nonzero(members))
        tally = self._sets[name]
        return {
            "name": name,
            "items": total,
            "items_too_short": total - int(np.count_nonzero(members[matchable])),
            "contaminated_items": contaminated,
            "share": contaminated / total if total else 0.0,
            "documents": tally.documents,
            "documents_by_input": dict(tally.by_input.most_common()),
            "examples": tally.examples,
        }

    def most_frequent(self, counts: NDArray[np.int32]) -> list[dict[str, Any]]:
        """Among those whose text was kept: boiler-plate shows here, and can be ignored with --max-documents."""
        shown = sorted(self._texts, key=lambda gram: (-counts[gram], gram))[:_COMMON_NGRAMS]
        return [
            {"documents": int(counts[gram]), "text": self._texts[gram], "counted": bool(self._counted[gram])}
            for gram in shown
        ]
