"""Saving in the background: what is copied is what is saved, the loop waits for the copy alone, and a save is complete
everywhere or reported with the reason of the rank that failed."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.checkpoint import background
from cpt.checkpoint.background import Saver
from cpt.checkpoint.hostcopy import HostCopy
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment
from cpt.checkpoint.writing import write_shard
from cpt.rundir import step_name

ROOT = Path(__file__).resolve().parents[3]
META = CheckpointMeta(3, 9, {}, 3, 0, "f", {"w": [4]}, {}, {}, {})


def half(rank: int) -> list[Fragment]:
    kinds = ("param", "exp_avg", "exp_avg_sq")
    return [Fragment("w", 2 * rank, {kind: torch.full((2,), 10.0 + rank) for kind in kinds})]


def whole() -> list[Fragment]:
    return [*half(0), *half(1)]


def weights(folder: Path) -> list[float]:
    return Checkpoint.open(folder).read("w").tolist()  # type: ignore[no-any-return]


def held_back(monkeypatch: pytest.MonkeyPatch, where: Any, name: str) -> threading.Event:
    """Make a function of the save wait for the returned event."""
    go, real = threading.Event(), getattr(where, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        assert go.wait(10.0)
        return real(*arguments, **options)

    monkeypatch.setattr(where, name, slow)
    return go


@pytest.fixture
def alone_of_two(monkeypatch: pytest.MonkeyPatch) -> Saver:
    """Rank 0 of two, whose other rank takes part in the collective calls and then says nothing."""
    monkeypatch.setattr(background, "gather", lambda value, world_size: [value])
    monkeypatch.setattr(background, "from_first", lambda value, world_size: value)
    monkeypatch.setattr(background, "together", lambda action, world_size: action())
    return Saver(rank=0, world_size=2, patience_seconds=0.2)


def test_one_process_saves_a_complete_checkpoint_and_reports_it_once(tmp_path: Path) -> None:
    saver, folder = Saver(), tmp_path / "checkpoints" / step_name(3)
    saver.begin(folder, whole(), META)
    assert saver.wait() is None and not saver.in_flight
    assert weights(folder) == [10.0, 10.0, 11.0, 11.0] and Checkpoint.open(folder).verify() == []
    (saved,) = saver.poll()
    files = [path for path in folder.iterdir() if path.name != "COMPLETE"]
    assert (saved.step, saved.error, saved.bytes) == (3, None, sum(path.stat().st_size for path in files))
    assert saver.poll() == [] and saver.wait() is None


def test_the_loop_waits_for_the_copy_and_what_it_does_then_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, write = held_back(monkeypatch, HostCopy, "copy"), held_back(monkeypatch, background, "write_shard")
    saver, state = Saver(), whole()
    saver.begin(tmp_path / step_name(3), state, META)
    threading.Timer(0.1, copy.set).start()
    started = time.perf_counter()
    saver.wait_copied()
    assert 0.05 < time.perf_counter() - started < 5.0  # for the copy; nothing is written yet
    for fragment in state:
        fragment.state["param"].fill_(-1.0)  # the next update
    assert saver.poll() == [] and not list((tmp_path / step_name(3)).iterdir())
    write.set()
    saver.wait()
    assert weights(tmp_path / step_name(3)) == [10.0, 10.0, 11.0, 11.0]
    (saved,) = saver.poll()
    assert saved.stall_seconds > 0.05 and saved.copy_seconds > 0.05


def test_a_second_save_waits_for_the_first_and_says_how_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = held_back(monkeypatch, background, "write_shard")
    saver = Saver()
    saver.begin(tmp_path / step_name(3), whole(), META)
    saver.wait_copied()
    threading.Timer(0.1, write.set).start()
    saver.begin(tmp_path / step_name(6), whole(), META)
    saver.wait()
    first, second = saver.poll()
    assert first.waited_seconds < 0.05 < second.waited_seconds <= second.stall_seconds
    assert weights(tmp_path / step_name(3)) == weights(tmp_path / step_name(6))


def test_the_copy_is_taken_into_the_same_memory_every_time() -> None:
    host = HostCopy()
    first, second = host.copy(whole()), host.copy([*half(1)])
    assert second[0].state["param"].tolist() == [11.0, 11.0]
    assert first[0].state["param"].data_ptr() == second[0].state["param"].data_ptr()
    assert (
        host.copy([Fragment("b", 0, {"param": torch.ones(3, dtype=torch.bfloat16)})])[0].state["param"].tolist()
        == [1.0] * 3
    )


def test_a_failed_save_is_told_and_the_older_checkpoint_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Saver()
    saver.begin(tmp_path / step_name(3), whole(), META)

    def full_disk(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(background, "write_shard", full_disk)
        saver.begin(tmp_path / step_name(6), whole(), META)
        assert saver.wait() == "rank 0: OSError: [Errno 28] No space left on device"
    assert [saved.error is None for saved in saver.poll()] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == [step_name(3)] and weights(tmp_path / step_name(3))
    saver.begin(tmp_path / step_name(9), whole(), META)  # and the next one works again
    assert saver.wait() is None and weights(tmp_path / step_name(9))


def test_a_save_that_cannot_begin_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / step_name(6)).write_text("a file where the folder should be")
    saver = Saver()
    with pytest.raises(OSError, match=r"rank 0: .*step_00000006"):
        saver.begin(tmp_path / step_name(6), whole(), META)
    assert not saver.in_flight and saver.wait() is None


def test_what_fails_after_a_complete_save_is_a_warning(tmp_path: Path) -> None:
    def broken() -> dict[str, object]:
        raise PermissionError("not yours")

    saver = Saver()
    saver.begin(tmp_path / step_name(3), whole(), META, after=broken)
    assert saver.wait() is None
    assert saver.poll()[0].details == {"warning": "PermissionError: not yours"}
    saver.begin(tmp_path / step_name(6), whole(), META, after=lambda: {"pruned": ["x"]})
    saver.wait()
    assert saver.poll()[0].details == {"pruned": ["x"]}


def test_a_rank_that_says_nothing_fails_the_save_within_its_time(tmp_path: Path, alone_of_two: Saver) -> None:
    alone_of_two.begin(tmp_path / step_name(3), half(0), META)
    assert "rank 1: no word within 0 s of rank 0; do all hosts share" in str(alone_of_two.wait())
    assert not list(tmp_path.iterdir())


def test_a_rank_whose_copy_fails_says_so_at_once_and_rank_0_need_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone_of_two: Saver
) -> None:
    def no_memory(*arguments: Any) -> None:
        raise RuntimeError("out of host memory")

    other, folder = Saver(rank=1, world_size=2), tmp_path / step_name(3)
    monkeypatch.setattr(background, "from_first", lambda value, world_size: "0000abcd" if value else value)
    folder.mkdir()  # which rank 0 makes
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "copy", no_memory)
        other.begin(folder, half(1), META)
        other.wait()
    (receipt,) = folder.iterdir()
    assert receipt.name == ".receipt_0000abcd_00001.json"
    content = receipt.read_text()
    assert "rank 1: RuntimeError: out of host memory" in content
    alone_of_two.patience_seconds = 60.0
    alone_of_two.begin(folder, half(0), META)
    receipt.write_text(content)
    alone_of_two._join(alone_of_two._task.thread, folder)  # type: ignore[union-attr, arg-type]
    (saved,) = alone_of_two.poll()
    assert saved.error == "rank 1: RuntimeError: out of host memory" and not folder.exists()


def test_a_receipt_of_another_attempt_does_not_count(tmp_path: Path, alone_of_two: Saver) -> None:
    alone_of_two.begin(tmp_path / step_name(3), half(0), META)
    (tmp_path / step_name(3) / ".receipt_00000000_00001.json").write_text('{"files": {}, "kinds": {}}')
    assert "rank 1: no word" in str(alone_of_two.wait())


def test_a_save_in_flight_is_finished_or_abandoned_when_the_run_ends(tmp_path: Path, alone_of_two: Saver) -> None:
    alone_of_two.patience_seconds = 60.0
    alone_of_two.begin(tmp_path / step_name(3), half(0), META)
    started = time.perf_counter()
    alone_of_two.close(timeout=0.2)
    assert time.perf_counter() - started < 5.0
    (saved,) = alone_of_two.poll()
    assert saved.error == "rank 1: not done when the run ended" and not list(tmp_path.iterdir())
    saver = Saver()
    saver.begin(tmp_path / step_name(6), whole(), META)
    saver.close(timeout=10.0)
    saver.close(timeout=10.0)
    assert weights(tmp_path / step_name(6))


LEAVING = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cpt.checkpoint import background
from cpt.failures import leave
from test_background import META, whole

def forever(*arguments, **options):
    time.sleep(60)

background.write_shard = forever
background.Saver().begin(Path(sys.argv[2]), whole(), META)
leave(0)  # as every command and every rank of the product ends
"""


def test_a_process_leaves_while_a_save_is_in_flight(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(Path(__file__).parent), str(tmp_path / step_name(3))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / step_name(3) / "COMPLETE").exists()


KILLED = """
import os, shutil, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from cpt.checkpoint.agreed import newest_good
from cpt.checkpoint.background import Saver
from cpt.checkpoint.marker import clear_unfinished
from cpt.checkpoint.retention import Policy, apply, decide, survey
from cpt.rundir import step_name
from test_background import META, whole

root = Path(sys.argv[2])

def retain():
    return apply(root, decide(survey(root), Policy(1, 3)))

def save(step):
    saver = Saver()
    saver.begin(root / step_name(step), whole(), META, after=retain)
    saver.wait()

def dying_at(number):
    done = [0]
    def dying(real):
        def act(*arguments, **options):
            done[0] += 1
            if done[0] > number:
                os._exit(9)
            return real(*arguments, **options)
        return act
    os.fsync, os.replace, os.rmdir, Path.unlink, os.mkdir = map(dying, (os.fsync, os.replace, os.rmdir, Path.unlink, os.mkdir))

number, code = 0, 9
while code == 9:
    shutil.rmtree(root, ignore_errors=True)
    save(3)
    save(4)
    child = os.fork()
    if child == 0:
        dying_at(number)
        save(6)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    checkpoint, _ = newest_good(root, rank=0, world_size=1)
    assert checkpoint.path.name in (step_name(4), step_name(6)), number
    assert checkpoint.read("w").tolist() == [10.0, 10.0, 11.0, 11.0]
    assert survey(root)[3] == "weights", survey(root)
    clear_unfinished(root)
    retain()
    assert set(survey(root).values()) <= {"full", "weights"}, survey(root)
    number += 1
print("KILLED", number, survey(root))
"""


def test_a_save_killed_at_any_moment_leaves_the_newest_or_the_one_before(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    moments, left = done.stdout.removeprefix("KILLED ").split(" ", 1)
    assert int(moments) > 10 and left.strip() in ("{3: 'weights', 6: 'full'}", "{6: 'full', 3: 'weights'}")


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from cpt.checkpoint import background
from cpt.checkpoint.agreed import newest_good
from cpt.rundir import step_name
from test_background import META, half

dist.init_process_group("gloo")
rank, root = dist.get_rank(), Path(sys.argv[2])
saver = background.Saver(rank=rank, world_size=2)

def save(step):
    try:
        saver.begin(root / step_name(step), half(rank), META)
        print("SAVED", step, saver.wait(), flush=True)
    except OSError as error:
        print("REFUSED", step, error, flush=True)

def full_disk(folder, fragments, **_):
    (folder / f"shard_{rank:05d}-of-00002.param.safetensors").write_text("a part")
    raise OSError(28, "No space left on device", str(folder))

save(3)
real = background.write_shard
if rank == 1:
    background.write_shard = full_disk
save(6)
background.write_shard = real
if rank == 0:
    (root / step_name(9)).write_text("a file where the folder should be")
save(9)
save(12)
if rank == 1:  # bytes that only the other rank will read
    for part in ("param", "state"):
        path = root / step_name(12) / f"shard_00000-of-00002.{part}.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([255]))
dist.barrier()
checkpoint, skipped = newest_good(root, rank=rank, world_size=2)
print("FOUND", checkpoint.path.name, len(skipped), "content is damaged" in skipped[0], flush=True)
dist.destroy_process_group()
from cpt.failures import leave
leave(0)
"""


def two_ranks(script: str, *arguments: str) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    start: Callable[[int], subprocess.Popen[str]] = lambda rank: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, **job, "RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    ranks = [start(rank) for rank in (0, 1)]
    try:
        outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    return outputs


def test_two_ranks_save_together_agree_on_failures_and_on_what_is_sound(tmp_path: Path) -> None:
    for output in two_ranks(TWO_RANKS, str(Path(__file__).parent), str(tmp_path)):
        assert "SAVED 3 None" in output and "SAVED 12 None" in output
        assert "SAVED 6 rank 1: OSError: [Errno 28] No space left on device" in output
        assert "REFUSED 9 rank 0: " in output
        assert "FOUND step_00000003 1 True" in output
    assert weights(tmp_path / step_name(3)) == [10.0, 10.0, 11.0, 11.0]
    assert {path.name for path in (tmp_path / step_name(3)).iterdir()} >= {"COMPLETE", "meta.json"}
    assert not (tmp_path / step_name(6)).exists()  # a part of a checkpoint only takes space
    assert not list(tmp_path.rglob(".receipt*"))


def test_a_shard_can_be_written_of_weights_alone(tmp_path: Path) -> None:
    receipt = write_shard(tmp_path, whole(), rank=0, world_size=1, parts=("param",))
    assert list(receipt.files) == ["shard_00000-of-00001.param.safetensors"] and receipt.kinds == {}
