"""Measuring benchmarks moves no generator of random numbers."""

import random

import numpy as np
import pytest
import torch

from cpt.run_benchmarks import _random_states_kept


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def seeded() -> None:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)


def test_random_states_are_put_back_whatever_happens_in_between() -> None:
    seeded()
    expected = [draws(), draws()]
    seeded()
    found = [draws()]
    with pytest.raises(KeyError), _random_states_kept():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        raise KeyError
    assert [*found, draws()] == expected
