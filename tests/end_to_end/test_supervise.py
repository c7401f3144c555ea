"""The supervisor over real ranks: a crash costs the steps since the last checkpoint, and nothing outlives its owner."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
FIELDS = {
    "train.tokens": STEPS * 2048,
    "train.global_batch_tokens": 2048,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 10,
}
LIMIT = 120


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``whole``: two ranks that nothing happened to."""

    def make(shop: Workshop) -> None:
        shop.stores()
        code, out = end_of(shop.start("train", shop.run_file("whole", FIELDS), "--nproc", "2"))
        assert code == 0, out

    return made_once("supervise", make)


def end_of(process: Any) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()  # its ranks end with it
        raise
    return process.returncode, out


def beat(shop: Workshop, name: str, rank: int) -> dict[str, Any]:
    return dict(json.loads((shop.run_dir(name) / f"heartbeats/rank_{rank:05d}.json").read_text()))


def named(shop: Workshop, name: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in shop.events(name) if event["event"] == kind]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def newest_complete(run_dir: Path) -> int:
    return max(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/*/COMPLETE"))


def test_a_rank_that_is_killed_costs_some_steps_and_the_losses_are_those_of_a_run_that_nothing_happened_to(
    shop: Workshop,
) -> None:
    process = shop.start("train", shop.run_file("killed", FIELDS), "--nproc", "2", "--supervise")
    shop.wait_for_step("killed", 25, process)
    victim = beat(shop, "killed", 1)["pid"]
    os.kill(victim, signal.SIGKILL)
    code, out = end_of(process)
    assert code == 0, out
    assert f"rank 1 (process {victim}) was killed by SIGKILL" in out and "start 2 from the checkpoint after step" in out
    (restart,) = named(shop, "killed", "restart")
    assert (restart["exit_code"], restart["attempt"], restart["processes"], restart["waited"]) == (137, 2, 2, 2.0)
    assert restart["checkpoint"] >= 20 and "SIGKILL" in restart["reason"]
    assert shop.losses("killed") == shop.losses("whole")
    told = json.loads(shop.cpt("report", shop.run_dir("killed"), "--json").out)["runs"][0]["goodput"]
    assert told["interruptions"] == 1 and told["seconds"]["interrupted"] >= 2 and 0 < told["fraction"] < 1


def test_where_one_of_two_devices_is_gone_the_run_goes_on_with_one_process(shop: Workshop, tmp_path: Path) -> None:
    script = tmp_path / "shrinking.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from launch.local.devices import Usable\n"
        "from launch.local.supervise import Job, supervise\n"
        "usable = [2, 1]\n"
        "run_dir, run_file = sys.argv[1:]\n"
        "job = Job(Path(run_dir), [run_file], ['--resume', run_dir], 2, lambda count: True, 60.0)\n"
        "sys.exit(supervise(job, available=lambda wanted: Usable(usable.pop(0))))\n"
    )
    run_file = shop.run_file("shrunk", FIELDS)
    command = [sys.executable, str(script), str(shop.run_dir("shrunk")), str(run_file)]
    process = shop.start_command(["env", f"PYTHONPATH={ROOT}", *command])
    shop.wait_for_step("shrunk", 15, process)
    os.kill(beat(shop, "shrunk", 1)["pid"], signal.SIGKILL)
    code, out = end_of(process)
    assert code == 0 and "supervisor: 1 of 2 processes" in out, out
    (restart,), (resumed,) = named(shop, "shrunk", "restart"), named(shop, "shrunk", "resume")
    assert restart["processes"] == 1 == resumed["world_size"]
    assert shop.losses("shrunk") == pytest.approx(shop.losses("whole"), rel=1e-6)


def test_sigterm_to_the_supervisor_saves_and_ends_with_143_and_no_restart(shop: Workshop) -> None:
    process = shop.start("train", shop.run_file("stopped", FIELDS), "--nproc", "2", "--supervise")
    shop.wait_for_step("stopped", 12, process)
    process.send_signal(signal.SIGTERM)
    code, out = end_of(process)
    assert code == 143, out
    last = shop.records("stopped")[-1]["step"]
    assert 12 <= last < STEPS and newest_complete(shop.run_dir("stopped")) == last
    assert not named(shop, "stopped", "restart")


def test_ranks_whose_supervisor_was_killed_save_and_end_within_seconds(shop: Workshop) -> None:
    process = shop.start("train", shop.run_file("orphaned", FIELDS), "--nproc", "2", "--supervise")
    shop.wait_for_step("orphaned", 12, process)
    ranks = [beat(shop, "orphaned", rank)["pid"] for rank in (0, 1)]
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15
    while not all(is_gone(pid) for pid in ranks):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.1)
    last = shop.records("orphaned")[-1]["step"]
    assert last < STEPS and newest_complete(shop.run_dir("orphaned")) == last
