"""Which row of which source stands at a global row index: arithmetic on (plan, index), and nothing else.

Owns the order of the data. There is no state, no generator and no index in memory, so any step of any run is found at
the same small cost, on 10^12 tokens as on ten rows, and any world size and micro-batch size reads the same rows in the
same order. Refuses: a step outside the plan, and a batch that ranks and micro-batches do not divide.

Worked example: block_rows 5, sources A (4 rows, 3 per block) and B (7 rows, 2 per block), one stage of 13 rows, seed 1.

    global row        0  1  2  3  4 | 5  6  7  8  9 | 10 11 12
    source            A  B  A  A  B | A  B  A  B  A |  B  A  B    (1)
    draw of it        0  0  1  2  1 | 3  2  4  3  5 |  4  6  5    (2) = rows before the stage + block * count + place
    epoch of it       0  0  0  0  0 | 0  0  1  0  1 |  0  1  0    (3) = draw // rows of the source
    row in source     2  0  3  1  3 | 0  4  0  6  2 |  1  3  5    (4) = bijection of the epoch (draw % rows)

(1) The order in a block is stratified: the i-th of a source's c rows gets the sort key (i + u) / c, with u keyed and
uniform in [0, 1). A source's rows keep their order, and *every* prefix of a block, not only a whole one, is within 1 +
share * (sources - 2) rows of the wished share. Short stages and partial blocks are as exact as long runs. The
price: a rare source comes half as often as it should at the first and the last of a block's places.

(2) The rows of earlier stages are summed once per plan. A stage that ends inside a block hands on exactly where it
stopped. A stage whose rows have another length starts its sources' draws of that length at 0, or where the last stage
with that length stopped: rows of 8 and of 16 tokens are two packings of a source, each with an order of its own. A
curriculum alone goes on at the same place of its text: after 7 rows of 8 tokens comes row 3 of 16.

(4) A Feistel network on the two digits of the index to the base ceil(sqrt(rows)), walked until it lands inside (Black
& Rogaway 2002). A comes as 2 3 1 0 in epoch 0 and as 0 2 3 .. in epoch 1. A source that is ``in_order``, a curriculum,
comes as 0 1 2 .. in every epoch.

Every random value is a hash of (seed, purpose, indices) through the finaliser of splitmix64 (Steele et al. 2014), in
unsigned 64-bit arithmetic: the same on every machine and for every version of numpy.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from cpt.plan import Plan
from cpt.plan_parts import micro_rows
from cpt.rundir import DataError

IntArray = NDArray[np.int64]
KeyArray = NDArray[np.uint64]

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment, 2^64 / golden ratio
FEISTEL_ROUNDS = (
    10  # four suffice on large domains (Luby & Rackoff 1988); below 20 rows fewer than eight show a pattern
)
BLOCKS_AT_ONCE = 1024  # bounds memory when rows are scattered over many blocks
PURPOSE_BLOCK = 1
PURPOSE_EPOCH = 2


@dataclass(frozen=True)
class RowLocations:
    """For each global row: index into ``plan.sources``, 0-based epoch of that source, row in its packed store."""

    source_index: IntArray
    epoch: IntArray
    row_in_source: IntArray


@dataclass(frozen=True)
class _Tables:
    """What is worth computing once per plan; a few numbers per stage and source."""

    lengths: IntArray  # (stages,) index into ``seq_lens``
    seq_lens: tuple[int, ...]
    bases: IntArray  # (stages, sources) where the stage's draws begin
    drawn: IntArray  # (stages + 1, lengths, sources) rows of each length drawn before the stage, in the end of all
    epoch_rows: IntArray  # (lengths, sources)
    source_keys: KeyArray  # (lengths, sources)
    in_order: NDArray[np.bool_]  # (sources,) a curriculum


def locate(plan: Plan, rows: IntArray | Sequence[int]) -> RowLocations:
    """Source, epoch and row in the source of each global row; any shape, which the result keeps."""
    flat = np.asarray(rows, dtype=np.int64).ravel()
    assert flat.size == 0 or (flat.min() >= 0 and flat.max() < plan.num_rows), (
        f"rows {flat.min()} to {flat.max()} are asked for, the plan has {plan.num_rows}"
    )
    tables = _tables(plan)
    source = np.empty_like(flat)
    draw = np.empty_like(flat)
    stages = plan.stages_at(flat)
    for stage in np.unique(stages).tolist():
        chosen = stages == stage
        source[chosen], draw[chosen] = _draws_in_stage(plan, stage, flat[chosen] - plan.stages[stage].start_row)
    draw += tables.bases[stages, source]
    length = tables.lengths[stages]
    num_rows = tables.epoch_rows[length, source]
    epoch, position = np.divmod(draw, num_rows)
    keys = _keyed(plan.seed, PURPOSE_EPOCH, tables.source_keys[length, source], epoch.astype(np.uint64))
    row = np.where(tables.in_order[source], position, permute(position, num_rows, keys))
    return RowLocations(*(part.reshape(np.shape(rows)) for part in (source, epoch, row)))


def rows_of_step(plan: Plan, step: int) -> IntArray:
    """Global rows of one optimizer step, in order; shape (rows of a step of its stage,)."""
    assert 0 <= step < plan.num_steps, f"step {step} lies outside the plan's {plan.num_steps} steps"
    first = plan.rows_before(step)
    return np.arange(first, first + plan.rows_per_step(plan.stage_of_step(step)), dtype=np.int64)


def rows_of_rank(plan: Plan, step: int, *, rank: int, world_size: int, micro_batch_size: int) -> IntArray:
    """The rank's rows of one step; shape (grad_accum_steps, rows per micro-batch).

    ``micro_batch_size`` rows are of the plan's own length; a stage with longer rows has fewer in a micro-batch.
    Micro-batch a of rank r holds the step's rows a * W * m + r * m + [0, m), with W ranks and m rows per micro-batch.

    Raises:
        DataError: world_size * m does not divide the step's rows.
    """
    assert 0 <= rank < world_size, f"rank {rank} of {world_size} does not exist"
    seq_len, rows = plan.seq_len_of(plan.stage_of_step(step)), rows_of_step(plan, step)
    micro = micro_rows(micro_batch_size, seq_len=seq_len, stated_for=plan.seq_len)
    if micro_batch_size < 1 or rows.size % (world_size * micro):
        of = "" if seq_len == plan.seq_len else f" of {seq_len} tokens"
        raise DataError(
            f"a step of {rows.size} rows{of} cannot be split over world_size {world_size} x micro_batch_size "
            f"{micro}; choose micro_batch_size so that the product divides it"
        )
    return rows.reshape(-1, world_size, micro)[:, rank]


def rows_seen(plan: Plan, step: int) -> dict[str, int]:
    """Rows of each source in the first ``step`` steps, exact, without walking over them."""
    return _by_source(plan, _seen(plan, step))


def tokens_seen(plan: Plan, step: int) -> dict[str, int]:
    """Tokens of each source in the first ``step`` steps."""
    lengths = np.array(_tables(plan).seq_lens, dtype=np.int64)
    return _by_source(plan, _seen(plan, step) * lengths[:, None])


def epochs_seen(plan: Plan, step: int) -> dict[str, float]:
    """Passes over each source in the first ``step`` steps; those of every row length add up."""
    epochs = (_seen(plan, step) / np.maximum(1, _tables(plan).epoch_rows)).sum(axis=0)
    return {source.name: float(value) for source, value in zip(plan.sources, epochs, strict=True)}


def _by_source(plan: Plan, counts: IntArray) -> dict[str, int]:
    return {source.name: int(counts[:, index].sum()) for index, source in enumerate(plan.sources)}


def _seen(plan: Plan, step: int) -> IntArray:
    """Rows of each length and source in the first ``step`` steps; shape (lengths, sources)."""
    assert 0 <= step <= plan.num_steps, f"step {step} lies outside the plan's {plan.num_steps} steps"
    tables = _tables(plan)
    stage = len(plan.stages) if step == plan.num_steps else plan.stage_of_step(step)
    seen: IntArray = tables.drawn[stage].copy()
    if stage == len(plan.stages):
        return seen
    seen[tables.lengths[stage]] += _rows_in_prefix(plan, stage, plan.rows_before(step) - plan.stages[stage].start_row)
    return seen


def permute(position: IntArray, num_rows: IntArray, keys: KeyArray) -> IntArray:
    """A keyed bijection of ``0..num_rows-1``, elementwise: where ``position`` goes under its key. All of shape (N,)."""
    limit = num_rows.astype(np.uint64)
    side = _ceil_sqrt(num_rows).astype(np.uint64)
    value = _feistel(position.astype(np.uint64), side, keys)
    outside = np.flatnonzero(value >= limit)
    while outside.size:  # side^2 exceeds num_rows by at most 2 * sqrt(num_rows) + 1: few walk, and not far
        value[outside] = _feistel(value[outside], side[outside], keys[outside])
        outside = outside[value[outside] >= limit[outside]]
    return value.astype(np.int64)


@lru_cache(maxsize=16)
def _tables(plan: Plan) -> _Tables:
    seq_lens = plan.seq_lens
    sources = range(len(plan.sources))
    lengths = np.array([seq_lens.index(plan.seq_len_of(i)) for i in range(len(plan.stages))], dtype=np.int64)
    epoch_rows = np.array([[plan.epoch_rows(i, seq_len) for i in sources] for seq_len in seq_lens], dtype=np.int64)
    in_order = np.array([source.in_order for source in plan.sources], dtype=np.bool_)
    bases = np.zeros((len(plan.stages), len(plan.sources)), dtype=np.int64)
    drawn = np.zeros((len(plan.stages) + 1, len(seq_lens), len(plan.sources)), dtype=np.int64)
    each, tokens = np.arange(len(plan.sources)), np.array(seq_lens, dtype=np.int64)
    ends, before = np.zeros_like(each), np.full_like(each, lengths[0] if lengths.size else 0)  # draws, of which length
    for index, length in enumerate(lengths.tolist()):
        old, new = (epoch_rows[before, each], tokens[before]), (epoch_rows[length], tokens[length])
        carried = np.where(before == length, ends, _carried(ends, old, new))
        bases[index] = np.where(in_order, carried, drawn[index, length])
        rows = _rows_in_prefix(plan, index, plan.stages[index].num_rows)
        drawn[index + 1] = drawn[index]
        drawn[index + 1, length] += rows
        ends, before = np.where(rows, bases[index] + rows, ends), np.where(rows, length, before)
    keys = np.array([[_source_key(plan, i, seq_len) for i in sources] for seq_len in seq_lens], dtype=np.uint64)
    return _Tables(lengths, seq_lens, bases, drawn, epoch_rows, keys, in_order)


def _carried(draws: IntArray, old: tuple[IntArray, IntArray], new: tuple[IntArray, IntArray]) -> IntArray:
    """The draw in rows of a ``new`` length that begins where ``draws`` rows of an ``old`` one end, or less than a row
    before; each is (rows of an epoch, row length), by source.
    """
    epoch, row = np.divmod(draws, np.maximum(1, old[0]))
    carried: IntArray = epoch * new[0] + np.minimum(new[0], row * old[1] // new[1])
    return carried


def _source_key(plan: Plan, source: int, seq_len: int) -> int:
    """From the source's name, so that its order does not depend on which other sources there are; and from the row
    length where it is not the plan's, whose rows are other rows.
    """
    name = plan.sources[source].name.encode()
    named = name if seq_len == plan.seq_len else name + b"\0%d" % seq_len
    return int.from_bytes(hashlib.sha256(named).digest()[:8], "little")


def _draws_in_stage(plan: Plan, stage: int, into_stage: IntArray) -> tuple[IntArray, IntArray]:
    """Source of each row, and how many rows of that source the stage drew before it."""
    counts = np.array(plan.stages[stage].block_counts, dtype=np.int64)
    slot_source, slot_place = _slots(counts)
    block, place = np.divmod(into_stage, plan.block_rows)
    blocks, index = np.unique(block, return_inverse=True)
    slot = np.empty_like(into_stage)
    for first in range(0, blocks.size, BLOCKS_AT_ONCE):
        order = _block_order(plan, stage, blocks[first : first + BLOCKS_AT_ONCE])
        chosen = np.flatnonzero((index >= first) & (index < first + BLOCKS_AT_ONCE))
        slot[chosen] = order[index[chosen] - first, place[chosen]]
    source = slot_source[slot]
    return source, block * counts[source] + slot_place[slot]


def _rows_in_prefix(plan: Plan, stage: int, num_rows: int) -> IntArray:
    """Rows of each source among the first ``num_rows`` of a stage; shape (sources,)."""
    counts = np.array(plan.stages[stage].block_counts, dtype=np.int64)
    blocks, rest = divmod(num_rows, plan.block_rows)
    total = counts * blocks
    if rest:
        order = _block_order(plan, stage, np.array([blocks], dtype=np.int64))[0]
        total += np.bincount(_slots(counts)[0][order[:rest]], minlength=counts.size)
    return total


def _slots(counts: IntArray) -> tuple[IntArray, IntArray]:
    """A block's slots before ordering, source by source: source of each, and its place among its source's slots."""
    source = np.repeat(np.arange(counts.size, dtype=np.int64), counts)
    first = np.cumsum(counts) - counts
    return source, np.arange(source.size, dtype=np.int64) - first[source]


def _block_order(plan: Plan, stage: int, blocks: IntArray) -> IntArray:
    """The slot at each place of the given blocks of a stage; shape (blocks, block_rows).

    Keyed by the block's first global row: cutting a stage short changes no row before the cut. Stable sorting settles
    ties.
    """
    counts = np.array(plan.stages[stage].block_counts, dtype=np.int64)
    source, place = _slots(counts)
    first_rows = plan.stages[stage].start_row + blocks * plan.block_rows
    keys = _keyed(plan.seed, PURPOSE_BLOCK, first_rows.astype(np.uint64))
    steps = np.arange(1, plan.block_rows + 1, dtype=np.uint64) * GOLDEN
    fraction = _mix(keys[:, None] + steps) >> np.uint64(17)  # 47 bits, and places have at most 16: no overflow
    sort_keys = ((place.astype(np.uint64) << np.uint64(47)) + fraction) // counts[source].astype(np.uint64)
    return np.argsort(sort_keys, axis=1, kind="stable")


def _feistel(value: KeyArray, side: KeyArray, keys: KeyArray) -> KeyArray:
    """A bijection of ``0..side^2-1`` on the two digits to base ``side``: a round adds a hash of one to the other.

    The round function is the splitmix64 stream of the key at index digit * FEISTEL_ROUNDS + round.
    """
    left, right = np.divmod(value, side)
    for number in range(1, FEISTEL_ROUNDS + 1):
        hashed = _mix(keys + (right * np.uint64(FEISTEL_ROUNDS) + np.uint64(number)) * GOLDEN)
        left, right = right, (left + (hashed >> np.uint64(1))) % side  # the shift leaves room: the sum must not wrap
    return left * side + right


def _keyed(seed: int, purpose: int, *indices: KeyArray) -> KeyArray:
    """A 64-bit key for (seed, purpose, indices), elementwise over index arrays of one shape."""
    key = np.zeros(1, dtype=np.uint64)
    for part in (np.array([seed], dtype=np.uint64), np.array([purpose], dtype=np.uint64), *indices):
        key = _mix((key + GOLDEN) ^ part)
    return key


def _mix(value: KeyArray) -> KeyArray:
    """The finaliser of splitmix64; wraps modulo 2^64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def _ceil_sqrt(values: IntArray) -> IntArray:
    """Exact for values below 2^62, where a float root may be one off."""
    root = np.sqrt(values.astype(np.float64)).astype(np.int64)
    root -= root * root >= values
    root += root * root < values
    return root + (root * root < values)
