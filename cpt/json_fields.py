"""Dataclasses from JSON that nobody vouches for: a file cut short, edited by hand or made by someone else.

Owns the checks of names, integers and texts, each with a message that says field, value and rule. Refuses to guess: a
missing or an unknown field is an error, and so is ``true`` or ``3.0`` where an integer belongs.
"""

from dataclasses import fields
from typing import Any

from cpt.rundir import DataError

MAX_COUNT = 2**62  # rows and tokens stay inside int64 with room for one addition


def check_integer(name: str, value: object, *, low: int) -> int:
    if type(value) is not int or not low <= value <= MAX_COUNT:
        raise DataError(f"{name} is {value!r:.80}; it must be an integer from {low} to {MAX_COUNT}")
    return value


def check_text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{name} is {value!r:.80}; it must be a non-empty text")


def take_fields(raw: object, kind: Any, where: str, *, extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """The object's values by field name: exactly the fields of dataclass ``kind`` and ``extra``."""
    names = {*(field.name for field in fields(kind)), *extra}
    if not isinstance(raw, dict):
        raise DataError(f"{where} is {raw!r:.80}; it must be an object with {', '.join(sorted(names))}")
    for problem, keys in (("misses the", names - raw.keys()), ("has the unknown", raw.keys() - names)):
        if keys:
            raise DataError(f"{where} {problem} field {min(keys)!r:.80}")
    return dict(raw)


def take_list(raw: object, kind: Any, where: str) -> tuple[Any, ...]:
    """A list of objects as instances of dataclass ``kind``; lists inside them become tuples."""
    if not isinstance(raw, list):
        raise DataError(f"{where} is {raw!r:.80}; it must be a list")
    items = []
    for index, value in enumerate(raw):
        found = take_fields(value, kind, f"{where}[{index}]")
        frozen = {name: tuple(item) if isinstance(item, list) else item for name, item in found.items()}
        try:
            items.append(kind(**frozen))
        except DataError as error:
            raise DataError(f"{where}[{index}]: {error}") from error
    return tuple(items)
