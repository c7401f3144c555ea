"""A suite for a file of items, written from the names of their fields. No torch, no lm_eval.

Owns which field is taken for what, unless a template says so; the result is a YAML file to read, edit and run. Refuses
items without a field that it knows for a part of the task, naming the fields that there are.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import yaml

from cpt.eval.suite import Kind, LocalTask, Suite, load_suite
from cpt.eval.task_files import items_of, write_local_task
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, write_atomic
from data_tools.decontaminate.protected_texts import read_records
from data_tools.readers.records import Input

# Names that public benchmarks give their fields; the first one that an item has counts.
PROMPTS = ("question", "prompt", "query", "goal", "ctx", "context", "stem", "sentence", "premise")
CHOICES = ("choices", "options", "endings", "mc_answers")
SINGLE_CHOICES = (("sol1", "sol2"), ("choice1", "choice2"), ("option1", "option2"), ("A", "B", "C", "D"))
ANSWERS = ("answer", "label", "gold", "target", "answerKey", "answer_index", "completion", "continuation")
PAIRS = (("sentence_good", "sentence_bad"), ("good", "bad"), ("right", "wrong"), ("chosen", "rejected"))
TEXTS = ("text", "page", "content", "document", "sentence")


@dataclass(frozen=True)
class Draft:
    """What is asked for; a template that is empty is guessed from the items' fields."""

    file: Path
    kind: Kind
    group: str = "general"
    prompt: str = ""
    choices: Sequence[str] = ()
    answer: str = ""
    subset_field: str | None = None


def write_draft(draft: Draft, out: Path) -> dict[str, Any]:
    """Write the suite of one task that reads ``draft.file``; returns the first item as the model will see it.

    Raises:
        ConfigError: ``out`` is taken, no field is known for a part of the task, or a template is none.
        DataError: items that cannot be read, or that a template does not fit, with file, line and field.
    """
    if out.exists():
        raise ConfigError(Problem("--out", str(out), "is there already", "give a new name, or edit that file"))
    write_atomic(out.absolute(), draft_text(draft, out, _first_item(draft.file)))
    try:
        return _first_as_seen(load_suite(out))
    except BaseException:
        out.unlink()
        raise


def _first_item(file: Path) -> dict[str, Any]:
    if file.suffix not in (".jsonl", ".parquet") or not file.is_file():
        raise ConfigError(Problem("FILE", str(file), "is not a .jsonl or .parquet file", "write one item per line"))
    item = next(iter(read_records(Input(str(file), file.suffix))), (0, None))[1]
    if not isinstance(item, dict) or not item:
        raise DataError(f"{file}: line 1: an item must be an object of fields, not {item!r:.60}")
    return item


def _first_as_seen(suite: Suite) -> dict[str, Any]:
    """All items are rendered, so that one that a template does not fit is found now."""
    [(_, task)] = suite.tasks()
    assert isinstance(task, LocalTask), "a draft has one task, over a local file"
    with TemporaryDirectory() as folder:
        write_local_task(task, Path(folder))
        [found] = pq.read_table(items_of(task, Path(folder))).slice(0, 1).to_pylist()
    return {name: value for name, value in found.items() if name != "line" and value != ""}


def draft_text(draft: Draft, out: Path, item: Mapping[str, Any]) -> str:
    """The suite as YAML; the file of items is named relative to ``out``."""
    task: dict[str, Any] = {
        "name": _plain(draft.file.stem),
        "file": os.path.relpath(draft.file.absolute(), out.absolute().parent),
        "kind": draft.kind,
        **_templates(draft, item),
    }
    if draft.subset_field:
        if draft.subset_field not in item:
            raise _no_field("--subset-field", draft.subset_field, item)
        task["subset_field"] = draft.subset_field
    suite = {"name": _plain(out.stem), "groups": {draft.group: [task]}}
    return yaml.safe_dump(suite, sort_keys=False, allow_unicode=True, width=1000)


def _plain(name: str) -> str:
    """A file's name as the name of a suite or task: small letters, digits, _ and -."""
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "_" for letter in name)
    return kept.lower().strip("_") or "items"


def _templates(draft: Draft, item: Mapping[str, Any]) -> dict[str, Any]:
    if draft.kind == "perplexity":
        return {"text": draft.prompt or _field_of(item, TEXTS, "--prompt", "the text")}
    if draft.kind == "minimal_pairs":
        return {"choices": list(draft.choices) or _pair_of(item)}
    parts: dict[str, Any] = {"prompt": draft.prompt or _prompt_of(item)}
    if draft.kind == "multiple_choice":
        parts["choices"] = _one_or_all(draft.choices) or _choices_of(item)
    return {**parts, "answer": draft.answer or _answer_of(item)}


def _one_or_all(templates: Sequence[str]) -> str | list[str]:
    return templates[0] if len(templates) == 1 else list(templates)


def _prompt_of(item: Mapping[str, Any]) -> str:
    field = _field_of(item, PROMPTS, "--prompt", "the prompt")
    return f"Question: {field}\nAnswer:" if field == "{{question}}" else field


def _choices_of(item: Mapping[str, Any]) -> str | list[str]:
    for name in CHOICES:
        if isinstance(item.get(name), list):
            return f"{{{{{name}}}}}"
        if isinstance(item.get(name), dict) and "text" in item[name]:  # as in ARC: {"text": [...], "label": [...]}
            return f"{{{{{name}.text}}}}"
    for names in SINGLE_CHOICES:
        if all(name in item for name in names):
            return [f"{{{{{name}}}}}" for name in names]
    raise _no_field("--choices", "the choices", item)


def _answer_of(item: Mapping[str, Any]) -> str:
    labelled = next((name for name in CHOICES if isinstance(item.get(name), dict) and "label" in item[name]), None)
    if labelled and "answerKey" in item:
        return f"{{{{{labelled}.label.index(answerKey)}}}}"
    return _field_of(item, ANSWERS, "--answer", "the answer")


def _pair_of(item: Mapping[str, Any]) -> list[str]:
    for names in PAIRS:
        if all(name in item for name in names):
            return [f"{{{{{name}}}}}" for name in names]
    raise _no_field("--choices", "the right and the wrong text", item)


def _field_of(item: Mapping[str, Any], names: Sequence[str], option: str, part: str) -> str:
    found = next((name for name in names if name in item), None)
    if found is None:
        raise _no_field(option, part, item)
    return f"{{{{{found}}}}}"


def _no_field(option: str, part: str, item: Mapping[str, Any]) -> ConfigError:
    fix = f"give a template such as {option} '{{{{{next(iter(item), 'field')}}}}}'"
    if option == "--subset-field":
        fix = "give one of these"
    fields = ", ".join(item)
    return ConfigError(Problem(option, None, f"no field is known for {part}; the items have {fields}", fix))
