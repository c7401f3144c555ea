"""Task files for lm_eval: from local items and templates, and of its own tasks on local data. No torch, no lm_eval.

A local task becomes two files that the plain ``lm_eval --include_path FOLDER`` reads, too:

    NAME.items.parquet   every item as the model sees it: prompt, choices, answer, subset, its line in the user's file
    NAME.yaml            the task over these fields

The items are a table because a reader of JSON guesses types: answers that all look like dates come back as dates.

Templates are rendered here, in jinja's sandbox, so that a fault names file, line and field, and nothing that came with
data is run. A template that is one expression, ``"{{choices}}"``, gives its value rather than its text. One of
lm_eval's own tasks keeps its YAML, which is included, and reads local files in place of its dataset.
Refuses items without a field that a template names, without choices, or with an answer that is none of them.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import TemplateError, UndefinedError
from jinja2.runtime import StrictUndefined, Undefined
from jinja2.sandbox import SandboxedEnvironment

from cpt.eval.suite import LocalTask, NamedTask
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, write_atomic
from data_tools.decontaminate.protected_texts import read_records
from data_tools.readers.records import Input

FAULTS_SHOWN = 5
Item = dict[str, Any]


def write_local_task(task: LocalTask, folder: Path) -> Path:
    """Write both files of a local task; returns the YAML.

    Raises:
        ConfigError: a template that is none.
        DataError: the first faults of the items, each with file, line and field.
    """
    render = _renderer(task)
    files = {"test": items_of(task, folder)}
    _write_items(files["test"], _rendered(task.file, render))
    if task.fewshot_file is not None:
        files["fewshot"] = folder / f"{task.name}.fewshot.parquet"
        _write_items(files["fewshot"], _rendered(task.fewshot_file, render))
    raw = {"task": task.name, **_dataset(files, folder), **_scoring(task), "num_fewshot": task.num_fewshot}
    return _write_yaml(folder / f"{task.name}.yaml", raw)


def items_of(task: LocalTask, folder: Path) -> Path:
    """Where ``write_local_task`` puts the items that are scored."""
    return folder / f"{task.name}.items.parquet"


def write_named_task(task: NamedTask, original: Path, folder: Path) -> Path:
    """Write a YAML that includes lm_eval's own (``original``) and states what the suite changes; returns it."""
    raw: dict[str, Any] = {"include": str(original), "task": task.task}
    if task.data is not None:
        raw |= _dataset(task.data.paths(), folder)
    if task.num_fewshot is not None:
        raw["num_fewshot"] = task.num_fewshot
    return _write_yaml(folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', task.label)}.yaml", raw)


def check_named_items(task: NamedTask) -> list[int]:
    """Whether the local files of one of lm_eval's tasks can be read, and every item has the fields of the first one;
    returns the lines, from 1, of the items to score, none without a file.

    Raises:
        DataError: with file, line and field.
    """
    lines: dict[str, list[int]] = {}
    for field_of_suite, path in task.paths().items():
        faults, wanted = [], None
        for line, record in _records(path):
            lines.setdefault(field_of_suite, []).append(line)
            if wanted is None:
                wanted = [field for field, value in record.items() if value is not None]
            faults += [_fault(path, line, field, "is missing; the first item has it") for field in wanted
                       if record.get(field) is None]  # fmt: skip
        _raise_first(faults)
        if wanted is None:
            raise DataError(f"{path}: holds no items; write one per line")
    return lines.get("data.test", [])


# --- items ------------------------------------------------------------------------------------------------------------


def _records(path: Path) -> Iterator[tuple[int, Item]]:
    """(line or row from 1, fields) of every item."""
    for number, record in read_records(Input(str(path), path.suffix)):
        if not isinstance(record, dict):
            raise DataError(f"{path}: line {number + 1}: an item must be an object of fields, not {record!r:.40}")
        yield number + 1, record


def _rendered(path: Path, render: Callable[[Item], Item]) -> list[Item]:
    """Every item as the model sees it, with its line; at least one."""
    items, faults = [], []
    for line, record in _records(path):
        try:
            items.append({**render(record), "line": line})
        except _ItemError as error:
            faults.append(_fault(path, line, error.field, error.rule))
    _raise_first(faults)
    if not items:
        raise DataError(f"{path}: holds no items; write one per line")
    return items


class _ItemError(Exception):
    """What is wrong with one item, before it is known where the item stands."""

    def __init__(self, field: str, rule: str) -> None:
        self.field, self.rule = field, rule
        super().__init__(field, rule)


def _fault(path: Path, line: int, field: str, rule: str) -> str:
    return f"{path}: line {line}: field {field!r} {rule}"


def _raise_first(faults: list[str]) -> None:
    if faults:
        rest = len(faults) - FAULTS_SHOWN
        more = [f"and {rest} more like these"] if rest > 0 else []
        raise DataError("\n".join([*faults[:FAULTS_SHOWN], *more]))


def _write_items(path: Path, items: list[Item]) -> None:
    pq.write_table(pa.Table.from_pylist(items), path)


# --- templates --------------------------------------------------------------------------------------------------------


def _renderer(task: LocalTask) -> Callable[[Item], Item]:
    """What makes an item of the user's into one of ours, for this kind of task."""
    choices = task.choice_templates
    several = [choices] if isinstance(choices, str) else choices
    compiled = [_compile(f"{task.name}.choices", template) for template in several]
    one = {name: _compile(f"{task.name}.{name}", getattr(task, name)) for name in ("prompt", "answer", "text")}

    def choices_of(record: Item) -> list[str]:
        found = compiled[0](record) if isinstance(choices, str) else [str(make(record)) for make in compiled]
        return _check_choices(found)

    def render(record: Item) -> Item:
        subset = "" if task.subset_field is None else _text(_field(record, task.subset_field))
        if task.kind == "perplexity":
            return {"text": _filled("text", one["text"](record)), "subset": subset}
        if task.kind == "minimal_pairs":
            return {"prompt": "", "choices": choices_of(record), "answer": 0, "subset": subset}
        prompt, answer = _text(one["prompt"](record)), one["answer"](record)
        if task.kind == "multiple_choice":
            given = choices_of(record)
            return {"prompt": prompt, "choices": given, "answer": _index_of(answer, given), "subset": subset}
        filled = _filled("answer", answer)
        return {"prompt": prompt, "answer": task.delimiter + filled if task.kind == "cloze" else filled.strip(),
                "subset": subset}  # fmt: skip

    return render


def _compile(field: str, template: str) -> Callable[[Item], Any]:
    """A template over an item's fields; one that is a single expression keeps its type."""
    sandbox = SandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False, finalize=_not_null
    )
    inner = template.strip()
    single = inner.startswith("{{") and inner.endswith("}}") and inner.count("{{") == inner.count("}}") == 1
    try:
        expression = sandbox.compile_expression(inner[2:-2], undefined_to_none=False) if single else None
        text = sandbox.from_string(template)
    except TemplateError as error:
        raise ConfigError(Problem(field, template, f"is not a template: {error}")) from None

    def make(record: Mapping[str, Any]) -> Any:
        try:
            value = expression(record) if expression else text.render(record)
        except (TemplateError, TypeError, ValueError, KeyError, IndexError, ArithmeticError) as error:
            raise _ItemError(field.rpartition(".")[2], f"cannot be made from {template!r}: {error}") from None
        if isinstance(value, Undefined) or value is None:
            raise _ItemError(field.rpartition(".")[2], f"cannot be made from {template!r}: no such field, or null")
        return value

    return make


def _not_null(value: Any) -> Any:
    """What stands in a template's text; jinja would write "None" for a null, as every missing field of a table is."""
    if value is None:
        raise UndefinedError("a field is null")
    return value


def _field(record: Item, name: str) -> Any:
    if record.get(name) is None:
        raise _ItemError(name, "is missing")
    return record[name]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _filled(field: str, value: Any) -> str:
    text = _text(value)
    if not text.strip():
        raise _ItemError(field, "is empty")
    return text


def _check_choices(found: Any) -> list[str]:
    """Raises _ItemError unless there are two or more, each with text."""
    if not isinstance(found, list | tuple):
        raise _ItemError("choices", f"must be a list, not {found!r:.60}")
    choices = ["" if choice is None else _text(choice) for choice in found]
    if len(choices) < 2:
        raise _ItemError("choices", f"holds {len(choices)} of them; two are needed to choose from")
    empty = [number for number, choice in enumerate(choices) if not choice.strip()]
    if empty:
        raise _ItemError("choices", f"is empty at number {empty[0]}")
    return choices


def _index_of(answer: Any, choices: list[str]) -> int:
    """The right choice by its text, or by its number from 0."""
    if not isinstance(answer, bool):
        if isinstance(answer, str) and answer in choices:
            return choices.index(answer)
        if str(answer).strip().isdecimal() and int(answer) < len(choices):
            return int(answer)
    rule = f"= {answer!r:.60} is neither one of the {len(choices)} choices nor a number from 0 to {len(choices) - 1}"
    raise _ItemError("answer", rule)


# --- YAML -------------------------------------------------------------------------------------------------------------


def _dataset(files: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """Local files by split. What ``datasets`` makes of them stays in ``folder``."""
    suffixes = {path.suffix for path in files.values()}
    reader = "parquet" if suffixes == {".parquet"} else "json"
    if len(suffixes) > 1:
        raise ConfigError(Problem("data", sorted(suffixes), "mixes .jsonl and .parquet in one task", "convert one"))
    return {
        "dataset_path": reader,
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(path) for split, path in files.items()},
            "cache_dir": str(folder / "datasets"),
        },
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "fewshot" if "fewshot" in files else None,
    }


def _scoring(task: LocalTask) -> dict[str, Any]:
    """The part of a task's YAML that depends on its kind."""
    mean = {"aggregation": "mean", "higher_is_better": True}
    if task.kind in ("multiple_choice", "minimal_pairs"):
        names = ("acc",) if task.kind == "minimal_pairs" else ("acc", "acc_norm")
        return {
            "output_type": "multiple_choice",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": task.delimiter,
            "metric_list": [{"metric": name, **mean} for name in names],
        }
    if task.kind == "cloze":  # the delimiter is a part of the answers: lm_eval adds none to a loglikelihood
        perplexity = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
        return {
            "output_type": "loglikelihood",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", **mean}, perplexity],
        }
    if task.kind == "exact_match":
        return {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "answer",
            "target_delimiter": task.delimiter,
            "generation_kwargs": {"until": list(task.stop), "max_gen_toks": task.max_new_tokens, "do_sample": False},
            # The filter's own strip() takes the white space around what was generated.
            "filter_list": [
                {
                    "name": "none",
                    "filter": [{"function": "regex", "regex_pattern": "(?s)^.*$"}, {"function": "take_first"}],
                }
            ],
            "metric_list": [{"metric": "exact_match", **mean}],
        }
    # No perplexity by word: a line of Japanese is one word, and exp of its nats overflows, which ends lm_eval.
    ratios = {"bits_per_byte": "bits_per_byte", "byte_perplexity": "weighted_perplexity"}
    return {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [
            {"metric": name, "aggregation": how, "higher_is_better": False} for name, how in ratios.items()
        ],
    }


def _write_yaml(path: Path, raw: Mapping[str, Any]) -> Path:
    write_atomic(path, yaml.safe_dump(dict(raw), sort_keys=False, allow_unicode=True))
    return path
