"""The newest sound checkpoint: content is read, damage goes to an older one, and a damaged one no longer counts."""

import json
from pathlib import Path

import pytest
import torch

from cpt.checkpoint.agreed import newest_good, together
from cpt.checkpoint.marker import reduce_to_weights
from cpt.checkpoint.portable import CheckpointMeta, Fragment
from cpt.checkpoint.retention import Policy, decide, survey
from cpt.checkpoint.writing import finish_checkpoint, start_checkpoint, write_shard
from cpt.rundir import DataError, step_name


def save(root: Path, *steps: int) -> Path:
    for step in steps:
        folder, meta = root / step_name(step), CheckpointMeta(step, 9, {}, step, 0, "f", {"w": [4]}, {}, {}, {})
        start_checkpoint(folder, 100)
        state = {kind: torch.ones(4) for kind in ("param", "exp_avg")}
        finish_checkpoint(folder, meta, [write_shard(folder, [Fragment("w", 0, state)], rank=0, world_size=1)])
    return root


def damage(folder: Path, part: str = "state") -> None:
    (path,) = folder.glob(f"*.{part}.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


def found(root: Path) -> tuple[str | None, list[str]]:
    checkpoint, skipped = newest_good(root, rank=0, world_size=1)
    return checkpoint and checkpoint.path.name, skipped


@pytest.mark.parametrize("part", ["param", "state"])
def test_a_newest_checkpoint_of_damaged_content_gives_way_to_the_one_before(tmp_path: Path, part: str) -> None:
    save(tmp_path, 5, 10)
    damage(tmp_path / step_name(10), part)
    name, (reason,) = found(tmp_path)
    assert name == step_name(5) and f".{part}.safetensors: its content is damaged" in reason


def test_a_damaged_checkpoint_pushes_out_no_sound_one_later(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    damage(tmp_path / step_name(10))
    found(tmp_path)
    actions = decide(survey(tmp_path), Policy(keep_last=1))
    assert actions == {5: "keep", 10: "keep"}
    save(tmp_path, 15)
    assert decide(survey(tmp_path), Policy(keep_last=1)) == {5: "delete", 10: "delete", 15: "keep"}


def test_weights_alone_are_passed_over(tmp_path: Path) -> None:
    reduce_to_weights(save(tmp_path, 5, 10) / step_name(10))
    name, (reason,) = found(tmp_path)
    assert name == step_name(5) and "holds weights alone" in reason


def test_no_save_ever_is_an_answer_and_none_left_is_an_error(tmp_path: Path) -> None:
    assert found(tmp_path / "checkpoints") == (None, [])
    (tmp_path / step_name(3)).mkdir()  # cut short
    name, skipped = found(tmp_path)
    assert name is None and "incomplete" in skipped[0]
    damage(save(tmp_path, 5) / step_name(5))
    for _ in range(2):  # and it stays one, though the marker is gone the second time
        with pytest.raises(DataError, match="none of its checkpoints can be used; restore one from a copy"):
            found(tmp_path)


def test_a_checkpoint_that_cannot_be_opened_keeps_its_marker(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    (tmp_path / step_name(10) / "optimizer.pt").write_bytes(b"\x80\x04N.")
    assert found(tmp_path)[0] == step_name(5)
    assert json.loads((tmp_path / step_name(10) / "COMPLETE").read_text())  # the user can move the file out


def test_what_fails_on_a_rank_is_raised_with_its_number() -> None:
    def fail() -> None:
        raise ValueError("odd")

    with pytest.raises(OSError, match="rank 0: ValueError: odd"):
        together(fail, 1)
