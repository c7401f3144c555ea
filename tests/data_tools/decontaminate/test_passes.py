"""`cpt data decontaminate` from files to files: what is dropped, cut, reported, and that it goes on where it stopped."""

import io
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cpt.data.store_selection import ViewRequest, open_split, write_view
from cpt.rundir import DataError
from data_tools.corpus.document import Step
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.decontaminate.passes import DecontaminateRequest, decontaminate
from data_tools.decontaminate.protected_texts import Protected, read_records
from data_tools.decontaminate.report_view import render_outcome
from data_tools.sources import ReadOptions, read_texts, resolve_inputs
from data_tools.store_builder import StoreRequest, build_store
from data_tools.train_tokenizer import train_bpe

QUESTION = "A patient of sixty years comes with pain in the left arm and cold sweat since noon"
CHOICE = "the blood vessels of the heart are narrowed"
FILLER = "Nothing of note was said on this long and rainy afternoon in the valley. " * 12


def write_jsonl(path: Path, records: list[Any]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


@pytest.fixture
def request_of(tmp_path: Path) -> DecontaminateRequest:
    items = [
        {"question": "short?", "choices": ["yes", "no"], "answer": 0},
        {"question": QUESTION, "choices": {"text": ["a", CHOICE]}, "tags": ["x", 1, None]},
    ]
    write_jsonl(tmp_path / "evals" / "quiz" / "test.jsonl", items)
    first = [{"text": FILLER, "id": 1}, "no record", {"text": f"{FILLER}{QUESTION.upper()}. \x1b[2J {FILLER}", "id": 2}]
    second = [{"text": f"It is said that {CHOICE}.", "id": 3}, {"text": "clean", "id": 4}]
    inputs = (write_jsonl(tmp_path / "in" / "a.jsonl", first), write_jsonl(tmp_path / "in" / "b.jsonl", second))
    protected = Protected(against=(f"exam={tmp_path}/evals/quiz/*.jsonl",))
    return DecontaminateRequest(inputs, tmp_path / "out", protected)


def kept_texts(out: Path) -> list[str]:
    return [text for source in resolve_inputs([str(out)]) for text in read_texts(source, ReadOptions())]


def test_documents_with_items_are_dropped_and_reported(request_of: DecontaminateRequest) -> None:
    outcome = decontaminate(request_of)
    assert kept_texts(request_of.out) == [FILLER, "clean"]
    reasons = {name: entry["documents"] for name, entry in outcome["summary"]["reasons"].items()}
    assert reasons == {"contaminated.exam": 2, "bad_record.not_json": 1}
    items = json.loads((request_of.out / "contaminated_items.json").read_text())
    a, b = request_of.inputs
    assert items == {"exam|test|1": [f"{a}:3", f"{b}:1"]}
    (entry,) = json.loads((request_of.out / "report.json").read_text())["sets"]
    assert (entry["items"], entry["items_too_short"], entry["contaminated_items"], entry["share"]) == (2, 1, 1, 0.5)
    assert entry["documents_by_input"] == {a: 1, b: 1}
    assert entry["examples"][0]["excerpt"][1] == " ".join(QUESTION.upper().split()[:13])


def test_cut_leaves_the_rest_of_the_document(request_of: DecontaminateRequest) -> None:
    decontaminate(replace(request_of, action="cut"))
    first, second, *rest = kept_texts(request_of.out)
    assert first == FILLER and rest == ["clean"]
    assert "PATIENT" not in second and 900 < len(second) < 2 * len(FILLER) - 300 and "\n\n" in second
    rejects = resolve_inputs([str(request_of.out / "rejects" / "00001.jsonl.zst")])[0]
    assert list(read_texts(rejects, ReadOptions())) == [f"It is said that {CHOICE}."]  # too short to cut: whole


def test_a_dry_run_reports_the_same_and_writes_no_documents(request_of: DecontaminateRequest) -> None:
    dry = decontaminate(replace(request_of, dry_run=True))
    assert dry["summary"] == {} and not (request_of.out / "documents").exists()
    marker = request_of.out / "scan" / "done" / "00000.json"
    scanned_at = marker.stat().st_mtime_ns
    assert decontaminate(request_of)["report"] == dry["report"]
    assert marker.stat().st_mtime_ns == scanned_at  # the real run goes on from the dry one's scan


def test_tasks_give_the_bytes_of_one_run_and_so_does_a_run_that_was_killed(request_of: DecontaminateRequest) -> None:
    whole = decontaminate(request_of)
    split = replace(request_of, out=request_of.out.with_name("split"))
    first = decontaminate(replace(split, task=(0, 2)))
    assert first == {"report": None, "summary": {}}
    assert decontaminate(replace(split, task=(1, 2)))["report"] is not None
    assert decontaminate(split)["summary"]["content_hash"] == whole["summary"]["content_hash"]
    (request_of.out / "scan" / "done" / "00001.json").unlink()
    (request_of.out / "done" / "00001.json").unlink()
    (request_of.out / "summary.json").unlink()
    assert decontaminate(request_of)["summary"] == whole["summary"]


def test_ngrams_of_many_documents_can_be_ignored(request_of: DecontaminateRequest) -> None:
    notice = "all rights reserved no part of this book may be copied or sold without leave of"
    documents = [{"text": f"{notice} publisher {number}"} for number in range(4)]
    inputs = (write_jsonl(request_of.out.parent / "in" / "c.jsonl", [*documents, {"text": QUESTION}]),)
    write_jsonl(request_of.out.parent / "evals" / "quiz" / "test.jsonl", [{"page": notice}, {"question": QUESTION}])
    request = replace(request_of, inputs=inputs, max_documents=3)
    with pytest.raises(DataError, match="run all tasks with --dry-run first"):
        decontaminate(replace(request, task=(0, 2)))
    report = decontaminate(request)["report"]
    assert len(kept_texts(request.out)) == 4 and report["common_ngrams_ignored"] == 4
    assert report["most_frequent_ngrams"][0]["documents"] == 4 and not report["most_frequent_ngrams"][0]["counted"]
    assert report["sets"][0]["contaminated_items"] == 1


def test_text_of_a_held_out_split_is_found_in_raw_files_and_in_stores(
    request_of: DecontaminateRequest, tmp_path: Path
) -> None:
    story = " ".join(f"the {number} wolves of the {number + 1} mountains ran" for number in range(12))
    write_jsonl(tmp_path / "held" / "valid.jsonl", [{"text": "other"}, {"text": story}])
    train_bpe([story], out=tmp_path / "bpe", vocab_size=300)
    build_store(StoreRequest((f"{tmp_path}/held/valid.jsonl",), tmp_path / "bpe", tmp_path / "store", "s", "d", 0.0))
    quoted = " ".join(story.split()[:49])
    inputs = (write_jsonl(tmp_path / "in" / "c.jsonl", [{"text": quoted}, {"text": f"Listen: {story}!"}]),)
    protected = Protected(
        heldout=(str(tmp_path / "held" / "valid.jsonl"), f"mine={tmp_path}/store/train"), tokenizer=tmp_path / "bpe"
    )
    outcome = decontaminate(replace(request_of, inputs=inputs, protected=protected))
    assert kept_texts(request_of.out) == [quoted]
    assert [entry["contaminated_items"] for entry in outcome["report"]["sets"]] == [1, 1]
    items = json.loads((request_of.out / "contaminated_items.json").read_text())
    assert set(items) == {"held/valid.jsonl|valid|1", "mine|store|1"}


def test_a_short_held_out_document_is_found_behind_a_bos_and_in_a_view_of_the_store(
    request_of: DecontaminateRequest, tmp_path: Path
) -> None:
    short = "some seven geese flew over the dark lake as the bells rang for noon"
    raw = write_jsonl(tmp_path / "held" / "valid.jsonl", [{"text": short}, {"text": "other"}])
    train_bpe([short], out=tmp_path / "bpe", vocab_size=300)
    build_store(StoreRequest((raw,), tmp_path / "bpe", tmp_path / "store", "s", "d", 0.0, bos_token="s"))
    store = open_split(tmp_path / "store" / "train")
    assert store.manifest.bos_id is not None
    write_view(tmp_path / "view", {"train": ViewRequest(store, np.array([1, 0]), {})})
    inputs = (write_jsonl(tmp_path / "in" / "c.jsonl", [{"text": f"Listen: {short}!"}, {"text": "clean"}]),)
    heldout = (f"whole={tmp_path}/store/train", f"view={tmp_path}/view/train")
    decontaminate(replace(request_of, inputs=inputs, protected=Protected(heldout=heldout, tokenizer=tmp_path / "bpe")))
    assert kept_texts(request_of.out) == ["clean"]
    items = json.loads((request_of.out / "contaminated_items.json").read_text())
    assert set(items) == {"whole|store|0", "view|store|1"}


def test_benchmark_tables_are_read_behind_urls(tmp_path: Path) -> None:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"a": "no"}, {"a": CHOICE}]), tmp_path / "dev.parquet")
    fsspec.filesystem("memory").pipe("/evals/dev.parquet", (tmp_path / "dev.parquet").read_bytes())
    (source,) = resolve_inputs(["memory://evals/dev.parquet"])
    assert list(read_records(source)) == [(0, {"a": "no"}), (1, {"a": CHOICE})]


def test_what_cannot_be_looked_for_is_refused(request_of: DecontaminateRequest, tmp_path: Path) -> None:
    def refused(protected: Protected, message: str) -> None:
        with pytest.raises(DataError, match=message):
            decontaminate(replace(request_of, protected=protected))
        assert not request_of.out.exists()  # what is mended runs in the same folder

    given = request_of.protected.against
    refused(Protected(), "nothing to look for")
    refused(Protected(against=given, fields=("questoin",)), "no item has questoin, there is .*question")
    refused(Protected(against=given, ngram=40, heldout_ngram=50), "no text of exam has 25 words")
    refused(Protected(against=given, ngram=60), "it must be 2 <= ngram <= heldout-ngram")
    broken = write_jsonl(tmp_path / "broken" / "test.jsonl", [{"question": QUESTION}])
    Path(broken).write_text('{"question": "a"}\n{"question": ')
    refused(Protected(against=(broken,)), "test.jsonl: line 2: not JSON")
    again = write_jsonl(tmp_path / "other" / "test.jsonl", [{"question": QUESTION}])
    refused(Protected(against=(*given, f"exam={again}")), "its items would be named as those of .*quiz/test.jsonl")
    (tmp_path / "items.txt").write_text("a")
    refused(Protected(against=(str(tmp_path / "items.txt"),)), "read from .jsonl and .parquet")


def test_a_folder_of_another_search_is_refused(request_of: DecontaminateRequest) -> None:
    decontaminate(replace(request_of, dry_run=True))
    with pytest.raises(DataError, match=r"holds the scan of another command \(other index"):
        decontaminate(replace(request_of, protected=replace(request_of.protected, ngram=12)))


def test_nothing_is_written_into_a_folder_that_is_refused(request_of: DecontaminateRequest, tmp_path: Path) -> None:
    def refused(request: DecontaminateRequest, message: str) -> None:
        before = {file: file.read_bytes() for file in request.out.rglob("*") if file.is_file()}
        with pytest.raises(DataError, match=message):
            decontaminate(request)
        assert {file: file.read_bytes() for file in request.out.rglob("*") if file.is_file()} == before

    cleaned = replace(request_of, out=tmp_path / "cleaned")
    run_stage(StageRequest("clean", request_of.inputs, cleaned.out, {}, make_step=_keep_all))
    refused(cleaned, 'cleaned: holds the output of another command .verb: "clean" there, "decontaminate" now')
    assert not (cleaned.out / "scan").exists()
    decontaminate(request_of)
    refused(replace(request_of, max_documents=1), "holds the output of another command .identity")
    refused(replace(request_of, max_documents=1, dry_run=True), "holds the output of another command .identity")
    write_jsonl(tmp_path / "raw" / "a.jsonl", [])
    refused(replace(request_of, out=tmp_path / "raw"), r"holds \['a.jsonl'\] but no scan")


def test_a_run_whose_scan_was_deleted_scans_again(request_of: DecontaminateRequest) -> None:
    whole = decontaminate(request_of)
    shutil.rmtree(request_of.out / "scan")
    assert decontaminate(request_of) == whole


def _keep_all() -> Step:
    return lambda document: None


def test_the_outcome_is_readable_in_each_state(request_of: DecontaminateRequest) -> None:
    def shown(request: DecontaminateRequest) -> str:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(render_outcome(decontaminate(request)))
        return console.export_text()

    assert "others are not" in shown(replace(request_of, task=(0, 2)))
    assert "nothing was written yet" in shown(replace(request_of, dry_run=True))
    whole = shown(request_of)
    assert (
        "\x1b" not in whole
        and "exam|test|1 in in/a.jsonl:3" in whole
        and "contaminated.exam" in whole
        and "50.00%" in whole
    )


def test_a_document_that_is_mostly_overlap_is_dropped_where_others_are_cut(
    request_of: DecontaminateRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.decontaminate.scan.MOST_HITS", 3)
    monkeypatch.setattr("data_tools.decontaminate.passes.MOST_HITS", 3)
    outcome = decontaminate(replace(request_of, action="cut"))  # the question has 5 n-grams
    assert outcome["summary"]["reasons"]["contaminated.exam"]["documents"] == 2
    assert outcome["report"]["sets"][0]["contaminated_items"] == 1


def test_lines_of_a_benchmark_keep_their_numbers_and_parquet_is_read_too(
    request_of: DecontaminateRequest, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "evals" / "quiz" / "test.jsonl").write_text(f'\n{{"q": "{QUESTION}"}}\n\n')
    pq.write_table(pa.Table.from_pylist([{"a": "no"}, {"a": CHOICE}]), tmp_path / "evals" / "dev.parquet")
    protected = Protected(against=(*request_of.protected.against, f"{tmp_path}/evals/dev.parquet"))
    decontaminate(replace(request_of, protected=protected))
    assert set(json.loads((request_of.out / "contaminated_items.json").read_text())) == {"exam|test|1", "evals|dev|1"}


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text('{}[]"a:1,\\n', max_size=60).map(str.encode)))
def test_benchmark_files_of_any_bytes_are_read_or_refused(content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        try:
            records = list(read_records(resolve_inputs([file.name])[0]))
        except DataError:
            return
        assert len(records) == sum(1 for line in content.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip())
