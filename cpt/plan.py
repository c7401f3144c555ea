"""From wishes to the plan of a run: which source gives how many rows in which stage.

Owns the quotas (integer rows per block) and the caps on repetition; the frozen result is ``cpt.plan_frozen``'s.
Refuses: shares that do not add up, a share for a group without a source, and more tokens than the sources hold in
``max_epochs`` passes.

Worked example: a source ``web`` (general, 1000 rows), a source ``med`` (domain, 30 rows), a stage of 200 rows with
share_general 0.25. ``med`` should give 150 rows = 5 epochs. With max_epochs 4 it is capped at 120 rows, and the freed
30 go to ``web``: 80 rows. A block of 1000 rows therefore takes 400 of ``web`` and 600 of ``med``, and two warnings
name the shares wished (0.25, 0.75) and planned (0.40, 0.60).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from cpt.plan_frozen import Plan as Plan  # the plan and its parts are a part of this module's name
from cpt.plan_frozen import read_plan as read_plan
from cpt.plan_frozen import write_plan as write_plan
from cpt.plan_parts import Group as Group
from cpt.plan_parts import PlanSource as PlanSource
from cpt.plan_parts import Stage as Stage
from cpt.plan_parts import StageWish as StageWish
from cpt.plan_parts import group_weights, wished_shares
from cpt.plan_words import Given, NewPass, doubts_in_words, new_passes_in_words
from cpt.quotas import block_counts, fair_room, fill_groups, whole_steps
from cpt.rundir import DataError

Caps = float | Mapping[str, float]  # passes over a source: one number for all, or one by name for each

BLOCK_ROWS = 1000


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
    row = plan.rows_before(from_step)
    padding = (0,) * len(new_sources)
    kept = tuple(
        replace(stage, end_row=min(stage.end_row, row), block_counts=stage.block_counts + padding)
        for stage in plan.stages
        if stage.start_row < row
    )
    start = replace(plan, sources=plan.sources + tuple(new_sources), stages=kept)
    return _extend(start, wishes, max_epochs)


def _extend(plan: Plan, wishes: Sequence[StageWish], max_epochs: Caps) -> tuple[Plan, list[str]]:
    """One pass over the wishes: plans of thousands of stages are built in seconds.

    Room is counted in rows of the plan's length; ``scales`` turn them into a stage's own, per pass over each source.
    """
    sources, block_rows = plan.sources, plan.block_rows
    limits = [cap * source.num_rows for cap, source in zip(_caps(sources, max_epochs), sources, strict=True)]
    steps = whole_steps([wish.tokens for wish in wishes], plan.global_batch_tokens)
    lengths = [wish.seq_len or plan.seq_len for wish in wishes]
    sizes = [n * plan.step_rows(length) for n, length in zip(steps, lengths, strict=True)]
    wished = [[share * n for share in wished_shares(sources, w)] for w, n in zip(wishes, sizes, strict=True)]
    for index, (rows, length) in enumerate(zip(wished, lengths, strict=True)):
        _check_packed(plan, len(plan.stages) + index, rows, length)
    scales = [_scales(plan, length) for length in lengths]
    usual = [[row / scale for row, scale in zip(r, s, strict=True)] for r, s in zip(wished, scales, strict=True)]
    ahead = [*accumulate(reversed(usual), lambda total, more: [a + b for a, b in zip(total, more, strict=True)])][::-1]
    drawn = _drawn(plan)
    stages, given = list(plan.stages), []
    for number, (wish, size, scale) in enumerate(zip(wishes, sizes, scales, strict=True)):
        room = [max(0.0, limit - float(used / block_rows)) for limit, used in zip(limits, drawn, strict=True)]
        rooms = (_own(fair_room(room, usual[number], ahead[number]), scale), _own(room, scale))
        counts = _stage_counts(plan, wish, _StageRoom(len(stages), size, lengths[number], *rooms))
        for i, source in enumerate(sources):
            before = float(drawn[i] / block_rows)
            drawn[i] += counts[i] * size / scale[i]
            share = wished[number][i] * block_rows / size
            rows_so_far = (source.num_rows, limits[i], before + ahead[number][i], float(drawn[i] / block_rows))
            given.append(Given(len(stages), source.name, share, counts[i], block_rows, *rows_so_far))
        first = stages[-1].end_row if stages else 0
        own = None if lengths[number] == plan.seq_len else lengths[number]
        stages.append(Stage(first, first + size, counts, own))
    whole = replace(plan, stages=tuple(stages))
    return whole, [*doubts_in_words(given), *new_passes_in_words(_new_passes(whole, len(plan.stages)))]


def _scales(plan: Plan, seq_len: int) -> list[Fraction]:
    """Rows of ``seq_len`` in a pass over each source, for each of the plan's own. Fractions: ``x / 1`` is exactly x."""
    if seq_len == plan.seq_len:
        return [Fraction(1)] * len(plan.sources)
    rows = [plan.epoch_rows(index, seq_len) for index in range(len(plan.sources))]
    return [Fraction(max(1, own), source.num_rows) for own, source in zip(rows, plan.sources, strict=True)]


def _own(room: Sequence[float], scale: Sequence[Fraction]) -> list[float]:
    return [rows * each for rows, each in zip(room, scale, strict=True)]


def _check_packed(plan: Plan, stage: int, wished: Sequence[float], seq_len: int) -> None:
    for index, source in enumerate(plan.sources):
        if wished[index] and not plan.epoch_rows(index, seq_len):
            raise DataError(
                f"stage {stage} has rows of {seq_len} tokens, and source {source.name!r} holds {source.num_tokens} "
                "tokens, too few for one; give it the weight 0 there, more text, or the stage a smaller seq_len"
            )


def _new_passes(plan: Plan, first: int) -> Iterator[NewPass]:
    """The stages from ``first`` on whose rows have another length than those before them."""
    for index in range(max(first, 1), len(plan.stages)):
        seq_len = plan.seq_len_of(index)
        if seq_len == plan.seq_len_of(index - 1):
            continue
        before = replace(plan, stages=plan.stages[:index]).epochs_by_source()
        counts = zip(plan.sources, plan.stages[index].block_counts, strict=True)
        drawn = {each.name: before[each.name] for each, count in counts if count and not each.in_order}
        yield NewPass(index, seq_len, {name: epochs for name, epochs in drawn.items() if epochs})


def _caps(sources: Sequence[PlanSource], max_epochs: Caps) -> list[float]:
    caps = [max_epochs[source.name] if isinstance(max_epochs, Mapping) else max_epochs for source in sources]
    for cap in caps:
        if not (math.isfinite(cap) and cap > 0):
            raise DataError(f"max_epochs is {cap}; it must be a positive number")
    return caps


def _drawn(plan: Plan) -> list[Fraction]:
    """Rows of each source in the stages, in units of a row per block and of the plan's row length: exact."""
    drawn = [Fraction(0)] * len(plan.sources)
    for index, stage in enumerate(plan.stages):
        for i, scale in enumerate(_scales(plan, plan.seq_len_of(index))):
            drawn[i] += stage.block_counts[i] * stage.num_rows / scale
    return drawn


@dataclass(frozen=True)
class _StageRoom:
    """A stage to be filled: its rows, and every source's room with (``fair``) and without regard to later stages."""

    index: int
    num_rows: int
    seq_len: int
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
        f"stage {stage.index} asks for {num_rows * stage.seq_len} tokens, but within max_epochs its sources have "
        f"only {int(sum(parts)) * stage.seq_len} left; lower {fix}, raise max_epochs, or add text"
    )
