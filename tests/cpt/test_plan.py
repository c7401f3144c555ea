import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.plan import Plan, PlanSource, Stage, StageWish, append_stages, build_plan, read_plan, write_plan
from cpt.quotas import apportion, block_counts, fair_room, fill_groups, water_fill
from cpt.rundir import DataError

SEQ_LEN = 10


def source(name: str, group: Any, num_rows: int) -> PlanSource:
    return PlanSource(name, group, num_rows, num_rows * SEQ_LEN + 1, f"hash-of-{name}")


WEB, MED = source("web", "general", 1000), source("med", "domain", 30)
LAW = source("law", "domain", 90)


def plan_of(
    sources: list[PlanSource], wishes: list[StageWish], *, max_epochs: float = 4.0, batch: int = 10
) -> tuple[Plan, list[str]]:
    return build_plan(sources, wishes, seed=3, seq_len=SEQ_LEN, global_batch_rows=batch, max_epochs=max_epochs)


@pytest.mark.parametrize(
    ("parts", "total", "expected"),
    [
        ([2, 1, 1], 10, [5, 3, 2]),
        ([1, 1, 1], 1000, [334, 333, 333]),
        ([0.5, 0.25, 0.25], 8, [4, 2, 2]),
        ([0.7, 0.2, 0.1], 3, [2, 1, 0]),
        ([5, 0], 3, [3, 0]),
    ],
)
def test_largest_remainder_gives_hand_computed_counts(parts: list[float], total: int, expected: list[int]) -> None:
    assert apportion(parts, total) == expected


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8).filter(any), st.integers(0, 10**12))
def test_largest_remainder_sums_to_the_total_and_is_within_one_of_exact(parts: list[int], total: int) -> None:
    counts = apportion(parts, total)
    assert sum(counts) == total
    assert all(abs(count * sum(parts) - part * total) < sum(parts) for count, part in zip(counts, parts, strict=True))


@pytest.mark.parametrize(
    ("target", "weights", "room", "expected"),
    [
        (100, [1, 1], [80, 80], [50, 50]),
        (100, [2, 1, 1], [30, 20, 90], [30, 20, 50]),
        (100, [1, 1, 2], [10, 100, 100], [10, 30, 60]),
        (100, [1, 1], [30, 40], [30, 40]),  # all full: 30 remain with the caller
        (100, [1, 0], [60, 60], [60, 0]),  # a weight of 0 takes nothing
        (0, [1, 1], [5, 5], [0, 0]),
    ],
)
def test_water_filling_gives_hand_computed_parts(
    target: float, weights: list[float], room: list[float], expected: list[float]
) -> None:
    assert water_fill(target, weights, room) == expected


def test_a_group_takes_what_the_other_cannot_give() -> None:
    weights = ([1.0, 0.0, 0.0], [0.0, 0.5, 0.5])
    assert fill_groups(100, 0.2, weights, [500, 30, 100]) == [20, 30, 50]  # inside the group first
    assert fill_groups(100, 0.2, weights, [500, 30, 10]) == [60, 30, 10]  # then the other group
    assert fill_groups(100, 0.9, weights, [40, 30, 100]) == [40, 30, 30]
    assert sum(fill_groups(100, 0.5, weights, [10, 20, 30])) == 60


def test_a_source_too_small_for_all_stages_is_shared_between_them() -> None:
    assert fair_room([60, 500, 7], [40, 10, 0], [120, 30, 0]) == [20, 480, 7]


def test_rounding_never_lifts_a_source_over_its_cap() -> None:
    assert block_counts([996.0, 4.0], [5000, 4.0], 1000, 100) == [100, 0]  # 0.4 a block; one would be 10 rows
    assert block_counts([985.0, 15.0], [5000, 15.0], 1000, 100) == [99, 1]
    assert block_counts([999.0, 1.0], [5000, 5000.0], 1000, 100) == [99, 1]  # uncapped: at least one


def test_shares_become_rows_per_block_and_tokens() -> None:
    plan, warnings = plan_of([WEB, LAW], [StageWish(tokens=2000, share_general=0.25)])
    assert (plan.num_steps, plan.stages) == (20, (Stage(0, 200, (250, 750)),))
    assert plan.shares(0) == {"web": 0.25, "law": 0.75}
    assert plan.tokens_by_source() == {"web": 500, "law": 1500}
    assert plan.epochs_by_source() == {"web": 0.05, "law": 150 / 90}
    assert plan.share_general() + plan.share_domain() == 1
    assert warnings == []


def test_sources_of_a_group_are_mixed_by_tokens_unless_weighted() -> None:
    plan, _ = plan_of([WEB, MED, LAW], [StageWish(1000, 0.2)])
    assert plan.stages[0].block_counts == (200, 200, 600)
    plan, _ = plan_of([WEB, MED, LAW], [StageWish(1000, 0.2, {"med": 1, "law": 1})])
    assert plan.stages[0].block_counts == (200, 400, 400)


def test_stages_end_at_whole_steps_of_the_tokens_so_far_and_never_exceed_the_budget() -> None:
    plan, _ = plan_of([WEB], [StageWish(160, 1.0), StageWish(160, 1.0), StageWish(160, 1.0)])
    assert [stage.num_rows for stage in plan.stages] == [10, 20, 10]  # steps of 100 tokens: borders at 1, 3 and 4
    plan, _ = plan_of([WEB], [StageWish(199, 1.0)])
    assert plan.num_steps == 1


def test_the_worked_example_caps_the_small_source_and_says_so() -> None:
    plan, warnings = plan_of([WEB, MED], [StageWish(tokens=2000, share_general=0.25)])
    assert plan.stages[0].block_counts == (400, 600)
    assert plan.epochs_by_source()["med"] == 4
    assert warnings == [
        "stage 0, source 'web': wished share 0.25, planned 0.4: "
        "it takes what capped sources cannot give and reaches 0.08 epochs",
        "stage 0, source 'med': wished share 0.75, planned 0.6: the wish is 5.00 epochs, capped at max_epochs 4",
    ]


def test_freed_rows_stay_in_the_group_while_it_has_room() -> None:
    plan, _ = plan_of([WEB, MED, LAW], [StageWish(3000, 0.2, {"med": 3, "law": 1})])
    assert plan.rows_by_source() == {"web": 60, "med": 120, "law": 120}


def test_later_stages_keep_their_part_of_a_capped_source() -> None:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.0), StageWish(2000, 0.0)], max_epochs=5)
    assert [plan.rows_by_source(stage)["med"] for stage in (0, 1)] == [50, 100]
    plan, warnings = plan_of([WEB, MED], [StageWish(1000, 0.0), StageWish(2000, 0.0)])
    assert [plan.rows_by_source(stage)["med"] for stage in (0, 1)] == [40, 80]
    assert warnings == [
        "stages 0 to 1, source 'web': wished share 0, planned 0.6: "
        "it takes what capped sources cannot give and reaches 0.18 epochs",
        "stages 0 to 1, source 'med': wished share 1, planned 0.4: the wish is 10.00 epochs, capped at max_epochs 4",
    ]


def test_a_source_smaller_than_a_row_per_block_is_left_out_with_a_warning() -> None:
    tiny = source("tiny", "domain", 2)
    plan, warnings = plan_of([WEB, tiny], [StageWish(36_000, 0.999)])
    assert plan.stages[0].block_counts == (999, 1)
    plan, warnings = plan_of([source("web", "general", 10**6), tiny], [StageWish(1_000_000, 0.999)])
    assert plan.stages[0].block_counts == (1000, 0)
    assert "one row in each block of 1000 would exceed max_epochs 4; it is left out" in warnings[1]


def test_a_small_weight_gets_one_row_per_block_and_a_warning() -> None:
    plan, warnings = plan_of([WEB, LAW], [StageWish(20_000, 0.9999)])
    assert plan.stages[0].block_counts == (999, 1)
    assert "at least one row in each block" in warnings[0]


def test_more_tokens_than_the_sources_hold_is_refused_with_both_fixes() -> None:
    with pytest.raises(DataError, match=r"asks for 5000 tokens.* only 4800 left; lower .* raise max_epochs"):
        plan_of([MED, LAW], [StageWish(5000, 0.0)])
    plan, _ = plan_of([MED, LAW], [StageWish(4800, 0.0)])
    assert plan.epochs_by_source() == {"med": 4, "law": 4}


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"share_general": 1.2}, "share_general is 1.2; a share of tokens lies between 0 and 1"),
        ({"share_general": float("nan")}, "share_general is nan"),
        ({"share_general": 0.3, "share_domain": 0.6}, r"= 0.9; they must sum to 1, for example share_domain = 0.7"),
        ({"share_general": 0.3, "tokens": 0}, "tokens of a stage is 0; it must be an integer from 1"),
        ({"share_general": 0.3, "weights": {"web": -1.0}}, "weight of source 'web' is -1.0"),
    ],
)
def test_an_impossible_wish_is_refused_with_value_and_rule(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        StageWish(**{"tokens": 1000, **wish})


@pytest.mark.parametrize(
    ("sources", "wish", "message"),
    [
        ([MED], StageWish(100, 0.1), "share_general is 0.1 but no general source has a weight above 0"),
        ([WEB], StageWish(100, 0.1), "share_domain is 0.9 but no domain source"),
        ([WEB, MED], StageWish(100, 0.1, {"med": 0}), "share_domain is 0.9 but no domain source has a weight above 0"),
        ([WEB, MED], StageWish(100, 0.1, {"madical": 1}), "unknown source 'madical'; the plan's sources are web, med"),
        ([WEB, MED, LAW], StageWish(100, 0.1, {"med": 1}), "weights name some domain sources but not law"),
        ([WEB, WEB], StageWish(100, 1.0), "sources name 'web' twice"),
    ],
)
def test_a_wish_that_does_not_fit_the_sources_is_refused(
    sources: list[PlanSource], wish: StageWish, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plan_of(sources, [wish])


def test_a_source_without_one_row_an_empty_plan_and_a_bad_cap_are_refused() -> None:
    with pytest.raises(DataError, match=r"source 'tiny' holds 7 tokens, too few for one row; .* shorten seq_len"):
        PlanSource("tiny", "domain", 0, 7, "x")
    with pytest.raises(DataError, match="has no stage"):
        plan_of([WEB], [])
    with pytest.raises(DataError, match="max_epochs is 0; it must be a positive number"):
        plan_of([WEB], [StageWish(100, 1.0)], max_epochs=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.integers(1, 10**6), min_size=2, max_size=6),
    share=st.floats(0, 1),
    stage_rows=st.lists(st.integers(1, 10**5), min_size=1, max_size=3),
    max_epochs=st.floats(0.1, 20),
)
def test_caps_hold_to_a_row_per_block_whatever_is_wished(
    rows: list[int], share: float, stage_rows: list[int], max_epochs: float
) -> None:
    sources = [source(f"s{i}", "domain" if i % 2 else "general", n) for i, n in enumerate(rows)]
    wishes = [StageWish(n * SEQ_LEN, share) for n in stage_rows]
    try:
        plan, _ = plan_of(sources, wishes, max_epochs=max_epochs, batch=1)
    except DataError:
        assert sum(stage_rows) > max_epochs * sum(rows) * 0.99
        return
    slack = sum(n / 1000 + 1 for n in stage_rows) * len(sources)
    for each in sources:
        assert plan.rows_by_source()[each.name] <= max_epochs * each.num_rows + slack


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.25), StageWish(500, 0.9)])
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    assert read_plan(tmp_path / "plan.json").fingerprint == plan.fingerprint


def test_the_fingerprint_changes_with_every_field() -> None:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.25)])
    changed = [
        replace(plan, seed=4),
        replace(plan, seq_len=9),
        replace(plan, global_batch_rows=5),
        replace(plan, packing="best_fit"),
        replace(plan, block_rows=500, stages=(Stage(0, 100, (125, 375)),)),
        replace(plan, stages=(Stage(0, 90, (250, 750)),)),
        replace(plan, stages=(Stage(0, 100, (251, 749)),)),
        replace(plan, sources=(WEB, replace(MED, name="medical"))),
        replace(plan, sources=(WEB, replace(MED, group="general"))),
        replace(plan, sources=(WEB, replace(MED, num_rows=29))),
        replace(plan, sources=(WEB, replace(MED, num_tokens=302))),
        replace(plan, sources=(WEB, replace(MED, content_hash="other"))),
    ]
    assert len({each.fingerprint for each in [plan, *changed]}) == len(changed) + 1


def test_the_fingerprint_is_the_same_on_every_machine() -> None:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.25)])
    assert plan.fingerprint == "91d98ff5b31d4966"


def edited(**changes: Any) -> bytes:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.25)])
    content = json.loads(plan.to_json())
    for path, value in changes.items():
        place, *rest = path.split("__")
        target = content
        while rest:
            target = target[int(place)] if isinstance(target, list) else target[place]
            place, *rest = rest
        target[place] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2; this version of cpt reads 1"),
        ({"surprise": 1}, "plan has the unknown field 'surprise'"),
        ({"seed": True}, "seed is True; it must be an integer"),
        ({"seed": -1}, "seed is -1"),
        ({"seq_len": 1.5}, "seq_len is 1.5"),
        ({"global_batch_rows": 0}, "global_batch_rows is 0"),
        ({"block_rows": 10**7}, "block_rows is 10000000; it must be at most 65536"),
        ({"packing": ""}, "packing is ''"),
        ({"sources": {}}, "sources is {}; it must be a list"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [7]}, r"stages\[0\] is 7; it must be an object"),
        ({"sources__1__group": "other"}, r"sources\[1\]: group of source 'med' is 'other'"),
        ({"sources__1__name": 5}, r"sources\[1\]: name is 5"),
        ({"sources__1__num_rows": 2**63}, r"sources\[1\]: num_rows is 9223372036854775808"),
        ({"sources__1__num_rows": 31}, "num_rows of source 'med' is 31, but 301 tokens hold at most 30 rows of 10"),
        ({"sources__1__extra": 1}, r"sources\[1\] has the unknown field 'extra'"),
        ({"stages__0__start_row": 10}, r"stages\[0\].start_row is 10; it must be 0"),
        ({"stages__0__end_row": 0}, r"stages\[0\]: end_row is 0"),
        ({"stages__0__end_row": 101}, r"stages\[0\].end_row is 101; it must be a multiple of global_batch_rows 10"),
        ({"stages__0__block_counts": [1000]}, r"stages\[0\].block_counts is \[1000\]; it must hold one count for each"),
        ({"stages__0__block_counts": [-1, 1001]}, r"stages\[0\]: block_counts\[0\] is -1"),
        ({"stages__0__block_counts": [251, 750]}, r"stages\[0\].block_counts is \[251, 750\].* sum to block_rows 1000"),
        ({"stages__0__block_counts": "ab"}, r"stages\[0\]: block_counts is 'ab'; it must be a list"),
        ({"seed": 4}, "fingerprint is '[0-9a-f]{16}' but the content gives '[0-9a-f]{16}'; it was edited"),
    ],
)
def test_a_doctored_plan_is_refused_with_file_field_and_rule(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(edited(**changes))
    with pytest.raises(DataError, match=f"plan.json: {message}"):
        read_plan(path)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"seed": 1e999', edited()[:-20]]
)
def test_a_file_that_is_no_plan_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"plan\.json: .*plan the run again"):
        read_plan(path)
    with pytest.raises(DataError, match=r"absent\.json"):
        read_plan(tmp_path / "absent.json")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    content = json.loads(edited())
    del content["stages"][0]["end_row"]
    with pytest.raises(DataError, match=r"stages\[0\] misses the field 'end_row'"):
        Plan.from_json(json.dumps(content))


def test_the_stage_of_a_row_is_found_at_both_ends_of_each_stage() -> None:
    plan, _ = plan_of([WEB], [StageWish(100, 1.0), StageWish(300, 1.0), StageWish(100, 1.0)])
    assert [plan.stage_at(row) for row in (0, 9, 10, 39, 40, 49)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(AssertionError, match="row 50 lies outside"):
        plan.stage_at(50)


def test_an_appended_stage_cuts_the_plan_and_counts_what_was_used() -> None:
    plan, _ = plan_of([WEB, MED], [StageWish(1000, 0.5), StageWish(1000, 0.5)])
    longer, warnings = append_stages(plan, [StageWish(1000, 0.2)], from_step=12, max_epochs=4, new_sources=[LAW])
    assert [(s.start_row, s.end_row) for s in longer.stages] == [(0, 100), (100, 120), (120, 220)]
    assert longer.stages[0].block_counts == (*plan.stages[0].block_counts, 0)
    assert longer.stages[2].block_counts == (200, 200, 600)
    assert warnings == []
    at_border, _ = append_stages(plan, [StageWish(1000, 0.5)], from_step=10, max_epochs=4)
    assert [(s.start_row, s.end_row) for s in at_border.stages] == [(0, 100), (100, 200)]
    with pytest.raises(DataError, match="from_step is 21; the plan has 20 steps"):
        append_stages(plan, [StageWish(1000, 0.2)], from_step=21, max_epochs=4)
    with pytest.raises(DataError, match="only"):  # 60 rows of med are used, 60 are left, web is excluded
        append_stages(plan, [StageWish(1000, 0.0, {"web": 0})], from_step=12, max_epochs=4)
