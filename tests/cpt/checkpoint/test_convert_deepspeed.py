"""Folders of DeepSpeed that cannot be converted are refused with the reason; real ones are in tests/end_to_end."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.checkpoint.convert_deepspeed import Inert, open_deepspeed, read_plain, shards, write_universal
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment
from cpt.checkpoint.writing import finish_checkpoint, start_checkpoint, write_shard
from cpt.rundir import DataError

MODEL_FILE = "mp_rank_00_model_states.pt"


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    """ZeRO 0, two parameters that their shapes tell apart."""
    module = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
    state = {
        n: {"step": torch.tensor(5.0), "exp_avg": t + 1, "exp_avg_sq": t * t} for n, t in enumerate(module.values())
    }
    optimizer = {"state": state, "param_groups": [{"params": [0, 1]}]}
    tmp_path.mkdir(exist_ok=True)
    torch.save({"module": module, "optimizer": optimizer, "global_steps": 7, **changes}, tmp_path / MODEL_FILE)
    return tmp_path


class Surprise:
    """Whatever a pickle may hold beside tensors."""


def test_a_plain_folder_is_read_whole(tmp_path: Path) -> None:
    folder = open_deepspeed(folder_of(tmp_path))
    ((fragments, updates),) = shards(folder)
    assert (folder.step, updates, folder.shapes) == (7, 5, {"a": [2, 3], "b": [4]})
    assert fragments[0].state["exp_avg"].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_folder_around_it_names_it_in_latest(tmp_path: Path) -> None:
    folder_of(tmp_path / "global_step7")
    (tmp_path / "latest").write_text("global_step7\n")
    assert open_deepspeed(tmp_path).step == 7
    for tag in ("../elsewhere", "..", "/etc", "a/b"):
        (tmp_path / "latest").write_text(tag)
        with pytest.raises(DataError, match="no folder beside it"):
            open_deepspeed(tmp_path)


def test_a_pickle_that_needs_more_than_tensors_and_containers_is_refused(tmp_path: Path) -> None:
    folder_of(tmp_path, extra=Surprise())
    with pytest.raises(DataError, match="nothing else is read from a pickle"):
        open_deepspeed(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match=MODEL_FILE):
        open_deepspeed(tmp_path)


def test_the_classes_of_deepspeed_become_an_empty_one(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "plain.pt")
    assert read_plain(tmp_path / "plain.pt")["x"].item() == 1
    assert Inert(1, 2).parts == (1, 2)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mp_rank_01_model_states.pt", "tensor parallelism"),
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "tensor parallelism"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "expert or pipeline parallelism"),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", "rank 0 are missing"),
    ],
)
def test_other_layouts_and_missing_ranks_are_refused_by_name(tmp_path: Path, name: str, reason: str) -> None:
    folder_of(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=reason):
        open_deepspeed(tmp_path)


def test_frozen_parameters_no_state_and_an_order_that_shapes_do_not_tell_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="frozen"):
        open_deepspeed(folder_of(tmp_path, frozen_param_shapes={"c": torch.Size([1])}))
    with pytest.raises(DataError, match="no optimizer state"):
        list(shards(open_deepspeed(folder_of(tmp_path, optimizer=None))))
    odd = {n: {"step": 1, "exp_avg": torch.ones(5)} for n in range(2)}
    optimizer = {"state": odd, "param_groups": [{"params": [0, 1]}]}
    with pytest.raises(DataError, match="save it under ZeRO 1"):
        list(shards(open_deepspeed(folder_of(tmp_path, optimizer=optimizer))))


def test_no_folder_of_deepspeed_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no checkpoint folder of DeepSpeed"):
        open_deepspeed(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        open_deepspeed(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["../../outside", "a/b", "..", ""])
def test_a_parameter_name_that_leads_out_of_the_folder_is_never_made_one(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoints" / "step_00000003"
    start_checkpoint(folder, 0)
    fragment = Fragment(name or "x", 0, {kind: torch.ones(2) for kind in ("param", "exp_avg", "exp_avg_sq")})
    meta = CheckpointMeta(3, 9, {}, 3, 0, "f", {name: [2]}, {}, {}, {})
    finish_checkpoint(folder, meta, [write_shard(folder, [fragment], rank=0, world_size=1)])
    with pytest.raises(DataError, match="cannot name a folder"):
        write_universal(Checkpoint.open(folder), tmp_path / "deep" / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
