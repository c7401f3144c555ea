"""The typed run configuration: one YAML file plus dotted overrides, every problem reported at once.

Owns reading, overriding and checking; the fields are in ``cpt.run_fields``, the rules between them in
``cpt.run_rules``. Refuses unknown keys (naming the nearest known one), unsafe YAML and run names that would leave their
folder.
"""

import difflib
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cpt.follow import follow_plan
from cpt.problems import ConfigError as ConfigError  # every module that reads a config raises it
from cpt.problems import Problem as Problem
from cpt.problems import location_of, problem_of
from cpt.run_fields import DEFAULT_REPLAY_SHARE as DEFAULT_REPLAY_SHARE  # the fields are a part of this module's name
from cpt.run_fields import ModelSection as ModelSection
from cpt.run_fields import RunConfig as RunConfig
from cpt.run_fields import StageSection as StageSection
from cpt.run_rules import RULES
from cpt.schedule_fields import Section


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run YAML, apply ``a.b=value`` overrides and the recommendation it follows, make paths absolute, validate.

    Raises:
        ConfigError: with every problem found.
    """
    raw = read_mapping(path)
    problems: list[Problem] = []
    actions = [*(partial(apply_override, raw, text) for text in overrides), partial(_make_paths_absolute, raw)]
    for action in (*actions, partial(follow_plan, raw, overrides)):
        try:
            action()
        except ConfigError as error:
            problems += error.problems
    try:
        config = validate(raw)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return config


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping; YAML's reader would drop the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def read_mapping(path: Path, *, of: str = "sections such as run, model, data, train") -> dict[str, Any]:
    """A YAML file that holds one mapping. Raises ConfigError naming the file and, for bad syntax, the line."""
    try:
        raw = _UniqueKeys(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise ConfigError(Problem(str(path), None, "no such file", _nearby_files(path))) from None
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
        OSError,
    ) as error:  # ValueError: not UTF-8, or a date such as 2024-02-30
        raise ConfigError(Problem(str(path), None, f"cannot be read as YAML: {error}")) from None
    if not isinstance(raw, dict):
        raise ConfigError(Problem(str(path), raw, f"must hold a mapping of {of}"))
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set ``a.b.c=value`` in place; the value is read as YAML: ``1e-3``, ``null`` and ``[1, 2]`` mean what they say."""
    key, separator, text = override.partition("=")
    if not separator or not key or not all(key.split(".")):
        raise ConfigError(Problem(override, None, "an override has the form section.field=value"))
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(Problem(key, child, f"{parent} is not a section, so it has no field {leaf}"))
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(Problem(key, text, f"is not a YAML value: {error}")) from None


def validate(raw: Mapping[str, Any]) -> RunConfig:
    """Build the config, or raise ConfigError with every wrong field and every broken rule."""
    try:
        config, problems = RunConfig.model_validate(raw), []
    except ValidationError as error:
        told = [problem_of(detail, _fields()) for detail in error.errors()]
        problems = [one for i, one in enumerate(told) if one.field not in {before.field for before in told[:i]}]
        repaired = _without_faults(raw, error)
        if repaired is None:
            raise ConfigError(*problems) from None
        config = repaired
    faulty = {problem.field for problem in problems}
    for fields, rule in RULES:
        if not any(bad.startswith(field) or field.startswith(bad) for field in fields for bad in faulty):
            found = rule(config)
            problems += [found] if found else []
    if problems:
        raise ConfigError(*problems)
    return config


# Legal values for required fields that are wrong or missing: no rule that reads them is checked then.
STAND_INS: dict[str, dict[str, Any]] = {
    "run": {"name": "x"},
    "model": {},
    "data": {"stores": {"x": "x"}, "seq_len": 1},
    "train": {"tokens": 1, "global_batch_tokens": 1, "micro_batch_size": 1, "peak_lr": 0.1},
}


def _without_faults(raw: Mapping[str, Any], error: ValidationError) -> RunConfig | None:
    """The config with its wrong fields left out, so that rules between the others are checked; None if that fails."""
    copy = deepcopy(dict(raw))
    for detail in error.errors():
        node, (*parents, leaf) = copy, location_of(detail)
        for part in parents:
            if not isinstance(node.get(part), dict):  # inside a list: all of it goes
                leaf = part
                break
            node = node[part]
        node.pop(leaf, None)
    for section, fields in STAND_INS.items():
        copy[section] = {**fields, **copy.get(section, {})}
    try:
        return RunConfig.model_validate(copy)
    except ValidationError:
        return None


def _fields(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, str]:
    """Dotted name -> description of every field; a schedule's own fields stand under train.schedule."""
    found: dict[str, str] = {}
    for name, info in model.model_fields.items():
        found[prefix + name] = info.description or ""
        kinds = [info.annotation, *getattr(info.annotation, "__args__", ())]
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, Section):
                found |= _fields(kind, f"{prefix}{name}.")
    return found


def _nearby_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    close = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], n=1)
    return f"did you mean {path.parent / close[0]}?" if close else ""


def _make_paths_absolute(raw: dict[str, Any]) -> None:
    """Paths are relative to where the command runs; a run folder keeps them absolute, so that resume works anywhere."""
    base = Path.cwd()
    data, model, run, evals = (
        section if isinstance(section := raw.get(name), dict) else {} for name in ("data", "model", "run", "eval")
    )
    if isinstance(data.get("stores"), dict):
        data["stores"] = {
            name: str(base / Path(path).expanduser()) if isinstance(path, str) else path
            for name, path in data["stores"].items()
        }
    for key in ("init_from", "tokenizer"):  # either a local path or a hub name
        if isinstance(model.get(key), str) and (local := base / Path(model[key]).expanduser()).exists():
            model[key] = str(local)
    if isinstance(evals.get("suite"), str):
        evals["suite"] = str(base / Path(evals["suite"]).expanduser())
    if isinstance(run.get("dir", "runs"), str):
        run["dir"] = str(base / run.get("dir", "runs"))
    if isinstance(model.get("fresh"), str):
        model["fresh"] = read_mapping(base / model["fresh"])


def to_yaml(config: RunConfig) -> str:
    """The resolved config, every default filled in; reading it back gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def json_schema() -> dict[str, Any]:
    """JSON schema of a run file, for editors."""
    return RunConfig.model_json_schema()
