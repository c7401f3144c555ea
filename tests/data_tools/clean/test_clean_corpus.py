"""`cpt data clean` from raw files to documents, rejects and counts; the dry run; through the command line."""

import json
from pathlib import Path

import orjson
import pytest
import zstandard
from typer.testing import CliRunner

from cpt.cli import app
from cpt.rundir import DataError
from data_tools.clean.clean_corpus import CleanRequest, clean, try_rules

PROSE = "The committee met on Tuesday to consider the report that the office had prepared with great care. It was late."
TEXTS = [
    PROSE,
    "tiny",
    f"{PROSE} Write to a@b.org.",
    "Der Ausschuss tagte am Dienstag und beriet über den Bericht.",
    "",
]
RULES = "rules:\n- fix_unicode\n- length: {min_characters: 10}\n- language: {keep: [en]}\n- pii\n"


def raw_files(folder: Path) -> CleanRequest:
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_bytes(
            b"".join(orjson.dumps({"text": t, "id": i}) + b"\n" for i, t in enumerate(TEXTS))
        )
    (folder / "clean.yaml").write_text(RULES)
    return CleanRequest(folder / "clean.yaml", (str(folder / "*.jsonl"),), folder / "out")


def records(file: Path) -> list[dict[str, object]]:
    return [
        orjson.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(file.open("rb")).read().splitlines()
    ]


def test_documents_rejects_and_counts_are_written(tmp_path: Path) -> None:
    summary = clean(raw_files(tmp_path))
    assert (summary["records"], summary["documents"]) == (10, 4)
    counts = {reason: entry["documents"] for reason, entry in summary["reasons"].items()}
    assert counts == {"bad_record.empty": 2, "language.other": 2, "length.short": 2}
    kept = records(tmp_path / "out" / "documents" / "00000.jsonl.zst")
    assert [entry["id"] for entry in kept] == [0, 2]
    assert kept[1]["text"] == f"{PROSE} Write to email@example.com." and kept[0]["language"] == "en"
    dropped = {entry["reason"]: entry for entry in records(tmp_path / "out" / "rejects" / "00001.jsonl.zst")}
    assert dropped["length.short"]["detail"] == "4 < 10" and dropped["length.short"]["text"] == "tiny"


def test_workers_and_tasks_change_nothing(tmp_path: Path) -> None:
    from dataclasses import replace

    request = raw_files(tmp_path)
    alone = clean(request)
    two = clean(replace(request, out=tmp_path / "two", workers=2))
    assert clean(replace(request, out=tmp_path / "tasks", task=(0, 2))) == {}
    tasks = clean(replace(request, out=tmp_path / "tasks", task=(1, 2)))
    assert alone["content_hash"] == two["content_hash"] == tasks["content_hash"]


def test_other_thresholds_do_not_go_into_the_same_folder(tmp_path: Path) -> None:
    request = raw_files(tmp_path)
    clean(request)
    request.config.write_text(RULES.replace("10", "11"))
    with pytest.raises(DataError, match="holds the output of another command"):
        clean(request)


def test_a_dry_run_writes_nothing_and_shows_each_rule_by_itself(tmp_path: Path) -> None:
    request = raw_files(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    facts = try_rules(request, 9)  # of two files: 4 and 5 records
    assert sorted(tmp_path.rglob("*")) == before
    assert (facts["records"], facts["documents"]) == (9, 4)
    alone = {rule["rule"]: (rule["rejects_alone"], rule["changed"]) for rule in facts["rules"]}
    assert alone["length"] == (2, 0) and alone["pii"] == (0, 2)
    assert alone["language"][0] >= 2  # "tiny" too may be of no language


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_the_verb_prints_a_table_or_json(tmp_path: Path) -> None:
    request = raw_files(tmp_path)
    told = ["clean", "--config", str(request.config), "--input", request.inputs[0], "--out", str(request.out)]
    assert json.loads(run(*told, "--json"))["documents"] == 4
    assert "language.other" in run(*told)
    assert "rejects alone" in run(*told[:5], "--dry-run")


def test_the_verb_lists_its_rules_and_says_what_it_needs() -> None:
    assert "gopher_repetition" in run("clean", "--list-rules")
    result = CliRunner().invoke(app, ["data", "clean"])
    assert result.exit_code == 2 and "--config" in result.output


def test_a_model_is_trained_by_the_verb_and_used_by_the_rule(tmp_path: Path) -> None:
    request = raw_files(tmp_path)
    model = tmp_path / "model.npz"
    facts = json.loads(
        run("train-ngram", "--input", request.inputs[0], "--out", str(model), "--min-count", "1", "--json")
    )
    assert facts["documents"] == 10 and facts["order"] == 3 and facts["file_bytes"] == model.stat().st_size
    request.config.write_text(f"rules:\n- ngram_perplexity: {{model: {model}, max: 1000}}\n")
    assert clean(request)["documents"] == 8
