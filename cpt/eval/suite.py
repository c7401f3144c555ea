"""What an evaluation suite asks for: groups of benchmarks, typed, read from YAML. No torch, no lm_eval.

Owns the fields, their rules and the hashes by which results are known again. A task is one of lm_eval's by name,
perhaps on local files in place of its own dataset, or a local file of items with templates. Paths are relative to the
suite's file. Every problem is reported at once; items are checked when they are rendered (``cpt.eval.task_files``).
Refuses Python in YAML (``!function``), two tasks of one name, and few-shot examples drawn from the items themselves.
"""

import difflib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, ValidationInfo

from cpt.config import read_mapping
from cpt.problems import ConfigError, Problem
from cpt.schedule_fields import Count, Section, Steps

Kind = Literal["multiple_choice", "cloze", "minimal_pairs", "exact_match", "perplexity"]


def _beside_the_suite(path: Path, info: ValidationInfo) -> Path:
    """Absolute; relative ones start at the suite's folder, which the reader passes as ``folder``."""
    folder: Path = (info.context or {}).get("folder", Path.cwd())
    return (folder / path.expanduser()).resolve()


SuitePath = Annotated[Path, AfterValidator(_beside_the_suite)]


class ItemFiles(Section):
    """Local files in place of a task's own dataset; their fields must be those of that dataset."""

    test: SuitePath = Field(description="items to score, .jsonl or .parquet")
    fewshot: SuitePath | None = Field(None, description="items that examples are drawn from")

    def paths(self) -> dict[str, Path]:
        return {"test": self.test} | ({"fewshot": self.fewshot} if self.fewshot else {})


class NamedTask(Section):
    """A task, or a group of tasks, of lm_eval."""

    task: str = Field(min_length=1, description="a task or group of lm_eval")
    name: str = Field("", pattern=r"^[A-Za-z0-9_.-]*$", description="name in the results; default: the task's")
    data: ItemFiles | None = Field(None, description="local files in place of the task's own dataset")
    num_fewshot: Steps | None = Field(None, description="examples before each item; default: the task's own number")
    limit: Count | None = Field(None, description="score the first so many items only")
    metric: str | None = Field(None, description="primary metric; default: the first known one that the task has")
    subset_field: str | None = Field(None, description="field of an item by which item lists are grouped")

    @property
    def label(self) -> str:
        return self.name or self.task

    def paths(self) -> dict[str, Path]:
        """Every local file: dotted field -> path."""
        return {f"data.{field}": path for field, path in self.data.paths().items()} if self.data else {}


class LocalTask(Section):
    """Items in a local file, made into a task of lm_eval by templates (jinja over an item's fields).

    Which templates count: ``prompt``, ``choices`` and ``answer`` for multiple_choice; ``prompt`` and ``answer`` for
    cloze and exact_match; ``choices``, the right one first, for minimal_pairs; ``text`` for perplexity.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="name in the results")
    file: SuitePath = Field(description="items, .jsonl or .parquet")
    kind: Kind = Field(description="how items are scored")
    prompt: str = Field("{{prompt}}", description="what the model reads before the answer")
    choices: str | tuple[str, ...] = Field("", description="one template that gives a list, or one per choice")
    answer: str = Field("{{answer}}", description="the answer; multiple choice: its number from 0, or its text")
    text: str = Field("{{text}}", description="perplexity: the text itself")
    delimiter: str = Field(" ", description="between prompt and answer")
    stop: tuple[str, ...] = Field(("\n",), description="exact_match: generation ends at any of these")
    max_new_tokens: Count = Field(64, description="exact_match: generation ends after so many tokens")
    subset_field: str | None = Field(None, description="field of an item by which item lists are grouped")
    fewshot_file: SuitePath | None = Field(None, description="items that examples are drawn from")
    num_fewshot: Steps = Field(0, description="examples before each item")
    limit: Count | None = Field(None, description="score the first so many items only")
    metric: str | None = Field(None, description="primary metric; default: acc, exact_match or bits_per_byte")

    @property
    def label(self) -> str:
        return self.name

    @property
    def choice_templates(self) -> str | tuple[str, ...]:
        """``choices``, or by default the item's own list of that name; BLiMP's two fields for minimal pairs."""
        if self.choices:
            return self.choices
        return ("{{sentence_good}}", "{{sentence_bad}}") if self.kind == "minimal_pairs" else "{{choices}}"

    def paths(self) -> dict[str, Path]:
        """Every local file: field -> path."""
        return {"file": self.file} | ({"fewshot_file": self.fewshot_file} if self.fewshot_file else {})


def _sort_of(task: object) -> str:
    """Which of the two an entry of a group is: a task of lm_eval where it says ``task``."""
    return "named" if isinstance(task, NamedTask) or (isinstance(task, dict) and "task" in task) else "local"


SuiteTask = Annotated[
    Annotated[NamedTask, Tag("named")] | Annotated[LocalTask, Tag("local")],
    Discriminator(_sort_of),
]


class Suite(Section):
    """A suite, checked; ``groups`` keep the order of the file."""

    name: str = Field(pattern=r"^[a-z0-9_-]+$", description="folder name of the results in evals/")
    seed: Steps = Field(1234, description="of the choice of few-shot examples")
    batch_size: Count = Field(16, description="rows per forward pass")
    groups: dict[str, Annotated[tuple[SuiteTask, ...], Field(min_length=1)]] = Field(
        min_length=1, description="group name -> list of tasks"
    )
    copying_probe: bool = Field(False, description="also measure copying from the context (arXiv 2506.00288)")
    overlaps: SuitePath | None = Field(None, description="JSON with the items known to be in the training corpora")

    def tasks(self) -> Iterator[tuple[str, NamedTask | LocalTask]]:
        """(group, task) in the order of the file."""
        yield from ((group, task) for group, tasks in self.groups.items() for task in tasks)


def load_suite(path: Path) -> Suite:
    """Read a suite's YAML and check it; local files must exist.

    Raises:
        ConfigError: with every problem found; unknown fields and missing files name the nearest known ones.
    """
    raw = _read_yaml(path)
    try:
        suite = Suite.model_validate(raw, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise ConfigError(*(_problem(path, detail) for detail in _causes(error))) from None
    if found := [*_double_names(suite), *_missing_files(suite), *_idle_fields(suite)]:
        raise ConfigError(*found)
    return suite


def suite_hash(suite: Suite) -> str:
    """16 hex digits; changes with anything that changes a score, the content of local files among it, and with nothing
    else: where the files lie does not count.
    """
    tasks = [[group, task_hash(task, suite)] for group, task in suite.tasks()]
    overlaps = digest_of(suite.overlaps) if suite.overlaps else None
    return _short_hash([tasks, suite.copying_probe, overlaps])


def task_hash(task: NamedTask | LocalTask, suite: Suite) -> str:
    """16 hex digits over what changes this task's results, the content of its files included."""
    fields = task.model_dump(mode="json", exclude={"file", "fewshot_file", "data"})
    files = {field: digest_of(path) for field, path in task.paths().items()}
    return _short_hash([fields, files, suite.seed, suite.batch_size])


def digest_of(path: Path) -> str:
    """sha256 of a file's content, in hex.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(Problem(str(path), None, f"cannot be read: {error.strerror}")) from None


def _short_hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_mapping(path, of="a suite's name and groups")
    except ConfigError as error:
        if "!function" not in str(error):
            raise
        rule = "names Python code (!function), which a suite may not run"
        fix = "use templates (prompt, choices, answer), or a task that lm_eval itself brings"
        raise ConfigError(Problem(str(path), None, rule, fix)) from None


def _causes(error: ValidationError) -> list[Any]:
    """Pydantic's errors but those which follow from others: without its faulty tasks a group is "too short", too."""
    details = error.errors()
    around = {detail["loc"][:end] for detail in details for end in range(len(detail["loc"]))}
    return [detail for detail in details if detail["type"] != "too_short" or detail["loc"] not in around]


def _problem(path: Path, detail: Any) -> Problem:
    """One of pydantic's errors in our words, with the field as the file has it: ``groups.general.0.prompt``."""
    location = [str(part) for part in detail["loc"]]
    kind: type[Section] = Suite
    if len(location) > 3 and location[0] == "groups":
        kind = NamedTask if location[3] == "named" else LocalTask
        del location[3]
        kind = ItemFiles if location[3:4] == ["data"] and len(location) > 4 else kind
    field, known = ".".join(location), kind.model_fields
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1)
        fix = f"did you mean {near[0]}?" if near else f"known are: {', '.join(known)}"
        return Problem(f"{path}: {field}", detail["input"], "unknown field", fix)
    about = (known[location[-1]].description or "") if location[-1] in known else ""
    if detail["type"] == "missing":
        return Problem(f"{path}: {field}", None, "is required", about)
    return Problem(f"{path}: {field}", detail["input"], detail["msg"][0].lower() + detail["msg"][1:], about)


def _places(suite: Suite) -> Iterator[tuple[str, NamedTask | LocalTask]]:
    """(``groups.general.0``, task) of every task."""
    for group, tasks in suite.groups.items():
        yield from ((f"groups.{group}.{number}", task) for number, task in enumerate(tasks))


def _double_names(suite: Suite) -> Iterator[Problem]:
    seen: dict[str, str] = {}
    for place, task in _places(suite):
        if task.label in seen:
            fix = f"give one of them another name: {seen[task.label]} has this one, too"
            yield Problem(f"{place}.name", task.label, "names two tasks of the suite", fix)
        seen.setdefault(task.label, place)


def _missing_files(suite: Suite) -> Iterator[Problem]:
    files = [(f"{place}.{field}", path) for place, task in _places(suite) for field, path in task.paths().items()]
    for field, path in [*files, *([("overlaps", suite.overlaps)] if suite.overlaps else [])]:
        if not path.is_file():
            names = [entry.name for entry in path.parent.iterdir() if entry.is_file()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(path.name, names, n=1)
            hint = f"did you mean {path.parent / near[0]}?" if near else "paths are relative to the suite's file"
            yield Problem(field, str(path), "no such file", hint)
        elif field != "overlaps" and path.suffix not in (".jsonl", ".parquet"):
            yield Problem(field, str(path), "is neither .jsonl nor .parquet", "write one item per line as .jsonl")


def _idle_fields(suite: Suite) -> Iterator[Problem]:
    """Few-shot examples from the items themselves, and examples that no item gets."""
    for place, task in _places(suite):
        if isinstance(task, LocalTask) and task.num_fewshot and task.fewshot_file is None:
            fix = "name a fewshot_file with items that are not scored"
            yield Problem(f"{place}.num_fewshot", task.num_fewshot, "has no examples to draw from", fix)
        if isinstance(task, LocalTask) and task.kind == "perplexity" and task.num_fewshot:
            yield Problem(f"{place}.num_fewshot", task.num_fewshot, "perplexity takes no examples", "leave it out")
