import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cpt.data_cli import data_app
from cpt.rundir import DataError
from data_tools.dedup.request import Source, parse_sources

Write = Callable[[str, Sequence[str]], Path]


def test_sources_keep_their_order_and_references_come_first() -> None:
    assert parse_sources(["b=x/*.jsonl", "a=y", "b=z=1"], ["held.jsonl"]) == (
        Source("against", ("held.jsonl",), True),
        Source("b", ("x/*.jsonl", "z=1")),
        Source("a", ("y",)),
    )


@pytest.mark.parametrize(
    "text", ["x.jsonl", "=x", "a=", "../a=x", "a/b=x", "work=x", "against=x", "report.json=x", "dedup.json=x", ".a=x"]
)
def test_a_source_without_a_usable_name_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="--source"):
        parse_sources([text], [])


def test_the_verb_writes_folders_that_tokenize_takes_and_prints_what_it_did(
    tmp_path: Path, write: Write, make_text: Callable[..., str]
) -> None:
    domain = write("domain", [make_text(1), make_text(2)])
    general = write("general", [make_text(1, fresh=2), make_text(3)])
    command = ["dedup", "--source", f"domain={domain}", "--source", f"general={general}", "--workers", "1"]
    result = CliRunner().invoke(data_app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "near 0.93" in result.output and "goes from general" in result.output
    again = CliRunner().invoke(data_app, [*command, "--out", str(tmp_path / "out"), "--json"])
    assert json.loads(again.output)["sources"][1]["kept_documents"] == 1
    onward = CliRunner().invoke(
        data_app, ["dedup", "--source", f"x={tmp_path / 'out' / 'general'}", "--out", str(tmp_path / "next"), "--lines"]
    )
    assert onward.exit_code == 0 and "no duplicates" in onward.output


def test_a_task_whose_others_are_missing_says_so(tmp_path: Path, write: Write, make_text: Callable[..., str]) -> None:
    files = [write(name, [make_text(1)]) for name in ("a", "b")]
    command = ["dedup", *(part for file in files for part in ("--source", f"x={file}")), "--task", "0/2"]
    result = CliRunner().invoke(data_app, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0 and "the same command again" in result.output
