"""Measuring between hosts: little is sent where the way is slow, real processes agree, and what is in the way is told."""

import json
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from launch.preflight import bandwidth
from launch.preflight.bandwidth import SIZES, connection_fault, send_timed


class Way:
    """A way to another host that takes so many seconds for a message of each size, by a clock of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: Callable[[int], float]) -> None:
        self.sent: list[int] = []
        self._seconds, self._now = seconds, 0.0
        monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: self._now)

    def send(self, size: int) -> None:
        self.sent.append(size)
        self._now += self._seconds(size)


def test_a_fast_way_is_measured_with_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(monkeypatch, lambda size: 0.0001 + size / 1e9)
    rate, there_and_back = send_timed(way.send)
    assert way.sent == list(SIZES)
    assert rate == pytest.approx(1e9, rel=0.05) and there_and_back == pytest.approx(0.0001, rel=0.01)


def test_a_slow_way_is_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    way = Way(monkeypatch, lambda size: 0.02 + size / 2e5)
    rate, there_and_back = send_timed(way.send)
    assert way.sent == [*(size for size in SIZES if size == 8), 1 << 16]
    assert 1e5 < rate < 2e5 and there_and_back == pytest.approx(0.02, rel=0.01)


def test_the_best_of_several_tries_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = iter([5, 1, 5, 0.2, 0.1])
    assert send_timed(Way(monkeypatch, lambda size: next(waits)).send, [8, 8, 8, 100, 100]) == (pytest.approx(1000), 1)


def test_a_closed_port_and_a_deaf_listener_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert "another program" in connection_fault("127.0.0.1", port)
    assert "refused" in connection_fault("127.0.0.1", port)


def test_a_host_that_cannot_listen_says_so_at_once() -> None:
    pytest.importorskip("torch")
    with socket.create_server(("", 0)) as listener:
        place = ["--rank", "0", "--hosts", "2", "--master", "127.0.0.1", "--port", str(listener.getsockname()[1])]
        command = [sys.executable, "-m", "launch.preflight.bandwidth", *place]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == 3 and found["stage"] == "join" and "cannot listen" in found["error"]
