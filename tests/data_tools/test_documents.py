"""Readers of whole documents: fields and origins come along, damage of one record is a counted item, of a file an error."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.readers import plain_text, streams
from data_tools.sources import ReadOptions, read_documents, read_texts, resolve_inputs

ROWS = [{"text": "one", "n": 1, "tags": ["a"]}, {"text": "zwei äöü 😀", "n": None, "tags": []}, {"text": "3", "n": 3}]


@pytest.fixture(autouse=True)
def empty_memory_files() -> Iterator[None]:
    yield
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


def read(path: Path | str, *, start: int = 0, **options: str) -> list[Document | BadRecord]:
    [source] = resolve_inputs([str(path)])
    records = list(read_documents(source, ReadOptions(**options), start=start))  # type: ignore[arg-type]
    assert source.done_bytes == source.size_bytes
    return records


def summary(records: list[Document | BadRecord]) -> list[str]:
    return [record.text if isinstance(record, Document) else record.reason for record in records]


def put(url: str, content: bytes) -> None:
    import fsspec

    with fsspec.open(url, "wb") as file:
        file.write(content)


def table_bytes(kind: str, rows: list[dict[str, object]] = ROWS) -> bytes:
    table = pa.Table.from_pylist(
        rows, pa.schema([("text", pa.string()), ("n", pa.int64()), ("tags", pa.list_(pa.string()))])
    )
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=2)
    else:
        make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with make(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return bytes(sink.getvalue())


def jsonl(rows: list[dict[str, object]] = ROWS) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


FILES = {
    "a.jsonl.zst": zstandard.compress(jsonl()),
    "a.parquet": table_bytes("parquet"),
    "file.arrow": table_bytes("file"),
    "stream.arrow": table_bytes("stream"),
    "a.feather": table_bytes("file"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", ["local", "file://", "memory://"])
def test_documents_bring_their_fields_and_say_where_they_come_from(tmp_path: Path, name: str, where: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    address = {
        "local": str(tmp_path / name),
        "file://": f"file://{tmp_path / name}",
        "memory://": f"memory://b/{name}",
    }[where]
    if where == "memory://":
        put(address, FILES[name])
    for start in range(4):
        documents = read(address, start=start)
        assert summary(documents) == [row["text"] for row in ROWS[start:]]
    first = read(address)[0]
    assert isinstance(first, Document) and first.fields == {"n": 1, "tags": ["a"]}
    assert first.origin == f"{tmp_path / name if where != 'memory://' else address}:1"
    [source] = resolve_inputs([address])
    assert list(read_texts(source, ReadOptions())) == [row["text"] for row in ROWS]


def test_each_kind_of_bad_line_is_an_item_with_its_reason_bytes_and_place(tmp_path: Path) -> None:
    bad = {
        b'{"text": "\xff"}': "bad_record.invalid_utf8",
        b'{"text": "cut': "bad_record.not_json",
        b'{"text": "\\ud800"}': "bad_record.not_json",
        b'{"text": "x", "score": NaN}': "bad_record.not_json",
        b"[1]": "bad_record.not_json",
        b'{"body": "x"}': "bad_record.no_text_key",
        b'{"text": 5}': "bad_record.not_text",
        b'{"text": ["x"]}': "bad_record.not_text",
        b'{"text": null}': "bad_record.empty",
        b'{"text": ""}': "bad_record.empty",
        b" \r": "bad_record.empty",
    }
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([b'{"text": "good"}', *bad, b'{"text": "end"}']))
    records = read(tmp_path / "a.jsonl")
    assert summary(records) == ["good", *bad.values(), "end"]
    for number, (record, raw) in enumerate(zip(records[1:-1], bad, strict=True), 2):
        assert isinstance(record, BadRecord)
        assert record.raw == raw and record.origin.endswith(f"a.jsonl:{number}") and record.detail
    assert summary(read(tmp_path / "a.jsonl", start=11)) == ["bad_record.empty", "end"]


def test_a_row_with_broken_text_does_not_take_its_neighbours_along(tmp_path: Path) -> None:
    offsets = pa.array([0, 1, 3, 3, 4], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 4, [None, offsets, pa.py_buffer(b"ab\xffd")])
    table = pa.table({"text": text, "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        records = read(tmp_path / name)
        assert summary(records) == ["a", "bad_record.invalid_utf8", "bad_record.empty", "d"]
        assert isinstance(records[1], BadRecord) and records[1].raw == b"b\xff"


def test_a_record_beyond_the_limit_is_counted_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (streams, plain_text):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(streams, "_READ_BYTES", 64)
    lines = [b'{"text": "a"}', b'{"text": "' + b"x" * 5000 + b'"}', b'{"text": "b"}', b"y" * 3000]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    records = read(tmp_path / "a.jsonl")
    assert summary(records) == ["a", "bad_record.too_long", "b", "bad_record.too_long"]
    assert isinstance(records[1], BadRecord) and records[1].detail.startswith("5,012 bytes, a record may have")
    (tmp_path / "a.txt").write_bytes(b"one\n\n" + b"z" * 2000 + b"\nend\n\ntwo\n\n" + b"line\n" * 1000)
    found = summary(read(tmp_path / "a.txt", txt_documents="blank-line"))
    assert found == ["one", "bad_record.too_long", "two", "bad_record.too_long"]


def test_a_compressed_bomb_fills_neither_memory_nor_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1 << 22)
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 27))
    assert len(bomb) < 8192
    (tmp_path / "a.jsonl.zst").write_bytes(bomb + zstandard.compress(b'\n{"text": "b"}'))
    assert summary(read(tmp_path / "a.jsonl.zst")) == ["bad_record.too_long", "b"]


def test_a_broken_piece_of_text_is_one_item_and_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\u3000\nt\nwo\n\n".encode() + b"x\ny\xff\n\nend\n")
    records = read(tmp_path / "a.txt", txt_documents="blank-line")
    assert summary(records) == ["one", "t\nwo", "bad_record.invalid_utf8", "end"]
    [source] = resolve_inputs([str(tmp_path / "a.txt")])
    with pytest.raises(DataError, match=r"a.txt: line 7: invalid UTF-8"):
        list(read_texts(source, ReadOptions(txt_documents="blank-line")))
    (tmp_path / "empty.txt").touch()
    assert summary(read(tmp_path / "empty.txt")) == ["bad_record.empty"]


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow"])
@pytest.mark.parametrize("cut", ["half", "end mark", "tail"])
def test_a_cut_arrow_file_is_refused_wherever_it_was_cut(tmp_path: Path, name: str, cut: str) -> None:
    content = FILES[name]
    (tmp_path / name).write_bytes(
        {"half": content[: len(content) // 2], "end mark": content[:-8], "tail": content[:-1]}[cut]
    )
    with pytest.raises(DataError, match=name):
        read(tmp_path / name)


def test_a_stage_is_an_input_once_it_is_finished(tmp_path: Path) -> None:
    stage = tmp_path / "clean"
    (stage / "documents").mkdir(parents=True)
    (stage / "rejects").mkdir()
    (stage / "stage.json").write_text("{}")
    for name in ("documents/00000", "documents/00001", "rejects/00000"):
        (stage / f"{name}.jsonl.zst").write_bytes(zstandard.compress(json.dumps({"text": name}).encode()))
    with pytest.raises(DataError, match=r"clean: an unfinished stage, it has no summary.json; fix: run the command"):
        resolve_inputs([str(stage)])
    (stage / "summary.json").write_text("{}")
    texts = [list(read_texts(entry, ReadOptions())) for entry in resolve_inputs([str(stage)])]
    assert texts == [["documents/00000"], ["documents/00001"]]


def test_urls_take_globs_and_know_their_sizes() -> None:
    for name in ("b", "a"):
        put(f"memory://corpus/{name}.jsonl", b'{"text": "x"}\n')
    found = resolve_inputs(["memory://corpus/*.jsonl"])
    assert [(entry.name, entry.size_bytes) for entry in found] == [
        ("memory:///corpus/a.jsonl", 14),
        ("memory:///corpus/b.jsonl", 14),
    ]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://corpus/none.jsonl", "memory://corpus/none.jsonl: no such file"),
        ("memory://corpus/*.parquet", "matches no file"),
        ("memory://corpus", r"a folder; fix: name its files, e.g. memory://corpus/\*.jsonl.zst|unknown suffix"),
        ("gopher://corpus/a.jsonl", "unknown protocol gopher://"),
        ("memory://corpus/a.exe", "unknown suffix"),
    ],
)
def test_a_url_that_cannot_be_meant_is_refused(url: str, message: str) -> None:
    put("memory://corpus/a.jsonl", b"{}")
    with pytest.raises(DataError, match=message):
        resolve_inputs([url])


def test_a_missing_driver_names_the_package_to_install() -> None:
    import importlib.util

    if importlib.util.find_spec("s3fs"):
        pytest.skip("s3fs is installed here")
    with pytest.raises(
        RuntimeError, match=r"s3://bucket/a.jsonl: the driver for s3:// is missing; fix: pip install s3fs"
    ):
        resolve_inputs(["s3://bucket/a.jsonl"])


# --- web archives


def warc_record(kind: str, block: bytes, **headers: str) -> bytes:
    lines = [f"WARC-Type: {kind}", "WARC-Date: 2025-01-02T03:04:05Z", f"Content-Length: {len(block)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return b"WARC/1.0\r\n" + "\r\n".join(lines).encode() + b"\r\n\r\n" + block + b"\r\n\r\n"


def response(body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}\r\n".encode()
    url = "https://example.org/a"
    return warc_record("response", head + body, Content_Type="application/http; msgtype=response", WARC_Target_URI=url)


def archive() -> bytes:
    import gzip

    return b"".join(
        [
            warc_record("warcinfo", b"software: x\r\n", Content_Type="application/warc-fields"),
            warc_record("request", b"GET / HTTP/1.1\r\n\r\n", Content_Type="application/http; msgtype=request"),
            response("<html><head><title>t</title></head><p>Grüße</p></html>".encode()),
            response("<p>Größe".encode("latin-1"), "text/html; charset=ISO-8859-1"),
            response(b"\x89PNG", "image/png"),
            response(b"<p>gone</p>", status="404 Not Found"),
            response(b"6\r\n<p>chu\r\n7\r\nnk</p>\n\r\n0\r\n\r\n", more="Transfer-Encoding: chunked\r\n"),
            response(gzip.compress(b"plain"), "text/plain", more="Content-Encoding: gzip\r\n"),
            response(b"\xff\xfe broken", "text/plain"),
            response(b"\\ud800", "text/plain; charset=unicode_escape"),
            warc_record("response", b"no http at all", Content_Type="application/http; msgtype=response"),
            warc_record(
                "conversion", "Klartext äöü".encode(), Content_Type="text/plain", WARC_Target_URI="https://b.org"
            ),
            warc_record("conversion", b"", Content_Type="text/plain"),
        ]
    )


PAGES = [
    "Grüße",
    "Größe",
    "bad_record.not_text",
    "bad_record.http_status",
    "chunk",
    "plain",
    "bad_record.invalid_utf8",
    "bad_record.invalid_utf8",
    "bad_record.unreadable",
    "Klartext äöü",
    "bad_record.empty",
]


def test_pages_of_a_web_archive_are_text_with_address_and_date(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "a.warc").write_bytes(archive())
    (tmp_path / "a.warc.gz").write_bytes(gzip.compress(archive()[:300]) + gzip.compress(archive()[300:]))
    for name in ("a.warc", "a.warc.gz"):
        records = read(tmp_path / name)
        assert summary(records) == PAGES
        assert summary(read(tmp_path / name, start=5)) == PAGES[5:]
        last = records[-2]
        assert isinstance(last, Document)
        assert last.fields == {"url": "https://b.org", "date": "2025-01-02T03:04:05Z"}


def test_pages_without_text_are_records_without_text_for_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(response(b"x", "image/png") + response(b"<p>y"))
    [source] = resolve_inputs([str(tmp_path / "a.warc")])
    assert list(read_texts(source, ReadOptions())) == ["", "y"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-300], "truncated, or its Content-Length"),
        (
            lambda raw: raw.replace(b"Content-Length: 13\r\n", b"Content-Length: 10\r\n"),
            "the next record does not follow",
        ),
        (lambda raw: raw.replace(b"Content-Length: 13\r\n", b"Content-Length: -1\r\n"), "Content-Length is '-1'"),
        (lambda raw: b"no archive\r\n\r\n" + raw, "no WARC record starts here"),
        (lambda raw: b"x" * 3_000_000, "no WARC record starts here"),
    ],
)
def test_a_damaged_archive_is_refused_with_the_place(tmp_path: Path, damage: object, message: str) -> None:
    (tmp_path / "a.warc").write_bytes(damage(archive()))  # type: ignore[operator]
    with pytest.raises(DataError, match=rf"a.warc: WARC record \d+ near byte \d+.*{message}"):
        read(tmp_path / "a.warc")


def test_pages_written_by_warcio_are_read(tmp_path: Path) -> None:
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    with (tmp_path / "a.warc.gz").open("wb") as file:
        writer = WARCWriter(file, gzip=True)
        for text in ("one", "two"):
            headers = StatusAndHeaders("200 OK", [("Content-Type", "text/html")], protocol="HTTP/1.1")
            body = io.BytesIO(f"<p>{text}</p>".encode())
            writer.write_record(
                writer.create_warc_record("http://a.org", "response", payload=body, http_headers=headers)
            )
    assert summary(read(tmp_path / "a.warc.gz")) == ["one", "two"]
