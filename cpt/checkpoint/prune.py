"""Which checkpoints are deleted: the oldest usable ones beyond ``keep_last``, and leftovers of interrupted saves.

The newest usable checkpoint is never deleted, whatever ``keep_last`` says. Usable means that every promised file is
there in its promised size: a folder that merely claims to be complete must not push out one that is.
"""

from pathlib import Path

from cpt.checkpoint.portable import delete_checkpoint, is_usable
from cpt.rundir import step_of


def to_delete(checkpoints: Path, *, keep_last: int) -> list[Path]:
    """Folders to delete, oldest first. An incomplete folder counts only if a complete one is newer: it may be being
    written.
    """
    folders = sorted(folder for folder in checkpoints.glob("step_*") if step_of(folder) is not None)
    complete = [folder for folder in folders if is_usable(folder)]
    if not complete:
        return []
    kept = set(complete[-max(1, keep_last) :])
    return [folder for folder in folders if folder not in kept and folder < complete[-1]]


def prune(checkpoints: Path, *, keep_last: int) -> list[Path]:
    """Delete what ``to_delete`` names; returns it."""
    folders = to_delete(checkpoints, keep_last=keep_last)
    for folder in folders:
        delete_checkpoint(folder)
    return folders
