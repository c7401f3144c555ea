"""Suites: what is read, every fault at once, and hashes that change with what changes a score and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt.eval.suite import LocalTask, NamedTask, load_suite, suite_hash, task_hash
from cpt.problems import ConfigError

Tasks = list[dict[str, Any]]


def write_suite(folder: Path, general: Tasks, **fields: Any) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "groups": {"general": general}, **fields}))
    return path


def local(folder: Path, **fields: Any) -> dict[str, Any]:
    (folder / "items.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
    return {"name": "cloze", "file": "items.jsonl", "kind": "cloze", **fields}


def problems_of(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_suite(path)
    return [str(problem) for problem in caught.value.problems]


def test_paths_count_from_the_folder_of_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    suite = load_suite(write_suite(tmp_path, [{"task": "piqa"}, local(tmp_path)]))
    [(_, named), (group, own)] = suite.tasks()
    assert isinstance(named, NamedTask) and named.label == "piqa"
    assert isinstance(own, LocalTask) and own.file == tmp_path / "items.jsonl" and group == "general"


def test_every_fault_is_told_at_once_with_its_place(tmp_path: Path) -> None:
    tasks = [{"task": "piqa", "num_shot": 3}, {"name": "x y", "fil": "items.jsonl", "kind": "clozed"}]
    told = problems_of(write_suite(tmp_path, tasks, groupz=1))
    assert any("groups.general.0.num_shot = 3: unknown field; did you mean num_fewshot?" in line for line in told)
    assert any("groups.general.1.fil" in line and "did you mean file?" in line for line in told)
    assert any("groups.general.1.file: is required" in line for line in told)
    assert any("groups.general.1.kind = 'clozed'" in line and "minimal_pairs" in line for line in told)
    assert any("groups.general.1.name = 'x y'" in line for line in told)
    assert any("groupz = 1: unknown field; did you mean groups?" in line for line in told)


def test_one_fault_is_told_once(tmp_path: Path) -> None:
    [told] = problems_of(write_suite(tmp_path, [{"task": "piqa", "limit": 0}]))
    assert "groups.general.0.limit = 0" in told


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    [told] = problems_of(write_suite(tmp_path, [local(tmp_path, file="item.jsonl")]))
    assert "groups.general.0.file" in told and f"did you mean {tmp_path / 'items.jsonl'}?" in told


def test_items_of_another_ending_are_refused(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("a,b\n")
    [told] = problems_of(write_suite(tmp_path, [local(tmp_path, file="items.csv")]))
    assert "neither .jsonl nor .parquet" in told


def test_two_tasks_of_one_name_are_refused_and_a_name_of_its_own_helps(tmp_path: Path) -> None:
    twice = [{"task": "piqa"}, {"task": "piqa", "num_fewshot": 5}]
    [told] = problems_of(write_suite(tmp_path, twice))
    assert "groups.general.1.name = 'piqa': names two tasks" in told and "groups.general.0" in told
    twice[1]["name"] = "piqa_5shot"
    assert [task.label for _, task in load_suite(write_suite(tmp_path, twice)).tasks()] == ["piqa", "piqa_5shot"]


def test_python_in_a_suite_is_refused_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    path = tmp_path / "suite.yaml"
    path.write_text("name: small\ngroups:\n  general:\n    - task: piqa\n      metric: !function evil.f\n")
    [told] = problems_of(path)
    assert "names Python code (!function), which a suite may not run" in told


def test_examples_must_come_from_another_file_than_the_items(tmp_path: Path) -> None:
    [told] = problems_of(write_suite(tmp_path, [local(tmp_path, num_fewshot=2)]))
    assert "num_fewshot = 2: has no examples to draw from; name a fewshot_file" in told


def test_a_suite_name_is_a_folder_name(tmp_path: Path) -> None:
    [told] = problems_of(write_suite(tmp_path, [{"task": "piqa"}], name="../small"))
    assert "name = '../small'" in told


@pytest.mark.parametrize(
    "groups", [None, [], {}, {"general": None}, {"general": []}, {"general": {"task": "piqa"}}, {"general": ["piqa"]}]
)
def test_groups_of_another_shape_are_refused(tmp_path: Path, groups: object) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(json.dumps({"name": "small", "groups": groups}))
    assert all("groups" in told for told in problems_of(path))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_bytes(b"name: \xff\xfe")
    [told] = problems_of(path)
    assert "cannot be read as YAML" in told


def test_the_hash_follows_the_content_of_items_and_not_where_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first = load_suite(write_suite(tmp_path / "a", [local(tmp_path / "a")]))
    moved = load_suite(write_suite(tmp_path / "b", [local(tmp_path / "b")]))
    assert suite_hash(first) == suite_hash(moved)
    before = suite_hash(first)
    (tmp_path / "a" / "items.jsonl").write_text('{"prompt": "a", "answer": "c"}\n')
    assert suite_hash(first) != before == suite_hash(moved)


@pytest.mark.parametrize(
    "change", [{"prompt": "Q: {{prompt}}"}, {"limit": 1}, {"metric": "perplexity"}, {"delimiter": ""}]
)
def test_the_hash_of_a_task_follows_every_field(tmp_path: Path, change: dict[str, Any]) -> None:
    plain, other = (load_suite(write_suite(tmp_path, [local(tmp_path, **fields)])) for fields in ({}, change))
    [(_, before)], [(_, after)] = plain.tasks(), other.tasks()
    assert task_hash(before, plain) != task_hash(after, other)
    assert suite_hash(plain) != suite_hash(other)


def test_seed_and_batch_size_change_results_and_a_group_changes_its_name_only(tmp_path: Path) -> None:
    plain = load_suite(write_suite(tmp_path, [{"task": "piqa"}]))
    [(_, task)] = plain.tasks()
    for fields in ({"seed": 7}, {"batch_size": 1}):
        other = load_suite(write_suite(tmp_path, [{"task": "piqa"}], **fields))
        assert task_hash(task, other) != task_hash(task, plain)
