"""What raw files or a stage's folder hold, seen in the first documents of each file; constant memory, no full read.

Beyond ``MOST_FILES`` files, as many of them are opened, evenly spaced. The first documents of a file are not a random
sample of it: where files are sorted inside, look at more (`--sample-documents`).
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.encoders import load_counter
from data_tools.look.lengths import length_facts, percentiles
from data_tools.look.store_facts import Look
from data_tools.look.text_tally import TextTally, language_rule
from data_tools.readers.records import HUB_PREFIX
from data_tools.readers.remote import is_url
from data_tools.sources import READERS, STAGE_NAME, SUMMARY_NAME, Input, ReadOptions, read_documents, resolve_inputs

MOST_FILES = 64
_SHOWN_CHARACTERS = 800
_MOST_VALUES = 1000  # different values of a field; one with more is an id, not a source
_MOST_FIELDS = 50
_TOP_VALUES = 10
_LONGEST_VALUE = 80
_FILES_SHOWN = 20


def is_remote(name: str) -> bool:
    """A URL or a name of the hub: no path."""
    return is_url(name) or name.startswith(HUB_PREFIX)


def raw_facts(name: str, look: Look) -> dict[str, Any]:
    """``name``: a file, a folder, a pattern, a URL or a name of the hub.

    Raises:
        DataError: nothing readable there, an unfinished stage, damaged files.
    """
    inputs = resolve_inputs([name] if is_remote(name) else _patterns(Path(name)))
    per_file = _PerFile(inputs, look.sample)
    gathered = _Gathered(look)
    for source, document in per_file.documents(ReadOptions(text_key=look.text_key)):
        gathered.add(source, document)
    stage = None if is_remote(name) else _stage_summary(Path(name))
    return {
        "kind": "stage" if stage else "files",
        "label": "/".join(name.split("/")[-2:] if is_remote(name) else Path(name).absolute().parts[-2:]),
        "path": name,
        "num_files": len(inputs),
        "stored_bytes": sum(entry.size_bytes for entry in inputs),
        **({"stage": stage} if stage else {}),
        **gathered.facts(),
        "sample": {
            "documents": gathered.tally.documents,
            "of": gathered.tally.documents if per_file.complete else None,
            "how": "all of them" if per_file.complete else f"the first of each of {len(per_file.chosen)} file(s)",
            "shortened": gathered.tally.shortened,
        },
    }


def _patterns(path: Path) -> list[str]:
    """A plain folder stands for the readable files in it."""
    if path.is_dir() and not (path / STAGE_NAME).is_file() and not (path / "state.json").is_file():
        names = [str(file) for file in sorted(path.iterdir()) if file.name.endswith(tuple(filter(_is_suffix, READERS)))]
        if not names:
            raise DataError(f"{path}: no manifest.json there, no stage.json and no file of a known kind; fix: check it")
        return names
    return [str(path)]


def _is_suffix(kind: str) -> bool:
    return kind.startswith(".")


def _stage_summary(path: Path) -> dict[str, Any] | None:
    """What a stage says of itself, without its examples."""
    if not (path / STAGE_NAME).is_file():
        return None
    summary = json.loads((path / SUMMARY_NAME).read_text(encoding="utf-8"))
    reasons = {reason: entry["documents"] for reason, entry in summary["reasons"].items()}
    return {key: summary[key] for key in ("verb", "records", "documents", "bytes_read", "bytes_kept")} | {
        "reasons": reasons
    }


class _PerFile:
    def __init__(self, inputs: list[Input], sample: int) -> None:
        at = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), MOST_FILES)).astype(int))
        self.chosen = [inputs[number] for number in at.tolist()]
        self.complete = len(self.chosen) == len(inputs)
        self._each = -(-sample // len(self.chosen)) if sample else 0

    def documents(self, read: ReadOptions) -> Iterator[tuple[Input, Document | BadRecord]]:
        for source in self.chosen:
            records = read_documents(source, read)
            for document in itertools.islice(records, self._each):
                yield source, document
            self.complete &= next(records, None) is None


class _Gathered:
    def __init__(self, look: Look) -> None:
        self._look = look
        self._rule, identify = language_rule()
        self.tally = TextTally(identify)
        self._count_tokens = load_counter(look.tokenizer) if look.tokenizer is not None else None
        self._tokens = self._bad = 0
        self._lengths: list[int] = []
        self._files: Counter[str] = Counter()
        self._fields: dict[str, Counter[str]] = {}
        self._too_many: set[str] = set()
        self._first: list[dict[str, Any]] = []

    def add(self, source: Input, document: Document | BadRecord) -> None:
        if isinstance(document, BadRecord):
            self._bad += 1
            return
        counted = self.tally.add(document.text)
        if self._count_tokens:
            self._tokens += self._count_tokens(counted)
        self._lengths.append(len(document.text))
        self._files[source.name] += 1
        self._count_fields(document)
        if len(self._first) < self._look.num_documents:
            text = document.text[:_SHOWN_CHARACTERS]
            self._first.append({"origin": document.origin, "characters": len(document.text), "text": text})

    def _count_fields(self, document: Document) -> None:
        for name, value in document.fields.items():
            if isinstance(value, str | int | bool) and len(str(value)) <= _LONGEST_VALUE and name not in self._too_many:
                if name not in self._fields and len(self._fields) == _MOST_FIELDS:
                    continue
                counts = self._fields.setdefault(name, Counter())
                counts[str(value)] += 1
                if len(counts) > _MOST_VALUES:
                    del self._fields[name]
                    self._too_many.add(name)

    def facts(self) -> dict[str, Any]:
        tally, lengths = self.tally, np.array(self._lengths, np.int64)
        fields = {name: counts.most_common(_TOP_VALUES) for name, counts in self._fields.items()
                  if len(counts) <= max(1, tally.documents // 2)}  # fmt: skip
        return {
            "bad_records": self._bad,
            "lengths": length_facts(lengths, "characters", None),
            "document_characters": percentiles(lengths),
            **tally.facts(),
            "language_rule": self._rule,
            "tokens_per_word": round(self._tokens / tally.words, 4) if self._tokens and tally.words else None,
            "characters_per_token": round(tally.characters / self._tokens, 4) if self._tokens else None,
            "bytes_per_token": round(tally.utf8_bytes / self._tokens, 4) if self._tokens else None,
            "files": [[name, count] for name, count in self._files.most_common(_FILES_SHOWN)],
            "fields": {name: [[value, count] for value, count in top] for name, top in fields.items()},
            "first_documents": self._first,
        }
