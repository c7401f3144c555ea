"""The frozen plan of a run: which source gives how many rows in which stage.

Owns the quotas (integer rows per block), the caps on repetition, the one stage look-up, and ``plan.json`` with its
fingerprint. Which row of a source comes when is the sampler's business. Refuses: shares that do not add up, a share
for a group without a source, more tokens than the sources hold in ``max_epochs`` passes, and a ``plan.json`` that was
cut short or edited.

Worked example: a source ``web`` (general, 1000 rows), a source ``med`` (domain, 30 rows), a stage of 200 rows with
share_general 0.25. ``med`` should give 150 rows = 5 epochs. With max_epochs 4 it is capped at 120 rows, and the freed
30 go to ``web``: 80 rows. A block of 1000 rows therefore takes 400 of ``web`` and 600 of ``med``, and two warnings
name the shares wished (0.25, 0.75) and planned (0.40, 0.60).
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cpt.json_fields import check_integer, check_text, take_fields, take_list
from cpt.quotas import apportion, block_counts, fair_room, fill_groups, whole_steps
from cpt.rundir import DataError, write_atomic

Group = Literal["general", "domain"]

FORMAT_VERSION = 1
BLOCK_ROWS = 1000
MAX_BLOCK_ROWS = 65_536  # the sampler sorts one block per look-up


@dataclass(frozen=True)
class PlanSource:
    """One source as the plan sees it; ``num_rows`` rows of ``seq_len`` tokens are one epoch of its packed store."""

    name: str
    group: Group
    num_rows: int
    num_tokens: int
    content_hash: str

    def __post_init__(self) -> None:
        check_text("name", self.name)
        if self.group not in get_args(Group):
            raise DataError(f"group of source {self.name!r} is {self.group!r}; it must be 'general' or 'domain'")
        if check_integer("num_rows", self.num_rows, low=0) == 0:
            raise DataError(
                f"source {self.name!r} holds {self.num_tokens} tokens, too few for one row; "
                "give it more text, shorten seq_len or leave the source out"
            )
        check_integer("num_tokens", self.num_tokens, low=1)
        check_text("content_hash", self.content_hash)


@dataclass(frozen=True)
class Stage:
    """Rows ``[start_row, end_row)`` with constant shares: a block takes ``block_counts[i]`` rows of plan source i."""

    start_row: int
    end_row: int
    block_counts: tuple[int, ...]

    def __post_init__(self) -> None:
        check_integer("start_row", self.start_row, low=0)
        check_integer("end_row", self.end_row, low=self.start_row + 1)
        if not isinstance(self.block_counts, tuple):
            raise DataError(f"block_counts is {self.block_counts!r:.80}; it must be a list of integers")
        for index, count in enumerate(self.block_counts):
            check_integer(f"block_counts[{index}]", count, low=0)

    @property
    def num_rows(self) -> int:
        return self.end_row - self.start_row


@dataclass(frozen=True)
class StageWish:
    """What the user asks of a stage, before caps.

    ``weights`` are relative inside a source's group; a group without any is mixed in proportion to its sources' tokens.
    ``share_domain`` may be left out (it is the rest), but if stated the two must sum to 1.
    """

    tokens: int
    share_general: float
    weights: Mapping[str, float] = field(default_factory=dict)
    share_domain: float | None = None

    def __post_init__(self) -> None:
        check_integer("tokens of a stage", self.tokens, low=1)
        for name, share in (("share_general", self.share_general), ("share_domain", self.share_domain)):
            if share is not None and not 0 <= share <= 1:
                raise DataError(f"{name} is {share}; a share of tokens lies between 0 and 1")
        if self.share_domain is not None and abs(self.share_general + self.share_domain - 1) > 1e-6:
            total = self.share_general + self.share_domain
            raise DataError(
                f"share_general {self.share_general} + share_domain {self.share_domain} = {total:.6g}; "
                f"they must sum to 1, for example share_domain = {1 - self.share_general:.6g}"
            )
        for source, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise DataError(f"weight of source {source!r} is {weight}; it must be a finite number >= 0")

    def share(self, group: Group) -> float:
        return self.share_general if group == "general" else 1 - self.share_general


@dataclass(frozen=True)
class Plan:
    """The whole order of a run, up to the sampler's arithmetic. ``seq_len`` is one per plan, not per stage, for now."""

    seed: int
    seq_len: int
    global_batch_rows: int
    block_rows: int
    sources: tuple[PlanSource, ...]
    stages: tuple[Stage, ...]
    packing: str = "concat"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, low=0)
        check_integer("seq_len", self.seq_len, low=1)
        check_integer("global_batch_rows", self.global_batch_rows, low=1)
        if check_integer("block_rows", self.block_rows, low=1) > MAX_BLOCK_ROWS:
            raise DataError(f"block_rows is {self.block_rows}; it must be at most {MAX_BLOCK_ROWS}")
        check_text("packing", self.packing)
        _check_sources(self)
        _check_stages(self)

    @property
    def num_rows(self) -> int:
        return self.stages[-1].end_row if self.stages else 0

    @property
    def num_steps(self) -> int:
        return self.num_rows // self.global_batch_rows

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex characters of the SHA-256 of the canonical JSON; any changed field changes it."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def _stage_starts(self) -> NDArray[np.int64]:
        return np.array([stage.start_row for stage in self.stages], dtype=np.int64)

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def stages_at(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Stage index of each global row (any shape). The only stage look-up of the project."""
        return np.searchsorted(self._stage_starts, rows, side="right").astype(np.int64) - 1

    def stage_at(self, row: int) -> int:
        assert 0 <= row < self.num_rows, f"row {row} lies outside the plan's {self.num_rows} rows"
        return int(self.stages_at(np.array([row]))[0])

    def shares(self, stage: int) -> dict[str, float]:
        """Share of tokens by source in one stage; they sum to 1."""
        counts = self.stages[stage].block_counts
        return {source.name: count / self.block_rows for source, count in zip(self.sources, counts, strict=True)}

    def rows_by_source(self, stage: int | None = None) -> dict[str, int]:
        """Planned rows of one stage, or of all (None). Only a stage's last, partial block may turn out a row off."""
        chosen = self.stages if stage is None else self.stages[stage : stage + 1]
        parts = [apportion(each.block_counts, each.num_rows) for each in chosen]
        return {source.name: sum(part[i] for part in parts) for i, source in enumerate(self.sources)}

    def tokens_by_source(self, stage: int | None = None) -> dict[str, int]:
        return {name: rows * self.seq_len for name, rows in self.rows_by_source(stage).items()}

    def epochs_by_source(self, stage: int | None = None) -> dict[str, float]:
        """How often each source's rows are seen, fractional, in one stage or in all (None)."""
        rows = self.rows_by_source(stage)
        return {source.name: rows[source.name] / source.num_rows for source in self.sources}

    def share_general(self, stage: int | None = None) -> float:
        rows = self.rows_by_source(stage)
        general = sum(rows[source.name] for source in self.sources if source.group == "general")
        return general / sum(rows.values())

    def share_domain(self, stage: int | None = None) -> float:
        return 1 - self.share_general(stage)

    def to_json(self) -> str:
        content = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Plan":
        """Raises DataError: not JSON, another format, a field that is missing, unknown or breaks its rule, an edit."""
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"not a complete JSON file ({error})") from error
        if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version")
            raise DataError(f"format_version is {found!r:.80}; this version of cpt reads {FORMAT_VERSION}")
        fields = take_fields(raw, cls, "plan", extra=("format_version", "fingerprint"))
        stated = fields.pop("fingerprint")
        del fields["format_version"]
        fields["sources"] = take_list(fields["sources"], PlanSource, "sources")
        fields["stages"] = take_list(fields["stages"], Stage, "stages")
        plan = cls(**fields)
        if not plan.stages:
            raise DataError("stages is empty; a plan has at least one")
        if stated != plan.fingerprint:
            raise DataError(f"fingerprint is {stated!r:.80} but the content gives {plan.fingerprint!r}; it was edited")
        return plan


def write_plan(path: Path, plan: Plan) -> None:
    write_atomic(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Raises DataError naming the file, the field and the fix."""
    try:
        return Plan.from_json(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}. Restore the file from a copy, or plan the run again.") from error


def build_plan(
    sources: Sequence[PlanSource],
    wishes: Sequence[StageWish],
    *,
    seed: int,
    seq_len: int,
    global_batch_rows: int,
    max_epochs: float,
) -> tuple[Plan, list[str]]:
    """Turn wishes into quotas; the second value holds warnings in words, one per share that was changed.

    A stage's tokens are rounded down to whole steps (at least one), so that a step never mixes two stages. A cap
    holds to one row per block.

    Raises:
        DataError: an impossible wish, or more tokens than the sources hold in ``max_epochs`` passes.
    """
    if not wishes:
        raise DataError("the plan has no stage; give at least one with its tokens and share_general")
    empty = Plan(seed, seq_len, global_batch_rows, BLOCK_ROWS, tuple(sources), stages=())
    return _extend(empty, wishes, max_epochs)


def append_stage(
    plan: Plan, wish: StageWish, *, from_step: int, max_epochs: float, new_sources: Sequence[PlanSource] = ()
) -> tuple[Plan, list[str]]:
    """Change the mixture from ``from_step`` on: what was planned after it is replaced by one stage.

    Every row before ``from_step`` stays what it was, and every source continues where it then stands. ``max_epochs``
    counts from the start of the run.

    Raises:
        DataError: as ``build_plan``, or ``from_step`` lies outside the plan.
    """
    if not 0 <= from_step <= plan.num_steps:
        raise DataError(f"from_step is {from_step}; the plan has {plan.num_steps} steps, choose one from 0 to that")
    row = from_step * plan.global_batch_rows
    padding = (0,) * len(new_sources)
    kept = tuple(
        Stage(stage.start_row, min(stage.end_row, row), stage.block_counts + padding)
        for stage in plan.stages
        if stage.start_row < row
    )
    start = replace(plan, sources=plan.sources + tuple(new_sources), stages=kept)
    return _extend(start, [wish], max_epochs)


def _extend(plan: Plan, wishes: Sequence[StageWish], max_epochs: float) -> tuple[Plan, list[str]]:
    if not (math.isfinite(max_epochs) and max_epochs > 0):
        raise DataError(f"max_epochs is {max_epochs}; it must be a positive number")
    steps = whole_steps([wish.tokens for wish in wishes], plan.seq_len * plan.global_batch_rows)
    rows = [each * plan.global_batch_rows for each in steps]
    wished = [[share * n for share in _wished_shares(plan.sources, w)] for w, n in zip(wishes, rows, strict=True)]
    warnings: list[str] = []
    for index, wish in enumerate(wishes):
        ahead = [sum(column) for column in zip(*wished[index:], strict=True)]
        used = plan.rows_by_source()
        room = [max(0.0, max_epochs * source.num_rows - used[source.name]) for source in plan.sources]
        counts = _stage_counts(plan, wish, (rows[index], fair_room(room, wished[index], ahead), room))
        plan = replace(plan, stages=(*plan.stages, Stage(plan.num_rows, plan.num_rows + rows[index], counts)))
        warnings += _warnings(plan, wished[index], ahead, max_epochs)
    return plan, warnings


def _group_weights(sources: Sequence[PlanSource], wish: StageWish, group: Group) -> list[float]:
    """Weights of a group's sources, summing to 1, and zero for the others; all zero if no source is usable."""
    members = [source.name for source in sources if source.group == group]
    missing = [name for name in members if name not in wish.weights]
    if missing and len(missing) < len(members):
        raise DataError(
            f"weights name some {group} sources but not {', '.join(missing)}; "
            "give every source of the group a weight (0 leaves it out) or none"
        )
    raw = [wish.weights.get(s.name, s.num_tokens) if s.group == group else 0.0 for s in sources]
    total = sum(raw)
    return [weight / total for weight in raw] if total else [0.0] * len(raw)


def _wished_shares(sources: Sequence[PlanSource], wish: StageWish) -> list[float]:
    unknown = sorted(set(wish.weights) - {source.name for source in sources})
    if unknown:
        known = ", ".join(source.name for source in sources)
        raise DataError(f"weights name the unknown source {unknown[0]!r}; the plan's sources are {known}")
    shares = [0.0] * len(sources)
    for group in get_args(Group):
        weights = _group_weights(sources, wish, group)
        if wish.share(group) > 0 and not any(weights):
            raise DataError(
                f"share_{group} is {wish.share(group):.6g} but no {group} source has a weight above 0; "
                f"add a {group} source or set share_{group} to 0"
            )
        shares = [share + wish.share(group) * weight for share, weight in zip(shares, weights, strict=True)]
    return shares


def _stage_counts(plan: Plan, wish: StageWish, available: tuple[int, list[float], list[float]]) -> tuple[int, ...]:
    """``available``: the stage's rows, and every source's room with and without regard to later stages."""
    num_rows, fair, room = available
    weights = (_group_weights(plan.sources, wish, "general"), _group_weights(plan.sources, wish, "domain"))
    for limits in (fair, room):  # what later stages hoped for is touched only when there is no other way
        parts = fill_groups(num_rows, wish.share_general, weights, limits)
        if sum(parts) > num_rows - 0.5:
            return tuple(block_counts(parts, room, num_rows, plan.block_rows))
    raise DataError(
        f"stage {len(plan.stages)} asks for {num_rows * plan.seq_len} tokens, but within max_epochs its sources have "
        f"only {int(sum(parts)) * plan.seq_len} left; lower the stage's tokens to that, raise max_epochs, or add text"
    )


def _warnings(plan: Plan, wished_rows: list[float], ahead: list[float], max_epochs: float) -> list[str]:
    """The newest stage's shares that differ from the wish by more than rounding; ``ahead``: rows wished from it on."""
    index = len(plan.stages) - 1
    stage = plan.stages[index]
    before = replace(plan, stages=plan.stages[:-1]).rows_by_source()
    found = []
    for source, rows, count, total in zip(plan.sources, wished_rows, stage.block_counts, ahead, strict=True):
        wish = rows * plan.block_rows / stage.num_rows
        if count == 0 < wish:
            reason = (
                f"one row in each block of {plan.block_rows} would exceed max_epochs {max_epochs:g}; it is left out"
            )
        elif count <= wish - 1:
            epochs = (before[source.name] + total) / source.num_rows
            reason = f"the wish is {epochs:.2f} epochs, capped at max_epochs {max_epochs:g}"
        elif count >= wish + 1:
            epochs = plan.epochs_by_source()[source.name]
            reason = f"it takes what capped sources cannot give and reaches {epochs:.2f} epochs"
        elif count == 1 and wish < 0.5:
            reason = f"at least one row in each block of {plan.block_rows}"
        else:
            continue
        shares = f"wished share {wish / plan.block_rows:.4g}, planned {count / plan.block_rows:.4g}"
        found.append(f"stage {index}, source {source.name!r}: {shares}: {reason}")
    return found


def _check_sources(plan: Plan) -> None:
    seen: set[str] = set()
    for source in plan.sources:
        if source.name in seen:
            raise DataError(f"sources name {source.name!r} twice; every source has its own name")
        seen.add(source.name)
        if plan.packing == "concat" and source.num_rows * plan.seq_len > source.num_tokens:
            raise DataError(
                f"num_rows of source {source.name!r} is {source.num_rows}, but {source.num_tokens} tokens hold at most "
                f"{source.num_tokens // plan.seq_len} rows of {plan.seq_len}"
            )


def _check_stages(plan: Plan) -> None:
    end = 0
    for index, stage in enumerate(plan.stages):
        where = f"stages[{index}]"
        if stage.start_row != end:
            raise DataError(f"{where}.start_row is {stage.start_row}; it must be {end}, where the stage before ends")
        if stage.end_row % plan.global_batch_rows:
            raise DataError(
                f"{where}.end_row is {stage.end_row}; it must be a multiple of global_batch_rows "
                f"{plan.global_batch_rows}"
            )
        if len(stage.block_counts) != len(plan.sources) or sum(stage.block_counts) != plan.block_rows:
            raise DataError(
                f"{where}.block_counts is {list(stage.block_counts)!r:.80}; it must hold one count for each of "
                f"{len(plan.sources)} sources and sum to block_rows {plan.block_rows}"
            )
        end = stage.end_row
