"""Plans whose stages have rows of several lengths: steps, tokens and rows agree, and every source is read as promised."""

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cpt.data.sampler import epochs_seen, locate, rows_of_rank, rows_of_step, rows_seen, tokens_seen
from cpt.plan import Plan, PlanSource, Stage, StageWish, append_stages, build_plan
from cpt.plan_parts import micro_rows
from cpt.rundir import DataError

BASE, STEP = 8, 64  # tokens
LENGTHS = (4, 8, 16, 32, 64)


def source(name: str, tokens: int, *, in_order: bool = False, group: Any = "general") -> PlanSource:
    rows = {length: (tokens - 1) // length for length in LENGTHS}
    others = tuple((length, count) for length, count in rows.items() if length != BASE)
    return PlanSource(name, group, rows[BASE], tokens, "hash", in_order, others)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    sources = [
        source(f"s{i}", draw(st.integers(65, 2000)), in_order=draw(st.booleans()))
        for i in range(draw(st.integers(1, 3)))
    ]
    block_rows = draw(st.integers(len(sources), 24))
    stages, end = [], 0
    for _ in range(draw(st.integers(1, 5))):
        length = draw(st.sampled_from(LENGTHS))
        cuts = sorted(draw(st.integers(0, block_rows)) for _ in sources[1:])
        first, end = end, end + draw(st.integers(1, 12)) * STEP // length
        counts = tuple(np.diff([0, *cuts, block_rows]).tolist())
        stages.append(Stage(first, end, counts, None if length == BASE else length))
    return Plan(draw(st.integers(0, 2**60)), BASE, STEP // BASE, block_rows, tuple(sources), tuple(stages))


def lengths_of_rows(plan: Plan) -> np.ndarray[Any, Any]:
    stages = plan.stages_at(np.arange(plan.num_rows))
    return np.array([plan.seq_len_of(stage) for stage in stages.tolist()])


@given(plans())
def test_every_row_belongs_to_one_step_and_every_step_has_the_same_tokens(plan: Plan) -> None:
    steps = [rows_of_step(plan, step) for step in range(plan.num_steps)]
    assert np.concatenate(steps).tolist() == list(range(plan.num_rows))
    lengths = lengths_of_rows(plan)
    assert all(lengths[rows].sum() == STEP == plan.global_batch_tokens for rows in steps)
    assert plan.num_tokens == lengths.sum() and [plan.rows_before(i) for i in range(plan.num_steps)] == [
        int(rows[0]) for rows in steps
    ]
    assert [plan.stage_of_step(i) for i in range(plan.num_steps)] == [plan.stage_at(int(rows[0])) for rows in steps]


@given(plans(), st.data())
def test_what_was_seen_is_what_walking_over_the_rows_counts(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.num_steps))
    rows = np.arange(plan.rows_before(step))
    at, lengths = locate(plan, rows), lengths_of_rows(plan)[: rows.size]
    for i, each in enumerate(plan.sources):
        own = at.source_index == i
        assert rows_seen(plan, step)[each.name] == own.sum()
        assert tokens_seen(plan, step)[each.name] == lengths[own].sum()
        epochs = sum(1 / plan.epoch_rows(i, int(length)) for length in lengths[own])
        assert epochs_seen(plan, step)[each.name] == pytest.approx(epochs)
    assert sum(tokens_seen(plan, step).values()) == step * STEP


@given(plans())
def test_rows_of_one_length_are_read_pass_by_pass_whatever_comes_between(plan: Plan) -> None:
    at, lengths = locate(plan, np.arange(plan.num_rows)), lengths_of_rows(plan)
    for i, each in enumerate(plan.sources):
        for length in plan.seq_lens:
            own = (at.source_index == i) & (lengths == length)
            rows, epochs, num = at.row_in_source[own], at.epoch[own], plan.epoch_rows(i, length)
            if each.in_order:
                continue
            assert epochs.tolist() == (np.arange(rows.size) // num).tolist()
            for epoch in set(epochs.tolist()):
                seen = rows[epochs == epoch].tolist()
                assert len(set(seen)) == len(seen) and set(seen) <= set(range(num))


@given(plans())
def test_a_curriculum_goes_on_at_the_same_place_of_its_text(plan: Plan) -> None:
    at, lengths = locate(plan, np.arange(plan.num_rows)), lengths_of_rows(plan)
    for i in (i for i, each in enumerate(plan.sources) if each.in_order):
        own = at.source_index == i
        read = list(zip(at.epoch[own].tolist(), at.row_in_source[own].tolist(), lengths[own].tolist(), strict=True))
        for (epoch, row, length), (next_epoch, next_row, next_length) in pairwise(read):
            if next_epoch == epoch:
                gap = next_row * next_length - (row + 1) * length
                assert -next_length < gap <= 0 and (gap == 0 or next_length != length)
            else:  # a pass ends at the last whole row of either length
                assert (next_epoch, next_row) == (epoch + 1, 0)
                assert plan.sources[i].num_tokens - 1 - (row + 1) * length < max(length, next_length)


@given(plans(), st.data())
def test_a_change_of_mixture_moves_no_row_before_it(plan: Plan, data: st.DataObject) -> None:
    step = data.draw(st.integers(0, plan.num_steps))
    length = data.draw(st.sampled_from(LENGTHS))
    longer, _ = append_stages(plan, [StageWish(5 * STEP, 1.0, seq_len=length)], from_step=step, max_epochs=10**6)
    assert longer.num_steps == step + 5 and longer.seq_len_of(len(longer.stages) - 1) == length
    before = np.arange(plan.rows_before(step))
    old, new = locate(plan, before), locate(longer, before)
    assert np.array_equal(old.source_index, new.source_index) and np.array_equal(old.row_in_source, new.row_in_source)


@given(plans(), st.sampled_from([1, 2]), st.sampled_from([8, 16, 32]))
def test_ranks_together_read_each_row_of_a_step_once(plan: Plan, ranks: int, micro: int) -> None:
    for step in {0, plan.num_steps - 1}:
        length = plan.seq_len_of(plan.stage_of_step(step))
        held = micro_rows(micro, seq_len=length, stated_for=BASE)
        assume(STEP // length % (ranks * held) == 0)
        parts = [rows_of_rank(plan, step, rank=r, world_size=ranks, micro_batch_size=micro) for r in range(ranks)]
        assert {part.shape[1] for part in parts} == {held}
        assert np.stack(parts, axis=1).ravel().tolist() == rows_of_step(plan, step).tolist()


@pytest.mark.parametrize(
    ("stated", "seq_len", "rows"),
    [(8, 64, 8), (8, 256, 2), (8, 128, 4), (3, 128, 1), (1, 1024, 1), (2, 32, 4), (5, 48, 6)],
)
def test_memory_stays_about_the_same_in_a_micro_batch_of_longer_rows(stated: int, seq_len: int, rows: int) -> None:
    assert micro_rows(stated, seq_len=seq_len, stated_for=64) == rows


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.sampled_from(LENGTHS)), min_size=1, max_size=6),
    st.floats(0.2, 5),
)
def test_caps_count_passes_over_all_row_lengths(stages: list[tuple[int, float, int]], cap: float) -> None:
    sources = [source("web", 40_001), source("med", 4_001, group="domain")]
    wishes = [StageWish(steps * STEP, share, seq_len=length) for steps, share, length in stages]
    try:
        plan, _ = build_plan(sources, wishes, seed=1, seq_len=BASE, global_batch_rows=8, max_epochs=cap)
    except DataError:
        return
    over_by = sum(stage.num_rows / 1000 / plan.epoch_rows(1, plan.seq_len_of(i)) for i, stage in enumerate(plan.stages))
    assert plan.epochs_by_source()["med"] <= cap + over_by + 0.05
    assert sum(plan.tokens_by_source().values()) == plan.num_tokens == sum(s for s, _, _ in stages) * STEP


def test_a_plan_says_which_stage_reads_again_and_keeps_its_lengths_on_disk() -> None:
    sources = [source("web", 40_001), source("law", 40_001, in_order=True)]
    wishes = [StageWish(50 * STEP, 1.0), StageWish(50 * STEP, 1.0, seq_len=32)]
    plan, warnings = build_plan(sources, wishes, seed=1, seq_len=BASE, global_batch_rows=8, max_epochs=4)
    (told,) = warnings
    assert "stage 1 has rows of 32 tokens" in told and "web 0.04" in told and "law" not in told
    raw = json.loads(plan.to_json())
    assert [stage.get("seq_len") for stage in raw["stages"]] == [None, 32] and "seq_len" not in raw["stages"][0]
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.fingerprint == plan.fingerprint
    assert replace(plan, stages=plan.stages[:1]).fingerprint != plan.fingerprint


def test_a_plan_of_one_length_has_no_trace_of_others() -> None:
    plan, warnings = build_plan(
        [PlanSource("web", "general", 1000, 8001, "h")],
        [StageWish(640, 1.0), StageWish(640, 1.0, seq_len=BASE)],
        seed=1,
        seq_len=BASE,
        global_batch_rows=8,
        max_epochs=4,
    )
    assert "rows_by_length" not in plan.to_json() and plan.to_json().count("seq_len") == 1 and not warnings


def raw_plan() -> dict[str, Any]:
    plan, _ = build_plan(
        [source("web", 40_001)],
        [StageWish(640, 1.0), StageWish(640, 1.0, seq_len=32)],
        seed=1,
        seq_len=BASE,
        global_batch_rows=8,
        max_epochs=4,
    )
    return dict(json.loads(plan.to_json()))


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("stages", {"seq_len": 24}, "a step of 64 tokens does not divide into rows of 24"),
        ("stages", {"seq_len": 128}, "a step of 64 tokens does not divide into rows of 128"),
        ("stages", {"seq_len": "32"}, "seq_len is '32'"),
        ("stages", {"end_row": 99}, "stages[1].end_row is 99; it must be a multiple of 2 after start_row"),
        ("sources", {"rows_by_length": [[32, 0]]}, "draws rows of 32 tokens from source 'web'"),
        ("sources", {"rows_by_length": [32]}, "holds 32; each is (seq_len, rows)"),
        ("sources", {"rows_by_length": [["a", 5]]}, "seq_len in rows_by_length is 'a'"),
        ("sources", {"rows_by_length": [[32, 9999]]}, "hold at most 1250 rows of 32"),
    ],
)
def test_a_doctored_plan_of_several_lengths_is_refused(part: str, changes: dict[str, Any], told: str) -> None:
    raw = raw_plan()
    raw[part][-1].update(changes)
    with pytest.raises(DataError) as caught:
        Plan.from_json(json.dumps(raw))
    assert told in str(caught.value)


def test_a_source_without_a_single_long_row_may_be_left_out_of_the_stage_but_not_drawn() -> None:
    sources = [source("web", 40_001), source("tiny", 33)]
    stages = [StageWish(640, 1.0), StageWish(640, 1.0, {"web": 1, "tiny": 0}, seq_len=64)]
    plan, _ = build_plan(sources, stages, seed=1, seq_len=BASE, global_batch_rows=8, max_epochs=4)
    assert plan.tokens_by_source(1)["tiny"] == 0
    with pytest.raises(DataError, match="stage 1 has rows of 64 tokens, and source 'tiny' holds 33 tokens, too few"):
        build_plan(
            sources,
            [stages[0], replace(stages[1], weights={"web": 1, "tiny": 1})],
            seed=1,
            seq_len=BASE,
            global_batch_rows=8,
            max_epochs=4,
        )
