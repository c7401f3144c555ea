"""The whole of deduplication on tiny corpora: who goes, who stays, and that nothing but the documents decides."""

import hashlib
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.rundir import DataError
from data_tools.corpus.executors import PASSES
from data_tools.dedup import buckets, candidates, lines
from data_tools.dedup.columns import save_array
from data_tools.dedup.pipeline import dedup
from data_tools.dedup.removals import REMOVAL
from data_tools.dedup.request import DedupRequest, LineRule, Numbering, Source, Unit
from data_tools.sources import ReadOptions, read_documents, resolve_inputs

Write = Callable[[str, Sequence[str]], Path]
Make = Callable[..., str]


def request_of(out: Path, files: Mapping[str, Path | Sequence[Path]], **options: Any) -> DedupRequest:
    sources = tuple(
        Source(name, tuple(map(str, [given] if isinstance(given, Path) else given)), name == "against")
        for name, given in files.items()
    )
    return DedupRequest(sources, out, **({"workers": 1} | options))


def kept(out: Path, source: str) -> list[str]:
    return [document.text for document in read_stage(out / source / "documents")]


def rejects(out: Path, source: str) -> list[dict[str, Any]]:
    return [document.fields | {"text": document.text} for document in read_stage(out / source / "rejects")]


def read_stage(folder: Path) -> list[Any]:
    files = sorted(folder.iterdir())
    return [item for entry in resolve_inputs(list(map(str, files))) for item in read_documents(entry, ReadOptions())]


def tree_hash(out: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(out.rglob("*")):
        if path.is_file() and "tasks" not in path.relative_to(out).parts and path.name != "report.json":
            digest.update(f"{path.relative_to(out)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def without_work(report: dict[str, Any]) -> dict[str, Any]:
    """Which task wrote lock files is no part of the result."""
    return {key: value for key, value in report.items() if key != "work_bytes"}


def similarity_of(a: str, b: str, size: int = 5) -> float:
    sets = [{tuple(t[i : i + size]) for i in range(max(len(t) - size + 1, 1))} for t in (a.split(), b.split())]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_the_first_source_keeps_what_it_shares_and_the_report_says_who_lost_what(
    tmp_path: Path, write: Write, make_text: Make
) -> None:
    medical = write("medical", [make_text(1), make_text(2), make_text(2).upper()])
    general = write("general", [make_text(3), make_text(1) + "\n", make_text(2, fresh=3), make_text(2, fresh=40)])
    report = dedup(request_of(tmp_path / "out", {"medical": medical, "general": general}))
    assert kept(tmp_path / "out", "medical") == [make_text(1), make_text(2)]
    assert kept(tmp_path / "out", "general") == [make_text(3), make_text(2, fresh=40)]
    rows = {(row["kept"], row["removed"]): (row["exact"], row["near"]) for row in report["matrix"]}
    assert rows == {("medical", "medical"): (1, 0), ("medical", "general"): (1, 1)}
    assert report["cluster_sizes"] == {"2": 1, "3-4": 1}
    near = next(row for row in rejects(tmp_path / "out", "general") if row["reason"] == "dedup.near")
    assert near["detail"] == f"{53 / 59:.3f} like medical {medical}:2"
    assert near["origin"] == f"{general}:3" and near["id"] == "general2"
    pair = next(pair for pair in report["examples"] if pair["kind"] == "near")
    assert pair["kept"] == {"source": "medical", "file": str(medical), "record": 2, "excerpt": make_text(2)[:300]}
    sizes = {row["name"]: row for row in report["sources"]}
    removed = sizes["general"]["removed"]
    assert {reason: entry["documents"] for reason, entry in removed.items() if entry["documents"]} == {
        "dedup.exact": 1,
        "dedup.near": 1,
    }
    assert sizes["general"]["bytes"] == sizes["general"]["kept_bytes"] + sum(e["bytes"] for e in removed.values())
    assert not (tmp_path / "out" / "work").exists()


def test_a_reference_takes_documents_away_and_is_not_written(tmp_path: Path, write: Write, make_text: Make) -> None:
    heldout = write("heldout", [make_text(1), make_text(1), make_text(1, fresh=1), make_text(2, fresh=6)])
    train = write("train", [make_text(1, fresh=2), make_text(2), make_text(2, fresh=1), make_text(3)])
    report = dedup(request_of(tmp_path / "out", {"against": heldout, "train": train}))
    assert kept(tmp_path / "out", "train") == [make_text(3)]
    assert not (tmp_path / "out" / "against").exists()
    assert [(row["kept"], row["removed"], row["near"]) for row in report["matrix"]] == [("against", "train", 3)]
    assert report["sources"][0] == {
        "name": "against", "reference": True, "files": 1, "documents": 4, "bytes": len("".join(
            [make_text(1), make_text(1), make_text(1, fresh=1), make_text(2, fresh=6)])),
    }  # fmt: skip


def test_of_a_chain_only_what_is_like_a_kept_document_goes(tmp_path: Path, write: Write, make_text: Make) -> None:
    words = [f"w{i}" for i in range(120)]
    chain = [" ".join(words[start : start + 90]) for start in (0, 8, 16, 24)]
    assert all(similarity_of(a, b) > 0.8 for a, b in pairwise(chain)) and similarity_of(chain[0], chain[2]) < 0.75
    dedup(request_of(tmp_path / "out", {"all": write("chain", chain)}))
    assert kept(tmp_path / "out", "all") == [chain[0], chain[2]]
    assert [row["detail"].split(":")[-1] for row in rejects(tmp_path / "out", "all")] == ["1", "3"]


def test_without_near_only_equal_texts_go(tmp_path: Path, write: Write, make_text: Make) -> None:
    texts = [make_text(1), make_text(1, fresh=1), make_text(1) + " "]
    report = dedup(request_of(tmp_path / "out", {"all": write("all", texts)}, near=False))
    assert kept(tmp_path / "out", "all") == texts[:2]
    assert report["bands"] is None and report["examples"][0]["removed"]["excerpt"] == texts[2][:300]


def test_odd_documents_are_counted_and_nothing_is_lost(tmp_path: Path, write: Write) -> None:
    texts = ["", " \n ", "?", "!", "one two", "One  Two", "one three", "?", "日本語の文章。", "日本語の文章!"]
    odd = write("odd", texts)
    odd.write_bytes(odd.read_bytes() + b'{"no": 1}\nnot json\n')
    report = dedup(request_of(tmp_path / "out", {"odd": odd, "none": write("none", [])}))
    assert kept(tmp_path / "out", "odd") == [" \n ", "?", "!", "one two", "one three", "日本語の文章。"]
    assert sorted(row["reason"] for row in rejects(tmp_path / "out", "odd")) == [
        "bad_record.empty", "bad_record.no_text_key", "bad_record.not_json", "dedup.exact", "dedup.exact", "dedup.near",
    ]  # fmt: skip
    assert [row["documents"] for row in report["sources"]] == [9, 0]
    assert kept(tmp_path / "out", "none") == [] and (tmp_path / "out" / "none" / "summary.json").is_file()


def test_a_thousand_copies_become_one(tmp_path: Path, write: Write, make_text: Make) -> None:
    copies = write("copies", [make_text(1)] * 1000 + [make_text(1, fresh=1)] * 1000)
    report = dedup(request_of(tmp_path / "out", {"all": copies}))
    assert kept(tmp_path / "out", "all") == [make_text(1)]
    assert report["cluster_sizes"] == {"1025-2048": 1} and report["compared_pairs"] == 1


def test_the_same_file_in_two_sources_is_said(tmp_path: Path, write: Write, make_text: Make) -> None:
    file = write("file", [make_text(1), make_text(2)])
    report = dedup(request_of(tmp_path / "out", {"a": file, "b": file}))
    assert report["warnings"] == [f"{file}: in a and in b, which loses all of it"]
    assert kept(tmp_path / "out", "b") == []


def test_a_long_document_is_compared_like_any_other(
    tmp_path: Path, write: Write, make_text: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.dedup.shingles.PIECE_CHARS", 100)
    monkeypatch.setattr("data_tools.dedup.signatures.PIECE_CHARS", 100)
    long = make_text(1, num_words=500)
    texts = [long, make_text(2), long.replace(" ", "\n"), make_text(1, num_words=500, fresh=10)]
    dedup(request_of(tmp_path / "out", {"all": write("all", texts)}))
    assert kept(tmp_path / "out", "all") == texts[:2]


def test_boilerplate_shared_by_many_is_compared_a_bounded_number_of_times(
    tmp_path: Path, write: Write, make_text: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.dedup.clusters.COMPARED", 4)
    monkeypatch.setattr("data_tools.dedup.clusters.BUCKET_MEMORY", 4)
    texts = [make_text(1, fresh=10, version=version) for version in range(100)]  # 0.73 of each other
    report = dedup(request_of(tmp_path / "out", {"all": write("all", [*texts, *texts[::10]])}))
    assert kept(tmp_path / "out", "all") == texts
    assert report["candidates"] >= 90 and report["compared_pairs"] <= 400


def test_lines_that_repeat_go_from_every_document_and_copies_do_not_count(tmp_path: Path, write: Write) -> None:
    footer = "Subscribe to our newsletter for more of this!"
    texts = [
        f"{footer.upper() if i % 2 else footer}  \nstory number {i} has a line of its own, like all\nok\nok"
        for i in range(4)
    ]
    copies = ["a document that was copied often, and is kept once\nwith both of its lines, which is the point"] * 9
    heldout = write("heldout", [f"{line}\n{number}" for number, line in enumerate(copies)])
    files = {"against": heldout, "all": write("all", [*texts, footer, *copies])}
    report = dedup(request_of(tmp_path / "out", files, lines=LineRule(20, 3), near=False))
    assert kept(tmp_path / "out", "all") == [*(text.split("\n", 1)[1] for text in texts), copies[0]]
    assert [row["reason"] for row in rejects(tmp_path / "out", "all")].count("dedup.only_repeated_lines") == 1
    assert report["repeated_lines"] == 1 and report["repeated_line_occurrences"] == 5
    assert report["repeated_line_examples"] == [{"count": 5, "text": footer}]
    assert report["sources"][1]["removed_line_bytes"] == 4 * (len(footer) + 3)


def test_documents_of_short_lines_cost_no_memory_and_move_the_bar(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, steps = [], []
    monkeypatch.setattr(lines, "_write_counts", lambda file, held: written.append(len(held)) or 0)
    monkeypatch.setattr(lines, "advance", steps.append)
    short = write("short", [f"verse {i}\nof short lines" for i in range(2000)])
    unit = Unit(0, 0, resolve_inputs([str(short)])[0])
    for folder in ("removals", "lines"):
        (tmp_path / folder).mkdir()
    save_array(tmp_path / "removals" / "none.npy", np.empty(0, REMOVAL))
    numbering = Numbering.of([2000])
    counting = lines.CountLinesPass(
        (unit,), ReadOptions(), LineRule(), numbering, 0, tmp_path / "removals" / "none.npy", tmp_path / "lines"
    )
    assert counting(0) == {"lines": 0} and written == [0]
    assert sum(steps) == short.stat().st_size and len(steps) >= 8


FAMILIES = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 25), st.integers(0, 2)), min_size=1, max_size=24)


@settings(max_examples=12, deadline=None)
@given(FAMILIES, st.integers(1, 3), st.sampled_from([0.5, 0.7, 0.8, 0.95]))
def test_whoever_goes_is_like_one_who_stays_and_going_over_it_again_takes_nothing(
    families: list[tuple[int, int, int]], num_files: int, threshold: float
) -> None:
    texts = []
    for seed, fresh, version in families:
        words = [f"w{random.Random(seed * 1000 + i).randrange(10**6)}" for i in range(40 - fresh)]
        texts.append(" ".join([*words, *(f"x{version}y{i}" for i in range(fresh))]))
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number in range(num_files):
            files.append(Path(folder) / f"{number}.jsonl")
            files[-1].write_bytes(b"".join(orjson.dumps({"text": t}) + b"\n" for t in texts[number::num_files]))
        first, second = Path(folder) / "first", Path(folder) / "second"
        dedup(request_of(first, {"all": files}, threshold=threshold))
        stays = kept(first, "all")
        goes = [row["text"] for row in rejects(first, "all")]
        assert sorted([*stays, *goes]) == sorted(texts)
        for text in goes:
            assert max(similarity_of(text, other) for other in stays) >= threshold
        # nobody else: a pair among those who stay is below the threshold, but for the candidates banding misses
        missed = [(a, b) for i, a in enumerate(stays) for b in stays[:i] if similarity_of(a, b) >= threshold + 0.1]
        assert not missed
        dedup(request_of(second, {"all": first / "all"}, threshold=threshold))
        assert kept(second, "all") == stays and not rejects(second, "all")


def corpus(write: Write, make_text: Make) -> dict[str, list[Path]]:
    """Three files, two sources; every kind of duplicate, over borders of files and sources."""
    texts = [make_text(seed, fresh=fresh) for seed in range(12) for fresh in (0, 1, 2, 20)]
    texts += [make_text(seed) for seed in range(0, 12, 3)]
    texts = [f"{text}\na line that all of these documents have in common\n{text[:50]} of its own" for text in texts]
    random.Random(3).shuffle(texts)
    return {
        "a": [write("a0", texts[:20])],
        "b": [write("b0", texts[20:30]), write("b1", texts[30:])],
    }


def test_workers_parts_and_chunks_do_not_change_a_byte(
    tmp_path: Path, write: Write, make_text: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = corpus(write, make_text)
    request = request_of(tmp_path / "one", files, lines=LineRule())
    report = dedup(request)
    assert len(kept(tmp_path / "one", "b")) < 30 and report["repeated_lines"] == 1
    again = dedup(replace(request, out=tmp_path / "two", workers=2))
    monkeypatch.setattr(buckets, "PART_DOCUMENTS", 5)
    monkeypatch.setattr(candidates, "CHUNK_MEMBERS", 3)
    monkeypatch.setattr("data_tools.dedup.lines.PART_LINES", 7)
    monkeypatch.setattr("data_tools.dedup.lines._BUFFER", 4)
    monkeypatch.setattr("data_tools.dedup.signatures._BATCH_DOCUMENTS", 3)
    monkeypatch.setattr("data_tools.dedup.columns.BLOCK", 4)
    parts = dedup(replace(request, out=tmp_path / "three"))
    assert without_work(again) == without_work(report) == without_work(parts)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two") == tree_hash(tmp_path / "three")


def test_tasks_go_on_as_far_as_the_others_are_and_end_with_the_same_bytes(
    tmp_path: Path, write: Write, make_text: Make
) -> None:
    request = request_of(tmp_path / "one", corpus(write, make_text), lines=LineRule())
    report = dedup(request)
    reports = [dedup(replace(request, out=tmp_path / "tasks", task=(turn % 2, 2))) for turn in range(30)]
    assert reports[0] == {} and reports[-1] == reports[-2]
    assert without_work(reports[-1]) == without_work(report)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "tasks")
    assert dedup(replace(request, out=tmp_path / "rest", task=(1, 2))) == {}
    assert without_work(dedup(replace(request, out=tmp_path / "rest"))) == without_work(report)


def test_more_sources_need_no_more_turns(tmp_path: Path, write: Write, make_text: Make) -> None:
    files = [write(f"f{i}", [make_text(i), make_text(0)]) for i in range(18)]

    def turns(num_sources: int) -> int:
        out = tmp_path / f"out{num_sources}"
        request = request_of(out, {f"s{i}": files[2 * i : 2 * i + 2] for i in range(num_sources)})
        return next(turn for turn in range(40) if dedup(replace(request, task=(turn % 2, 2))))

    assert turns(9) == turns(2) <= 2 * PASSES["dedup"]


def test_killed_before_any_of_its_files_appears_it_goes_on_to_the_same_bytes(
    tmp_path: Path, write: Write, make_text: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(tmp_path / "one", corpus(write, make_text), lines=LineRule())
    report = dedup(request)
    rename, killed, kills = os.replace, replace(request, out=tmp_path / "killed"), 0
    while kills < 300:
        left = kills % 7  # up to six files and a marker make a unit

        def rename_some_files_then_die(source: Any, target: Any) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            rename(source, target)

        monkeypatch.setattr(os, "replace", rename_some_files_then_die)
        try:
            again = dedup(killed)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 20
    assert again == report and tree_hash(tmp_path / "one") == tree_hash(tmp_path / "killed")


def test_the_folder_of_another_request_and_changed_files_are_refused(
    tmp_path: Path, write: Write, make_text: Make
) -> None:
    file = write("all", [make_text(1)])
    request = request_of(tmp_path / "out", {"all": file})
    assert dedup(request) == dedup(request)
    with pytest.raises(DataError, match=r"near: \[0.8, 5\] there, \[0.9, 5\] now"):
        dedup(replace(request, threshold=0.9))
    write("all", [make_text(1), make_text(2)])
    with pytest.raises(DataError, match="holds the output of another command"):
        dedup(request)
    with pytest.raises(DataError, match=r"but no dedup.json; fix: --out with a new folder"):
        dedup(replace(request, out=tmp_path))


def test_bad_requests_are_refused_with_every_problem(tmp_path: Path) -> None:
    request = DedupRequest((Source("x", ("a.jsonl",), True),), tmp_path, threshold=1.5, shingle_size=0)
    with pytest.raises(DataError, match=r"--source is 'nothing'.*--threshold is 1.5.*--shingle-size is 0"):
        dedup(request)
    with pytest.raises(DataError, match=r"x: .*a.jsonl: no such file"):
        dedup(DedupRequest((Source("x", (str(tmp_path / "a.jsonl"),)),), tmp_path / "out"))
