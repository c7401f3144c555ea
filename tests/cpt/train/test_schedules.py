"""Schedules against the vectors of their papers, and the promises that all of them keep."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from cpt.run_fields import TrainSection
from cpt.schedule_fields import Schedule
from cpt.train.schedules import DECAYS, SCHEDULES, build_schedule, learning_rates, rate_segments

PEAK = 3e-4
PHASES = {"warmup_steps": 10, "cooldown_steps": 600, "constant_steps": 250}


def scale(total_steps: int, **fields: object) -> Callable[[int], float]:
    return build_schedule(TypeAdapter(Schedule).validate_python(fields), total_steps=total_steps)


def infinite(name: str) -> Callable[[int], float]:
    ratios = {"constant_lr_ratio": 1.65e-4 / PEAK, "min_lr_ratio": 3e-5 / PEAK}
    return scale(1000, name=name, **PHASES, timescale=10, **ratios)


@pytest.mark.parametrize(
    ("update", "cosine", "inverse_root"),
    [
        (5, 1.5e-4, 1.5e-4),
        (10, 3e-4, 3e-4),
        (110, 2.90957e-4, 2.25082e-4),
        (310, 2.325e-4, 1.8563e-4),
        (610, 1.65e-4, 1.65e-4),
        (800, 1.65e-4, 1.65e-4),
        (860, 1.65e-4, 1.65e-4),
        (930, 7.03562e-5, 7.03562e-5),
        (1000, 3e-5, 3e-5),
    ],
)
def test_infinite_schedules_give_the_published_rates(update: int, cosine: float, inverse_root: float) -> None:
    assert PEAK * infinite("infinite_cosine")(update) == pytest.approx(cosine, abs=1e-9)  # given to six figures
    assert PEAK * infinite("infinite_inv_sqrt")(update) == pytest.approx(inverse_root, abs=1e-9)


def test_infinite_schedules_agree_with_the_formulas_to_1e_10() -> None:
    h = [1 / math.sqrt(1 + 10 * x) - 1 for x in (100 / 600, 1.0)]
    expected = {
        "infinite_cosine": {
            110: 1.65e-4 + (3e-4 - 1.65e-4) / 2 * (1 + math.cos(math.pi * 100 / 600)),
            930: math.sqrt(1.65e-4 * 3e-5),
        },
        "infinite_inv_sqrt": {110: 3e-4 + (1.65e-4 - 3e-4) / h[1] * h[0], 930: math.sqrt(1.65e-4 * 3e-5)},
    }
    for name, rates in expected.items():
        for update, rate in rates.items():
            assert PEAK * infinite(name)(update) == pytest.approx(rate, abs=1e-10)


@pytest.mark.parametrize(
    ("fields", "borders"),
    [
        ({"name": "rewarm_cosine", "warmup_steps": 10}, [10]),
        ({"name": "constant", "warmup_steps": 10}, [10]),
        ({"name": "linear_to_zero", "warmup_steps": 10}, [10]),
        ({"name": "wsd", "warmup_steps": 10, "decay_steps": 200, "decay": "linear"}, [10, 800]),
        ({"name": "wsd", "warmup_steps": 10, "decay_steps": 200, "decay": "cosine"}, [10, 800]),
        ({"name": "infinite_cosine", **PHASES}, [10, 610, 860]),
        ({"name": "infinite_inv_sqrt", **PHASES}, [10, 610, 860]),
    ],
    ids=lambda value: value.get("name") if isinstance(value, dict) else None,
)
def test_schedules_are_continuous_at_every_phase_border(fields: dict[str, object], borders: list[int]) -> None:
    curve = scale(1000, **fields)
    for border in borders:
        assert curve(border + 1e-7) == pytest.approx(curve(border), abs=1e-6)  # type: ignore[arg-type]


def test_the_anneal_divides_by_its_own_length_and_so_reaches_its_floor() -> None:
    """One port divides by the first annealing step plus the length: its floor is out of reach."""
    ratios = {"constant_lr_ratio": 1.0, "min_lr_ratio": 1e-5 / 1.65e-4}
    phases = {"warmup_steps": 0, "cooldown_steps": 0, "constant_steps": 1000}
    curve = scale(1200, name="infinite_cosine", **phases, **ratios)
    rates = [1.65e-4 * curve(n) for n in (1000, 1100, 1200)]
    assert rates == pytest.approx([1.65e-4, 4.06202e-5, 1e-5], abs=1e-10)


def test_an_infinite_schedule_refuses_a_floor_of_zero_that_it_could_not_reach() -> None:
    with pytest.raises(ValidationError, match="min_lr_ratio"):
        scale(9, name="infinite_cosine", warmup_steps=1, cooldown_steps=1, constant_steps=1, min_lr_ratio=0)


@pytest.mark.parametrize(("shape", "left"), [("linear", 0.75), ("sqrt", 0.5), ("square", 0.9375), ("cosine", 0.853553)])
def test_a_quarter_into_the_decay_each_shape_has_left_what_its_formula_says(shape: str, left: float) -> None:
    assert DECAYS[shape](0.25) == pytest.approx(left, abs=1e-6)
    assert (DECAYS[shape](0.0), DECAYS[shape](1.0)) == (1.0, pytest.approx(0.0, abs=1e-15))
    assert scale(100, name="wsd", decay_steps=40, decay=shape)(70) == pytest.approx(left, abs=1e-6)


def test_wsd_warms_up_stays_and_decays_over_its_last_steps_to_its_floor() -> None:
    curve = scale(100, name="wsd", warmup_steps=10, decay_steps=20, decay="linear", min_lr_ratio=0.1)
    assert [curve(n) for n in (1, 5, 10, 11, 80)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    assert [curve(n) for n in (90, 100)] == pytest.approx([0.55, 0.1])


def test_linear_to_zero_ends_at_exactly_zero() -> None:
    curve = scale(300, name="linear_to_zero", warmup_steps=7)
    assert (curve(7), curve(300)) == (1.0, 0.0)
    assert curve(7 + 293 // 2) == pytest.approx(1 - 146 / 293)


def test_rewarm_cosine_peaks_at_its_warmup_and_ends_at_its_floor() -> None:
    curve = scale(1000, name="rewarm_cosine", warmup_steps=50, min_lr_ratio=0.1)
    assert (curve(25), curve(50)) == (0.5, 1.0)
    assert curve(525) == pytest.approx(0.55)
    assert curve(1000) == pytest.approx(0.1)
    assert max(map(curve, range(1, 1001))) == 1.0


def test_rewarm_takes_one_percent_of_the_run_unless_told() -> None:
    assert [scale(1000, name="rewarm_cosine")(n) for n in (5, 10)] == [0.5, 1.0]
    assert scale(20, name="rewarm_cosine")(1) == 1.0


def test_constant_warms_up_and_stays() -> None:
    curve = scale(10, name="constant", warmup_steps=4)
    assert [curve(n) for n in (1, 2, 4, 5, 10, 10**9)] == [0.25, 0.5, 1.0, 1.0, 1.0, 1.0]


def test_every_schedule_of_the_table_can_be_asked_for_by_name() -> None:
    phases = {"warmup_steps": 0, "cooldown_steps": 0, "constant_steps": 0, "decay_steps": 0}
    for name in SCHEDULES:
        for left_out in ({"cooldown_steps", "constant_steps"}, {"decay_steps"}, phases.keys() - {"warmup_steps"}):
            try:
                curve = scale(3, name=name, **{key: value for key, value in phases.items() if key not in left_out})
            except ValidationError:
                continue
            assert all(0.0 <= curve(n) <= 1.0 for n in (1, 2, 3))
            break
        else:
            pytest.fail(f"{name} is in the table but not in the config")


@st.composite
def legal_schedules(draw: st.DrawFn) -> tuple[dict[str, object], int]:
    """Any schedule whose segments fit its run, zero lengths and segments that fill the run included."""
    total = draw(st.integers(1, 40))
    cuts = sorted(draw(st.lists(st.integers(0, total), min_size=3, max_size=3)))
    first, second, third = cuts[0], cuts[1] - cuts[0], cuts[2] - cuts[1]
    floor, plateau = draw(st.floats(0, 1)), draw(st.floats(1e-6, 1))
    positive = draw(st.floats(1e-6, 1))
    kinds = [
        {"name": "rewarm_cosine", "warmup_steps": draw(st.sampled_from([None, first])), "min_lr_ratio": floor},
        {"name": "constant", "warmup_steps": first},
        {"name": "linear_to_zero", "warmup_steps": first},
        {
            "name": "wsd",
            "warmup_steps": first,
            "decay_steps": second,
            "decay": draw(st.sampled_from(sorted(DECAYS))),
            "min_lr_ratio": floor,
        },
        {
            "name": draw(st.sampled_from(["infinite_cosine", "infinite_inv_sqrt"])),
            "warmup_steps": first,
            "cooldown_steps": second,
            "constant_steps": third,
            "constant_lr_ratio": plateau,
            "min_lr_ratio": min(positive, plateau),
            "timescale": draw(st.floats(1e-3, 1e3)),
        },
    ]
    return draw(st.sampled_from(kinds)), total


@given(legal_schedules())
def test_any_legal_schedule_gives_a_multiplier_between_0_and_1_at_every_update(
    case: tuple[dict[str, object], int],
) -> None:
    fields, total = case
    curve = scale(total, **fields)
    for update in range(1, total + 1):
        assert -1e-12 <= curve(update) <= 1.0 + 1e-12, (fields, total, update)


def extended_run(past: list[dict[str, object]], **now: object) -> TrainSection:
    """10 tokens a step."""
    fields = {"tokens": 1500, "global_batch_tokens": 10, "micro_batch_size": 1, "peak_lr": 0.5, **now}
    return TrainSection.model_validate({**fields, "past": past})


COSINE = {"name": "rewarm_cosine", "warmup_steps": 10}


def test_an_extended_run_keeps_its_old_rates_and_warms_up_from_where_it_ended() -> None:
    past = {"until_step": 100, "tokens": 1000, "peak_lr": 0.5, "schedule": COSINE}
    train = extended_run([past], schedule=COSINE)
    rate, before = learning_rates(train, total_steps=150), scale(100, **COSINE)
    assert [rate(n) for n in range(1, 101)] == [0.5 * before(n) for n in range(1, 101)]
    assert rate(100) == pytest.approx(0.05)
    assert [rate(n) for n in (101, 105, 110)] == pytest.approx([0.05 + 0.045, 0.05 + 0.225, 0.5])
    assert rate(150) == pytest.approx(0.05)
    assert rate(130) == pytest.approx(0.5 * scale(50, **COSINE)(30))
    assert [(each.start, each.end, each.total) for each in rate_segments(train, total_steps=150)] == [
        (0, 100, 100),
        (100, 150, 50),
    ]


def test_a_run_extended_on_its_way_follows_its_old_curve_up_to_there_only() -> None:
    past = {"until_step": 60, "tokens": 1000, "peak_lr": 0.5, "schedule": COSINE}
    rate = learning_rates(extended_run([past], schedule={"name": "constant"}, peak_lr=0.25), total_steps=150)
    assert rate(60) == 0.5 * scale(100, **COSINE)(60) and rate(61) == rate(150) == 0.25


def test_a_run_that_was_extended_twice_has_three_curves() -> None:
    constant = {"name": "constant", "warmup_steps": 0}
    past = [
        {"until_step": 20, "tokens": 400, "peak_lr": 0.1, "schedule": constant},
        {"until_step": 50, "tokens": 500, "peak_lr": 0.2, "schedule": constant},
    ]
    schedule = {"name": "constant", "warmup_steps": 4}
    rate = learning_rates(extended_run(past, schedule=schedule), total_steps=150)
    assert [rate(n) for n in (1, 20, 21, 50)] == [0.1, 0.1, 0.2, 0.2]
    assert [rate(n) for n in (51, 52, 54, 55)] == pytest.approx([0.275, 0.35, 0.5, 0.5])


def test_a_run_that_was_never_extended_has_the_rates_of_its_schedule_bit_for_bit() -> None:
    train = extended_run([], schedule=COSINE)
    rate, plain = learning_rates(train, total_steps=150), scale(150, **COSINE)
    assert all(rate(n) == 0.5 * plain(n) for n in range(1, 151))
