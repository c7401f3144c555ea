"""The verbs `cpt data decontaminate` and `cpt data inspect`, as they are typed."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpt.cli import app

QUOTED = "It was the best of times it was the worst of times it was the age of wisdom"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiz").mkdir()
    (tmp_path / "quiz" / "test.jsonl").write_text(json.dumps({"passage": QUOTED, "label": "yes"}) + "\n")
    texts = [f"He read aloud: {QUOTED}!", "nothing of the kind"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return tmp_path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["data", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_decontaminate_then_inspect_what_is_left(folder: Path) -> None:
    arguments = ("decontaminate", "--input", "a.jsonl", "--against", "quiz/*.jsonl", "--out", "decon")
    dry = json.loads(run(*arguments, "--dry-run", "--json"))
    assert dry["summary"] == {} and dry["report"]["sets"][0]["contaminated_items"] == 1
    assert "contaminated.quiz" in run(*arguments)
    items = json.loads((folder / "decon" / "contaminated_items.json").read_text())
    assert list(items) == ["quiz|test|0"]
    looked = run("inspect", "decon", "a.jsonl", "--html", "look.html", "--num-documents", "1")
    assert "decontaminate: kept 1 of" in looked and "nothing of the kind" in looked
    assert "nothing of the kind" in (folder / "look.html").read_text()
    assert [source["kind"] for source in json.loads(run("inspect", "decon", "a.jsonl", "--json"))["sources"]] == [
        "stage",
        "files",
    ]


def test_the_task_must_be_one_of_n(folder: Path) -> None:
    arguments = [
        "data",
        "decontaminate",
        "--input",
        "a.jsonl",
        "--against",
        "quiz/*.jsonl",
        "--out",
        "x",
        "--task",
        "2/2",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0 and "0 <= i < n" in str(result.exception or result.output)
