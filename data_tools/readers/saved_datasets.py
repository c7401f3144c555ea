"""Hugging Face datasets: saved folders (memory-mapped) and hub names, streamed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpt.rundir import DataError
from data_tools.readers.records import (
    HUB_PREFIX,
    Damage,
    Fields,
    Input,
    ReadOptions,
    Record,
    judge,
    no_such_key,
)
from data_tools.readers.tables import batch_records, require_end_mark, require_text_column, require_valid, table_errors

_BATCH_ROWS = 256


def read_saved_dataset(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    import datasets

    with table_errors(source, "saved dataset"):
        for file in _data_files(Path(source.name)):
            with file.open("rb") as stored:
                require_end_mark(stored, str(file))
        try:
            table = datasets.load_from_disk(source.name)
        except Exception as error:  # it trusts its JSON files, so anything may come
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise DataError(f"{source.name}: not a complete saved dataset ({problem}); fix: save it again") from None
        if not isinstance(table, datasets.Dataset):
            raise DataError(f"{source.name}: no saved dataset; fix: name the folder of one split")
        _require_all_rows(table, source)
        require_text_column(table.data.schema, options.text_key, source)
        columns = [options.text_key] if fields == "text" else table.column_names
        view = table.select_columns(columns).with_format("arrow")
        for first in range(start, len(view), _BATCH_ROWS):
            rows = view[first : first + _BATCH_ROWS]
            yield from batch_records(_valid(rows, source), options.text_key, first, start)
            source.done_bytes = source.size_bytes * first // len(view)
    source.done_bytes = source.size_bytes


def _data_files(folder: Path) -> list[Path]:
    """What ``state.json`` names; nothing outside of the folder."""
    try:
        names = [entry["filename"] for entry in json.loads((folder / "state.json").read_bytes())["_data_files"]]
        files = [folder / name for name in names]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / 'state.json'}: damaged ({error!r:.100}); fix: save the dataset again") from None
    for file in files:
        if file.parent != folder or not file.is_file():
            raise DataError(f"{folder / 'state.json'}: names {file}, no file of this folder; fix: save it again")
    return files


def _valid(rows: Any, source: Input) -> Iterator[Any]:
    for batch in rows.to_batches():
        require_valid(batch, source)
        yield batch


def _require_all_rows(table: Any, source: Input) -> None:
    """A data file that was lost together with its entry would otherwise be missed silently."""
    splits = table.info.splits or {}
    expected = splits[str(table.split)].num_examples if str(table.split) in splits else None
    if expected is not None and expected != len(table):
        problem = f"has {len(table)} rows, its dataset_info.json says {expected}"
        raise DataError(f"{source.name}: {problem}; fix: save it again")


def read_hub(source: Input, options: ReadOptions, start: int, fields: Fields) -> Iterator[Record | Damage]:
    import datasets

    name, config, split = parse_hub_name(source.name)
    try:
        stream = datasets.load_dataset(name, config, split=split, streaming=True)
    except ConnectionError as error:
        raise RuntimeError(
            f"{source.name}: the hub cannot be reached ({error}); fix: check the network, or HF_ENDPOINT"
        ) from error
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"{source.name}: {str(error)[:300]}; fix: {HUB_PREFIX}NAME[/CONFIG][:SPLIT]") from None
    if stream.column_names and options.text_key not in stream.column_names:
        raise DataError(f"{source.name}: {no_such_key(options.text_key, stream.column_names)}")
    for number, record in enumerate(stream.skip(start), start + 1):
        yield judge(dict(record), options.text_key, f"row {number}")


def parse_hub_name(address: str) -> tuple[str, str | None, str]:
    """``hf://org/name/config:split`` -> (``org/name``, ``config``, ``split``); the split is ``train`` unless given.

    A name without an organisation takes no config: the hub has none left of that kind that needs one.
    """
    path, _, split = address.removeprefix(HUB_PREFIX).partition(":")
    parts = path.split("/")
    if not all(parts) or len(parts) > 3:
        raise DataError(
            f"{address}: not a hub name; fix: {HUB_PREFIX}NAME[/CONFIG][:SPLIT], e.g. {HUB_PREFIX}org/name:train"
        )
    return "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, split or "train"
