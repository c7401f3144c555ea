"""A rank that stops or dies ends its job in a bounded time with a message that names it, with and without a launcher
that watches."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 40
FIELDS = {
    "train.tokens": STEPS * 2048,
    "train.global_batch_tokens": 2048,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 10,
    "guard.hang_seconds": 4.0,
}
LIMIT = 150


def end_of(process: Any) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks end with it
        raise
    return process.returncode, out


def pid_of(shop: Workshop, name: str, rank: int) -> int:
    return int(json.loads((shop.run_dir(name) / f"heartbeats/rank_{rank:05d}.json").read_text())["pid"])


def test_a_stopped_rank_is_named_and_killed_and_the_run_goes_on_to_its_end(workshop: Workshop) -> None:
    workshop.stores()
    process = workshop.start("train", workshop.run_file("hung", FIELDS), "--nproc", "2", "--supervise")
    workshop.wait_for_step("hung", 12, process)
    victim = pid_of(workshop, "hung", 1)
    os.kill(victim, signal.SIGSTOP)
    code, out = end_of(process)
    assert code == 0, out
    assert f"HANG: rank 1 (host {socket.gethostname()}, process {victim}): no sign of life" in out, out
    (hang,) = [event for event in workshop.events("hung") if event["event"] == "hang"]
    (silent,) = hang["silent"]
    assert (silent["rank"], silent["pid"], silent["host"]) == (1, victim, socket.gethostname())
    assert silent["why"].endswith("its process is stopped") and 0 < silent["step"] < STEPS
    stacks = (workshop.run_dir("hung") / "stacks/rank_00000.txt").read_text()
    assert "trainer.py" in stacks and "heartbeat.py" in stacks
    (restart,) = [event for event in workshop.events("hung") if event["event"] == "restart"]
    assert restart["exit_code"] == 3 and restart["reason"].startswith("hang: rank 1 on")
    assert list(workshop.losses("hung")) == list(range(1, STEPS + 1))


def start_ranks(workshop: Workshop, run_file: Path, *ranks: int) -> list[Any]:
    """These of two ranks, each on its own, without a launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = ["env", "MASTER_ADDR=127.0.0.1", f"MASTER_PORT={port}", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2"]
    command = [sys.executable, "-m", "cpt.train.main", str(run_file)]
    return [workshop.start_command([*place, f"RANK={rank}", f"LOCAL_RANK={rank}", *command]) for rank in ranks]


def test_sigterm_while_a_rank_waits_for_another_ends_it_as_any_stop_does(workshop: Workshop) -> None:
    workshop.stores()
    (rank,) = start_ranks(workshop, workshop.run_file("early", FIELDS), 0)
    threads = Path(f"/proc/{rank.pid}/task")
    while rank.poll() is None and not any("tcpstore" in (each / "comm").read_text() for each in threads.iterdir()):
        time.sleep(0.05)
    rank.terminate()
    code, out = end_of(rank)
    assert code == 143 and "asked to stop before all 2 ranks were there; nothing was trained" in out, out
    assert not workshop.run_dir("early").exists()


def test_without_a_launcher_that_sees_it_the_survivor_of_a_killed_rank_ends_and_names_it(workshop: Workshop) -> None:
    """As on another host: nobody but the collectives and the heartbeats can tell."""
    workshop.stores()
    run_file = workshop.run_file("lost", FIELDS)
    ranks = start_ranks(workshop, run_file, 0, 1)
    workshop.wait_for_step("lost", 3, ranks[0])
    killed = time.monotonic()
    ranks[1].kill()
    code, out = end_of(ranks[0])
    assert code == 3 and time.monotonic() - killed < 20, out
    assert f"LOST: rank 1 (host {socket.gethostname()}, process {ranks[1].pid})" in out, out
    assert "its process is dead" in out or "its process is gone" in out
