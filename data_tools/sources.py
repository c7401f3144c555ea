"""Raw corpora as streams of records: JSON lines, tables, plain text, web archives, saved and hub datasets, stages.

A *record* is a line, a row, a page or a blank-line separated piece. Readers answer "the records from number n on", so a
position in the input is (input index, record number) and a killed job can go on anywhere. Memory is bounded by the
longest record, never by the file; records longer than 1 GiB are refused.

``read_texts`` stops at the first record that is damaged, naming file and line or row, and yields "" where a record
holds no text (null, blank); the caller counts those. ``read_documents`` yields every record, the unusable ones as
``BadRecord`` with a named reason. Both see the same records through the same readers. Truncated and damaged *files* are
refused by both.
"""

import difflib
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.readers.json_lines import read_json_lines
from data_tools.readers.plain_text import read_txt
from data_tools.readers.records import HUB_PREFIX, Damage, Input, Reader, ReadOptions
from data_tools.readers.remote import expand_url, is_url, local_name, url_size
from data_tools.readers.saved_datasets import parse_hub_name, read_hub, read_saved_dataset
from data_tools.readers.tables import read_arrow, read_parquet
from data_tools.readers.web_archives import read_web_archive

__all__ = ["Input", "ReadOptions", "parse_hub_name", "read_documents", "read_texts", "resolve_inputs"]

STAGE_NAME = "stage.json"
SUMMARY_NAME = "summary.json"


def resolve_inputs(patterns: Sequence[str]) -> list[Input]:
    """Inputs in the order given, globs expanded and sorted, a stage's output folder as the files in it.

    Raises:
        DataError: a missing file, a glob that matches nothing, an unknown suffix, the same file twice, an unfinished
            stage.
        RuntimeError: a URL whose driver is not installed, or a server that cannot be reached.
    """
    names = itertools.chain.from_iterable(_expand(pattern) for pattern in patterns)
    inputs = [_describe(file) for name in names for file in _stage_files(name)]
    if not inputs:
        raise DataError("no input given; fix: name files, e.g. --input 'corpus/*.jsonl.zst'")
    seen: dict[str, str] = {}
    for entry in inputs:
        file = entry.name if is_url(entry.name) or entry.kind == HUB_PREFIX else str(Path(entry.name).resolve())
        if file in seen:
            other = "" if seen[file] == entry.name else f", once as {seen[file]}"
            raise DataError(f"{entry.name}: given twice{other}, its documents would count double; fix: name it once")
        seen[file] = entry.name
    return inputs


def _expand(pattern: str) -> list[str]:
    if is_url(pattern):
        return _require_matches(pattern, expand_url(pattern))
    pattern = local_name(pattern)
    if pattern.startswith(HUB_PREFIX) or Path(pattern).exists():
        return [pattern]
    if not glob.has_magic(pattern):
        folder = Path(pattern).parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        nearest = difflib.get_close_matches(Path(pattern).name, names, 1)
        hint = f"did you mean {folder / nearest[0]}?" if nearest else f"folder {folder} holds {len(names)} entries"
        raise DataError(f"{pattern}: no such file; {hint}")
    return _require_matches(pattern, sorted(glob.glob(pattern, recursive=True)))


def _require_matches(pattern: str, matches: list[str]) -> list[str]:
    if not matches:
        raise DataError(f"{pattern}: the pattern matches no file; fix: check the folder and the suffix")
    return matches


def _stage_files(name: str) -> list[str]:
    """The documents of a finished stage; anything else is itself."""
    folder = Path(name)
    if is_url(name) or name.startswith(HUB_PREFIX) or not (folder / STAGE_NAME).is_file():
        return [name]
    if not (folder / SUMMARY_NAME).is_file():
        raise DataError(
            f"{name}: an unfinished stage, it has no {SUMMARY_NAME}; fix: run the command that writes it again, "
            "it continues (or its remaining --task i/n)"
        )
    files = sorted(str(file) for file in (folder / "documents").glob("*.jsonl.zst"))
    if not files:
        raise DataError(f"{name}: a stage without files in documents/; fix: delete the folder and run the stage again")
    return files


def _describe(name: str) -> Input:
    if name.startswith(HUB_PREFIX):
        return Input(name, HUB_PREFIX)
    if is_url(name):
        return Input(name, _kind(name), url_size(name))
    path = Path(name).absolute()
    if path.is_dir():
        return _describe_folder(path, name)
    return Input(str(path), _kind(str(path)), path.stat().st_size)


def _kind(name: str) -> str:
    for suffix in READERS:
        if suffix.startswith(".") and name.endswith(suffix):
            return suffix
    known = ", ".join(suffix for suffix in READERS if suffix.startswith("."))
    raise DataError(
        f"{name}: unknown suffix; known are {known}, saved dataset folders, folders of stages, URLs and "
        f"{HUB_PREFIX}NAME[/CONFIG][:SPLIT]"
    )


def _describe_folder(path: Path, name: str) -> Input:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(child.name for child in path.iterdir() if child.is_dir())
        hint = f"name one, e.g. {path / splits[0]}" if splits else "save it again"
        raise DataError(f"{name}: a saved dataset with the splits {splits}; fix: {hint}")
    if not (path / "state.json").is_file():
        if (path.parent / STAGE_NAME).is_file():
            raise DataError(f"{name}: a folder inside of a stage's; fix: name the stage's own, {path.parent}")
        raise DataError(f"{name}: a folder but no saved Hugging Face dataset; fix: name its files, e.g. {name}/*.jsonl")
    return Input(str(path), "folder", sum(file.stat().st_size for file in path.glob("*.arrow")))


def read_texts(source: Input, options: ReadOptions, *, start: int = 0) -> Iterator[str]:
    """The texts of all records from number ``start`` on; "" stands for a record without text.

    Raises:
        DataError: the input is damaged or has no such text; names the file and the line or row (counted from 1).
    """
    key = options.text_key
    for record in READERS[source.kind](source, options, start, "text"):
        if not isinstance(record, Damage):
            yield record[key]
        elif record.absent:
            yield ""
        else:
            raise DataError(f"{source.name}: {record.place}: {record.detail}")


def read_documents(source: Input, options: ReadOptions, *, start: int = 0) -> Iterator[Document | BadRecord]:
    """One item per record from number ``start`` on: what ``read_texts`` would refuse or skip comes as ``BadRecord``.

    Raises:
        DataError: the file itself is truncated or damaged.
    """
    key = options.text_key
    name = os.fsencode(source.name).decode("utf-8", "backslashreplace")  # names of files may be any bytes, origins not
    for number, record in enumerate(READERS[source.kind](source, options, start, "all"), start + 1):
        origin = f"{name}:{number}"
        if isinstance(record, Damage):
            yield BadRecord(record.raw, record.reason, record.detail, origin)
        else:
            yield Document(record.pop(key), record, origin)


READERS: dict[str, Reader] = {
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".jsonl.zst": read_json_lines,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".txt": read_txt,
    ".warc": read_web_archive,
    ".warc.gz": read_web_archive,
    ".wet": read_web_archive,
    ".wet.gz": read_web_archive,
    "folder": read_saved_dataset,
    HUB_PREFIX: read_hub,
}
