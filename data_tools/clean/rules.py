"""The cleaning rules: a table of them, the YAML that orders them, and the one step they make together.

    rules:
      - fix_unicode                                  # with its defaults
      - language: {keep: [en], min_score: 0.65}      # with thresholds; null switches one off
      - gopher_quality: {min_words: 30}

A document meets the rules in the order of the file; the first that rejects it names the reason, ``rule.reason``.
A new rule is a function of its settings that gives a step, its settings, and a line in ``RULES``.
Refused, all at once: unknown rules and fields (naming the nearest known), values out of range, a missing model.
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cpt.config import read_mapping
from cpt.problems import ConfigError, Problem, problem_of
from cpt.schedule_fields import Section
from data_tools.clean import settings as fields
from data_tools.clean.language import language
from data_tools.clean.masking import mask_personal_data
from data_tools.clean.ngram_rule import ngram_perplexity
from data_tools.clean.quality import c4_quality, fineweb_quality, first_broken, gopher_quality
from data_tools.clean.repetition import gopher_repetition
from data_tools.clean.unicode_text import fix_unicode
from data_tools.corpus.document import Document, Reject, Step
from data_tools.whole_file import sha256_of


@dataclass(frozen=True)
class Rule:
    """``build(settings)`` is called once per process; ``source``: where the rule and its defaults come from."""

    settings: type[Section]
    build: Callable[[Any], Step]
    source: str


Chosen = tuple[str, Section]  # a rule's name and what it was told


def length(settings: fields.Length) -> Step:
    def step(document: Document) -> Reject | None:
        found = len(document.text)
        limits = [("short", found, settings.min_characters, None), ("long", found, None, settings.max_characters)]
        return first_broken("length", limits)

    return step


RULES: dict[str, Rule] = {
    "fix_unicode": Rule(fields.FixUnicode, fix_unicode, "ftfy 6.3; normal form NFC as in FineWeb-2"),
    "language": Rule(fields.Language, language, "fastText lid.176; threshold of FineWeb (arXiv 2406.17557)"),
    "length": Rule(fields.Length, length, "own"),
    "gopher_quality": Rule(fields.GopherQuality, gopher_quality, "Gopher, table A1 (arXiv 2112.11446); datatrove"),
    "gopher_repetition": Rule(
        fields.GopherRepetition, gopher_repetition, "Gopher, table A1 (arXiv 2112.11446); datatrove"
    ),
    "c4_quality": Rule(fields.C4Quality, c4_quality, "C4 (arXiv 1910.10683, 2.2); datatrove; no word list"),
    "fineweb_quality": Rule(fields.FinewebQuality, fineweb_quality, "FineWeb (arXiv 2406.17557, 3.5); datatrove"),
    "pii": Rule(fields.Pii, mask_personal_data, "FineWeb; patterns of datatrove's PIIFormatter"),
    "ngram_perplexity": Rule(
        fields.NgramPerplexity, ngram_perplexity, "CCNet (arXiv 1911.00359); stability gap (arXiv 2406.14833)"
    ),
}


def load_rules(path: Path) -> tuple[Chosen, ...]:
    """The rules of a YAML file in its order.

    Raises:
        ConfigError: with every problem found.
    """
    raw = read_mapping(path)
    problems = [
        Problem(key, raw[key], "unknown field", "a cleaning file has the one field rules")
        for key in raw
        if key != "rules"
    ]
    entries = raw.get("rules")
    if not isinstance(entries, list) or not entries:
        problems.append(Problem("rules", entries, "must be a list of rules", "e.g. rules: [fix_unicode, pii]"))
        entries = []
    chosen: list[Chosen] = []
    for index, entry in enumerate(entries):
        try:
            chosen.append(_read_rule(f"rules[{index}]", entry))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return tuple(chosen)


def _read_rule(place: str, entry: object) -> Chosen:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1 or not isinstance(next(iter(entry)), str):
        raise ConfigError(Problem(place, entry, "must be one rule", "e.g. - gopher_quality: {min_words: 30}"))
    [(name, told)] = entry.items()
    if name not in RULES:
        raise ConfigError(Problem(place, name, "unknown rule", _nearest(name, tuple(RULES))))
    model = RULES[name].settings
    known = {f"{place}.{name}.{key}": info.description or "" for key, info in model.model_fields.items()}
    try:
        settings = model.model_validate(told if told is not None else {})
    except ValidationError as error:
        raise ConfigError(*(_told(detail, place, name, known) for detail in error.errors())) from None
    _require_files(f"{place}.{name}", settings)
    return name, settings


def _told(detail: Any, place: str, name: str, known: dict[str, str]) -> Problem:
    keys = tuple(key.rpartition(".")[2] for key in known)
    if detail["type"] == "extra_forbidden":
        field = str(detail["loc"][0])
        return Problem(f"{place}.{name}.{field}", detail["input"], "unknown field", _nearest(field, keys))
    return problem_of(dict(detail) | {"loc": (f"{place}.{name}", *detail["loc"])}, known)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; see cpt data clean --list-rules"


def _require_files(place: str, settings: Section) -> None:
    for key, value in settings:
        if isinstance(value, Path) and not value.is_file():
            raise ConfigError(Problem(f"{place}.{key}", str(value), "no such file", "paths count from where you are"))


def identity_of(chosen: Sequence[Chosen]) -> dict[str, Any]:
    """What the rules are, as JSON: a changed threshold or another model in the same file is another stage."""
    rules = []
    for name, settings in chosen:
        files = {f"{key}_sha256": sha256_of(value) for key, value in settings if isinstance(value, Path)}
        rules.append({"rule": name, **settings.model_dump(mode="json"), **files})
    return {"rules": rules}


def step_maker(chosen: Sequence[Chosen]) -> Callable[[], Step]:
    """For a stage: makes the step in whichever process works; pickles."""
    return partial(build_step, tuple(chosen))


def build_step(chosen: Sequence[Chosen]) -> Step:
    """All rules, one after another, up to the first that rejects."""
    steps = [RULES[name].build(settings) for name, settings in chosen]

    def step(document: Document) -> Reject | None:
        for apply in steps:
            reject = apply(document)
            if reject is not None:
                return reject
        return None

    return step


def list_rules() -> list[dict[str, Any]]:
    """Every rule with its fields, defaults and source, for ``--list-rules``."""
    listed = []
    for name, rule in RULES.items():
        schema = rule.settings.model_json_schema()["properties"]
        entries = [
            {"field": key, "default": facts.get("default", "required"), "description": facts.get("description", "")}
            for key, facts in schema.items()
        ]
        listed.append({"rule": name, "source": rule.source, "fields": entries})
    return listed
