"""Requirements that a run must meet, and whether it does, for a pipeline that has to stop. No torch.

    domain_gain >= 0.10               the measured value
    general_forgetting.high <= 0.02   the upper end of its interval: surely no more
    general.accuracy.change >= -1%    in percentage points

Owns the grammar, the nearest names, and the verdict on each requirement. Refuses to let pass what was not measured:
a metric that is missing or not finite is not met, and says why. Refuses a name that no measurement has.
"""

import difflib
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.problems import ConfigError, Problem

OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
ENDS = ("low", "high")
FORM = "METRIC >= NUMBER, such as 'domain_gain >= 0.10' or 'general_forgetting.high <= 0.02'"
_GRAMMAR = re.compile(r"\s*(?P<metric>[^<>=\s]+)\s*(?P<operator>[<>]=?)\s*(?P<number>[^<>=\s%]+)\s*(?P<percent>%?)\s*")


@dataclass(frozen=True)
class Measurement:
    """A number with its 95% interval; None where it is unknown, and then ``why`` says what would make it known."""

    value: float | None
    low: float | None = None
    high: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Requirement:
    """``end`` is "low" or "high" for an end of the interval, empty for the value itself."""

    text: str
    metric: str
    end: str
    operator: str
    bound: float


@dataclass(frozen=True)
class Check:
    """One requirement against what was measured; ``note`` says why it is not met, or how sure it is that it is."""

    requirement: Requirement
    measured: Measurement
    met: bool
    note: str

    def to_dict(self) -> dict[str, Any]:
        wanted, found = self.requirement, self.measured
        interval = None if found.low is None or found.high is None else [found.low, found.high]
        return {
            "requirement": wanted.text,
            "metric": wanted.metric,
            "end": wanted.end or "value",
            "operator": wanted.operator,
            "bound": wanted.bound,
            "value": found.value,
            "interval": interval,
            "met": self.met,
            "note": self.note,
        }


def is_requirement(text: str) -> bool:
    """Whether a word of the command line is meant as a requirement rather than as a run folder."""
    return any(sign in text for sign in "<>=")


def parse_requirements(texts: Sequence[str], names: Iterable[str]) -> list[Requirement]:
    """Requirements in the order given. ``names``: every metric that there may be for this run, measured or not.

    Raises:
        ConfigError: all that cannot be understood, each with the nearest names.
    """
    known = sorted(set(names))
    parsed = [_parse(text, known) for text in texts]
    if not parsed:
        raise ConfigError(Problem("--require", None, "is required", f"give one or more of the form {FORM}"))
    if problems := [item for item in parsed if isinstance(item, Problem)]:
        raise ConfigError(*problems)
    return [item for item in parsed if isinstance(item, Requirement)]


def check(requirements: Sequence[Requirement], measured: Mapping[str, Measurement]) -> list[Check]:
    """Each requirement against ``measured``, a metric's name -> what is known of it."""
    absent = Measurement(None, why="was not measured")
    return [_check(wanted, measured.get(wanted.metric, absent)) for wanted in requirements]


def _parse(text: str, known: Sequence[str]) -> Requirement | Problem:
    found = _GRAMMAR.fullmatch(text)
    if found is None:
        return Problem("--require", text, "is not a requirement", f"write {FORM}, in quotes: a shell takes > and <")
    name, end = _split_end(found["metric"], known)
    if name not in known:
        return Problem("--require", text, f"there is no metric {name!r}", nearest_names(name, known))
    try:
        bound = float(found["number"]) / (100.0 if found["percent"] else 1.0)
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        return Problem("--require", text, f"{found['number']!r} is not a number", f"write {FORM}")
    return Requirement(text.strip(), name, end, found["operator"], bound)


def _split_end(metric: str, known: Sequence[str]) -> tuple[str, str]:
    """A source or task may itself be called ``x.low``: a whole name comes first."""
    name, _, end = metric.rpartition(".")
    return (name, end) if metric not in known and end in ENDS and name else (metric, "")


def nearest_names(name: str, known: Sequence[str]) -> str:
    """The three likeliest names, or where there are few, all of them."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    close += [other for other in known if name in other and other not in close][: 3 - len(close)]
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"there are {', '.join(known[:12])}{' ...' if len(known) > 12 else ''}"


def _check(wanted: Requirement, found: Measurement) -> Check:
    value = getattr(found, wanted.end) if wanted.end else found.value
    if value is None or not math.isfinite(value):
        unknown = f"the {wanted.end} end of its interval is not known" if wanted.end else "its value is not known"
        why = found.why or ("it was measured without an interval" if wanted.end else "it is not a finite number")
        return Check(wanted, found, met=False, note=f"{unknown}: {why}")
    met = OPERATORS[wanted.operator](value, wanted.bound)
    if not met:
        return Check(wanted, found, met, f"{value:.6g} is not {wanted.operator} {wanted.bound:.6g}")
    return Check(wanted, found, met, "" if wanted.end else _doubt(wanted, found))


def _doubt(wanted: Requirement, found: Measurement) -> str:
    """What to say of a requirement that the value meets and an end of its interval does not."""
    end = "low" if wanted.operator.startswith(">") else "high"
    limit = getattr(found, end)
    if limit is None or OPERATORS[wanted.operator](limit, wanted.bound):
        return ""
    return f"not surely: the interval reaches {limit:.6g}; require {wanted.metric}.{end} to be sure"
