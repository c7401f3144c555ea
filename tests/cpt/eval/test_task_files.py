"""Local items made into task files: each kind by hand, and every fault with its file, line and field."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.eval.suite import LocalTask, NamedTask
from cpt.eval.task_files import check_named_items, write_local_task, write_named_task
from cpt.problems import ConfigError
from cpt.rundir import DataError

QUESTION = {"question": "Who?", "options": ["me", "you"], "label": 1, "kind": "easy"}
TEMPLATES = {"prompt": "Q: {{question}}\nA:", "choices": "{{options}}", "answer": "{{label}}"}


def task(folder: Path, items: list[Any] | bytes, **fields: Any) -> LocalTask:
    path = folder / "own.jsonl"
    lines = items if isinstance(items, bytes) else "".join(json.dumps(item) + "\n" for item in items).encode()
    path.write_bytes(lines)
    return LocalTask(**{"name": "own", "file": path, "kind": "multiple_choice", **fields})


def written(made: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The YAML, and the items that it reads."""
    raw = yaml.safe_load(made.read_text())
    return raw, pq.read_table(raw["dataset_kwargs"]["data_files"]["test"]).to_pylist()


def test_multiple_choice_has_prompt_choices_and_the_number_of_the_answer(tmp_path: Path) -> None:
    raw, items = written(write_local_task(task(tmp_path, [QUESTION], subset_field="kind", **TEMPLATES), tmp_path))
    assert items == [{"prompt": "Q: Who?\nA:", "choices": ["me", "you"], "answer": 1, "subset": "easy", "line": 1}]
    assert raw["output_type"] == "multiple_choice" and raw["doc_to_text"] == "prompt"
    assert [entry["metric"] for entry in raw["metric_list"]] == ["acc", "acc_norm"]


@pytest.mark.parametrize(("answer", "index"), [("you", 1), (0, 0), ("1", 1), ("me", 0)])
def test_an_answer_is_a_number_from_0_or_the_text_of_a_choice(tmp_path: Path, answer: object, index: int) -> None:
    _, [item] = written(write_local_task(task(tmp_path, [{**QUESTION, "label": answer}], **TEMPLATES), tmp_path))
    assert item["answer"] == index


def test_choices_can_be_a_template_each(tmp_path: Path) -> None:
    fields = {**TEMPLATES, "choices": ("{{question}} yes", "no"), "answer": "0"}
    _, [item] = written(write_local_task(task(tmp_path, [QUESTION], **fields), tmp_path))
    assert item["choices"] == ["Who? yes", "no"] and item["answer"] == 0


def test_an_expression_may_look_into_nested_fields_as_in_arc(tmp_path: Path) -> None:
    arc = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
    fields = {"prompt": "{{question}}", "choices": "{{choices.text}}", "answer": "{{choices.label.index(answerKey)}}"}
    _, [item] = written(write_local_task(task(tmp_path, [arc], **fields), tmp_path))
    assert (item["choices"], item["answer"]) == (["a", "b"], 1)


def test_minimal_pairs_are_blimp_fields_with_the_right_one_first(tmp_path: Path) -> None:
    pair = {"sentence_good": "He runs.", "sentence_bad": "He run."}
    raw, [item] = written(write_local_task(task(tmp_path, [pair], kind="minimal_pairs"), tmp_path))
    assert item == {"prompt": "", "choices": ["He runs.", "He run."], "answer": 0, "subset": "", "line": 1}
    assert [entry["metric"] for entry in raw["metric_list"]] == ["acc"] and raw["target_delimiter"] == " "


def test_a_cloze_answer_carries_its_delimiter_and_an_exact_match_does_not(tmp_path: Path) -> None:
    items = [{"prompt": "one two", "answer": "three "}]
    cloze, [first] = written(write_local_task(task(tmp_path, items, kind="cloze"), tmp_path))
    assert first["answer"] == " three " and cloze["target_delimiter"] == ""
    match, [second] = written(write_local_task(task(tmp_path, items, kind="exact_match", stop=["."]), tmp_path))
    assert second["answer"] == "three" and match["generation_kwargs"]["until"] == ["."]


def test_an_item_may_have_a_field_named_self(tmp_path: Path) -> None:
    items = [{"self": False, "prompt": "one", "answer": "two"}]
    _, [item] = written(write_local_task(task(tmp_path, items, kind="cloze", prompt="{{prompt}}:"), tmp_path))
    assert (item["prompt"], item["answer"]) == ("one:", " two")


def test_perplexity_reads_the_whole_text(tmp_path: Path) -> None:
    raw, [item] = written(write_local_task(task(tmp_path, [{"text": " a b\n"}], kind="perplexity"), tmp_path))
    assert item["text"] == " a b\n" and raw["output_type"] == "loglikelihood_rolling"
    assert raw["metric_list"][0]["metric"] == "bits_per_byte"


def test_parquet_is_read_like_lines_and_blank_lines_keep_their_numbers(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"prompt": "a", "answer": "b"}] * 2), tmp_path / "own.parquet")
    _, items = written(write_local_task(LocalTask(name="p", file=tmp_path / "own.parquet", kind="cloze"), tmp_path))
    assert [item["line"] for item in items] == [1, 2]
    lines = b'{"prompt": "a", "answer": "b"}\n\n{"prompt": "c", "answer": "d"}\n'
    _, items = written(write_local_task(task(tmp_path, lines, kind="cloze"), tmp_path))
    assert [item["line"] for item in items] == [1, 3]


def test_few_shot_examples_come_from_their_own_file(tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text('{"prompt": "x", "answer": "y"}\n')
    fields = {"kind": "cloze", "fewshot_file": tmp_path / "shots.jsonl", "num_fewshot": 1}
    raw, _ = written(write_local_task(task(tmp_path, [{"prompt": "a", "answer": "b"}], **fields), tmp_path))
    assert raw["num_fewshot"] == 1 and raw["fewshot_split"] == "fewshot"
    assert pq.read_table(raw["dataset_kwargs"]["data_files"]["fewshot"])["prompt"].to_pylist() == ["x"]


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1).filter(str.strip), st.text())
def test_what_stands_in_an_item_is_never_taken_for_a_template(tmp_path_factory: Any, answer: str, prompt: str) -> None:
    folder = tmp_path_factory.mktemp("items")
    item = {"prompt": prompt + "{{ 1 + 1 }}{% raw %}", "answer": answer}
    _, [found] = written(write_local_task(task(folder, [item], kind="cloze"), folder))
    assert found["prompt"] == item["prompt"] and found["answer"] == " " + answer


FAULTS = [
    ({key: QUESTION[key] for key in ("question", "options", "kind")}, "field 'answer' cannot be made from '{{label}}'"),
    ({**QUESTION, "label": None}, "field 'answer'.*null"),
    ({**QUESTION, "options": []}, "field 'choices' holds 0 of them; two are needed"),
    ({**QUESTION, "options": ["me"]}, "field 'choices' holds 1 of them"),
    ({**QUESTION, "options": ["me", " "]}, "field 'choices' is empty at number 1"),
    ({**QUESTION, "options": ["me", None]}, "field 'choices' is empty at number 1"),
    ({**QUESTION, "question": None}, "field 'prompt' cannot be made from .*: a field is null"),
    ({**QUESTION, "options": "me"}, "field 'choices' must be a list, not 'me'"),
    ({**QUESTION, "label": 2}, "field 'answer' = 2 is neither one of the 2 choices nor a number from 0 to 1"),
    ({**QUESTION, "label": -1}, "field 'answer' = -1 is neither"),
    ({**QUESTION, "label": True}, "field 'answer' = True is neither"),
    ({**QUESTION, "label": "them"}, "field 'answer' = 'them' is neither"),
    ({**QUESTION, "kind": None}, "field 'kind' is missing"),
    ([1, 2], "an item must be an object of fields"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "told"), FAULTS, ids=[told[:40] for _, told in FAULTS])
def test_a_fault_names_file_line_and_field(tmp_path: Path, item: Any, told: str) -> None:
    with pytest.raises(DataError, match=rf"own\.jsonl: line 2: {told}"):
        write_local_task(task(tmp_path, [QUESTION, item, QUESTION], subset_field="kind", **TEMPLATES), tmp_path)


def test_the_first_five_faults_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        write_local_task(task(tmp_path, [{"text": " "}] * 8, kind="perplexity"), tmp_path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and "line 5: field 'text' is empty" in lines[4] and lines[5] == "and 3 more like these"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "\xff", "answer": "b"}\n', "line 2"),
        (b'{"prompt": "a", "answer": "b"}\n{"prompt": "c", "ans', "line 2"),
        (b"", "holds no items"),
        (b"\n\n", "holds no items"),
    ],
    ids=["not UTF-8", "truncated", "empty", "blank"],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, content: bytes, told: str) -> None:
    with pytest.raises(DataError, match=rf"own\.jsonl: .*{told}|{told}"):
        write_local_task(task(tmp_path, content, kind="cloze"), tmp_path)


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"own\.parquet"):
        write_local_task(LocalTask(name="own", file=tmp_path / "own.parquet", kind="cloze"), tmp_path)


@pytest.mark.parametrize("template", ["{{prompt", "{% if %}", "{{ prompt | nosuchfilter }}"])
def test_a_template_that_is_none_is_the_suites_fault(tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match=r"own\.prompt = .*is not a template"):
        write_local_task(task(tmp_path, [QUESTION], kind="cloze", prompt=template), tmp_path)


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }} x"])
def test_templates_run_in_a_sandbox(tmp_path: Path, template: str) -> None:
    with pytest.raises(DataError, match="line 1: field 'prompt' cannot be made"):
        write_local_task(task(tmp_path, [{"answer": "x"}], kind="cloze", prompt=template), tmp_path)


def test_one_of_lm_evals_tasks_keeps_its_yaml_and_reads_local_files(tmp_path: Path) -> None:
    named = NamedTask(task="arc_easy", data={"test": tmp_path / "a.jsonl"}, num_fewshot=0)
    raw = yaml.safe_load(write_named_task(named, Path("original.yaml"), tmp_path).read_text())
    assert raw["include"] == "original.yaml" and raw["task"] == "arc_easy" and raw["num_fewshot"] == 0
    assert raw["dataset_path"] == "json" and raw["test_split"] == "test" and raw["training_split"] is None


def test_items_of_a_named_task_have_the_fields_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"goal": "a", "sol1": "b"}\n{"goal": "c"}\n{"goal": "d", "sol1": null}\n')
    with pytest.raises(DataError) as caught:
        check_named_items(NamedTask(task="piqa", data={"test": path}))
    assert str(caught.value).splitlines() == [
        f"{path}: line 2: field 'sol1' is missing; the first item has it",
        f"{path}: line 3: field 'sol1' is missing; the first item has it",
    ]


def test_a_null_in_the_first_item_of_a_named_task_asks_nothing_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"goal": "a", "note": null}\n{"goal": "c"}\n')
    check_named_items(NamedTask(task="piqa", data={"test": path}))
