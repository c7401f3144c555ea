"""The one checkpoint format: the training state as fragments of named parameters, independent of ZeRO stage and world
size. This file reads it; ``writing.py`` writes it, ``marker.py`` says what is complete.

A checkpoint folder holds

    meta.json                                 step, tokens per source, parameter shapes, model and run configuration
    shard_00000-of-00002.param.safetensors    the weights that one rank wrote, as fragments
    shard_00000-of-00002.state.safetensors    its optimizer state; absent from a weights-only checkpoint
    COMPLETE                                  size and hash of every file above; written last

A fragment is elements [start, stop) of a flattened parameter, stored in fp32 under the key ``kind|start|name`` where
kind is ``param`` or whatever the optimizer keeps of that parameter: exp_avg and exp_avg_sq (AdamW), momentum_buffer
(Muon's matrices). Two ranks of ZeRO 2 may hold elements [0, 70) and [70, 100) of one 10 x 10 weight; a reader with
three ranks of ZeRO 3 that needs [34, 68) takes them from the first shard. There is no RNG state: randomness in a step
is a hash of (seed, step, rank). No pickle is written or read.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpt.checkpoint.marker import (
    COMPLETE,
    DAMAGED,
    FORMAT_VERSION,
    META,
    FileFacts,
    check_strangers,
    damage_of,
    is_full,
    is_state_shard,
    read_json,
    read_marker,
    wrong_version,
)
from cpt.rundir import DataError, step_of

_KEY = re.compile(r"(?P<kind>\w+)\|(?P<start>\d{1,18})\|(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of the flattened parameter ``name``: fp32 1-D tensors of one length, by
    state kind; ``param`` is always one of them.
    """

    name: str
    start: int
    state: Mapping[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.state["param"].numel()


@dataclass(frozen=True)
class CheckpointMeta:
    """What is known of a checkpoint without reading a tensor."""

    step: int
    tokens_seen: int
    tokens_by_source: dict[str, int]
    optimizer_steps: int
    seed: int
    plan_fingerprint: str
    parameter_shapes: dict[str, list[int]]
    model_config: dict[str, Any]
    run_config: dict[str, Any]
    written_by: dict[str, Any]  # world size, ZeRO stage, versions: for people, never needed to read
    state_kinds: dict[str, list[str]] = field(
        default_factory=dict
    )  # by parameter, beside "param"; the writer's to fill
    recent_steps: dict[str, list[tuple[float, float]]] = field(
        default_factory=dict
    )  # by series of the guard: (value, weight) of accepted steps; missing in checkpoints of earlier versions
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class _Entry:
    """A stored fragment: elements [start, stop), under ``key`` of the open safetensors file ``shard``."""

    start: int
    stop: int
    shard: Any
    key: str


class Checkpoint:
    """A complete checkpoint, read lazily.

    ``files`` is what its marker promises, ``kinds`` what its shards hold of each parameter ("param" included).
    """

    def __init__(self, path: Path, meta: CheckpointMeta, files: Mapping[str, FileFacts]) -> None:
        self.path = path
        self.meta = meta
        self.files = files
        self._open_files = ExitStack()
        self._index: dict[tuple[str, str], list[_Entry]] = {}  # by (kind, name), in order of start
        for name in files:
            if name != META:
                self._add_shard(path / name)
        for entries in self._index.values():
            entries.sort(key=lambda entry: (entry.start, entry.stop))
        self.kinds: dict[str, tuple[str, ...]] = {}
        for kind, name in self._index:
            self.kinds[name] = (*self.kinds.get(name, ()), kind)

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open and check all that can be checked without reading a tensor: marker, sizes, version, safetensors headers,
        and that no other weights or pickles lie beside them.

        Raises:
            DataError: naming the file, what was expected and what was found.
        """
        files = read_marker(path)
        check_strangers(path, files)
        return cls(path, _read_meta(path / META), files)

    @property
    def is_full(self) -> bool:
        """Holds the optimizer's state too, so that a run can go on from it."""
        return is_full(self.files)

    def fill(self, fragment: Fragment) -> None:
        """Copy the stored state into the tensors of ``fragment``, from as many stored fragments as it takes.

        Raises:
            DataError: the checkpoint does not hold it: it is of another model or optimizer, or holds weights alone.
        """
        for kind, target in fragment.state.items():
            self._read_into(target, kind=kind, name=fragment.name, start=fragment.start)

    def read(self, name: str, kind: str = "param") -> torch.Tensor:
        """One parameter's fp32 state of one kind, whole and in its own shape.

        Raises:
            DataError: there is no such parameter, or not all of its state of this kind.
        """
        shape, entries = self.meta.parameter_shapes.get(name), self._index.get((kind, name), [])
        if shape is None:
            raise self._absent(kind, name, 0, 0)
        if prod(shape) and not (entries and entries[-1].stop == prod(shape)):
            raise self._absent(kind, name, 0, prod(shape))  # before memory is taken for a made-up shape
        flat = torch.empty(prod(shape))
        self._read_into(flat, kind=kind, name=name, start=0)
        return flat.view(shape)

    def tensors(self, kind: str = "param") -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's fp32 state of one kind, whole and in its own shape; the files are read against their hashes
        first.

        Raises:
            DataError: a file is damaged, or a parameter has no such state.
        """
        for file, facts in self.files.items():
            if (
                file != META
                and is_state_shard(file) != (kind == "param")
                and (damage := damage_of(self.path / file, facts))
            ):
                raise DataError(f"{damage}; copy the checkpoint again")
        for name in self.meta.parameter_shapes:
            yield name, self.read(name, kind)

    def verify(self, *, rank: int = 0, world_size: int = 1) -> list[str]:
        """Read files against their hashes, those of one reader of ``world_size``; returns what is wrong with them.

        The first reader also checks that the fragments cover every parameter exactly once. No collective call.
        """
        by_size = sorted(self.files, key=lambda name: (-self.files[name].bytes, name))
        found = [damage_of(self.path / name, self.files[name]) for name in by_size[rank::world_size]]
        return [text for text in found if text] + (self._gaps() if rank == 0 else [])

    def _add_shard(self, shard: Path) -> None:
        for key, numel, file in _stored(shard, self._open_files):
            match = _KEY.fullmatch(key)
            if match is None:
                raise DataError(f"{shard}: tensor {key} is no fragment; was it written by another program?")
            entry = _Entry(int(match["start"]), int(match["start"]) + numel, file, key)
            if numel:
                self._index.setdefault((match["kind"], match["name"]), []).append(entry)

    def _gaps(self) -> list[str]:
        """Where fragments leave elements out, overlap, or are of unknown parameters."""
        shapes, problems = self.meta.parameter_shapes, []
        for name in sorted(shapes.keys() | self.kinds.keys()):
            wanted = {"param", *(self.meta.state_kinds.get(name, []) if self.is_full else [])}
            if name not in shapes or (held := set(self.kinds.get(name, ()))) - wanted:
                problems.append(f"{self.path}: {META} does not mention all that its shards hold of {name}")
                continue
            for kind in sorted(wanted if prod(shapes[name]) else held):
                spans = [(entry.start, entry.stop) for entry in self._index.get((kind, name), [])]
                ends = [0, *(stop for _, stop in spans)]
                if [start for start, _ in spans] + [prod(shapes[name])] != ends:
                    problems.append(f"{self.path}: its fragments do not hold every element of {kind} {name} once")
        return problems

    def _read_into(self, target: torch.Tensor, *, kind: str, name: str, start: int) -> None:
        entries = self._index.get((kind, name), [])
        position, stop = start, start + target.numel()
        at = max(0, bisect_right(entries, start, key=lambda entry: entry.start) - 1)
        while position < stop:
            if at >= len(entries) or not entries[at].start <= position < entries[at].stop:
                raise self._absent(kind, name, position, stop)
            entry = entries[at]
            until = min(entry.stop, stop)
            piece = entry.shard.get_slice(entry.key)[position - entry.start : until - entry.start]
            target[position - start : until - start].copy_(piece)
            position, at = until, at + 1

    def _absent(self, kind: str, name: str, position: int, stop: int) -> DataError:
        held = self.kinds.get(name, ())
        if "param" in held and kind not in held:
            if not self.is_full:
                rule = f"holds weights alone, not {kind} of {name}"
                return DataError(f"{self.path}: {rule}; a run cannot go on from it, but start from it: model.init_from")
            rule = f"holds {', '.join(held)} of {name}, not {kind}: it was saved with another optimizer"
            return DataError(f"{self.path}: {rule}; put train.optimizer back, or start a new run with model.init_from")
        rule = f"elements {position} to {stop} of {kind} {name} are not in it"
        return DataError(f"{self.path}: {rule}; is it a checkpoint of another model?")


def _stored(shard: Path, open_files: ExitStack) -> Iterator[tuple[str, int, Any]]:
    """(key, elements, open file) of every tensor in a shard, each of them fp32 and one-dimensional."""
    try:
        _check_header_length(shard)
        file = open_files.enter_context(safe_open(shard, framework="pt"))
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(f"{shard}: not a readable safetensors file ({error}); copy the checkpoint again") from None
    for key in file.keys():  # noqa: SIM118 - an open safetensors file is no mapping
        held = file.get_slice(key)
        shape, dtype = held.get_shape(), held.get_dtype()
        if len(shape) != 1 or dtype != "F32":
            rule = f"tensor {key} of type {dtype} and shape {shape} is no fragment"
            raise DataError(f"{shard}: {rule}; was it written by another program?")
        yield key, shape[0], file


def _check_header_length(shard: Path) -> None:
    """Raises ValueError: said here in numbers, rather than left to how a library treats a length of 2**60."""
    size = shard.stat().st_size
    with shard.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if size < 8 or claimed > size - 8:
        raise ValueError(f"its header claims {claimed} bytes of a file of {size}")


def _read_meta(path: Path) -> CheckpointMeta:
    raw = read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        raise wrong_version(path, raw.get("format_version"))
    known = {entry.name for entry in fields(CheckpointMeta)}
    if missing := sorted(known ^ {*raw, "recent_steps"}):
        raise DataError(f"{path}: fields {missing} are missing or unknown")
    meta = CheckpointMeta(**raw)
    for name in ("tokens_by_source", "model_config", "run_config", "written_by"):
        if not isinstance(raw[name], dict):
            raise DataError(f"{path}: {name} must be a JSON object; copy the checkpoint again")
    numbers = [meta.step, meta.tokens_seen, meta.optimizer_steps]
    shapes = [size for shape in _lists(path, "parameter_shapes", meta.parameter_shapes) for size in shape]
    if any(type(number) is not int or number < 0 for number in numbers + shapes):
        raise DataError(f"{path}: steps, tokens and shapes must be whole numbers from 0; copy the checkpoint again")
    if any(not isinstance(kind, str) for kinds in _lists(path, "state_kinds", meta.state_kinds) for kind in kinds):
        raise DataError(f"{path}: state_kinds must hold words; copy the checkpoint again")
    entries = [entry for held in _lists(path, "recent_steps", meta.recent_steps) for entry in held]
    if not all(isinstance(entry, list) and [type(part) for part in entry] == [float, float] for entry in entries):
        raise DataError(f"{path}: recent_steps must hold lists of value and weight; copy the checkpoint again")
    return meta


def _lists(path: Path, name: str, value: object) -> list[list[Any]]:
    if isinstance(value, dict) and all(isinstance(entry, list) for entry in value.values()):
        return list(value.values())
    raise DataError(f"{path}: {name} must hold lists by name; copy the checkpoint again")


def step_folders(checkpoints: Path) -> list[Path]:
    """Folders named like checkpoints, newest first."""
    folders = (path for path in checkpoints.glob("step_*") if step_of(path) is not None and path.is_dir())
    return sorted(folders, reverse=True)


def latest_complete(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest full checkpoint that can be opened, and why each newer one cannot; None where no save was ever
    completed.

    Reads no tensor: ``agreed.newest_good`` also reads the content, by all ranks together.

    Raises:
        DataError: saves were completed, but none can be used now. Going back to step 0 is not for us to decide.
    """
    skipped: list[str] = []
    folders = step_folders(checkpoints)
    for folder in folders:
        try:
            return open_full(folder), skipped
        except DataError as error:
            skipped.append(str(error))
    if any(was_completed(folder) for folder in folders):
        raise none_usable(checkpoints, skipped)
    return None, skipped


def open_full(folder: Path) -> Checkpoint:
    """Raises DataError: it cannot be opened, or a run cannot go on from it."""
    checkpoint = Checkpoint.open(folder)
    if not checkpoint.is_full:
        raise DataError(
            f"{folder}: holds weights alone; a run cannot go on from it, but start from it: model.init_from"
        )
    return checkpoint


def was_completed(folder: Path) -> bool:
    """Whether a save ever finished here, whatever became of it."""
    return (folder / COMPLETE).is_file() or (folder / DAMAGED).is_file()


def none_usable(checkpoints: Path, reasons: list[str]) -> DataError:
    fix = "restore one from a copy, or start a new run"
    return DataError(f"{checkpoints}: none of its checkpoints can be used; {fix}:\n  " + "\n  ".join(reasons))
