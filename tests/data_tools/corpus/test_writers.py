"""What is written is read back, byte for byte the same each time, and a file has its name only when it is whole."""

import multiprocessing
import os
import subprocess
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.rundir import DataError
from data_tools.corpus.document import Document
from data_tools.corpus.writers import open_writer
from data_tools.sources import ReadOptions, read_documents, resolve_inputs
from data_tools.whole_file import part_name

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
DOCUMENTS = [Document("one\ntwo", {"id": 1, "meta": {"a": [1.5]}}), Document("äöü 😀", {"id": 2, "meta": None})]


@pytest.fixture
def memory_files() -> Iterator[None]:
    yield
    import fsspec

    fsspec.filesystem("memory").store.clear()


def write(path: Path | str, documents: list[Document]) -> None:
    with open_writer(path) as writer:
        for document in documents:
            writer.write(document)


def read(path: Path | str) -> list[tuple[str, dict[str, object]]]:
    [source] = resolve_inputs([str(path)])
    records = list(read_documents(source, ReadOptions()))
    assert all(isinstance(record, Document) for record in records)
    return [(record.text, record.fields) for record in records if isinstance(record, Document)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_documents_come_back_with_their_fields_and_the_bytes_repeat(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}{suffix}", DOCUMENTS)
    assert read(tmp_path / f"a{suffix}") == [(document.text, document.fields) for document in DOCUMENTS]
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_urls_are_written_and_read_back(memory_files: None, suffix: str) -> None:
    write(f"memory://out/deep/a{suffix}", DOCUMENTS)
    assert len(read(f"memory://out/deep/a{suffix}")) == 2
    import fsspec

    assert len(fsspec.filesystem("memory").find("/")) == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_without_documents_is_a_valid_one(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / f"a{suffix}", [])
    assert read(tmp_path / f"a{suffix}") == []


@pytest.mark.parametrize("where", ["local", "memory://"])
def test_an_error_in_the_middle_leaves_nothing_behind(tmp_path: Path, memory_files: None, where: str) -> None:
    path = str(tmp_path / "a.jsonl.zst") if where == "local" else "memory://x/a.jsonl.zst"
    with pytest.raises(ZeroDivisionError), open_writer(path) as writer:
        writer.write(DOCUMENTS[0])
        raise ZeroDivisionError
    import fsspec

    assert not list(tmp_path.iterdir()) and not fsspec.filesystem("memory").find("/")


def test_the_first_line_has_the_text_first(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [Document("t", {"z": 1, "a": 2})])
    assert (tmp_path / "a.jsonl").read_bytes() == b'{"text":"t","z":1,"a":2}\n'


def test_a_field_called_text_does_not_hide_the_text(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [Document("the text", {"text": "another"})])
    assert read(tmp_path / "a.jsonl") == [("the text", {"fields.text": "another"})]


def test_values_that_json_has_not_become_readable_text(tmp_path: Path) -> None:
    fields = {"raw": b"a\xff", "price": Decimal("1.10"), "day": date(2025, 1, 2), "for": timedelta(hours=1)}
    write(tmp_path / "a.jsonl", [Document("t", fields)])
    assert read(tmp_path / "a.jsonl") == [
        ("t", {"raw": "a\\xff", "price": "1.10", "day": "2025-01-02", "for": "1:00:00"})
    ]


@pytest.mark.parametrize(
    ("late", "message"),
    [({"n": "text"}, "field 'n' has values of several types"), ({"m": 1}, "field 'm' appears first behind the first")],
)
def test_parquet_refuses_fields_that_do_not_fit_its_columns(
    tmp_path: Path, late: dict[str, object], message: str
) -> None:
    documents = [Document("t", {"n": 1})] * 10_000 + [Document("t", late)]
    with pytest.raises(DataError, match=rf"a.parquet: {message}.*fix: write .jsonl.zst"):
        write(tmp_path / "a.parquet", documents)
    assert not list(tmp_path.iterdir())


def test_parquet_writes_more_than_one_row_group(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [Document(str(i), {"n": i if i % 2 else None}) for i in range(10_500)])
    assert read(tmp_path / "a.parquet")[10_400:10_402] == [("10400", {"n": None}), ("10401", {"n": 10_401})]


def test_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"a.csv: unknown suffix to write; fix: one of .jsonl, .jsonl.gz"),
        open_writer(tmp_path / "a.csv"),
    ):
        pass


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), children, max_size=3)
    ),
    max_leaves=5,
)
TEXT = st.text(st.characters(codec="utf-8"), min_size=1)


@given(
    st.lists(
        st.tuples(TEXT, st.dictionaries(TEXT.filter(lambda key: key != "text"), JSON_VALUES, max_size=3)), max_size=5
    )
)
def test_any_json_document_survives_the_round_trip(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, dict[str, object]]]
) -> None:
    path = tmp_path_factory.mktemp("round") / "a.jsonl.zst"
    write(path, [Document(text, fields) for text, fields in documents])
    assert read(path) == documents


@pytest.mark.parametrize("levels", [253, 300, 1000])
def test_fields_nested_deeper_than_the_library_writes_survive(tmp_path: Path, levels: int) -> None:
    line = b'{"text":"t","a":%s1%s,"b":{"c":[2,{}]}}\n' % (b'[{"x":' * (levels // 2), b"}]" * (levels // 2))
    (tmp_path / "in.jsonl").write_bytes(line)
    [source] = resolve_inputs([str(tmp_path / "in.jsonl")])
    documents = [record for record in read_documents(source, ReadOptions()) if isinstance(record, Document)]
    write(tmp_path / "out.jsonl", documents)
    assert (tmp_path / "out.jsonl").read_bytes() == line


def test_two_processes_write_one_file_and_the_parts_of_dead_ones_go_away(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    ours = part_name("a.jsonl")
    stale, alive = (ours.replace(f"-{os.getpid()}.", f"-{number}.") for number in (dead.pid, os.getppid()))
    for name in (stale, alive, ".a.jsonl.00000000-1.part"):
        (tmp_path / name).write_text("half")
    write(tmp_path / "a.jsonl", DOCUMENTS)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([alive, ".a.jsonl.00000000-1.part", "a.jsonl"])
    child = multiprocessing.get_context("fork").Process(target=write, args=(tmp_path / "b.jsonl", DOCUMENTS[:1]))
    with open_writer(tmp_path / "b.jsonl") as writer:
        writer.write(DOCUMENTS[0])
        child.start()
        child.join()
    assert child.exitcode == 0 and len(read(tmp_path / "b.jsonl")) == 1
