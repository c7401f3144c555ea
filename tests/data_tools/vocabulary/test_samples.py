"""Samples: bounded, the same every time, with documents held back."""

import json
from pathlib import Path

import pytest

from cpt.rundir import DataError
from data_tools.sources import ReadOptions
from data_tools.vocabulary.samples import Sample, make_samples, parse_sources


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_sources_are_named_or_take_the_name_of_their_file() -> None:
    stated = ["medical=a/*.jsonl", "law.jsonl.zst", "medical=b.parquet", "data/x=1/web.txt"]
    assert parse_sources(stated) == {
        "medical": ["a/*.jsonl", "b.parquet"],
        "law": ["law.jsonl.zst"],
        "web": ["data/x=1/web.txt"],
    }
    with pytest.raises(DataError, match="medical="):
        parse_sources(["medical="])


def test_files_of_two_folders_do_not_become_one_source_unasked() -> None:
    for first, second in (("general/train.jsonl", "law/train.jsonl"), ("general/train/*.jsonl", "law/train/*.jsonl")):
        with pytest.raises(DataError, match=r"both would be 'train'; fix: name them NAME=PATTERN"):
            parse_sources([first, second])
    assert parse_sources(["law/train.jsonl", "law/train.parquet"]) == {
        "train": ["law/train.jsonl", "law/train.parquet"]
    }
    with pytest.raises(DataError, match=r"'law/x=1/train\.jsonl': has no name"):
        parse_sources(["general=g.jsonl", "law/x=1/train.jsonl"], named=True)


def test_every_file_gives_its_share_and_what_one_lacks_the_next_may_give(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["a" * 10])
    write(tmp_path / "b.jsonl", [f"b{i:09d}" for i in range(100)])
    sample = Sample("x", [str(tmp_path / "*.jsonl")], 200)
    texts = list(sample.taught()) + sample.held_back
    assert sum(len(text) for text in texts) == 200
    assert "a" * 10 in texts and sum(text.startswith("b") for text in texts) == 19


def test_a_document_is_held_back_or_learned_from_wherever_it_stands(tmp_path: Path) -> None:
    texts = [f"document number {i}" for i in range(400)]
    files = [write(tmp_path / "a.jsonl", texts), write(tmp_path / "b.jsonl", texts[::-1])]
    sample = Sample("x", files, 10**6)
    taught = set(sample.taught())
    assert not taught & set(sample.held_back) and taught | set(sample.held_back) == set(texts)
    assert 8 <= len(set(sample.held_back)) <= 36
    again = Sample("x", files, 10**6)
    assert list(again.taught()) and again.held_back == sample.held_back


def test_a_huge_document_is_cut_to_the_budget(tmp_path: Path) -> None:
    sample = Sample("x", [write(tmp_path / "a.jsonl", ["é" * 10_000])], 1001)
    assert [len(text.encode()) for text in [*sample.taught(), *sample.held_back]] == [1000]


def test_a_small_source_is_measured_on_its_first_documents(tmp_path: Path) -> None:
    [sample] = make_samples([write(tmp_path / "a.jsonl", ["one text"])], sample_bytes=100, read=ReadOptions())
    assert list(sample.taught()) == ["one text"] == sample.measured_on()


def test_a_source_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no document with text"):
        list(Sample("x", [write(tmp_path / "a.jsonl", [""])], 100).taught())
