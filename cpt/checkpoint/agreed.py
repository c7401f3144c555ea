"""What all ranks find together: the newest checkpoint whose content is what its marker promises.

Every file is read and hashed once, the ranks sharing the files; what one rank finds damaged, no rank uses.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cpt.checkpoint.marker import set_aside
from cpt.checkpoint.portable import Checkpoint, none_usable, open_full, step_folders, was_completed
from cpt.rundir import DataError, step_of


def gather(value: Any, world_size: int) -> list[Any]:
    """``value`` of every rank, in order; a collective call."""
    if world_size == 1:
        return [value]
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any, world_size: int) -> Any:
    """What rank 0 gave; a collective call."""
    values = [value]
    if world_size > 1:
        dist.broadcast_object_list(values)
    return values[0]


def together(action: Callable[[], None], world_size: int) -> None:
    """Run ``action``, wait for all ranks, and raise OSError everywhere if it failed anywhere."""
    reason: str | None = None
    try:
        action()
    except Exception as error:  # whatever it was, the other ranks wait for this one's answer
        reason = f"{type(error).__name__}: {error}"
    reasons = gather(reason, world_size)
    if failed := [f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text is not None]:
        raise OSError("; ".join(failed))


def newest_good(
    checkpoints: Path, *, rank: int, world_size: int, at_most: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest full checkpoint of sound content, of a step ``at_most`` where that is given, and why each newer one is
    passed over; None where no save was ever completed. A collective call. A checkpoint of damaged content loses its
    marker, so that retention does not count it.

    Raises:
        DataError: on every rank; saves were completed, but none can be used now.
    """
    seen = [(folder, was_completed(folder)) for folder in step_folders(checkpoints)] if rank == 0 else []
    seen = [(folder, ever) for folder, ever in seen if at_most is None or (step_of(folder) or 0) <= at_most]
    folders = from_first(seen, world_size)  # a slow file system must not show different ones to the ranks
    skipped: list[str] = []
    for folder, _ in folders:
        checkpoint, reason, damage = _examine(folder, rank, world_size)
        reasons = [text for text in gather(reason, world_size) if text]
        damages = [text for texts in gather(damage, world_size) for text in texts]
        if checkpoint and not reasons and not damages:
            return checkpoint, skipped
        skipped.append("; ".join(dict.fromkeys(reasons + damages)))
        if rank == 0 and damages and not reasons:
            set_aside(folder)
    if any(completed for _, completed in folders):
        raise none_usable(checkpoints, skipped)
    return None, skipped


def _examine(folder: Path, rank: int, world_size: int) -> tuple[Checkpoint | None, str | None, list[str]]:
    """The checkpoint, why it cannot be opened, and what is damaged of this rank's share of it."""
    try:
        checkpoint = open_full(folder)
    except DataError as error:
        return None, str(error), []
    return checkpoint, None, checkpoint.verify(rank=rank, world_size=world_size)
