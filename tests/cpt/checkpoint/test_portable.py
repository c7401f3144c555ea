"""The portable format: any partition writes it, any partition reads it, and no damaged checkpoint is taken for a good one."""

import contextlib
import json
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cpt.checkpoint import marker, writing
from cpt.checkpoint.marker import (
    COMPLETE,
    META,
    delete_checkpoint,
    is_usable,
    read_marker,
    reduce_to_weights,
    set_aside,
)
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment, latest_complete
from cpt.checkpoint.writing import finish_checkpoint, predicted_bytes, start_checkpoint, write_shard
from cpt.rundir import DataError, step_name

STATE_KINDS = ("param", "exp_avg", "exp_avg_sq")

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
    start_checkpoint(folder, 1000)
    receipts = [write_shard(folder, each, rank=rank, world_size=len(parts)) for rank, each in enumerate(parts)]
    finish_checkpoint(folder, meta, receipts)
    return folder


@pytest.fixture
def state() -> State:
    return random_state(SHAPES)


@pytest.fixture
def folder(tmp_path: Path, state: State) -> Path:
    return write(tmp_path / "checkpoints" / step_name(7), even_parts(state, SHAPES, 2), meta_of(SHAPES))


def shard(folder: Path, rank: int = 0, part: str = "param") -> Path:
    return folder / f"shard_{rank:05d}-of-00002.{part}.safetensors"


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


@settings(deadline=None, max_examples=25)
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
    named = {name: ["exp_avg", "exp_avg_sq"] for name, shape in shapes.items() if prod(shape)}
    assert checkpoint.meta == replace(meta, state_kinds={name: named[name] for name in shapes if name in named})
    assert checkpoint.verify() == []
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
    tensors = load_file(shard(folder, 0)) | load_file(shard(folder, 0, "state"))
    assert torch.equal(tensors["param|0|embed.weight"], state["param", "embed.weight"][:7])
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
    with pytest.raises(
        DataError, match=r"shard_00001-of-00002\.param\.safetensors: COMPLETE promises \d+ bytes, found None"
    ):
        Checkpoint.open(folder)


def promise(folder: Path, **changes: Any) -> None:
    """Rewrite the marker with other promises; None takes one away."""
    promises = json.loads((folder / COMPLETE).read_text()) | changes
    (folder / COMPLETE).write_text(json.dumps({name: facts for name, facts in promises.items() if facts is not None}))


def replace_file(folder: Path, file: Path, content: bytes) -> None:
    """Put other content in a checkpoint so that its size and hash are the promised ones, as an attacker would."""
    file.write_bytes(content)
    promise(folder, **{file.name: {"bytes": len(content), "xxh3_128": marker.content_hash(file)}})


def test_another_format_version_is_refused_with_both_versions(folder: Path) -> None:
    raw = json.loads((folder / META).read_text()) | {"format_version": 3}
    replace_file(folder, folder / META, json.dumps(raw).encode())
    with pytest.raises(
        DataError, match=r"meta\.json: format_version is 3, this version of cpt reads 2; export it with"
    ):
        Checkpoint.open(folder)


def test_a_checkpoint_of_the_first_version_is_refused_by_its_version(folder: Path) -> None:
    sizes = {name: (folder / name).stat().st_size for name in json.loads((folder / COMPLETE).read_text())}
    (folder / COMPLETE).write_text(json.dumps(sizes))  # it promised sizes alone
    with pytest.raises(DataError, match="COMPLETE: format_version is 1, this version of cpt reads 2"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"step": 7, "tok', "not readable JSON"),
        (b"\xff\xfe{}", "not readable JSON"),
        (b"[1, 2]", "must hold a JSON object, found list"),
        (b"[" * 100_000, "not readable JSON"),
        (b'{"format_version": 2, "step": 7}', "fields .*parameter_shapes.* are missing or unknown"),
    ],
)
def test_a_damaged_meta_file_is_refused_by_name(folder: Path, content: bytes, reason: str) -> None:
    replace_file(folder, folder / META, content)
    with pytest.raises(DataError, match=rf"meta\.json: {reason}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parameter_shapes": [1]}, "parameter_shapes must hold lists by name"),
        ({"parameter_shapes": {"w": [-1]}}, "steps, tokens and shapes must be whole numbers from 0"),
        ({"step": "7"}, "steps, tokens and shapes must be whole numbers from 0"),
        ({"state_kinds": {"w": [1]}}, "state_kinds must hold words"),
        ({"recent_steps": {"norm": [[1.0, "2"]]}}, "recent_steps must hold lists of value and weight"),
        ({"recent_steps": {"norm": [[True, 2.0]]}}, "recent_steps must hold lists of value and weight"),
        ({"written_by": []}, "written_by must be a JSON object"),
        ({"tokens_by_source": None}, "tokens_by_source must be a JSON object"),
    ],
)
def test_meta_values_of_another_type_are_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    raw = json.loads((folder / META).read_text()) | changes
    replace_file(folder, folder / META, json.dumps(raw).encode())
    with pytest.raises(DataError, match=rf"meta\.json: {reason}"):
        Checkpoint.open(folder)


def test_meta_that_was_edited_is_refused_at_once(folder: Path) -> None:
    raw = json.loads((folder / META).read_text())
    (folder / META).write_text(json.dumps(raw).replace('"step": 7', '"step": 8'))
    with pytest.raises(
        DataError, match=r"meta\.json: its content is damaged: COMPLETE promises xxh3_128 \w{32}, found"
    ):
        Checkpoint.open(folder)


def test_a_damaged_completion_marker_is_refused_by_name(folder: Path) -> None:
    (folder / COMPLETE).write_text("")  # as after a crash of the machine
    with pytest.raises(DataError, match="COMPLETE: not readable JSON"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        *("../../secret.safetensors", "/etc/passwd", "shard_00000-of-00002.safetensors", "a.pkl"),
        f"shard_00000-of-{'9' * 5000}.param.safetensors",  # more digits than Python turns into a number
    ],
)
def test_a_completion_marker_cannot_promise_what_is_no_file_of_a_checkpoint(folder: Path, name: str) -> None:
    promise(folder, **{name: {"bytes": 1, "xxh3_128": "0" * 32}})
    with pytest.raises(DataError, match=rf"COMPLETE: promises '{name}', which is no file of a checkpoint"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "facts", [{"bytes": 1}, {"bytes": -1, "xxh3_128": "0" * 32}, "12", {"bytes": 1, "xxh3_128": "x"}]
)
def test_a_promise_without_size_or_hash_is_refused(folder: Path, facts: Any) -> None:
    promise(folder, **{META: facts})
    with pytest.raises(DataError, match=r"COMPLETE: says .* of meta\.json, not its bytes and xxh3_128"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shard_00001-of-00002.param.safetensors": None}, "names 4 files of 2 ranks, some are missing or too many"),
        ({"shard_00001-of-00002.state.safetensors": None}, "names 4 files of 2 ranks, some are missing or too many"),
        ({META: None}, "names 4 files of 2 ranks"),
        (
            {
                "shard_00001-of-00002.param.safetensors": None,
                "shard_00002-of-00002.param.safetensors": {"bytes": 8, "xxh3_128": "0" * 32},
            },
            r"does not name \['shard_00001-of-00002\.param\.safetensors'\]",
        ),
        (
            {"shard_00000-of-00001.param.safetensors": {"bytes": 8, "xxh3_128": "0" * 32}},
            "names shards of 2 saves, not of one",
        ),
    ],
)
def test_a_set_of_shards_that_is_not_whole_is_refused(folder: Path, changes: dict[str, Any], reason: str) -> None:
    promise(folder, **changes)
    with pytest.raises(DataError, match=f"COMPLETE: {reason}"):
        Checkpoint.open(folder)


def test_extra_bytes_are_refused_in_the_file_and_between_its_tensors(folder: Path) -> None:
    content = shard(folder).read_bytes()
    shard(folder).write_bytes(content + b"....")
    with pytest.raises(DataError, match=rf"COMPLETE promises {len(content)} bytes, found {len(content) + 4}"):
        Checkpoint.open(folder)
    replace_file(folder, shard(folder), content + b"....")
    with pytest.raises(DataError, match=r"param\.safetensors: not a readable safetensors file"):
        Checkpoint.open(folder)


def test_a_pickle_renamed_to_a_shard_is_refused_and_not_opened(folder: Path, tmp_path: Path) -> None:
    torch.save({"param|0|embed.weight": torch.zeros(15)}, tmp_path / "weights.pt")
    replace_file(folder, shard(folder), (tmp_path / "weights.pt").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.param\.safetensors: not a readable safetensors file"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["optimizer.pt", "model.bin", "a.pkl", "shard_00000-of-00001.param.safetensors"])
def test_weights_and_pickles_that_do_not_belong_into_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match=rf"{name}: COMPLETE promises no such file, .* move it out"):
        Checkpoint.open(folder)


def test_a_note_beside_the_shards_does_no_harm(folder: Path) -> None:
    (folder / "README.md").write_text("the good one")
    (folder / ".nfs0001").write_text("")
    assert Checkpoint.open(folder).verify() == []


@pytest.mark.parametrize(("claimed", "size"), [(2**60, 64), (2**63 + 9, 64), (9, 16), (0, 4)])
def test_a_header_length_beyond_the_file_is_refused_in_numbers(folder: Path, claimed: int, size: int) -> None:
    replace_file(folder, shard(folder), claimed.to_bytes(8, "little")[: min(size, 8)].ljust(size, b" "))
    with pytest.raises(DataError, match=rf"its header claims {claimed} bytes of a file of {size}"):
        Checkpoint.open(folder)


def test_a_header_cut_short_is_refused(folder: Path) -> None:
    content = shard(folder).read_bytes()
    replace_file(folder, shard(folder), content[:60])
    with pytest.raises(DataError, match="its header claims"):
        Checkpoint.open(folder)


def test_shapes_made_up_in_meta_take_no_memory(folder: Path) -> None:
    raw = json.loads((folder / META).read_text())
    raw["parameter_shapes"]["embed.weight"] = [2**40, 2**20]
    replace_file(folder, folder / META, json.dumps(raw).encode())
    with pytest.raises(DataError, match=r"of param embed\.weight are not in it"):
        Checkpoint.open(folder).read("embed.weight")


@pytest.mark.parametrize("key", ["model.embed.weight", "param|x|embed.weight", "param|0"])
def test_a_safetensors_file_of_another_program_is_refused_by_name(folder: Path, tmp_path: Path, key: str) -> None:
    save_file({key: torch.zeros(15)}, tmp_path / "other.safetensors")
    replace_file(folder, shard(folder), (tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.param\.safetensors: tensor .* is no fragment"):
        Checkpoint.open(folder)


def test_a_fragment_that_is_not_fp32_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file({"param|0|embed.weight": torch.zeros(15, dtype=torch.bfloat16)}, tmp_path / "other.safetensors")
    replace_file(folder, shard(folder), (tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"of type BF16 and shape \[15\] is no fragment"):
        Checkpoint.open(folder)


def test_a_shard_filled_with_noise_is_refused_by_name(folder: Path) -> None:
    replace_file(folder, shard(folder), bytes(range(256)) * 4)
    with pytest.raises(DataError, match=r"shard_00000-of-00002\.param\.safetensors: not a readable safetensors file"):
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
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 2**30))
    old = tmp_path / step_name(3)
    old.mkdir()
    (old / "shard").write_text("of an interrupted save of the same step")
    with pytest.raises(
        OSError, match=r"step_00000003: a checkpoint needs 3\.03 GiB but 2\.00 GiB are free; older ones"
    ):
        start_checkpoint(old, 3 * 2**30)
    assert not list(tmp_path.iterdir())  # what an interrupted save had left is gone: its space counts as free


def test_starting_a_checkpoint_clears_what_interrupted_saves_left_and_nothing_else(folder: Path) -> None:
    cut_short, damaged = (folder.parent / step_name(step) for step in (3, 5))
    for left in (cut_short, damaged):
        left.mkdir()
    (damaged / "DAMAGED").write_text("{}")
    (folder.parent / "notes").mkdir()
    start_checkpoint(folder.parent / step_name(9), 1000)
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, step_name(9), damaged.name, "notes"}
    start_checkpoint(folder, 1000)
    assert list(folder.iterdir()) == []


@settings(deadline=None, max_examples=10)
@given(st.integers(1, 5), st.integers(1, 200), st.booleans())
def test_the_predicted_size_is_the_size_on_disk(
    tmp_path_factory: pytest.TempPathFactory, world_size: int, rows: int, muon: bool
) -> None:
    shapes = {"embed.weight": [rows, 7], "norm.weight": [3]}
    state, meta = random_state(shapes), meta_of(shapes)
    parts = even_parts(state, shapes, world_size)
    if muon:
        parts = [
            [Fragment(f.name, f.start, {"param": f.state["param"], "buf": f.state["exp_avg"]}) for f in p]
            for p in parts
        ]
    predicted = sum(predicted_bytes(part, None if rank else meta) for rank, part in enumerate(parts))
    folder = write(tmp_path_factory.mktemp("any") / step_name(7), parts, meta)
    found = sum(path.stat().st_size for path in folder.iterdir())
    small = sum((folder / name).stat().st_size for name in (META, COMPLETE))
    assert abs(predicted - found) <= 0.05 * small  # the shards exactly, the two small files nearly


def test_deletion_takes_the_marker_first_so_that_a_cut_leaves_nothing_that_looks_complete(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(marker.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        delete_checkpoint(folder)
    assert shard(folder).exists()
    with pytest.raises(DataError, match="incomplete"):
        Checkpoint.open(folder)


def muon_fragments() -> list[Fragment]:
    matrix = Fragment("w", 0, {"param": torch.ones(4), "momentum_buffer": torch.full((4,), 2.0)})
    return [
        matrix,
        Fragment("norm", 0, {"param": torch.zeros(2), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}),
    ]


def test_every_parameter_may_have_its_own_kinds_of_state(tmp_path: Path) -> None:
    folder = write(tmp_path / step_name(1), [muon_fragments()], meta_of({"w": [2, 2], "norm": [2]}))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.meta.state_kinds == {"w": ["momentum_buffer"], "norm": ["exp_avg", "exp_avg_sq"]}
    assert checkpoint.kinds["w"] == ("param", "momentum_buffer") and checkpoint.verify() == []
    assert checkpoint.read("w", "momentum_buffer").tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_state_of_another_optimizer_is_refused_by_what_is_there(tmp_path: Path) -> None:
    folder = write(tmp_path / step_name(1), [muon_fragments()], meta_of({"w": [2, 2], "norm": [2]}))
    wanted = Fragment("w", 0, {kind: torch.zeros(4) for kind in STATE_KINDS})
    rule = (
        "holds param, momentum_buffer of w, not exp_avg: it was saved with another optimizer; put train.optimizer back"
    )
    with pytest.raises(DataError, match=rule):
        Checkpoint.open(folder).fill(wanted)


def test_a_checkpoint_reduced_to_weights_still_gives_them_and_refuses_the_rest(folder: Path, state: State) -> None:
    reduce_to_weights(folder)
    assert sorted(path.name for path in folder.iterdir()) == [COMPLETE, META, shard(folder).name, shard(folder, 1).name]
    checkpoint = Checkpoint.open(folder)
    assert not checkpoint.is_full and checkpoint.verify() == []
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor.flatten(), state["param", name])
    with pytest.raises(DataError, match=r"holds weights alone, not exp_avg of norm\.weight; .*model\.init_from"):
        checkpoint.fill(fragment(state, "norm.weight", 0, 3))


@pytest.mark.parametrize("cut_at", range(6))
def test_a_reduction_killed_at_any_moment_leaves_a_checkpoint_and_is_finished_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cut_at: int
) -> None:
    acts = 0

    def killed_at(real: Any) -> Any:
        def act(*arguments: Any, **options: Any) -> Any:
            nonlocal acts
            acts += 1
            if acts > cut_at:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        return act

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", killed_at(os.fsync))
        patch.setattr("os.replace", killed_at(os.replace))
        patch.setattr(Path, "unlink", killed_at(Path.unlink))
        with contextlib.suppress(KeyboardInterrupt):
            reduce_to_weights(folder)
    assert Checkpoint.open(folder).verify() == []
    reduce_to_weights(folder)
    assert not list(folder.glob("*.state.*")) and is_usable(folder)


def test_damaged_content_is_found_by_the_reader_that_the_file_falls_to(folder: Path) -> None:
    for name in [path.name for path in folder.iterdir() if path.name != COMPLETE]:
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(before[:-3] + bytes([before[-3] ^ 1]) + before[-2:])
        if name == META:
            assert not is_usable(folder)
        else:
            checkpoint = Checkpoint.open(folder)
            by_reader = [checkpoint.verify(rank=rank, world_size=3) for rank in range(3)]
            (found,) = [text for texts in by_reader for text in texts]
            assert f"{name}: its content is damaged" in found
        (folder / name).write_bytes(before)
    assert Checkpoint.open(folder).verify() == []


def test_whole_weights_are_read_against_their_hash_without_reading_the_optimizers_state(folder: Path) -> None:
    for part, kind, other in (("state", "param", "exp_avg"), ("param", "exp_avg", "param")):
        content = shard(folder, 1, part).read_bytes()
        shard(folder, 1, part).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        list(Checkpoint.open(folder).tensors(kind))
        with pytest.raises(DataError, match=rf"00001-of-00002\.{part}\.safetensors: its content is damaged"):
            list(Checkpoint.open(folder).tensors(other))
        shard(folder, 1, part).write_bytes(content)


@pytest.mark.parametrize(
    "spans",
    [[("w", 0, 4)], [("w", 0, 6), ("w", 5, 9)], [("w", 0, 9), ("x", 0, 2)]],
    ids=["hole", "overlap", "stranger"],
)
def test_fragments_that_do_not_hold_every_element_once_are_no_sound_checkpoint(
    tmp_path: Path, spans: list[tuple[str, int, int]]
) -> None:
    state = random_state({"w": [9], "x": [2]})
    folder = write(tmp_path / step_name(1), [[fragment(state, *span) for span in spans]], meta_of({"w": [9]}))
    assert any("every element of exp_avg w once" in text or "of x" in text for text in Checkpoint.open(folder).verify())


def test_a_checkpoint_set_aside_as_damaged_is_none_any_more(folder: Path) -> None:
    set_aside(folder)
    with pytest.raises(DataError, match="its content was found to be damaged at an earlier start"):
        read_marker(folder)
    with pytest.raises(DataError, match="none of its checkpoints can be used"):
        latest_complete(folder.parent)


def test_the_newest_full_checkpoint_is_passed_over_for_no_newer_weights(tmp_path: Path, state: State) -> None:
    for step in (5, 10):
        write(tmp_path / step_name(step), even_parts(state, SHAPES, 2), meta_of(SHAPES, step))
    reduce_to_weights(tmp_path / step_name(10))
    checkpoint, skipped = latest_complete(tmp_path)
    assert checkpoint is not None and checkpoint.meta.step == 5 and "holds weights alone" in skipped[0]
