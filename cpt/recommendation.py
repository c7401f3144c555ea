"""What ``cpt plan recommend`` advises: stages with their shares, and the losses it promises for them.

Owns the record, its file (``plan.json`` where it is written, ``recommendation.json`` in a run folder) and its
fingerprint. Refuses a file that was cut short or edited, numbers that are not finite, shares that do not add up, and a
run's frozen plan (``cpt.plan``, also called plan.json) in its place: that one says which rows are read, this one why.

Units: tokens, parameters, nats per token. A stage of two sources states ``share_general`` and ``share_domain``; one of
more sources states ``weights``, the share of the whole stage's tokens by source, and may leave the two shares open
(None), since only the stores' labels say which of them are general.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from cpt.json_fields import check_integer, check_text, take_fields, take_list
from cpt.rundir import DataError, write_atomic

KIND = "cpt-recommendation"
FORMAT_VERSION = 1
SUM_TOLERANCE = 1e-6

Usage = Literal["tolerance", "domain-tokens", "flops"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class RecommendedStage:
    """Tokens with constant shares; see the rule on ``weights`` at the top of this file."""

    tokens: int
    share_general: float | None
    share_domain: float | None
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_integer("tokens", self.tokens, low=1)
        shares = {"share_general": self.share_general, "share_domain": self.share_domain}
        stated = {name: check_number(name, share, high=1) for name, share in shares.items() if share is not None}
        if len(stated) == 1 or not (stated or self.weights):
            raise DataError(f"{' and '.join(shares.keys() - stated.keys())} missing; state both shares, or weights")
        _check_sum("share_general + share_domain", stated.values())
        if not isinstance(self.weights, Mapping):
            raise DataError(f"weights is {self.weights!r:.80}; it must be an object of source: share")
        weights = {name: check_number(f"weights[{name!r}]", weight, high=1) for name, weight in self.weights.items()}
        _check_sum("the sum of weights", weights.values())
        _set(self, **stated, weights=weights)


@dataclass(frozen=True)
class PromisePoint:
    """Predicted losses after ``tokens`` tokens, at the end of a schedule, each with its 90% interval."""

    tokens: float
    loss_general: float
    general_interval: Interval
    loss_domain: float
    domain_interval: Interval

    def __post_init__(self) -> None:
        losses = {name: check_number(name, getattr(self, name)) for name in ("loss_general", "loss_domain")}
        intervals = {
            name: check_interval(name, getattr(self, name)) for name in ("general_interval", "domain_interval")
        }
        _set(self, tokens=check_number("tokens", self.tokens), **losses, **intervals)


@dataclass(frozen=True)
class LawNames:
    """Which law predicted which loss."""

    general: str
    domain: str

    def __post_init__(self) -> None:
        check_text("general", self.general)
        check_text("domain", self.domain)


@dataclass(frozen=True)
class BaseLoss:
    """Losses of the pilots' base before training; None where no base row was measured."""

    general: float | None
    domain: float | None

    def __post_init__(self) -> None:
        known = {name: value for name, value in vars(self).items() if value is not None}
        _set(self, **{name: check_number(name, value) for name, value in known.items()})


@dataclass(frozen=True)
class ObservationsFile:
    """The measurements that the laws were fitted to."""

    path: str
    sha256: str

    def __post_init__(self) -> None:
        check_text("path", self.path)
        check_text("sha256", self.sha256)


@dataclass(frozen=True)
class Recommendation:
    """``params`` and ``lr`` say which model and which peak rate it is for; ``interval`` is the 90% one of
    ``share_general``, None where sources have weights and no share is stated.
    """

    usage: Usage
    base: str
    params: float
    lr: float | None
    stages: tuple[RecommendedStage, ...]
    interval: Interval | None
    law: LawNames
    promise: tuple[PromisePoint, ...]
    base_loss: BaseLoss
    observations: ObservationsFile
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.usage not in get_args(Usage):
            raise DataError(f"usage is {self.usage!r:.80}; it must be one of {', '.join(get_args(Usage))}")
        if not isinstance(self.base, str):
            raise DataError(f"base is {self.base!r:.80}; it must be a text")
        if check_number("params", self.params) == 0:
            raise DataError("params is 0; it must be the number of parameters of the model")
        if not self.stages:
            raise DataError("stages is empty; a recommendation has at least one")
        later = [point.tokens for point in self.promise]
        if any(b <= a for a, b in pairwise(later)):
            raise DataError(f"promise has tokens {later!r:.80}; they must increase from point to point")
        for index, warning in enumerate(self.warnings):
            check_text(f"warnings[{index}]", warning)
        _set(
            self,
            params=float(self.params),
            lr=None if self.lr is None else check_number("lr", self.lr, high=1),
            interval=None if self.interval is None else check_interval("interval", self.interval, high=1),
        )

    @property
    def tokens(self) -> int:
        return sum(stage.tokens for stage in self.stages)

    @property
    def share_general(self) -> float | None:
        """Over all stages, by tokens; None where a stage leaves it to the stores' labels."""
        parts = [stage.tokens * stage.share_general for stage in self.stages if stage.share_general is not None]
        return sum(parts) / self.tokens if len(parts) == len(self.stages) else None

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex characters of the SHA-256 of the canonical JSON; any changed field changes it."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    def to_json(self) -> str:
        head = {"kind": KIND, "format_version": FORMAT_VERSION, "fingerprint": self.fingerprint}
        return json.dumps(head | asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Recommendation":
        """Raises DataError: not JSON, another kind or format, a field missing, unknown or against its rule, an edit."""
        raw = _checked_kind(text)
        fields = take_fields(raw, cls, "recommendation", extra=("kind", "format_version", "fingerprint"))
        stated = fields.pop("fingerprint")
        del fields["kind"], fields["format_version"]
        fields["stages"] = take_list(fields["stages"], RecommendedStage, "stages")
        fields["promise"] = take_list(fields["promise"], PromisePoint, "promise")
        for name, kind in (("law", LawNames), ("base_loss", BaseLoss), ("observations", ObservationsFile)):
            fields[name] = _take_object(fields[name], kind, name)
        if not isinstance(fields["warnings"], list):
            raise DataError(f"warnings is {fields['warnings']!r:.80}; it must be a list of texts")
        fields["warnings"] = tuple(fields["warnings"])
        found = cls(**fields)
        if stated != found.fingerprint:
            raise DataError(f"fingerprint is {stated!r:.80} but the content gives {found.fingerprint!r}; it was edited")
        return found


def write_recommendation(path: Path, recommendation: Recommendation) -> None:
    write_atomic(path, recommendation.to_json())


def read_recommendation(path: Path) -> Recommendation:
    """Raises DataError naming the file, the field and the fix."""
    try:
        return Recommendation.from_json(path.read_bytes())
    except (OSError, DataError) as error:
        fix = "Restore the file from a copy, or write it again with cpt plan recommend."
        raise DataError(f"{path}: {error}. {fix}") from error


def check_number(name: str, value: object, *, high: float = math.inf) -> float:
    """A finite number from 0 to ``high``; NaN and infinity are no numbers here, nor is ``true``."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name} is {value!r:.80}; it must be a finite number")
    if not 0 <= value <= high:
        raise DataError(f"{name} is {value!r:.80}; it must lie between 0 and {high:g}")
    return float(value)


def check_interval(name: str, value: object, *, high: float = math.inf) -> Interval:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise DataError(f"{name} is {value!r:.80}; it must be [low, high]")
    low, top = (check_number(name, end, high=high) for end in value)
    if low > top:
        raise DataError(f"{name} is {value!r:.80}; its low end lies above its high end")
    return low, top


def _check_sum(name: str, shares: Any) -> None:
    total = sum(shares)
    if len(shares) and abs(total - 1) > SUM_TOLERANCE:
        raise DataError(f"{name} is {total:.6g}; shares of tokens must sum to 1")


def _set(record: object, **values: object) -> None:
    """Plain floats and tuples in place of what was given (numpy's, lists): equal content has one fingerprint."""
    for name, value in values.items():
        object.__setattr__(record, name, value)


def _checked_kind(text: str | bytes) -> object:
    """The file's JSON if it says that it is a recommendation of a known format."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a complete JSON file ({error})") from error
    if not isinstance(raw, dict):
        return raw  # take_fields says what belongs here
    if "kind" not in raw and {"block_rows", "sources"} <= raw.keys():
        raise DataError(
            "it is a run's frozen plan (RUN_DIR/plan.json), which says what rows that run reads, not a recommendation; "
            "a run's recommendation is RUN_DIR/recommendation.json"
        )
    for name, expected in (("kind", KIND), ("format_version", FORMAT_VERSION)):
        if raw.get(name) != expected:
            raise DataError(f"{name} is {raw.get(name)!r:.80}; this version of cpt reads {expected!r}")
    return raw


def _take_object(raw: object, kind: Any, where: str) -> Any:
    try:
        return kind(**take_fields(raw, kind, where))
    except DataError as error:
        text = str(error)
        raise DataError(text if text.startswith(where) else f"{where}: {text}") from error
