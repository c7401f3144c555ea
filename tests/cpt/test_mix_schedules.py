"""From a schedule of the mixture to stages: hand-computed shares, and what holds for every schedule."""

from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.data.sampler import locate, rows_seen
from cpt.mix_fields import ConstantMix, LinearMix, StageSection, TemperatureMix, UpsampleEndMix
from cpt.mix_schedules import MIXES, SHARE_ERROR, MixRequest, after_step, steps, temperature_shares
from cpt.plan import Plan, PlanSource, StageWish, build_plan
from cpt.plan_parts import wished_shares
from cpt.rundir import DataError

SEQ_LEN = 10


def source(name: str, group: Any, num_rows: int) -> PlanSource:
    return PlanSource(name, group, num_rows, num_rows * SEQ_LEN + 1, f"hash-of-{name}")


WEB, MED, LAW = source("web", "general", 10**6), source("med", "domain", 10**6), source("law", "domain", 10**6)


def request(*sources: PlanSource, num_steps: int = 100, step_rows: int = 200, **stated: Any) -> MixRequest:
    step_tokens = step_rows * SEQ_LEN
    given = {"share_general": None, "weights": {}, **stated}
    return MixRequest(sources or (WEB, MED), num_steps * step_tokens, step_rows, step_tokens, **given)


def stages_of(mix: Any, asked: MixRequest) -> list[tuple[int, list[float]]]:
    """(steps, share of each source) of every stage."""
    return shown(MIXES[mix.name](mix, asked), asked)


def shown(wishes: list[StageWish], asked: MixRequest) -> list[tuple[int, list[float]]]:
    return [
        (wish.tokens // asked.step_tokens, [round(share, 6) for share in wished_shares(asked.sources, wish)])
        for wish in wishes
    ]


def plan_of(mix: Any, asked: MixRequest) -> Plan:
    plan, _ = build_plan(
        asked.sources,
        MIXES[mix.name](mix, asked),
        seed=3,
        seq_len=SEQ_LEN,
        global_batch_rows=asked.step_rows,
        max_epochs=10**6,
    )
    return plan


def line(*points: tuple[int, float]) -> LinearMix:
    return LinearMix.model_validate(
        {"name": "linear", "points": [{"tokens": tokens, "share_general": share} for tokens, share in points]}
    )


def test_a_constant_mixture_is_one_stage_and_replays_a_quarter_where_nothing_is_said() -> None:
    assert stages_of(ConstantMix(), request()) == [(100, [0.25, 0.75])]
    assert stages_of(ConstantMix(), request(share_general=0.4)) == [(100, [0.4, 0.6])]
    assert stages_of(ConstantMix(), request(WEB)) == [(100, [1.0])]
    assert stages_of(ConstantMix(), request(MED)) == [(100, [1.0])]


def test_stages_keep_their_tokens_and_say_shares_by_group_or_by_source() -> None:
    stages = (
        StageSection(tokens=20_000, share_general=0.5),
        StageSection(tokens=180_000, weights={"web": 1, "med": 3}),
    )
    assert shown(steps(stages, request()), request()) == [(10, [0.5, 0.5]), (90, [0.25, 0.75])]
    with pytest.raises(DataError, match="every weight of a stage is 0"):
        steps((StageSection(tokens=200_000, weights={"web": 0, "med": 0}),), request())


def test_a_line_from_a_half_to_a_tenth_is_fifty_stages_with_the_value_of_their_middle() -> None:
    found = stages_of(line((0, 0.5), (200_000, 0.1)), request())
    assert len(found) == 50 and all(length == 2 for length, _ in found)
    assert [shares[0] for _, shares in found[:3]] == [0.496, 0.488, 0.48]
    assert found[-1] == (2, [0.104, 0.896])
    assert sum(length * shares[0] for length, shares in found) / 100 == pytest.approx(0.3, abs=1e-9)


def test_a_line_is_constant_before_its_first_and_after_its_last_point_and_may_jump() -> None:
    found = stages_of(line((40_000, 0.5), (40_000, 0.2), (60_000, 0.2), (60_000, 0.3)), request())
    assert found == [(20, [0.5, 0.5]), (10, [0.2, 0.8]), (70, [0.3, 0.7])]


def test_weights_of_sources_move_in_a_line_too() -> None:
    mix = LinearMix.model_validate(
        {
            "name": "linear",
            "points": [
                {"tokens": 0, "weights": {"web": 0.2, "med": 0.8, "law": 0}},
                {"tokens": 200_000, "weights": {"web": 0.2, "med": 0, "law": 0.8}},
            ],
        }
    )
    found = stages_of(mix, request(WEB, MED, LAW))
    assert len(found) == 100 and found[0][1] == [0.2, 0.796, 0.004] and found[-1][1] == [0.2, 0.004, 0.796]


def test_a_stage_of_a_line_is_never_shorter_than_a_hundred_rows() -> None:
    found = stages_of(line((0, 0.9), (100 * 160, 0.1)), request(num_steps=100, step_rows=16))
    assert sum(length for length, _ in found) == 100 and min(length for length, _ in found) * 16 >= 96
    assert stages_of(line((0, 0.9), (320, 0.1)), request(num_steps=2, step_rows=16)) == [(2, [0.5, 0.5])]


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (1, [0.9312, 0.0552, 0.0133, 0.0003]),
        (5, [0.4543, 0.2582, 0.1942, 0.0933]),
        (100, [0.2594, 0.2522, 0.2486, 0.2397]),
    ],
)
def test_temperature_gives_the_shares_computed_by_hand(tau: float, expected: list[float]) -> None:
    assert temperature_shares([2733, 162, 39, 1], tau) == pytest.approx(expected, abs=5.1e-5)


def test_a_tiny_temperature_takes_the_largest_source_and_nothing_overflows() -> None:
    assert temperature_shares([10**12, 10**11], 0.001) == pytest.approx([1, 0])


def test_temperature_works_inside_the_groups_or_over_all_and_cools_down() -> None:
    big, small = source("big", "domain", 81), source("small", "domain", 1)
    asked = request(WEB, big, small, share_general=0.2)
    cooled = TemperatureMix(name="temperature", tau=4, final_tau=1, final_fraction=0.25)
    (first, hot), (last, cold) = stages_of(cooled, asked)
    assert (first, last) == (75, 25) and hot[0] == cold[0] == 0.2
    assert hot[1] / hot[2] == pytest.approx((811 / 11) ** 0.25, rel=1e-4)
    assert cold[1] / cold[2] == pytest.approx(811 / 11, rel=1e-3)
    ((_, over_all),) = stages_of(TemperatureMix(name="temperature", tau=1, scope="all"), request(WEB, MED))
    assert over_all == [0.5, 0.5]


def test_the_end_upsamples_named_sources_inside_their_group_or_at_the_cost_of_all() -> None:
    asked = request(WEB, MED, LAW, share_general=0.2)
    inside = UpsampleEndMix(name="upsample_end", factors={"med": 1.5})
    assert stages_of(inside, asked) == [(85, [0.2, 0.4, 0.4]), (15, [0.2, 0.6, 0.2])]
    of_all = UpsampleEndMix(name="upsample_end", factors={"med": 2}, final_fraction=0.1, scope="all")
    assert stages_of(of_all, asked) == [(90, [0.2, 0.4, 0.4]), (10, [round(0.2 / 3, 6), 0.8, round(0.4 / 3, 6)])]


@pytest.mark.parametrize(
    ("factors", "scope", "message"),
    [
        ({"med": 2.5}, "group", r"gives med a share of 1 at the end, but the group has 0.8 .*scope=all"),
        ({"med": 2.6}, "all", r"gives med a share of 1.04 at the end, but the whole batch has 1"),
        (
            {"web": 0.5},
            "group",
            r"gives web a share of 0.1 at the end, but the group has 0.2 .*no other source there .*leave web out",
        ),
    ],
)
def test_factors_that_do_not_fit_are_refused_with_the_share_they_would_take(
    factors: dict[str, float], scope: Any, message: str
) -> None:
    mix = UpsampleEndMix(name="upsample_end", factors=factors, scope=scope)
    with pytest.raises(DataError, match=message):
        MIXES["upsample_end"](mix, request(WEB, MED, LAW, share_general=0.2))


def test_a_source_without_a_share_cannot_be_upsampled() -> None:
    mix = UpsampleEndMix(name="upsample_end", factors={"med": 3})
    for stated in ({"weights": {"med": 0, "law": 1}}, {"share_general": 1.0}):
        with pytest.raises(DataError, match=r"med has no share to multiply; .*data\.stages .*linear"):
            MIXES["upsample_end"](mix, request(WEB, MED, LAW, **stated))


def test_what_is_left_after_some_steps_starts_inside_a_stage() -> None:
    asked = request()
    wishes = steps(
        (StageSection(tokens=20_000, share_general=0.5), StageSection(tokens=180_000, share_general=1)), asked
    )
    left = after_step(wishes, 4, asked.step_tokens)
    assert [wish.tokens for wish in left] == [6 * 2000, 180_000]
    assert [wish.tokens for wish in after_step(wishes, 10, asked.step_tokens)] == [180_000]
    assert after_step(wishes, 100, asked.step_tokens) == []


SOURCES = (WEB, MED, LAW, source("books", "general", 10**5), source("rare", "domain", 10**3))
shares = st.floats(0.01, 0.99)
mixes = st.one_of(
    st.just(ConstantMix()),
    st.lists(st.tuples(st.integers(0, 1000), shares), min_size=2, max_size=4).map(
        lambda points: line(*sorted((tokens * 100, share) for tokens, share in points))
    ),
    st.builds(
        TemperatureMix,
        name=st.just("temperature"),
        tau=st.floats(0.5, 100),
        final_tau=st.none() | st.floats(0.5, 100),
        final_fraction=st.floats(0.01, 0.99),
        scope=st.sampled_from(["group", "all"]),
    ),
    st.builds(
        UpsampleEndMix,
        name=st.just("upsample_end"),
        factors=st.fixed_dictionaries({"rare": st.floats(0.1, 20)}),
        final_fraction=st.floats(0.01, 0.99),
    ),
)


@settings(max_examples=80, deadline=None)
@given(mixes, st.integers(1, 300), st.integers(1, 64))
def test_every_schedule_fills_the_run_with_whole_steps_and_shares_that_add_to_one(
    mix: Any, num_steps: int, step_rows: int
) -> None:
    asked = request(*SOURCES, num_steps=num_steps, step_rows=step_rows)
    wishes = MIXES[mix.name](mix, asked)
    assert sum(wish.tokens for wish in wishes) == asked.tokens
    for wish in wishes:
        assert wish.tokens % asked.step_tokens == 0
        found = wished_shares(asked.sources, wish)
        assert sum(found) == pytest.approx(1, abs=1e-9) and min(found) >= 0
    assert plan_of(mix, asked).num_steps == num_steps


@settings(max_examples=60, deadline=None)
@given(
    points=st.lists(st.tuples(st.integers(0, 400), shares), min_size=2, max_size=4).map(sorted),
    step_rows=st.integers(100, 300),
)
def test_a_line_is_followed_to_half_a_percent_and_to_the_last_row_on_the_whole(
    points: list[tuple[int, float]], step_rows: int
) -> None:
    """``points`` in steps, so that the wish needs no rounding."""
    num_steps = 400
    asked = request(num_steps=num_steps, step_rows=step_rows)
    plan = plan_of(line(*((step * asked.step_tokens, share) for step, share in points)), asked)
    at = np.array([step for step, _ in points], dtype=float)
    wished = np.array([share for _, share in points])
    last = np.array([i == len(at) - 1 or at[i + 1] > at[i] for i in range(len(at))])
    ends = [stage.end_row // step_rows for stage in plan.stages]
    for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        inside = [step for step in range(start, end) if not any(step <= place <= step + 1 for place in at)]
        exact = np.interp(np.array(inside) + 0.5, at[last], wished[last]) if inside and len(set(at)) == len(at) else []
        steepest = max(np.abs(np.diff(wished)) / np.maximum(np.diff(at), 1)) / 2
        for value in exact:
            assert abs(plan.shares(index)["web"] - value) <= SHARE_ERROR + 0.001 + steepest
    if len(set(at)) == len(at):
        grid = np.arange(num_steps * 2 + 1) / 2
        mean = np.trapezoid(np.interp(grid, at, wished), grid) / num_steps
        realised = rows_seen(plan, num_steps)["web"]
        assert abs(realised - mean * plan.num_rows) <= plan.num_rows / plan.block_rows / 2 + 2 * len(plan.stages) + 1


@settings(max_examples=30, deadline=None)
@given(mixes, st.data())
def test_after_any_step_each_source_has_given_what_its_stages_say_to_a_row_or_two_per_stage(
    mix: Any, data: st.DataObject
) -> None:
    asked = request(*SOURCES, num_steps=50, step_rows=40)
    plan = plan_of(mix, asked)
    step = data.draw(st.integers(0, plan.num_steps))
    row, expected, bound = step * asked.step_rows, np.zeros(len(SOURCES)), np.zeros(len(SOURCES))
    for stage in plan.stages:
        inside = max(0, min(row, stage.end_row) - stage.start_row)
        part = np.array(stage.block_counts) / plan.block_rows
        expected += inside * part
        bound += (inside % plan.block_rows > 0) * (1 + part * (len(SOURCES) - 2))
    seen = np.array([*rows_seen(plan, step).values()])
    assert (np.abs(seen - expected) <= bound + 1e-9).all()
    counted = np.bincount(locate(plan, np.arange(row)).source_index, minlength=len(SOURCES))
    assert counted.tolist() == seen.tolist()


def test_a_thousand_stages_cost_little_and_seek_fast() -> None:
    asked = request(*SOURCES, num_steps=1000, step_rows=100)
    plan = plan_of(line(*((step * 100_000, 0.9 * (step % 2)) for step in range(11))), asked)
    assert len(plan.stages) >= 900
    assert Plan.from_json(plan.to_json()) == plan
    ends = list(accumulate(stage.num_rows for stage in plan.stages))
    assert sum(rows_seen(plan, 500).values()) == 500 * 100 and ends[-1] == plan.num_rows
