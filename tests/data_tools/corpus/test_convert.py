"""Documents keep their text and fields in every format and place, and a conversion goes on with what is missing."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cpt.rundir import DataError
from data_tools.corpus.convert import ConvertRequest, convert
from data_tools.corpus.document import Document
from data_tools.sources import ReadOptions, read_documents, resolve_inputs

RECORDS = [{"text": "one", "id": 1, "url": "a"}, {"text": "zwei\nLinien", "id": 2, "url": "b"}]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return tmp_path


def read_back(pattern: str) -> list[tuple[str, dict[str, object]]]:
    found = [record for entry in resolve_inputs([pattern]) for record in read_documents(entry, ReadOptions())]
    return [(record.text, record.fields) for record in found if isinstance(record, Document)]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("place", ["folder", "memory"])
def test_text_and_fields_come_through(raw: Path, suffix: str, place: str) -> None:
    out = str(raw / "out") if place == "folder" else f"memory://converted{suffix}"
    counts = convert(ConvertRequest((str(raw / "*.jsonl"),), out, suffix))
    assert counts["documents"] == 4 and counts["files"] == 2
    assert read_back(f"{out}/*{suffix}") == 2 * [(r["text"], {"id": r["id"], "url": r["url"]}) for r in RECORDS]
    if place == "memory":
        fsspec.filesystem("memory").rm(out, recursive=True)


def test_files_that_are_there_are_not_made_again(raw: Path) -> None:
    request = ConvertRequest((str(raw / "*.jsonl"),), str(raw / "out"), ".parquet")
    convert(request)
    (raw / "out" / "00001.parquet").unlink()
    before = (raw / "out" / "00000.parquet").stat().st_mtime_ns
    state = json.loads((raw / "out" / "convert.json").read_text())
    del state["done"]["1"]  # killed before the second file was done
    (raw / "out" / "convert.json").write_text(json.dumps(state))
    again = convert(request)
    assert again["already_there"] == 1 and again["documents"] == 4
    assert (raw / "out" / "00000.parquet").stat().st_mtime_ns == before
    assert (raw / "out" / "00001.parquet").is_file()


@pytest.mark.parametrize("change", [{"inputs": "0.jsonl"}, {"read": ReadOptions(text_key="url")}, {"suffix": ".jsonl"}])
def test_the_folder_of_another_conversion_is_refused(raw: Path, change: dict[str, Any]) -> None:
    convert(ConvertRequest((str(raw / "*.jsonl"),), str(raw / "out"), ".parquet"))
    inputs = (str(raw / change.get("inputs", "*.jsonl")),)
    with pytest.raises(DataError, match="output of another command"):
        convert(
            ConvertRequest(
                inputs, str(raw / "out"), change.get("suffix", ".parquet"), change.get("read", ReadOptions())
            )
        )


def test_a_damaged_record_stops_the_conversion_or_is_counted(raw: Path) -> None:
    with (raw / "1.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(DataError, match=r"1\.jsonl:3: .*--bad-records reject"):
        convert(ConvertRequest((str(raw / "*.jsonl"),), str(raw / "out"), ".jsonl"))
    assert not (raw / "out" / "00001.jsonl").exists()
    counts = convert(ConvertRequest((str(raw / "*.jsonl"),), str(raw / "loose"), ".jsonl", bad_records="reject"))
    assert counts["left_out"] == {"bad_record.not_json": 1} and counts["documents"] == 4
