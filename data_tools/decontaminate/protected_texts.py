"""Texts that must not be trained on: items of benchmarks, documents of held-out splits; the index over all of them.

A benchmark item is one record of whatever shape: every string in it counts as a text of its own (question, passage,
each choice), or those under ``fields``. Its key is ``set|file|line``, lines counted from 0. Held out is a split of a
token store or a view, decoded with its tokenizer, or raw documents. Corpora share idiom and boiler-plate, so that an
overlap with a held-out document is told by a longer n-gram, and a shorter document counts from ``ngram`` words on.
Refused: a benchmark file that cannot be read to its end, fields that no item has, another tokenizer than the store's.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from cpt.data.store_selection import Split, open_split
from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord
from data_tools.decontaminate.gram_index import GramIndex, GramRule, IndexBuilder
from data_tools.readers.remote import is_url
from data_tools.readers.streams import file_chunks, open_input, split_lines
from data_tools.readers.tables import table_errors
from data_tools.sources import Input, ReadOptions, read_documents, resolve_inputs
from data_tools.store_texts import is_split, split_texts

HELDOUT_NGRAMS = 8_000_000  # of one held-out split, 24 bytes each; of a larger split a sample, chosen by hash
_NAMED = re.compile(r"([\w.:-]+)=(.+)", re.DOTALL)
_BYTES_PER_WORD = 6
_COMPRESSION = 4
_ROWS = 256


@dataclass(frozen=True)
class Protected:
    """``against``, ``heldout``: ``NAME=PATH`` or ``PATH``, globs too; ``fields``: of benchmark items, all if none."""

    against: tuple[str, ...] = ()
    heldout: tuple[str, ...] = ()
    tokenizer: Path | None = None
    fields: tuple[str, ...] = ()
    ngram: int = 13
    heldout_ngram: int = 50
    read: ReadOptions = field(default_factory=ReadOptions)

    def identity(self) -> dict[str, Any]:
        """All that decides the index; files count with their sizes."""
        rules = {"fields": list(self.fields), "ngram": self.ngram, "heldout_ngram": self.heldout_ngram}
        return {
            "against": [[name, entry.name, entry.size_bytes] for name, entry in self._benchmark_files()],
            "heldout": [[name, path, content] for name, path, content in self._heldout_contents()],
            **rules,
        }

    def build_index(self) -> GramIndex:
        """Raises DataError: nothing to protect, files that cannot be read, no text that is long enough."""
        if not self.against and not self.heldout:
            raise DataError("nothing to look for; fix: --against 'NAME=items/*.jsonl', or --heldout stores/x/heldout")
        if self.ngram < 2 or self.heldout_ngram < self.ngram:
            raise DataError(
                f"--ngram is {self.ngram}, --heldout-ngram {self.heldout_ngram}; it must be 2 <= ngram <= heldout-ngram"
            )
        words, characters = (max(2, round(self.ngram * share / 13)) for share in (8, 24))
        builder = IndexBuilder(shortest_words=words, shortest_characters=characters)
        rule = GramRule((words, self.ngram), (characters, characters))
        for name, source in self._benchmark_files():
            self._add_benchmark(builder, name, source, rule)
        for name, path in self._heldout_paths():
            self._add_heldout(builder, name, path)
        index = builder.build()
        if not len(index.hashes):
            raise DataError(
                f"no text of {', '.join(index.sets) or 'the given files'} has {words} words; fix: check the files and "
                "--field, or a smaller --ngram"
            )
        return index

    def _benchmark_files(self) -> Iterator[tuple[str, Input]]:
        files: dict[tuple[str, str], str] = {}
        for given, pattern in map(_split_name, self.against):
            for source in resolve_inputs([pattern]):
                name = given or Path(source.name).parent.name
                other = files.setdefault((name, _stem(source)), source.name)
                if other != source.name:
                    raise DataError(
                        f"{source.name}: its items would be named as those of {other}; fix: NAME=FILES with a name for "
                        "each"
                    )
                yield name, source

    def _heldout_paths(self) -> list[tuple[str, str]]:
        named = [_split_name(given) for given in self.heldout]
        return [(name or "/".join(Path(path).absolute().parts[-2:]), path) for name, path in named]

    def _heldout_contents(self) -> Iterator[tuple[str, str, Any]]:
        for name, path in self._heldout_paths():
            if is_split(Path(path)):
                yield name, path, open_split(Path(path)).manifest.content_hash
            else:
                yield name, path, [entry.size_bytes for entry in resolve_inputs([path])]

    def _add_benchmark(self, builder: IndexBuilder, name: str, source: Input, rule: GramRule) -> None:
        stem = _stem(source)
        seen: set[str] = set()
        for number, record in read_records(source):
            if self.fields and isinstance(record, dict):
                seen |= record.keys()
                record = [record[key] for key in self.fields if key in record]
            builder.add(name, f"{name}|{stem}|{number}", list(strings_of(record)), rule)
        if self.fields and not seen & set(self.fields):
            raise DataError(f"{source.name}: no item has {', '.join(self.fields)}, there is {', '.join(sorted(seen))}; "
                            "fix: --field with names of these")  # fmt: skip

    def _add_heldout(self, builder: IndexBuilder, name: str, path: str) -> None:
        n, ratio = self.heldout_ngram, 24 / 13
        lengths = (self.ngram, n), (round(self.ngram * ratio), round(n * ratio))
        if is_split(Path(path)):
            store = open_split(Path(path))
            every = _every(store.manifest.utf8_bytes)
            for number, text in enumerate(self._store_texts(store)):
                builder.add(name, f"{name}|store|{number}", [text], GramRule(*lengths, every))
            return
        sources = resolve_inputs([path])
        every = _every(sum(e.size_bytes * (_COMPRESSION if e.kind.endswith((".gz", ".zst")) else 1) for e in sources))
        for source in sources:
            stem = _stem(source)
            for number, document in enumerate(read_documents(source, self.read)):
                if not isinstance(document, BadRecord):
                    builder.add(name, f"{name}|{stem}|{number}", [document.text], GramRule(*lengths, every))

    def _store_texts(self, store: Split) -> Iterator[str]:
        if self.tokenizer is None:
            raise DataError(f"{store.path}: holds tokens, not text; fix: --tokenizer with the one it was made with")
        return split_texts(store, self.tokenizer)


def read_records(source: Input) -> Iterator[tuple[int, Any]]:
    """Every record of a .jsonl or .parquet file as (line or row from 0, Python value); blank lines are passed over.

    Raises:
        DataError: another kind of file, a line that is no JSON, a damaged file.
    """
    if source.kind == ".parquet":
        yield from enumerate(_parquet_rows(source))
        return
    if not source.kind.startswith(".jsonl"):
        raise DataError(f"{source.name}: benchmark items are read from .jsonl and .parquet; fix: convert it")
    for number, line in enumerate(split_lines(file_chunks(source))):
        if isinstance(line, bytes) and not line.strip():
            continue
        try:
            yield number, orjson.loads(line if number else line.removeprefix(b"\xef\xbb\xbf"))  # type: ignore[arg-type, union-attr]
        except (orjson.JSONDecodeError, AttributeError) as error:
            raise DataError(f"{source.name}: line {number + 1}: not JSON ({error}); fix: one item per line") from None


def _parquet_rows(source: Input) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with (
        open_input(source) as stored,
        table_errors(source, "parquet"),
        pq.ParquetFile(stored if is_url(source.name) else source.name) as file,
    ):
        for batch in file.iter_batches(_ROWS):
            yield from batch.to_pylist()


def strings_of(value: Any) -> Iterator[str]:
    """All strings in a JSON value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for part in inner:
            yield from strings_of(part)


def _split_name(given: str) -> tuple[str, str]:
    """``mmlu=evals/*.jsonl`` -> (``mmlu``, ``evals/*.jsonl``); without a name ("", path)."""
    named = _NAMED.fullmatch(given)
    return (named[1], named[2]) if named else ("", given)


def _stem(source: Input) -> str:
    return Path(source.name).name.removesuffix(source.kind)


def _every(text_bytes: int) -> int:
    return max(1, math.ceil(text_bytes / _BYTES_PER_WORD / HELDOUT_NGRAMS))
