"""Whatever is in a file, reading it ends in documents, counted rejects or a DataError: fuzzed, and failures once found.

The cases are those of ``benchmarks/data/fuzz.py``, which runs 10^5 of them; here a few hundred, other ones each time.
"""

import gzip
import importlib.util
import os
import struct
import sys
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split
from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.interop.datasets_view import as_dataset
from data_tools.sources import READERS, ReadOptions, read_documents, resolve_inputs

FUZZ = Path(__file__).parents[2] / "benchmarks" / "data" / "fuzz.py"
SUFFIXES = sorted(suffix for suffix in READERS if suffix.startswith("."))


def load_fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpt_fuzz", FUZZ)
    assert spec and spec.loader
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


fuzz = load_fuzz()


def read(path: Path) -> list[Document | BadRecord]:
    [source] = resolve_inputs([str(path)])
    return list(read_documents(source, ReadOptions()))


@given(name=st.sampled_from(sorted(fuzz.FORMATS)), number=st.integers(10**6, 10**12))
@settings(max_examples=200, deadline=None)
def test_a_mutated_file_is_an_error_a_reject_or_whole(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: int
) -> None:
    assert fuzz.run_case(name, number, tmp_path_factory.mktemp("fuzz")) in ("error", "rejects", "documents")


@given(suffix=st.sampled_from(SUFFIXES), content=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_bytes_of_any_kind_are_an_error_or_records(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("bytes") / f"x{suffix}"
    file.write_bytes(content)
    fuzz.check_documents(file, content, content)


def test_no_flipped_bit_of_a_parquet_file_loses_rows(tmp_path: Path) -> None:
    """pyarrow ends a row group with its shortest column: one bit made all rows of a group vanish, without an error."""
    table = pa.table({"text": ["a", "b", "c", "d"], "n": pa.array([1, 2, 3, 4], pa.int32())})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=2, store_schema=False, use_dictionary=False, compression="none")
    whole, refused = bytes(sink.getvalue()), 0
    for position in range(len(whole)):
        raw = bytearray(whole)
        raw[position] ^= 1 << position % 8
        (tmp_path / "x.parquet").write_bytes(raw)
        try:
            assert len(read(tmp_path / "x.parquet")) == 4
        except DataError as error:
            refused += "rows in a row group of 2" in str(error)
    assert refused


def test_an_arrow_file_with_a_footer_of_fewer_batches_is_refused(tmp_path: Path) -> None:
    def ipc_file(rows: int) -> bytes:
        table = pa.table({"text": ["x"] * rows})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
        return bytes(sink.getvalue())

    three, one = ipc_file(6), ipc_file(2)
    footer = one[-10 - struct.unpack("<i", one[-10:-6])[0] :]
    body = three[: -10 - struct.unpack("<i", three[-10:-6])[0]]
    (tmp_path / "x.arrow").write_bytes(body + footer)
    with pytest.raises(DataError, match=r"x.arrow: 3 batches, its footer says 1"):
        read(tmp_path / "x.arrow")


def test_positions_beyond_the_tokens_are_refused_before_anything_points_there(tmp_path: Path) -> None:
    facts = TokenizerFacts("t", "f" * 64, "T")
    write_split(tmp_path, StoreLabel("s", "general", "train", 100, 0, facts), [[[5, 7, 0], [9, 0]]])
    for starts in ((0, 3, 7), (0, 3, 1 << 60), (3, 3, 5), (0, 9, 5), (0, -1, 5)):
        (tmp_path / "documents_00000.bin").write_bytes(struct.pack("<3q", *starts))
        with pytest.raises(DataError, match=r"documents_00000.bin: its positions do not fit its tokens"):
            as_dataset(tmp_path)


def test_an_error_message_does_not_repeat_a_damaged_file(tmp_path: Path) -> None:
    record = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 2" + b"[" * 5000 + b"\r\n\r\nx\r\n\r\n"
    (tmp_path / "x.warc").write_bytes(record)
    with pytest.raises(DataError, match="Content-Length is") as caught:
        read(tmp_path / "x.warc")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize("value", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000, b'{"text": 1e999}', b"-", b"\0"])
def test_json_that_breaks_parsers_is_one_reject(tmp_path: Path, value: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text":"a"}\n' + value + b'\n{"text":"b"}\n')
    first, middle, last = read(tmp_path / "x.jsonl")
    assert isinstance(first, Document) and isinstance(middle, BadRecord) and isinstance(last, Document)


def test_a_saved_dataset_may_not_name_files_outside_of_its_folder(tmp_path: Path) -> None:
    import datasets

    for name in ("one", "two"):
        datasets.Dataset.from_list([{"text": name}]).save_to_disk(str(tmp_path / name))
    state = tmp_path / "one" / "state.json"
    state.write_text(state.read_text().replace("data-00000", "../two/data-00000"))
    with pytest.raises(DataError, match=r"state.json: names .*two/data-00000.*no file of this folder"):
        read(tmp_path / "one")


def test_zeros_behind_a_gzip_file_are_padding_and_before_it_damage(tmp_path: Path) -> None:
    """Tapes and block devices pad; `gzip -dc` reads over it."""
    packed = gzip.compress(b'{"text": "x"}\n')
    (tmp_path / "x.jsonl.gz").write_bytes(packed + bytes(9000) + packed + bytes(9000))
    assert len(read(tmp_path / "x.jsonl.gz")) == 2
    for content in (bytes(4096) + packed, bytes(4096), packed + bytes(9000) + packed[:-1]):
        (tmp_path / "x.jsonl.gz").write_bytes(content)
        with pytest.raises(DataError, match=r"x.jsonl.gz: (damaged|truncated)"):
            read(tmp_path / "x.jsonl.gz")


def test_a_cut_page_of_a_web_archive_is_a_reject(tmp_path: Path) -> None:
    body = gzip.compress(b"plain text " * 100)[:-20]
    block = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Encoding: gzip\r\n\r\n" + body
    head = f"WARC/1.0\r\nWARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: {len(block)}\r\n\r\n"
    (tmp_path / "x.warc").write_bytes(head.encode() + block + b"\r\n\r\n")
    [record] = read(tmp_path / "x.warc")
    assert isinstance(record, BadRecord) and record.reason == "bad_record.unreadable"


def test_a_file_name_that_is_no_utf8_has_a_readable_origin(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff.jsonl"))
    file.write_bytes(b'{"text": "x"}\n{\n')
    assert [record.origin[len(str(tmp_path)) :] for record in read(file)] == ["/n\\xff.jsonl:1", "/n\\xff.jsonl:2"]
    request = StageRequest("copy", (str(file),), tmp_path / "out", {}, lambda: lambda document: None)
    assert run_stage(request)["reasons"].keys() == {"bad_record.not_json"}
