"""Every raw format gives the same three documents; every kind of damage names the file and the place."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cpt.rundir import DataError
from data_tools.sources import ReadOptions, parse_hub_name, read_texts, resolve_inputs

TEXTS = ["first\nwith two lines", "zweites äöü 😀", "third"]


def jsonl(texts: list[str] = TEXTS) -> bytes:
    return b"".join(json.dumps({"id": i, "text": text}).encode() + b"\n" for i, text in enumerate(texts))


def save_dataset(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2]}).save_to_disk(str(path))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(jsonl()),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl()[:30]) + gzip.compress(jsonl()[30:])),
    "a.jsonl.zst": lambda path: path.write_bytes(zstandard.compress(jsonl()[:30]) + zstandard.compress(jsonl()[30:])),
    "a.parquet": lambda path: pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), path, row_group_size=2),
    "a.txt": lambda path: path.write_text("\n\n".join(["first\nwith two lines", *TEXTS[1:]]) + "\n"),
    "saved": save_dataset,
}


def read(path: Path | str, *, start: int = 0, **options: str) -> list[str]:
    [source] = resolve_inputs([str(path)])
    texts = list(read_texts(source, ReadOptions(**options), start=start))  # type: ignore[arg-type]
    assert source.done_bytes == source.size_bytes
    return texts


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_three_documents_come_back_from_any_record_on(tmp_path: Path, name: str, start: int) -> None:
    WRITERS[name](tmp_path / name)
    assert read(tmp_path / name, start=start, txt_documents="blank-line") == TEXTS[start:]


def test_a_text_file_is_one_document_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    assert read(tmp_path / "a.txt") == ["one\n\ntwo\n"]
    assert read(tmp_path / "a.txt", start=1) == []


def test_a_hub_name_is_read_through_datasets_streaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a relative folder has the form of a hub name and needs no network
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "train.jsonl").write_bytes(jsonl())
    assert read("hf://org/name") == TEXTS
    assert read("hf://org/name:train", start=2) == TEXTS[2:]
    with pytest.raises(DataError, match="no text under 'body', there is id, text"):
        read("hf://org/name", text_key="body")


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("hf://wikitext", ("wikitext", None, "train")),
        ("hf://org/name:validation", ("org/name", None, "validation")),
        ("hf://org/name/config:test", ("org/name", "config", "test")),
    ],
)
def test_hub_addresses_have_three_parts(address: str, parsed: tuple[str, str | None, str]) -> None:
    assert parse_hub_name(address) == parsed


def test_a_hub_address_with_an_empty_part_is_refused() -> None:
    with pytest.raises(DataError, match="hf://org//x: not a hub name"):
        parse_hub_name("hf://org//x")


def test_records_without_text_are_empty_strings(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n{"text": null}\n{"text": ""}\n{"text": "b"}')
    assert read(tmp_path / "a.jsonl") == ["a", "", "", "", "b"]
    pq.write_table(pa.table({"text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ["a", "", "b"]


def test_a_line_longer_than_the_read_buffer_is_one_document(tmp_path: Path) -> None:
    text = "wörd " * 300_000
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(jsonl([text, "end"])))
    assert read(tmp_path / "a.jsonl.zst") == [text, "end"]


def test_globs_are_sorted_and_a_file_may_not_come_twice(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        (tmp_path / name).write_bytes(jsonl())
    found = resolve_inputs([f"{tmp_path}/c.txt", f"{tmp_path}/*.jsonl"])
    assert [Path(entry.name).name for entry in found] == ["c.txt", "a.jsonl", "b.jsonl"]
    with pytest.raises(DataError, match=r"a.jsonl: given twice"):
        resolve_inputs([f"{tmp_path}/a.jsonl", f"{tmp_path}/*.jsonl"])


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def parquet_bytes(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def invalid_utf8_parquet() -> bytes:
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")]
    )
    return parquet_bytes(pa.table({"text": bad}))


LONG = jsonl([f"text number {i * 7919 % 10007}" for i in range(500)])
BAD_FILES: list[tuple[str, bytes, str]] = [
    ("x.jsonl", jsonl() + b'{"text": "\xff"}\n', r"x.jsonl: line 4: invalid UTF-8 \(b'\\xff'"),
    ("x.txt", b"one\ntwo \xe4\n", r"x.txt: line 2: invalid UTF-8"),
    ("x.jsonl", jsonl() + b'{"text": "cut', r"x.jsonl: line 4: not JSON"),
    ("x.jsonl", jsonl() + b'{"text": "\\ud800"}', r"x.jsonl: line 4: not JSON"),
    ("x.jsonl", b"[1]\n", r"line 1: a JSON list, not an object"),
    ("x.jsonl", b'"text"\n', r"line 1: a JSON str, not an object"),
    (
        "x.jsonl",
        jsonl() + b'{"texts": "a", "url": "b"}\n',
        r"line 4: no text under 'text', there is texts, url; did you mean",
    ),
    ("x.jsonl", jsonl() + b'{"text": 5}\n', r"line 4: 'text' is 5, a int; fix: text must be a string"),
    ("x.jsonl.zst", truncated(zstandard.compress(LONG)), r"x.jsonl.zst: truncated"),
    ("x.jsonl.gz", truncated(gzip.compress(LONG)), r"x.jsonl.gz: truncated"),
    ("x.jsonl.zst", b"", r"x.jsonl.zst: truncated"),
    ("x.jsonl.zst", b"no zstd at all", r"x.jsonl.zst: damaged near byte 14"),
    ("x.jsonl.gz", b"no gzip at all", r"x.jsonl.gz: damaged near byte 14"),
    ("x.parquet", truncated(parquet_bytes(pa.table({"text": TEXTS}))), r"x.parquet: truncated or damaged parquet"),
    (
        "x.parquet",
        parquet_bytes(pa.table({"txt": TEXTS, "n": [1, 2, 3]})),
        r"there is n, txt; did you mean --text-key txt\?",
    ),
    ("x.parquet", parquet_bytes(pa.table({"text": [1, 2]})), r"x.parquet: column 'text' holds int64, not text"),
    ("x.parquet", invalid_utf8_parquet(), r"x.parquet: row 2: invalid UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_refused_with_its_name_and_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name, txt_documents="blank-line")


def test_invalid_utf8_in_a_whole_text_file_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"one\ntwo\nthree \xff\n")
    with pytest.raises(DataError, match=r"x.txt: line 3: invalid UTF-8"):
        read(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("corpu.jsonl", r"corpu.jsonl: no such file; did you mean .*corpus.jsonl"),
        ("*.parquet", r"matches no file"),
        ("notes.md", r"notes.md: unknown suffix; known are .jsonl"),
        ("folder", r"folder: a folder but no saved Hugging Face dataset"),
        ("stage/*", r"stage/documents: a folder inside of a stage's; fix: name the stage's own, .*/stage$"),
        ("dict", r"splits \['test', 'train'\]"),
    ],
)
def test_an_input_that_cannot_be_meant_is_refused_with_a_hint(tmp_path: Path, pattern: str, message: str) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(jsonl())
    (tmp_path / "notes.md").touch()
    for name in ("folder", "dict/train", "dict/test", "stage/documents"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "stage" / "stage.json").touch()
    (tmp_path / "dict" / "dataset_dict.json").touch()
    with pytest.raises(DataError, match=message):
        resolve_inputs([str(tmp_path / pattern)])


def test_no_input_at_all_is_refused() -> None:
    with pytest.raises(DataError, match="no input given"):
        resolve_inputs([])


def test_a_saved_dataset_with_a_missing_file_is_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved")
    [arrow] = (tmp_path / "saved").glob("*.arrow")
    arrow.write_bytes(truncated(arrow.read_bytes()))
    with pytest.raises(DataError, match="saved"):
        read(tmp_path / "saved")


def test_one_file_under_two_names_comes_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    for other in ("folder/../a.jsonl", "link.jsonl"):
        with pytest.raises(DataError, match=rf"{other}: given twice, once as .*a.jsonl, its documents"):
            resolve_inputs([f"{tmp_path}/a.jsonl", f"{tmp_path}/{other}"])
    [entry] = resolve_inputs([f"{tmp_path}/link.jsonl"])
    assert entry.name == f"{tmp_path}/link.jsonl"
