import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cpt.data import sampler
from cpt.data.sampler import RowLocations, locate, permute, rows_of_rank, rows_of_step, rows_seen, tokens_seen
from cpt.plan import Plan, PlanSource, Stage, StageWish, append_stages, build_plan
from cpt.rundir import DataError

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def source(name: str, num_rows: int, group: Any = "general", seq_len: int = 4) -> PlanSource:
    return PlanSource(name, group, num_rows, num_rows * seq_len + 1, "hash")


def small_plan(*, counts: list[tuple[int, ...]], lengths: list[int], rows: list[int], seed: int = 1) -> Plan:
    ends = np.cumsum(lengths).tolist()
    stages = [Stage(end - n, end, count) for end, n, count in zip(ends, lengths, counts, strict=True)]
    sources = tuple(source(f"s{i}", n) for i, n in enumerate(rows))
    return Plan(seed, 4, 1, sum(counts[0]), sources, tuple(stages))


def everything(plan: Plan) -> RowLocations:
    return locate(plan, np.arange(plan.num_rows))


def triples(at: RowLocations) -> list[tuple[int, int, int]]:
    columns = (at.source_index.ravel().tolist(), at.epoch.ravel().tolist(), at.row_in_source.ravel().tolist())
    return list(zip(*columns, strict=True))


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    num_sources = draw(st.integers(1, 4))
    block_rows = draw(st.integers(num_sources, 24))
    counts = []
    for _ in range(draw(st.integers(1, 4))):
        cuts = sorted(draw(st.integers(0, block_rows)) for _ in range(num_sources - 1))
        counts.append(tuple(np.diff([0, *cuts, block_rows]).tolist()))
    return small_plan(
        counts=counts,
        lengths=[draw(st.integers(1, 80)) for _ in counts],
        rows=[draw(st.integers(1, 40)) for _ in range(num_sources)],
        seed=draw(st.integers(0, 2**62)),
    )


# a second implementation, on Python integers and by walking: what the arithmetic must equal


def mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def keyed(*parts: int) -> int:
    key = 0
    for part in parts:
        key = mix(((key + GOLDEN) & MASK) ^ part)
    return key


def permuted(position: int, num_rows: int, key: int) -> int:
    side = math.isqrt(num_rows - 1) + 1
    while True:
        left, right = divmod(position, side)
        for number in range(1, 11):
            left, right = right, (left + (mix((key + (right * 10 + number) * GOLDEN) & MASK) >> 1)) % side
        position = left * side + right
        if position < num_rows:
            return position


def walk(plan: Plan) -> Iterator[tuple[int, int, int]]:
    drawn = [0] * len(plan.sources)
    for stage in plan.stages:
        slots = [(i, place) for i, count in enumerate(stage.block_counts) for place in range(count)]
        for first in range(stage.start_row, stage.end_row, plan.block_rows):
            key = keyed(plan.seed, 1, first)
            sort_keys = [
                ((place << 47) + (mix((key + (slot + 1) * GOLDEN) & MASK) >> 17)) // stage.block_counts[i]
                for slot, (i, place) in enumerate(slots)
            ]
            for slot in sorted(range(len(slots)), key=sort_keys.__getitem__)[: stage.end_row - first]:
                i = slots[slot][0]
                epoch, position = divmod(drawn[i], plan.sources[i].num_rows)
                name_key = int.from_bytes(hashlib.sha256(plan.sources[i].name.encode()).digest()[:8], "little")
                yield i, epoch, permuted(position, plan.sources[i].num_rows, keyed(plan.seed, 2, name_key, epoch))
                drawn[i] += 1


@settings(max_examples=60, deadline=None)
@given(plans())
def test_seeking_any_row_gives_what_a_walk_gives(plan: Plan) -> None:
    walked = list(walk(plan))
    assert triples(everything(plan)) == walked
    backwards = [triples(locate(plan, np.array([row])))[0] for row in range(plan.num_rows - 1, -1, -17)]
    assert backwards == walked[::-17]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_epoch_of_a_source_sees_each_row_once_and_stages_skip_nothing(plan: Plan) -> None:
    epochs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, epoch, row in triples(everything(plan)):
        epochs[index, epoch].append(row)
    for (index, epoch), rows in epochs.items():
        complete = (index, epoch + 1) in epochs
        assert len(set(rows)) == len(rows)
        assert not complete or sorted(rows) == list(range(plan.sources[index].num_rows))
        assert epoch == 0 or (index, epoch - 1) in epochs


@settings(max_examples=60, deadline=None)
@given(plans())
def test_shares_are_exact_in_every_block_and_near_in_every_prefix(plan: Plan) -> None:
    index = everything(plan).source_index
    for stage in plan.stages:
        num_sources = sum(count > 0 for count in stage.block_counts)
        for first in range(stage.start_row, stage.end_row, plan.block_rows):
            block = index[first : min(first + plan.block_rows, stage.end_row)]
            for i, count in enumerate(stage.block_counts):
                seen = np.cumsum(block == i)
                wished = np.arange(1, len(block) + 1) * count / plan.block_rows
                limit = 1 + count / plan.block_rows * max(0, num_sources - 2)
                assert len(block) < plan.block_rows or seen[-1] == count
                assert np.abs(seen - wished).max() <= limit + 1e-9


@settings(max_examples=60, deadline=None)
@given(plans(), st.data())
def test_rows_seen_equals_counting(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.num_steps))
    counted = Counter(everything(plan).source_index[: step * plan.global_batch_rows].tolist())
    assert rows_seen(plan, step) == {each.name: counted[i] for i, each in enumerate(plan.sources)}
    assert tokens_seen(plan, step) == {name: 4 * rows for name, rows in rows_seen(plan, step).items()}


@settings(max_examples=40, deadline=None)
@given(plans(), st.data())
def test_an_appended_stage_changes_no_earlier_row_and_continues_each_source(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.num_steps))
    wish = StageWish(4 * 30, 1.0, {each.name: 1.0 for each in plan.sources} | {"new": 1.0})
    longer, _ = append_stages(plan, [wish], from_step=step, max_epochs=10**6, new_sources=[source("new", 9)])
    cut = step * plan.global_batch_rows
    old, new = triples(everything(plan)), triples(everything(longer))
    assert new[:cut] == old[:cut]
    for i, each in enumerate(longer.sources):
        drawn = [epoch * each.num_rows for index, epoch, _ in new if index == i]
        expected = [n // each.num_rows * each.num_rows for n in range(len(drawn))]
        assert drawn == expected


@settings(max_examples=40, deadline=None)
@given(grad_accum=st.integers(1, 4), world_size=st.integers(1, 6), micro=st.integers(1, 4), step=st.integers(0, 2))
def test_every_split_over_ranks_reads_the_same_rows_in_the_same_order(
    grad_accum: int, world_size: int, micro: int, step: int
) -> None:
    batch = grad_accum * world_size * micro
    plan = Plan(0, 4, batch, 10, (source("a", 7),), (Stage(0, 3 * batch, (10,)),))
    parts = [rows_of_rank(plan, step, rank=r, world_size=world_size, micro_batch_size=micro) for r in range(world_size)]
    assert all(part.shape == (grad_accum, micro) for part in parts)
    assert np.stack(parts, axis=1).ravel().tolist() == rows_of_step(plan, step).tolist()
    assert rows_of_step(plan, step).tolist() == list(range(step * batch, (step + 1) * batch))


def test_a_batch_that_ranks_do_not_divide_is_refused_with_the_numbers() -> None:
    plan = Plan(0, 4, 12, 10, (source("a", 7),), (Stage(0, 12, (10,)),))
    with pytest.raises(DataError, match="12 rows cannot be split over world_size 4 x micro_batch_size 2; choose"):
        rows_of_rank(plan, 0, rank=0, world_size=4, micro_batch_size=2)
    with pytest.raises(DataError, match="micro_batch_size 0"):
        rows_of_rank(plan, 0, rank=0, world_size=4, micro_batch_size=0)
    with pytest.raises(AssertionError, match="step 1 lies outside the plan's 1 steps"):
        rows_of_step(plan, 1)
    with pytest.raises(AssertionError, match="rows 11 to 12 are asked for, the plan has 12"):
        locate(plan, np.array([11, 12]))


def test_replay_over_a_hundred_thousand_draws_has_its_share_and_is_the_same_after_a_restart() -> None:
    sources = [source("web", 10**6), source("med", 10**6, "domain")]
    wish = StageWish(4 * 10**5, share_general=0.0725)
    plan, _ = build_plan(sources, [wish], seed=7, seq_len=4, global_batch_rows=100, max_epochs=4)
    general = everything(plan).source_index == 0
    assert abs(general.mean() - 0.0725) < 0.005
    assert abs((~general).mean() - (1 - 0.0725)) < 0.005  # displaced: domain rows fall by the replay share
    sampler._tables.cache_clear()
    restarted = Plan.from_json(plan.to_json())
    later = np.arange(50_000, 100_000)
    assert triples(locate(restarted, later)) == triples(everything(plan))[50_000:]


def test_orders_differ_between_epochs_seeds_and_sources_but_not_with_the_company() -> None:
    plan = small_plan(counts=[(1, 1)], lengths=[400], rows=[100, 100])
    at = everything(plan)
    orders = [tuple(at.row_in_source[(at.source_index == i) & (at.epoch == e)]) for i in (0, 1) for e in (0, 1)]
    other = everything(replace(plan, seed=2))
    orders.append(tuple(other.row_in_source[(other.source_index == 0) & (other.epoch == 0)]))
    assert len(set(orders)) == 5
    alone = Plan(1, 4, 1, 1, plan.sources[:1], (Stage(0, 100, (1,)),))
    assert tuple(everything(alone).row_in_source) == orders[0]


def test_a_trillion_tokens_are_addressed_without_overflow() -> None:
    rows = 2**50
    plan = Plan(5, 1, 1, 1000, (source("a", rows, seq_len=1), source("b", 3, seq_len=1)), (Stage(0, 2**60, (999, 1)),))
    far = np.array([2**60 - 1, 10**9, 2**59 + 7])
    at = locate(plan, far)
    seen = [rows_seen(plan, int(row)) for row in far]
    names = [plan.sources[i].name for i in at.source_index.tolist()]
    sizes = [plan.sources[i].num_rows for i in at.source_index.tolist()]
    assert at.epoch.tolist() == [s[name] // size for s, name, size in zip(seen, names, sizes, strict=True)]
    assert ((at.row_in_source >= 0) & (at.row_in_source < sizes)).all()
    assert sum(seen[0].values()) == 2**60 - 1
    keys = [keyed(5, 2, int(sampler._tables(plan).source_keys[0][i]), e) for i, e, _ in triples(at)]
    expected = [permuted(s[n] % size, size, key) for s, n, size, key in zip(seen, names, sizes, keys, strict=True)]
    assert at.row_in_source.tolist() == expected


@given(st.integers(1, 2**62))
def test_the_integer_root_is_exact(value: int) -> None:
    near = [max(1, min(2**62, root**2 + d)) for root in [math.isqrt(value)] for d in (-1, 0, 1)]
    assert sampler._ceil_sqrt(np.array(near)).tolist() == [math.isqrt(n - 1) + 1 for n in near]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_the_permutation_is_a_bijection_for_any_size_and_key(num_rows: int, key: int) -> None:
    got = permute(np.arange(num_rows), np.full(num_rows, num_rows), np.full(num_rows, key, dtype=np.uint64))
    assert sorted(got.tolist()) == list(range(num_rows))


@pytest.mark.parametrize("num_rows", [3, 4, 7, 10, 25, 100])
def test_positions_and_pairs_are_uniform_over_keys(num_rows: int) -> None:
    num_keys = 4000
    keys = np.repeat(sampler._keyed(11, 99, np.arange(num_keys, dtype=np.uint64)), num_rows)
    positions = np.tile(np.arange(num_rows), num_keys)
    order = permute(positions, np.full(positions.size, num_rows), keys).reshape(num_keys, num_rows)
    for column in (0, num_rows // 2, num_rows - 1):
        assert stats.chisquare(np.bincount(order[:, column], minlength=num_rows)).pvalue > 1e-3
    pairs = np.bincount(order[:, 0] * num_rows + order[:, 1], minlength=num_rows**2).reshape(num_rows, num_rows)
    if num_rows <= 25:  # beyond that a cell expects too few
        assert stats.chisquare(pairs[~np.eye(num_rows, dtype=bool)]).pvalue > 1e-3


def test_a_large_permutation_has_no_correlation_with_the_index_its_neighbour_or_the_next_epoch() -> None:
    size = 50_021
    positions, sizes = np.arange(size), np.full(size, size)
    first, second = (
        permute(positions, sizes, np.repeat(sampler._keyed(3, 2, np.array([e], dtype=np.uint64)), size)) for e in (0, 1)
    )
    for a, b in ((positions, first), (first[:-1], first[1:]), (first[:-7], first[7:]), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(size)
    cells = np.bincount(positions * 20 // size * 20 + first * 20 // size, minlength=400)
    assert stats.chisquare(cells).pvalue > 1e-3
    steps = np.bincount((np.diff(first) % size) * 50 // size, minlength=50)
    assert stats.chisquare(steps).pvalue > 1e-3


def test_the_place_of_a_lone_row_is_uniform_but_for_the_two_ends_of_a_block() -> None:
    plan = small_plan(counts=[(19, 1)], lengths=[20 * 4000], rows=[50, 50])
    places = np.bincount(np.flatnonzero(everything(plan).source_index == 1) % 20, minlength=20)
    assert stats.chisquare(places[1:-1]).pvalue > 1e-3
    # before the first of 19 strata's rows it comes with u / 19 for a uniform u: half as often as elsewhere
    assert stats.binomtest(int(places[0] + places[-1]), 4000, 1 / 19).pvalue > 1e-3


def test_scattered_rows_over_many_blocks_equal_contiguous_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = small_plan(counts=[(3, 2), (1, 4)], lengths=[203, 104], rows=[40, 30])
    rows = np.random.default_rng(0).permutation(plan.num_rows)
    together = everything(plan)
    monkeypatch.setattr(sampler, "BLOCKS_AT_ONCE", 3)
    scattered = locate(plan, rows.reshape(1, -1))
    assert scattered.epoch.shape == (1, plan.num_rows)
    for got, expected in zip(triples(scattered), rows.tolist(), strict=True):
        assert got == triples(together)[expected]


def test_no_rows_have_no_location() -> None:
    plan = small_plan(counts=[(3, 2)], lengths=[10], rows=[4, 7])
    assert locate(plan, np.zeros((0, 4), dtype=np.int64)).epoch.shape == (0, 4)


def test_the_order_never_changes_between_versions() -> None:
    """The docstring's table is the record: a change of order would break every resumed run."""
    sources = (source("A", 4), source("B", 7))
    plan = Plan(1, 4, 1, 5, sources, (Stage(0, 13, (3, 2)),))
    at = everything(plan)
    lines = {
        line[4:21].strip(): line[21:].split("(")[0] for line in (sampler.__doc__ or "").splitlines() if "|" in line
    }
    shown = {name: cells.replace("|", " ").split() for name, cells in lines.items()}
    assert shown["source"] == ["AB"[i] for i in at.source_index]
    assert shown["epoch of it"] == [str(epoch) for epoch in at.epoch]
    assert shown["row in source"] == [str(row) for row in at.row_in_source]
    assert shown["draw of it"] == [str((at.source_index[:r] == i).sum()) for r, i in enumerate(at.source_index)]


def test_a_source_in_order_comes_from_its_first_row_to_its_last_in_every_epoch_and_moves_no_other() -> None:
    shuffled = small_plan(counts=[(3, 2)], lengths=[60], rows=[17, 11])
    first, second = shuffled.sources
    with pytest.raises(DataError, match="in_order of source 's0' is 1"):
        replace(first, in_order=1)
    plan = replace(shuffled, sources=(first, replace(second, in_order=True)))
    at, other = everything(plan), everything(shuffled)
    rows = at.row_in_source[at.source_index == 1].tolist()
    assert rows == [draw % 11 for draw in range(24)]
    assert rows != other.row_in_source[other.source_index == 1].tolist()
    assert (at.source_index == other.source_index).all()
    assert (at.row_in_source[at.source_index == 0] == other.row_in_source[other.source_index == 0]).all()
