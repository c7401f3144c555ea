"""The portable format: any partition writes it, any partition reads it, and no damaged checkpoint is taken for a good one."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cpt.checkpoint import portable
from cpt.checkpoint.portable import (
    COMPLETE,
    META,
    STATE_KINDS,
    Checkpoint,
    CheckpointMeta,
    Fragment,
    delete_checkpoint,
    finish_checkpoint,
    latest_complete,
    start_checkpoint,
    write_shard,
)
from cpt.rundir import DataError, step_name

Shapes = dict[str, list[int]]
State = dict[tuple[str, str], torch.Tensor]
SHAPES: Shapes = {"embed.weight": [5, 3], "norm.weight": [3], "odd|name": [1]}


def meta_of(shapes: Shapes, step: int = 7) -> CheckpointMeta:
    return CheckpointMeta(
        step=step,
        tokens_seen=step * 64,
        tokens_by_source={"general": step * 16, "medical": step * 48},
        optimizer_steps=step,
        seed=1,
        plan_fingerprint="0123456789abcdef",
        parameter_shapes=shapes,
        model_config={"model_type": "llama"},
        run_config={"run": {"name": "demo"}},
        written_by={"world_size": 2},
    )


def random_state(shapes: Shapes, seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        (kind, name): torch.randn(prod(shape), generator=generator)
        for kind in STATE_KINDS
        for name, shape in shapes.items()
    }


def fragment(state: State, name: str, start: int, stop: int) -> Fragment:
    return Fragment(name, start, {kind: state[kind, name][start:stop] for kind in STATE_KINDS})


def even_parts(state: State, shapes: Shapes, world_size: int) -> list[list[Fragment]]:
    """By rank, as ZeRO 3 cuts: each parameter into equal parts."""
    parts: list[list[Fragment]] = [[] for _ in range(world_size)]
    for name, shape in shapes.items():
        numel = prod(shape)
        for rank in range(world_size):
            start, stop = numel * rank // world_size, numel * (rank + 1) // world_size
            if stop > start:
                parts[rank].append(fragment(state, name, start, stop))
    return parts


def write(folder: Path, parts: list[list[Fragment]], meta: CheckpointMeta) -> Path:
    start_checkpoint(folder, meta)
    for rank, fragments in enumerate(parts):
        write_shard(folder, fragments, rank=rank, world_size=len(parts))
    finish_checkpoint(folder, meta, world_size=len(parts))
    return folder


@pytest.fixture
def state() -> State:
    return random_state(SHAPES)


@pytest.fixture
def folder(tmp_path: Path, state: State) -> Path:
    return write(tmp_path / "checkpoints" / step_name(7), even_parts(state, SHAPES, 2), meta_of(SHAPES))


def shard(folder: Path, rank: int = 0) -> Path:
    return folder / f"shard_{rank:05d}-of-00002.safetensors"


@st.composite
def partitions(draw: st.DrawFn, shapes: Shapes) -> list[list[tuple[str, int, int]]]:
    """Spans of every parameter, cut anywhere, dealt to any number of ranks in any order."""
    ranks: list[list[tuple[str, int, int]]] = [[] for _ in range(draw(st.integers(1, 4)))]
    spans = []
    for name, shape in shapes.items():
        cuts = sorted({0, prod(shape), *draw(st.lists(st.integers(0, prod(shape)), max_size=4))})
        spans += [(name, start, stop) for start, stop in pairwise(cuts)]
    for span in draw(st.permutations(spans)):
        draw(st.sampled_from(ranks)).append(span)
    return ranks


@st.composite
def rewrites(draw: st.DrawFn) -> tuple[Shapes, list[list[tuple[str, int, int]]], list[list[tuple[str, int, int]]]]:
    dimensions = st.lists(st.integers(1, 6), min_size=0, max_size=3)
    shapes = draw(st.dictionaries(st.sampled_from(["a", "b.c", "d|e", "f g", "ü"]), dimensions, min_size=1, max_size=4))
    return shapes, draw(partitions(shapes)), draw(partitions(shapes))


@settings(deadline=None, max_examples=60)
@given(rewrites())
def test_any_partition_into_fragments_reads_back_what_any_other_wrote(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[Shapes, list[list[tuple[str, int, int]]], list[list[tuple[str, int, int]]]],
) -> None:
    shapes, writers, readers = case
    state, meta = random_state(shapes), meta_of(shapes)
    path = tmp_path_factory.mktemp("any") / step_name(7)
    write(path, [[fragment(state, *span) for span in spans] for spans in writers], meta)
    checkpoint = Checkpoint.open(path)
    assert checkpoint.meta == meta
    empty = {key: torch.full_like(tensor, torch.nan) for key, tensor in state.items()}
    for span in (span for spans in readers for span in spans):
        checkpoint.fill(fragment(empty, *span))  # a view: filling it fills `empty`
    assert all(torch.equal(empty[key], tensor) for key, tensor in state.items())
    for kind in STATE_KINDS:
        for name, tensor in checkpoint.tensors(kind):
            assert list(tensor.shape) == shapes[name] and torch.equal(tensor.flatten(), state[kind, name])


def test_special_values_survive_bit_for_bit(tmp_path: Path) -> None:
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38, torch.pi])
    state = {(kind, "w"): odd.clone() for kind in STATE_KINDS}
    path = write(tmp_path / step_name(1), [[fragment(state, "w", 0, 6)]], meta_of({"w": [6]}))
    (_, read), *_ = Checkpoint.open(path).tensors()
    assert torch.equal(read.view(torch.int32), odd.view(torch.int32))


def test_safetensors_own_loader_reads_a_shard(folder: Path, state: State) -> None:
    tensors = load_file(shard(folder, 0))
    assert torch.equal(tensors["exp_avg|0|embed.weight"], state["exp_avg", "embed.weight"][:7])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_checkpoint_without_its_completion_marker_is_refused_as_cut_short(folder: Path) -> None:
    (folder / COMPLETE).unlink()
    with pytest.raises(
        DataError, match=rf"{folder}: incomplete checkpoint, it has no COMPLETE file; its save was cut short"
    ):
        Checkpoint.open(folder)


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="step_00000009: no such checkpoint folder"):
        Checkpoint.open(tmp_path / step_name(9))


def test_a_truncated_shard_is_refused_with_the_file_and_both_sizes(folder: Path) -> None:
    size = shard(folder, 1).stat().st_size
    with shard(folder, 1).open("r+b") as file:
        file.truncate(size - 5)
    with pytest.raises(DataError, match=rf"{shard(folder, 1)}: COMPLETE promises {size} bytes, found {size - 5}"):
        Checkpoint.open(folder)


def test_a_missing_shard_is_refused_with_the_file_name(folder: Path) -> None:
    shard(folder, 1).unlink()
    with pytest.raises(DataError, match=r"shard_00001-of-00002\.safetensors: COMPLETE promises \d+ bytes, found None"):
        Checkpoint.open(folder)


def replace_file(folder: Path, file: Path, content: bytes) -> None:
    """Put other content in a checkpoint so that its size is the promised one."""
    file.write_bytes(content)
    sizes = json.loads((folder / COMPLETE).read_text()) | {file.name: len(content)}
    (folder / COMPLETE).write_text(json.dumps(sizes))


def test_another_format_version_is_refused_with_both_versions(folder: Path) -> None:
    raw = json.loads((folder / META).read_text()) | {"format_version": 2}
    replace_file(folder, folder / META, json.dumps(raw).encode())
    with pytest.raises(DataError, match=r"meta\.json: format_version is 2, this version of cpt reads 1"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"step": 7, "tok', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b'{"format_version": 1, "step": 7}', "fields .*parameter_shapes.* are missing or unknown"),
    ],
)
def test_a_damaged_meta_file_is_refused_by_name(folder: Path, content: bytes, reason: str) -> None:
    replace_file(folder, folder / META, content)
    with pytest.raises(DataError, match=rf"meta\.json: {reason}"):
        Checkpoint.open(folder)


def test_a_damaged_completion_marker_is_refused_by_name(folder: Path) -> None:
    (folder / COMPLETE).write_text("")  # as after a crash of the machine
    with pytest.raises(DataError, match="COMPLETE: not readable JSON"):
        Checkpoint.open(folder)


def test_a_completion_marker_cannot_point_outside_its_folder(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path / "secret.safetensors"
    shutil.copy(shard(folder), outside)
    sizes = json.loads((folder / COMPLETE).read_text()) | {f"../../{outside.name}": outside.stat().st_size}
    (folder / COMPLETE).write_text(json.dumps(sizes))
    with pytest.raises(DataError, match=rf"{folder / outside.name}: COMPLETE promises"):
        Checkpoint.open(folder)


def test_a_pickle_renamed_to_a_shard_is_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    torch.save({"param|0|embed.weight": torch.zeros(15)}, tmp_path / "weights.pt")
    replace_file(folder, shard(folder), (tmp_path / "weights.pt").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.safetensors: not a readable safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("key", ["model.embed.weight", "param|x|embed.weight", "param|0"])
def test_a_safetensors_file_of_another_program_is_refused_by_name(folder: Path, tmp_path: Path, key: str) -> None:
    save_file({key: torch.zeros(15)}, tmp_path / "other.safetensors")
    replace_file(folder, shard(folder), (tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.safetensors: tensor .* is no fragment"):
        Checkpoint.open(folder)


def test_a_shard_filled_with_noise_is_refused_by_name(folder: Path) -> None:
    replace_file(folder, shard(folder), bytes(range(256)) * 4)
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.safetensors: not a readable safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("name", "start", "numel"), [("other.weight", 0, 4), ("embed.weight", 10, 6), ("norm.weight", 3, 1)]
)
def test_elements_that_the_checkpoint_does_not_hold_are_refused_as_another_models(
    folder: Path, name: str, start: int, numel: int
) -> None:
    wanted = Fragment(name, start, {kind: torch.zeros(numel) for kind in STATE_KINDS})
    with pytest.raises(
        DataError, match=rf"{folder}: elements \d+ to {start + numel} of param {name} are not in it; .*another model"
    ):
        Checkpoint.open(folder).fill(wanted)


def test_a_hole_between_fragments_is_refused_rather_than_filled_with_neighbours(tmp_path: Path, state: State) -> None:
    parts = [[fragment(state, "embed.weight", 0, 4), fragment(state, "embed.weight", 6, 15)]]
    checkpoint = Checkpoint.open(write(tmp_path / step_name(1), parts, meta_of({"embed.weight": [5, 3]})))
    with pytest.raises(DataError, match=r"elements 4 to 15 of param embed\.weight are not in it"):
        list(checkpoint.tensors())


def test_the_newest_complete_checkpoint_is_used_and_every_newer_one_is_accounted_for(
    tmp_path: Path, state: State
) -> None:
    checkpoints = tmp_path / "checkpoints"
    for step in (5, 10, 15, 20):
        write(checkpoints / step_name(step), even_parts(state, SHAPES, 2), meta_of(SHAPES, step))
    (checkpoints / step_name(20) / COMPLETE).unlink()
    shard(checkpoints / step_name(15)).write_bytes(b"cut short")
    checkpoint, skipped = latest_complete(checkpoints)
    assert checkpoint is not None and checkpoint.meta.step == 10
    assert "step_00000020: incomplete" in skipped[0] and "step_00000015/shard_00000" in skipped[1] and len(skipped) == 2


def test_folders_that_only_look_like_checkpoints_are_left_out(tmp_path: Path, state: State) -> None:
    write(tmp_path / step_name(5), even_parts(state, SHAPES, 2), meta_of(SHAPES, 5))
    shutil.copytree(tmp_path / step_name(5), tmp_path / "step_00000009.bak")
    checkpoint, skipped = latest_complete(tmp_path)
    assert checkpoint is not None and checkpoint.path.name == "step_00000005" and skipped == []


def test_no_checkpoint_at_all_is_an_answer_too(tmp_path: Path) -> None:
    assert latest_complete(tmp_path / "checkpoints") == (None, [])


def test_too_little_free_space_is_told_in_numbers_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = replace(meta_of({"w": [2**28]}), step=3)  # 2**28 parameters x 3 values x 4 bytes = 3 GiB
    monkeypatch.setattr(portable.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2**30))
    old = tmp_path / step_name(3)
    old.mkdir()
    (old / "shard").write_text("of an interrupted save of the same step")
    with pytest.raises(OSError, match=r"step_00000003: a checkpoint needs 3\.06 GiB but 2\.00 GiB are free"):
        start_checkpoint(old, meta)
    assert not list(tmp_path.iterdir())  # what an interrupted save had left is gone: its space counts as free


def test_starting_a_checkpoint_clears_what_an_interrupted_save_left(folder: Path) -> None:
    start_checkpoint(folder, meta_of(SHAPES))
    assert list(folder.iterdir()) == []


def test_deletion_takes_the_marker_first_so_that_a_cut_leaves_nothing_that_looks_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(portable.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(folder)
    assert shard(folder).exists()
    with pytest.raises(DataError, match="incomplete"):
        Checkpoint.open(folder)
