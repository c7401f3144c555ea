"""Ranks that find each other, and those that do not: real stores, a rank per thread."""

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import TCPStore

from cpt.train.guard import AskedToStop
from cpt.train.joining import join


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found = int(probe.getsockname()[1])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(found))
    return found


@pytest.mark.usefixtures("port")
def test_ranks_that_have_all_come_share_a_store() -> None:
    with ThreadPoolExecutor() as threads:
        first, second = threads.map(lambda rank: join(rank=rank, world_size=2, seconds=10), (0, 1))
    first.set("said", "by rank 0")
    assert second.get("said") == b"by rank 0"


@pytest.mark.usefixtures("port")
def test_a_rank_that_never_comes_is_named_with_those_that_did() -> None:
    with pytest.raises(RuntimeError) as error:
        join(rank=0, world_size=3, seconds=1)
    assert "rank 1, 2 of 3 did not join within 1 s" in str(error.value)
    assert f"rank 0: host {socket.gethostname()}, process {os.getpid()}" in str(error.value)


@pytest.mark.usefixtures("port")
def test_asked_to_stop_while_ranks_are_missing_it_does_not_wait_for_them() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    began = time.monotonic()
    with pytest.raises(AskedToStop, match="asked to stop before all 2 ranks were there"):
        join(rank=0, world_size=2, seconds=60, asked_to_stop=stop.is_set)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("asked", range(3))
def test_where_one_rank_is_asked_to_stop_all_leave_together(port: int, asked: int) -> None:
    """Those that were not told would wait for it; the third rank comes when it is asked itself, or not at all."""
    stop = threading.Event()

    def outcome(rank: int) -> str:
        try:
            join(rank=rank, world_size=3, seconds=60, asked_to_stop=lambda: rank == asked and stop.is_set())
        except AskedToStop as stopped:
            return str(stopped)
        return "began"

    with ThreadPoolExecutor() as threads:
        ranks = [threads.submit(outcome, rank) for rank in (0, 1)]
        seen = TCPStore("127.0.0.1", port, is_master=False)
        while not seen.check(["joined/0", "joined/1"]):
            time.sleep(0.01)
        stop.set()
        ranks += [threads.submit(outcome, 2)] if asked == 2 else []
    assert {each.result() for each in ranks} == {"asked to stop before all 3 ranks were there; nothing was trained"}


def test_asked_to_stop_while_rank_0_does_not_answer_it_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # as the launcher holds it until rank 0 has come
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(silent.getsockname()[1]))
        began = time.monotonic()
        with pytest.raises(AskedToStop, match="asked to stop before rank 1 reached rank 0"):
            join(rank=1, world_size=2, seconds=60, asked_to_stop=stop.is_set)
        assert time.monotonic() - began < 10


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked(port: int) -> None:
    with pytest.raises(RuntimeError, match=rf"rank 1 on .* cannot reach rank 0 at 127.0.0.1:{port} within 1 s"):
        join(rank=1, world_size=2, seconds=1)


def test_rank_0_takes_the_socket_that_the_launcher_holds_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    monkeypatch.setenv("CPT_LISTENER", str(listener.detach()))
    store = join(rank=0, world_size=1, seconds=10)
    store.set("a", "b")
    assert store.get("a") == b"b" and "CPT_LISTENER" not in os.environ
