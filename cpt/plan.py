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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.json_fields import check_integer, check_text, take_fields, take_list
from cpt.plan_parts import Group as Group  # the parts are a part of this module's name
from cpt.plan_parts import PlanSource as PlanSource
from cpt.plan_parts import Stage as Stage
from cpt.plan_parts import StageWish as StageWish
from cpt.plan_parts import group_weights, wished_shares
from cpt.plan_words import Given, doubts_in_words
from cpt.quotas import apportion, block_counts, fair_room, fill_groups, whole_steps
from cpt.rundir import DataError, write_atomic

Caps = float | Mapping[str, float]  # passes over a source: one number for all, or one by name for each

FORMAT_VERSION = 1
BLOCK_ROWS = 1000
MAX_BLOCK_ROWS = 65_536  # the sampler sorts one block per look-up


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
        canonical = json.dumps(self._content(), sort_keys=True, separators=(",", ":"))
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
        total = sum(each.num_rows for each in chosen)
        rows = apportion(_drawn(chosen, len(self.sources)), total) if total else [0] * len(self.sources)
        return {source.name: rows[i] for i, source in enumerate(self.sources)}

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
        content = {"format_version": FORMAT_VERSION, "fingerprint": self.fingerprint, **self._content()}
        return json.dumps(content, indent=1) + "\n"

    def _content(self) -> dict[str, Any]:
        """``in_order`` is written where it is true only: plans without a curriculum keep file and fingerprint."""
        content = asdict(self)
        for source in content["sources"]:
            if not source["in_order"]:
                del source["in_order"]
        return content

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
        fields["sources"] = take_list(_with_order(fields["sources"]), PlanSource, "sources")
        fields["stages"] = take_list(fields["stages"], Stage, "stages")
        plan = cls(**fields)
        if not plan.stages:
            raise DataError("stages is empty; a plan has at least one")
        if stated != plan.fingerprint:
            raise DataError(f"fingerprint is {stated!r:.80} but the content gives {plan.fingerprint!r}; it was edited")
        return plan


def _with_order(sources: Any) -> Any:
    """Sources as they are read: see ``Plan._content``."""
    if not isinstance(sources, list):
        return sources
    return [{"in_order": False, **source} if isinstance(source, dict) else source for source in sources]


def write_plan(path: Path, plan: Plan) -> None:
    write_atomic(path, plan.to_json())


def read_plan(path: Path) -> Plan:
    """Raises DataError naming the file, the field and the fix."""
    try:
        return Plan.from_json(path.read_bytes())
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}. Restore the file from a copy, or plan the run again.") from error


def build_plan(  # noqa: PLR0913 - each is a fact of the plan, and only sources and wishes come unnamed
    sources: Sequence[PlanSource],
    wishes: Sequence[StageWish],
    *,
    seed: int,
    seq_len: int,
    global_batch_rows: int,
    max_epochs: Caps,
    packing: str = "concat",
) -> tuple[Plan, list[str]]:
    """Turn wishes into quotas; the second value holds warnings in words, one per share that was changed.

    A stage's tokens are rounded down to whole steps (at least one), so that a step never mixes two stages. A cap
    holds to one row per block.

    Raises:
        DataError: an impossible wish, or more tokens than the sources hold in ``max_epochs`` passes.
    """
    if not wishes:
        raise DataError("the plan has no stage; give at least one with its tokens and share_general")
    empty = Plan(seed, seq_len, global_batch_rows, BLOCK_ROWS, tuple(sources), stages=(), packing=packing)
    return _extend(empty, wishes, max_epochs)


def append_stages(
    plan: Plan,
    wishes: Sequence[StageWish],
    *,
    from_step: int,
    max_epochs: Caps,
    new_sources: Sequence[PlanSource] = (),
) -> tuple[Plan, list[str]]:
    """Change the mixture from ``from_step`` on: what was planned after it is replaced by the wishes.

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
    return _extend(start, wishes, max_epochs)


def _extend(plan: Plan, wishes: Sequence[StageWish], max_epochs: Caps) -> tuple[Plan, list[str]]:
    """One pass over the wishes: plans of thousands of stages are built in seconds."""
    sources, block_rows = plan.sources, plan.block_rows
    limits = [cap * source.num_rows for cap, source in zip(_caps(sources, max_epochs), sources, strict=True)]
    steps = whole_steps([wish.tokens for wish in wishes], plan.seq_len * plan.global_batch_rows)
    sizes = [each * plan.global_batch_rows for each in steps]
    wished = [[share * n for share in wished_shares(sources, w)] for w, n in zip(wishes, sizes, strict=True)]
    ahead = [*accumulate(reversed(wished), lambda total, more: [a + b for a, b in zip(total, more, strict=True)])][::-1]
    drawn = _drawn(plan.stages, len(sources))
    stages, given = list(plan.stages), []
    for wish, size, here, later in zip(wishes, sizes, wished, ahead, strict=True):
        room = [max(0.0, limit - used / block_rows) for limit, used in zip(limits, drawn, strict=True)]
        counts = _stage_counts(plan, wish, _StageRoom(len(stages), size, fair_room(room, here, later), room))
        for i, source in enumerate(sources):
            before = drawn[i] / block_rows
            drawn[i] += counts[i] * size
            share = here[i] * block_rows / size
            rows = (source.num_rows, limits[i], before + later[i], drawn[i] / block_rows)
            given.append(Given(len(stages), source.name, share, counts[i], block_rows, *rows))
        first = stages[-1].end_row if stages else 0
        stages.append(Stage(first, first + size, counts))
    return replace(plan, stages=tuple(stages)), list(doubts_in_words(given))


def _caps(sources: Sequence[PlanSource], max_epochs: Caps) -> list[float]:
    caps = [max_epochs[source.name] if isinstance(max_epochs, Mapping) else max_epochs for source in sources]
    for cap in caps:
        if not (math.isfinite(cap) and cap > 0):
            raise DataError(f"max_epochs is {cap}; it must be a positive number")
    return caps


def _drawn(stages: Sequence[Stage], num_sources: int) -> list[int]:
    """Rows of each source in the stages, in units of a row per block: exact, and cheap for thousands of stages."""
    return [sum(stage.block_counts[i] * stage.num_rows for stage in stages) for i in range(num_sources)]


@dataclass(frozen=True)
class _StageRoom:
    """A stage to be filled: its rows, and every source's room with (``fair``) and without regard to later stages."""

    index: int
    num_rows: int
    fair: list[float]
    room: list[float]


def _stage_counts(plan: Plan, wish: StageWish, stage: _StageRoom) -> tuple[int, ...]:
    num_rows = stage.num_rows
    weights = (group_weights(plan.sources, wish, "general"), group_weights(plan.sources, wish, "domain"))
    for limits in (stage.fair, stage.room):  # what later stages hoped for is touched only when there is no other way
        parts = fill_groups(num_rows, wish.share_general, weights, limits)
        if sum(parts) > num_rows - 0.5:
            return tuple(block_counts(parts, stage.room, num_rows, plan.block_rows))
    fix = "the stage's tokens to that" if wish.own_tokens else "train.tokens, of which the stages are made"
    raise DataError(
        f"stage {stage.index} asks for {num_rows * plan.seq_len} tokens, but within max_epochs its sources have "
        f"only {int(sum(parts)) * plan.seq_len} left; lower {fix}, raise max_epochs, or add text"
    )


def _check_sources(plan: Plan) -> None:
    seen: set[str] = set()
    for source in plan.sources:
        if source.name in seen:
            raise DataError(f"sources name {source.name!r} twice; every source has its own name")
        seen.add(source.name)
        concat = plan.packing == "concat" or source.in_order  # any other rule would undo a source's order
        if concat and source.num_rows * plan.seq_len > source.num_tokens:
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
