"""Saving is one act of all ranks: complete everywhere, or refused everywhere with the reason of the rank that failed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cpt.checkpoint.portable import STATE_KINDS, Checkpoint, CheckpointMeta, Fragment
from cpt.checkpoint.save import save_checkpoint
from cpt.rundir import step_name

ROOT = Path(__file__).resolve().parents[3]
META = CheckpointMeta(3, 9, {}, 3, 0, "f", {"w": [4]}, {}, {}, {})


def half(rank: int) -> list[Fragment]:
    return [Fragment("w", 2 * rank, {kind: torch.full((2,), 10.0 + rank) for kind in STATE_KINDS})]


def test_one_process_saves_a_complete_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / step_name(3)
    save_checkpoint(folder, [*half(0), *half(1)], META, rank=0, world_size=1)
    ((name, weights),) = Checkpoint.open(folder).tensors()
    assert (name, weights.tolist()) == ("w", [10.0, 10.0, 11.0, 11.0])


def test_a_failed_save_leaves_the_older_checkpoint_as_it_was(tmp_path: Path) -> None:
    older = tmp_path / step_name(3)
    save_checkpoint(older, [*half(0), *half(1)], META, rank=0, world_size=1)
    (tmp_path / step_name(6)).write_text("a file where the folder should be")
    with pytest.raises(OSError, match=r"rank 0: .*step_00000006"):
        save_checkpoint(tmp_path / step_name(6), half(0), META, rank=0, world_size=1)
    Checkpoint.open(older)


TWO_RANKS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch.distributed as dist
from cpt.checkpoint import save
from cpt.rundir import step_name
from test_save import META, half

dist.init_process_group("gloo")
rank, root = dist.get_rank(), Path(sys.argv[2])
save.save_checkpoint(root / step_name(3), half(rank), META, rank=rank, world_size=2)

def full_disk(folder, fragments, **_):
    raise OSError(28, "No space left on device", str(folder))

if rank == 1:
    save.write_shard = full_disk
try:
    save.save_checkpoint(root / step_name(6), half(rank), META, rank=rank, world_size=2)
except OSError as error:
    print("REFUSED", error, flush=True)
dist.destroy_process_group()
from cpt.failures import leave
leave(0)
"""


def test_two_ranks_save_together_and_when_one_cannot_write_both_are_told_which(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(Path(__file__).parent), str(tmp_path)],
            env={**os.environ, **job, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    for output in outputs:
        assert "REFUSED rank 1: OSError: [Errno 28] No space left on device" in output and "rank 0:" not in output
    ((_, weights),) = Checkpoint.open(tmp_path / step_name(3)).tensors()
    assert weights.tolist() == [10.0, 10.0, 11.0, 11.0]
    assert not (tmp_path / step_name(6)).exists()  # a part of a checkpoint only takes space
