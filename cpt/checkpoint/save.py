"""Saving as one act of all ranks: either every rank's part is on disk and the checkpoint is complete, or all ranks
learn why not.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist

from cpt.checkpoint.portable import (
    CheckpointMeta,
    Fragment,
    delete_checkpoint,
    finish_checkpoint,
    start_checkpoint,
    write_shard,
)


def save_checkpoint(
    folder: Path, fragments: Iterable[Fragment], meta: CheckpointMeta, *, rank: int, world_size: int
) -> None:
    """Write a checkpoint; every rank calls it with the fragments it owns.

    Raises:
        OSError: on every rank, with the first rank's reason (disk full, folder not writable); older checkpoints are
        untouched.
    """
    first = rank == 0
    _together(lambda: start_checkpoint(folder, meta) if first else None, world_size)
    try:
        _together(lambda: write_shard(folder, fragments, rank=rank, world_size=world_size), world_size)
        _together(lambda: finish_checkpoint(folder, meta, world_size=world_size) if first else None, world_size)
    except OSError:
        if first:  # a part of a checkpoint is of no use, and the space may be what was missing
            delete_checkpoint(folder)
        raise


def _together(action: Callable[[], None], world_size: int) -> None:
    """Run ``action``, wait for all ranks, and raise everywhere if it failed anywhere."""
    reason: str | None = None
    try:
        action()
    except Exception as error:  # whatever it was, the other ranks wait for this one's answer
        reason = f"{type(error).__name__}: {error}"
    reasons: list[str | None] = [reason]
    if world_size > 1:
        reasons = [None] * world_size
        dist.all_gather_object(reasons, reason)
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]:
        raise OSError("; ".join(failed))
