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


def test_what_looks_like_markup_is_shown_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (folder / "b[").mkdir()
    for name in ("a[a-c,0-2].jsonl", "b[/b].jsonl", "c:smile:.jsonl"):
        (folder / name).write_text('{"text": "a [red]word[/] of text"}\n')
        looked = run("inspect", name)
        assert name in looked and "a [red]word[/] of text" in looked
    assert "b[/b].npz" in run("train-ngram", "--input", "a.jsonl", "--out", "b[/b].npz")
    assert "[en, de]" in run("clean", "--list-rules")


def test_an_inspected_tokenizer_needs_no_eos_and_a_url_no_path(folder: Path) -> None:
    import fsspec

    from data_tools.train_tokenizer import train_bpe

    train_bpe([QUOTED], out=folder / "bpe", vocab_size=270)
    (folder / "bpe" / "tokenizer_config.json").unlink(missing_ok=True)
    fsspec.filesystem("memory").pipe("/shelf/a.jsonl", (folder / "a.jsonl").read_bytes())
    assert "tokens per word" in run("inspect", "memory://shelf/a.jsonl", "--tokenizer", "bpe/tokenizer.json")


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
