"""Whole checkpoint folders: what happens where two processes remove the same one."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from cpt.checkpoint.marker import COMPLETE, delete_checkpoint


def test_two_that_delete_one_checkpoint_at_once_are_both_content(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / f"step_{number:08d}"
        folder.mkdir()
        for name in (COMPLETE, "meta.json", *(f"shard_{shard}" for shard in range(50))):
            (folder / name).touch()
        together = Barrier(2)

        def delete(folder: Path = folder, together: Barrier = together) -> None:
            together.wait()
            delete_checkpoint(folder)

        with ThreadPoolExecutor(2) as threads:
            for deletion in [threads.submit(delete) for _ in range(2)]:
                deletion.result()
        assert not folder.exists()
