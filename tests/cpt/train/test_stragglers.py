"""Which rank is slow: the comparison by hand, and episodes over two real ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt.train.stragglers import Straggler, slow_ranks


def test_a_rank_a_quarter_slower_than_the_others_is_slow_and_its_worst_phase_is_named() -> None:
    even = [0.1, 1.0]
    assert slow_ranks([even, even, even, even]) == []
    (slow,) = slow_ranks([even, even, [0.1, 1.3], even])
    assert (slow.rank, slow.phase) == (2, "forward") and slow.ratio == pytest.approx(1.4 / 1.1)
    (slow,) = slow_ranks([[0.5, 1.0], even, even])
    assert (slow.rank, slow.phase) == (0, "data")


def test_of_two_ranks_one_can_be_slow() -> None:
    assert [slow.rank for slow in slow_ranks([[0.0, 1.0], [0.0, 1.25]])] == [1]
    assert slow_ranks([[0.0, 1.0], [0.0, 1.15]]) == []


def test_milliseconds_make_nobody_slow() -> None:
    assert slow_ranks([[0.001, 0.004], [0.001, 0.009]]) == []
    assert slow_ranks([[0.0, 0.0], [0.0, 0.5]]) == [Straggler(1, 50.0, "forward")]  # no division by zero


RANK = """
import sys, torch, torch.distributed as dist
from cpt.train.engine import Topology
from cpt.train.stepinfo import StepInfo
from cpt.train.stragglers import StragglerHook
dist.init_process_group("gloo")
rank = dist.get_rank()
told = []
hook = StragglerHook(Topology(rank, 2, torch.device("cpu")), 5, lambda slow, step: told.append((slow.rank, step)))
for step in range(1, 81):
    slow = rank == 1 and (step <= 30 or 36 <= step <= 45 or step > 60)
    seconds = {"data": 0.01, "forward": 9.0 if step == 1 else 0.2 if slow else 0.1}
    hook(StepInfo(step, 0, {}, {}, 0.0, 0.0, 0.3, seconds))
print(told)
dist.destroy_process_group()
"""


def test_a_slow_rank_is_reported_once_per_episode_and_only_after_several_windows() -> None:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    root = Path(__file__).resolve().parents[3]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK], cwd=root, env={**place, "RANK": rank}, stdout=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    told = [rank.communicate(timeout=60)[0].strip() for rank in ranks]
    # Windows of 5 steps: slow in 1-6 (said after the third), in 8-9 (too short), in 13-16 (said after 15).
    assert told == ["[(1, 15), (1, 75)]"] * 2
