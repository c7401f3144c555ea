"""What is wrong with a configuration, told so that a person can fix it: field, value, rule, and what to do.

Owns the messages. Refuses to decide what is wrong: the fields and the rules are in ``cpt.config``.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One thing the user can fix: the field (dotted) or file, the value found, the rule it breaks, and what to do."""

    field: str
    value: object
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {_shorten(self.value)}"
        return f"{self.field}{shown}: {self.rule}" + (f"; {self.fix}" if self.fix else "")


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, listed in one go."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(f"  - {problem}" for problem in problems))


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def location_of(detail: Any) -> list[Any]:
    """Keys from the root to the fault, without what pydantic adds: the schedule's name, and the member of a union."""
    location = list(detail["loc"])
    if location[:2] in (["train", "schedule"], ["data", "mix"]):
        del location[2:3]
    return location[:2] if location[:2] in (["model", "fresh"], ["eval", "suite_steps"]) else location


def problem_of(detail: Any, fields: Mapping[str, str]) -> Problem:
    """One of pydantic's errors in our words. ``fields``: dotted name -> description of every field there is."""
    field = ".".join(map(str, location_of(detail)))
    if detail["type"] == "extra_forbidden":
        return Problem(field, detail["input"], "unknown field", _nearest(field, fields))
    if detail["type"] == "missing":
        return Problem(field, None, "is required", fields.get(field, ""))
    rule = detail["msg"][0].lower() + detail["msg"][1:]
    return Problem(field, detail["input"], rule, fields.get(field, ""))


def _nearest(field: str, fields: Mapping[str, str]) -> str:
    section, _, leaf = field.rpartition(".")

    def likeness(name: str) -> float:
        """The last name decides; the section breaks ties: a right name in a wrong section is a common mistake."""
        its_section, _, its_leaf = name.rpartition(".")
        return difflib.SequenceMatcher(None, leaf, its_leaf).ratio() + 0.05 * (section == its_section)

    best = max(fields, key=likeness)
    return f"did you mean {best}?" if likeness(best) >= 0.75 else "cpt config schema lists the fields"
