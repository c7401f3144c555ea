"""S1 and S2 of a schedule: the published areas, and what a warm-up and a re-warm do to them."""

import numpy as np
import pytest

from cpt.planner.lr_areas import annealing_area, forward_area

PEAK, STEPS = 2e-4, 10_000
PROGRESS = np.arange(STEPS) / STEPS
SCHEDULES = {
    "constant": (np.full(STEPS, PEAK), 2.0, 0.0),
    "cosine": (PEAK * 0.5 * (1 + np.cos(np.pi * PROGRESS)), 1.0, 0.1910),
    "linear": (PEAK * (1 - PROGRESS), 1.0, 0.1800),
    "wsd": (PEAK * np.minimum(1.0, (1 - PROGRESS) / 0.1), 1.9001, 0.0735),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_areas_of_10000_steps_are_the_published_ones(name: str) -> None:
    rates, s1, s2 = SCHEDULES[name]
    assert forward_area(rates)[-1] == pytest.approx(s1, abs=2e-4)
    assert annealing_area(rates)[-1] == pytest.approx(s2, abs=1e-4)


def test_annealing_area_is_the_double_sum_of_its_definition() -> None:
    rates = np.random.default_rng(0).random(40)
    drops = np.concatenate([[0.0], rates[:-1] - rates[1:]])
    direct = [sum(drops[k] * 0.9 ** (i - k) for i in range(t + 1) for k in range(i + 1)) for t in range(40)]
    np.testing.assert_allclose(annealing_area(rates, 0.9), direct, atol=1e-12)


def test_a_rewarm_lowers_the_annealing_area_and_a_warmup_left_out_does_not() -> None:
    rates = np.concatenate([np.linspace(0, 1, 11), np.ones(50)])
    assert annealing_area(rates)[-1] < 0
    assert annealing_area(rates, start=10)[-1] == 0.0
