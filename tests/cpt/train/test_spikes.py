"""Spikes are found, and noise, trends, re-warming and rare sources are not taken for them."""

import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.train.spikes import (
    MIN_HISTORY,
    WINDOW,
    SpikeDetector,
    centre,
    noise,
    outlying_rows,
    upper_limit,
)

ROW = 512  # tokens


def alarms(losses: dict[str, list[float]], rows: dict[str, list[int]], *, sigma: float = 8.0) -> list[int]:
    """Steps (from 0) that the detector calls spikes, each then left out."""
    detector = SpikeDetector(sigma, ROW)
    found = []
    for step in range(len(next(iter(losses.values())))):
        counted = {name: rows[name][step] * ROW for name in losses}
        sums = {name: losses[name][step] * counted[name] for name in losses}
        if detector.in_losses(sums, counted, settled=True):
            found.append(step)
        else:
            detector.accept(sums, counted, 1.0)
    return found


def noisy(steps: int, *, deviation: float, seed: int, start: float = 3.0, end: float = 2.5) -> list[float]:
    random = np.random.default_rng(seed)
    curve = end + (start - end) * np.exp(-np.arange(steps) / 100)
    return list(curve + deviation * random.standard_normal(steps))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 0.3))
def test_normal_noise_on_a_falling_curve_raises_no_alarm(seed: int, deviation: float) -> None:
    assert alarms({"web": noisy(200, deviation=deviation, seed=seed)}, {"web": [64] * 200}) == []


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([8, 64, 512]))
def test_few_rows_with_heavy_tails_raise_no_alarm(seed: int, batch_rows: int) -> None:
    random = np.random.default_rng(seed)
    rows = random.binomial(batch_rows, 0.1, size=200)  # of a source that gives a tenth, often none
    code = [float(np.mean(random.lognormal(0.0, 0.5, max(1, n)) + 4 * (random.random(max(1, n)) < 0.01))) for n in rows]
    losses = {"web": noisy(200, deviation=0.3 / math.sqrt(batch_rows), seed=seed), "code": code}
    assert alarms(losses, {"web": (batch_rows - rows).tolist(), "code": rows.tolist()}) == []


def test_the_rise_while_the_rate_is_warmed_up_again_raises_no_alarm() -> None:
    random = np.random.default_rng(0)
    rise = np.concatenate([np.full(50, 2.0), 2.0 + 0.5 * np.arange(100) / 100, np.full(100, 2.5)])
    assert alarms({"web": list(rise + 0.01 * random.standard_normal(250))}, {"web": [512] * 250}) == []


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(MIN_HISTORY, 190), st.floats(0.4, 5.0))
def test_a_jump_of_the_loss_is_found_at_its_step_alone(seed: int, at: int, height: float) -> None:
    losses = noisy(200, deviation=0.02, seed=seed, start=2.6)
    losses[at] += height
    assert alarms({"web": losses}, {"web": [64] * 200}) == [at]


def test_a_jump_of_one_source_among_others_is_found_by_name() -> None:
    detector = SpikeDetector(8.0, ROW)
    counted = {"web": 48 * ROW, "law": 16 * ROW}
    for _ in range(40):
        detector.accept({"web": 2.5 * counted["web"], "law": 1.5 * counted["law"]}, counted, 1.0)
    found = detector.in_losses({"web": 2.5 * counted["web"], "law": 2.5 * counted["law"]}, counted, settled=True)
    assert list(found) == ["law"]
    assert (found["law"].value, found["law"].usual) == (2.5, 1.5)
    assert str(found["law"]).startswith("the loss of law is 2.5, usually 1.5 (limit 1.6")


def test_what_is_too_little_in_each_source_is_seen_in_the_batch_whatever_their_shares() -> None:
    random = np.random.default_rng(0)
    rows = {f"source {i}": random.integers(1, 6, size=80).tolist() for i in range(8)}
    level = {name: 1.0 + 0.4 * i for i, name in enumerate(rows)}
    losses = {n: [level[n] + 0.3 * random.standard_normal() / math.sqrt(k) for k in ks] for n, ks in rows.items()}
    assert alarms(losses, rows) == []
    for name in losses:
        losses[name][60] += 1.0  # less than 8 x (1 + 3 / rows) deviations for each of them
    assert alarms(losses, rows) == [60]
    alone = {"source 0": losses["source 0"]}
    assert alarms(alone, {"source 0": rows["source 0"]}) == []


def test_a_source_of_one_row_in_512_cannot_do_harm() -> None:
    rows = {"web": [511] * 60, "rare": [1] * 60}
    losses = {"web": [2.5] * 60, "rare": [1.0] * 59 + [9.0]}
    assert alarms(losses, rows) == []


def test_nothing_is_a_spike_before_there_is_history_or_where_sigma_is_none() -> None:
    early = [2.0] * (MIN_HISTORY - 1) + [50.0] + [2.0] * 5
    assert alarms({"web": early}, {"web": [64] * len(early)}) == []
    detector = SpikeDetector(None, ROW)
    for _ in range(50):
        detector.accept({"web": 2.0 * ROW}, {"web": ROW}, 1.0)
    assert detector.in_losses({"web": 90.0 * ROW}, {"web": ROW}, settled=True) == {}
    assert detector.in_norm(1e9, settled=True) == []


def test_a_norm_is_judged_by_its_logarithm() -> None:
    detector = SpikeDetector(8.0, ROW)
    for step in range(60):
        detector.accept({}, {}, 0.5 + 0.01 * (step % 3))
    assert detector.in_norm(5.0, settled=True) == []
    (spike,) = detector.in_norm(20.0, settled=True)
    assert spike.value == 20.0 and spike.usual == pytest.approx(0.51) and spike.limit == pytest.approx(8.4, rel=0.01)
    assert detector.in_norm(20.0, settled=False) == []  # while the rate rises, or at a stage border


def test_a_falling_loss_is_no_spike() -> None:
    assert alarms({"web": [3.0] * 40 + [0.1] * 3}, {"web": [64] * 43}) == []


@given(st.floats(-0.05, 0.05), st.floats(0.001, 0.2), st.integers(0, 2**31))
def test_noise_is_that_of_the_values_whatever_their_trend(slope: float, deviation: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    values = slope * deviation * np.arange(WINDOW) + deviation * random.standard_normal(WINDOW)
    assert noise(list(values), [1.0] * WINDOW) == pytest.approx(deviation, rel=0.5)


def test_means_over_more_tokens_count_as_less_noisy() -> None:
    values = [2.0 + 0.1 * (-1) ** step for step in range(32)]
    assert noise(values, [4.0] * 32) == pytest.approx(2 * noise(values, [1.0] * 32))


def test_the_limit_follows_the_worked_example() -> None:
    losses = [2.50, 2.52, 2.48, 2.51, 2.49, 2.50] * 5
    limit = upper_limit(losses, [64.0 * ROW] * 30, weight=64.0 * ROW, sigma=8 * (1 + 3 / 64), floor=0.01 * 2.5)
    assert centre(losses) == pytest.approx(2.50) and limit == pytest.approx(2.71, abs=0.005)
    assert upper_limit(losses[:5], [1.0] * 5, weight=1.0, sigma=8, floor=0.1) == math.inf


def test_a_detector_with_the_history_of_another_judges_like_it() -> None:
    def taught(detector: SpikeDetector, steps: range) -> SpikeDetector:
        for step in steps:
            draw = random.Random(step)
            detector.accept({"web": draw.gauss(200, 2), "code": draw.gauss(90, 1)}, {"web": 100, "code": 60}, 2.0)
        return detector

    known = taught(SpikeDetector(8.0, ROW), range(1, 201))
    stored = json.loads(json.dumps(known.history()))
    other = taught(SpikeDetector(8.0, ROW), range(300, 310))
    other.go_back_to(stored)
    assert stored == json.loads(json.dumps(other.history())) and len(stored) == 4
    taught(known, range(201, 230)), taught(other, range(201, 230))
    bad = ({"web": 400.0, "code": 90.0}, {"web": 100, "code": 60})
    assert known.in_losses(*bad, settled=True) == other.in_losses(*bad, settled=True) != {}
    assert known.in_norm(500.0, settled=True) == other.in_norm(500.0, settled=True) != []
    other.go_back_to({})
    assert not other.in_losses(*bad, settled=True) and not other.in_norm(500.0, settled=True)


def test_rows_that_stand_out_are_found_unless_they_are_most() -> None:
    assert outlying_rows([2.0, 2.1, 9.0, 1.9, math.nan, 2.0], sigma=8.0) == [2, 4]
    assert outlying_rows([2.0, 2.2, 1.8, 2.1], sigma=8.0) == []
    assert outlying_rows([2.0, math.nan, math.inf], sigma=8.0) == []
    assert outlying_rows([math.nan] * 3, sigma=8.0) == []
