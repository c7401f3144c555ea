"""A suite is written for a file of items: its fields give the templates, or the message says which fields there are."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.eval.suite import load_suite
from cpt.eval.suite_draft import Draft, draft_text, write_draft
from cpt.problems import ConfigError
from cpt.rundir import DataError

ARC = {"id": "1", "question": "2 + 2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"}
PAIR = {"sentence_good": "It is.", "sentence_bad": "It are.", "pattern": "be"}


def items(folder: Path, *records: Any, name: str = "items.jsonl") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


def parts(item: dict[str, Any], **wishes: Any) -> dict[str, Any]:
    """The templates of the one task that is written for such items."""
    text = draft_text(Draft(Path("items.jsonl"), **wishes), Path("suite.yaml"), item)
    [task] = yaml.safe_load(text)["groups"]["general"]
    return {name: value for name, value in task.items() if name not in ("name", "file", "kind")}


@pytest.mark.parametrize(
    ("kind", "item", "templates"),
    [
        (
            "multiple_choice",
            {"question": "?", "choices": ["a", "b"], "answer": 1},
            {"prompt": "Question: {{question}}\nAnswer:", "choices": "{{choices}}", "answer": "{{answer}}"},
        ),
        (
            "multiple_choice",
            ARC,
            {
                "prompt": "Question: {{question}}\nAnswer:",
                "choices": "{{choices.text}}",
                "answer": "{{choices.label.index(answerKey)}}",
            },
        ),
        (
            "multiple_choice",
            {"goal": "g", "sol1": "a", "sol2": "b", "label": 0},
            {"prompt": "{{goal}}", "choices": ["{{sol1}}", "{{sol2}}"], "answer": "{{label}}"},
        ),
        ("cloze", {"prompt": "a", "answer": "b"}, {"prompt": "{{prompt}}", "answer": "{{answer}}"}),
        (
            "exact_match",
            {"question": "a", "target": "b"},
            {"prompt": "Question: {{question}}\nAnswer:", "answer": "{{target}}"},
        ),
        ("minimal_pairs", PAIR, {"choices": ["{{sentence_good}}", "{{sentence_bad}}"]}),
        ("minimal_pairs", {"good": "a", "bad": "b"}, {"choices": ["{{good}}", "{{bad}}"]}),
        ("perplexity", {"page": "p"}, {"text": "{{page}}"}),
    ],
)
def test_fields_of_public_benchmarks_are_known(kind: Any, item: dict[str, Any], templates: dict[str, Any]) -> None:
    assert parts(item, kind=kind) == templates


def test_a_template_that_is_given_counts() -> None:
    item = {"frage": "?", "wahl": ["a", "b"], "antwort": 0}
    given = {"prompt": "{{frage}}", "choices": ["{{wahl}}"], "answer": "{{antwort}}"}
    assert parts(item, kind="multiple_choice", **given) == given | {"choices": "{{wahl}}"}
    assert parts({"satz": "s"}, kind="perplexity", prompt="{{satz}}") == {"text": "{{satz}}"}


@pytest.mark.parametrize(
    ("kind", "item", "wishes", "named"),
    [
        ("cloze", {"frage": "?", "answer": "a"}, {}, "--prompt '{{frage}}'"),
        ("cloze", {"question": "?", "antwort": "a"}, {}, "the answer; the items have question, antwort"),
        ("multiple_choice", {"question": "?", "answer": 0}, {}, "--choices"),
        ("minimal_pairs", {"question": "?"}, {}, "the right and the wrong text"),
        ("perplexity", {"frage": "?"}, {}, "the text"),
        ("minimal_pairs", PAIR, {"subset_field": "term"}, "no field is known for term"),
    ],
)
def test_a_part_for_which_no_field_is_known_is_named_with_the_fields_there_are(
    kind: Any, item: dict[str, Any], wishes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parts(item, kind=kind, **wishes)
    assert named in str(caught.value)


def test_the_suite_that_is_written_can_be_read_and_its_first_item_is_shown(tmp_path: Path) -> None:
    file = items(tmp_path / "Items of ours", ARC, name="Arc (small).jsonl")
    out = tmp_path / "Our Suite.yaml"
    shown = write_draft(Draft(file, "multiple_choice", group="law", subset_field="id"), out)
    assert shown == {"prompt": "Question: 2 + 2?\nAnswer:", "choices": ["3", "4"], "answer": 1, "subset": "1"}
    suite = load_suite(out)
    [(group, task)] = suite.tasks()
    assert (suite.name, group, task.label) == ("our_suite", "law", "arc__small")
    assert next(iter(task.paths().values())) == file.resolve()
    assert "Items of ours/" in out.read_text() and str(tmp_path) not in out.read_text()


@pytest.mark.parametrize(
    ("records", "error", "named"),
    [
        ([PAIR, {"sentence_good": "It is."}], DataError, "line 2"),
        ([], DataError, "line 1"),
        (["text"], DataError, "must be an object"),
    ],
)
def test_items_that_the_templates_do_not_fit_leave_no_suite_behind(
    tmp_path: Path, records: list[Any], error: type[Exception], named: str
) -> None:
    out = tmp_path / "suite.yaml"
    with pytest.raises(error, match=named):
        write_draft(Draft(items(tmp_path, *records), "minimal_pairs"), out)
    assert not out.exists()


def test_a_suite_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "suite.yaml"
    out.write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        write_draft(Draft(items(tmp_path, PAIR), "minimal_pairs"), out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("name", ["nowhere.jsonl", "items.csv"])
def test_a_file_that_is_missing_or_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "items.csv").write_text("a,b\n")
    with pytest.raises(ConfigError, match=name):
        write_draft(Draft(tmp_path / name, "perplexity"), tmp_path / "suite.yaml")
