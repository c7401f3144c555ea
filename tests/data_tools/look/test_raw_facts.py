"""What `cpt data inspect` says about raw files, and about what a stage left."""

import json
from pathlib import Path
from typing import Any

import pytest

from cpt.rundir import DataError
from data_tools.corpus.document import Document, Reject, Step
from data_tools.corpus.stage import StageRequest, run_stage
from data_tools.look import raw_facts as module
from data_tools.look.inspection import fact_rows, inspect_sources
from data_tools.look.store_facts import Look
from data_tools.look.text_tally import TextTally, script_of
from data_tools.train_tokenizer import train_bpe

LINE = "All rights are reserved by the makers of this page."


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b"):
        records = [{"text": f"Text {n} of {name} is about the weather.\n{LINE}", "id": f"{name}{n}", "site": f"{n % 2}.org"}
                   for n in range(10)]  # fmt: skip
        lines = [json.dumps(record) for record in records] + ["no JSON", json.dumps({"text": records[0]["text"]})]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def facts_of(path: Path | str, **given: Any) -> dict[str, Any]:
    (source,) = json.loads(json.dumps(inspect_sources([path], Look(**given))))["sources"]
    assert isinstance(source, dict)
    return source


def test_a_folder_of_files_is_counted_to_its_end_when_it_is_small(corpus: Path) -> None:
    facts = facts_of(corpus)
    assert (facts["kind"], facts["num_files"], facts["bad_records"]) == ("files", 2, 2)
    assert facts["sample"] == {"documents": 22, "of": 22, "how": "all of them", "shortened": 0}
    assert facts["duplicates"] == {"documents": 2, "share": round(2 / 22, 4)}
    assert facts["repeated_lines"][0] == {"line": LINE, "count": 22}
    assert facts["fields"] == {"site": [["0.org", 10], ["1.org", 10]]}  # ids are no source
    assert sorted(count for _, count in facts["files"]) == [11, 11]
    assert facts["lengths"]["unit"] == "characters" and facts["tokens_per_word"] is None


def test_a_large_corpus_is_seen_by_the_first_documents_of_its_files(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = facts_of(corpus, sample=6)
    assert facts["sample"] == {"documents": 6, "of": None, "how": "the first of each of 2 file(s)", "shortened": 0}
    monkeypatch.setattr(module, "MOST_FILES", 1)
    assert facts_of(corpus, sample=100)["sample"]["how"] == "the first of each of 1 file(s)"


def test_fertility_comes_with_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    facts = facts_of(corpus, tokenizer=train_bpe([LINE], out=tmp_path / "bpe", vocab_size=280))
    assert facts["tokens_per_word"] > 1 and facts["bytes_per_token"] == facts["characters_per_token"] > 0.9


def test_a_tokenizer_without_eos_counts_as_well(corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_bpe([LINE], out=tmp_path / "bpe", vocab_size=280)
    expected = facts_of(corpus, tokenizer=tokenizer)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tokenizer / name).unlink(missing_ok=True)
    assert facts_of(corpus, tokenizer=tokenizer) == expected


def test_urls_and_names_of_the_hub_stay_what_they_are(corpus: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe("/looked/a.jsonl", (corpus / "a.jsonl").read_bytes())
    remote, local = facts_of("memory://looked/a.jsonl"), facts_of(f"file://{corpus}/a.jsonl")
    assert (remote["label"], remote["path"]) == ("looked/a.jsonl", "memory://looked/a.jsonl")
    assert remote["lengths"] == local["lengths"] and local["label"] == "corpus/a.jsonl"
    with pytest.raises(DataError, match="hf://a/b/c/d/e: not a hub name"):
        facts_of("hf://a/b/c/d/e")


def test_a_stage_tells_what_it_dropped(corpus: Path, tmp_path: Path) -> None:
    run_stage(StageRequest("clean", (f"{corpus}/*.jsonl",), tmp_path / "out", {}, make_step=_drop_text_three))
    facts = facts_of(tmp_path / "out")
    assert facts["kind"] == "stage" and facts["stage"]["reasons"] == {"number.three": 2, "bad_record.not_json": 2}
    rows = dict(fact_rows([facts]))
    assert rows["stage"] == ["clean: kept 20 of 24"] and "number.three 2" in rows["dropped for"][0]
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(DataError, match="out"):
        facts_of(tmp_path / "out")


def _drop_text_three() -> Step:
    def step(document: Document) -> Reject | None:
        return Reject("number.three") if document.text.startswith("Text 3") else None

    return step


def test_sources_stand_side_by_side(corpus: Path) -> None:
    sources = inspect_sources([corpus / "a.jsonl", f"{corpus}/b*"], Look())["sources"]
    assert [source["label"] for source in sources] == ["corpus/a.jsonl", "corpus/b*"]
    assert dict(fact_rows(sources))["looked at"] == ["11 documents (all of them)"] * 2


def test_lines_are_forgotten_only_when_they_were_seen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.look.text_tally.MOST_LINES", 50)
    tally = TextTally(script_of)
    for number in range(200):
        tally.add(f"a line that is here but once {number}\n{LINE}\n{LINE}")
    (top, *rest) = tally.facts()["repeated_lines"]
    assert top == {"line": LINE, "count": 400} and not rest


@pytest.mark.parametrize(
    ("text", "script"), [("plain", "LATIN"), ("ひらがなのみ", "HIRAGANA"), ("漢字", "CJK"), ("12 !", "no letters")]
)
def test_without_the_language_package_the_script_is_told(text: str, script: str) -> None:
    assert script_of(text) == script
