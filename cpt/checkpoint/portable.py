"""The one checkpoint format: the training state as fragments of named parameters, independent of ZeRO stage and world
size.

A checkpoint folder holds

    meta.json                       step, tokens per source, parameter shapes, model and run configuration
    shard_00000-of-00002.safetensors    the fragments that one rank wrote
    COMPLETE                        size of every file above; written last, so its absence means "cut short"

A fragment is elements [start, stop) of a flattened parameter, stored in fp32 under the key ``kind|start|name`` where
kind is param, exp_avg or exp_avg_sq. Two ranks of ZeRO 2 may hold elements [0, 70) and [70, 100) of one 10 x 10
weight; a reader with three ranks of ZeRO 3 that needs [34, 68) takes them from the first shard. There is no RNG
state: randomness in a step is a hash of (seed, step, rank). No pickle is written or read.
"""

import json
import os
import re
import shutil
import struct
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cpt.rundir import DataError, step_of, write_atomic

FORMAT_VERSION = 1
STATE_KINDS = ("param", "exp_avg", "exp_avg_sq")
META, COMPLETE = "meta.json", "COMPLETE"
_KEY = re.compile(r"(?P<kind>\w+)\|(?P<start>\d+)\|(?P<name>.+)", re.DOTALL)


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + numel)`` of the flattened parameter ``name``: fp32 1-D tensors of one length, by
    state kind.
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
    format_version: int = FORMAT_VERSION


def predicted_bytes(meta: CheckpointMeta) -> int:
    """Size of the tensors on disk: three fp32 values per parameter."""
    return 4 * len(STATE_KINDS) * sum(prod(shape) for shape in meta.parameter_shapes.values())


def start_checkpoint(folder: Path, meta: CheckpointMeta) -> None:
    """Make room for a checkpoint: remove what an interrupted save left under this name, then check the free space.

    Raises:
        OSError: not enough space; nothing was written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    delete_checkpoint(folder)
    needed, free = int(predicted_bytes(meta) * 1.02) + 2**20, shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OSError(f"{folder}: a checkpoint needs {needed / 2**30:.2f} GiB but {free / 2**30:.2f} GiB are free")
    folder.mkdir()


def write_shard(folder: Path, fragments: Iterable[Fragment], *, rank: int, world_size: int) -> None:
    """Write one rank's fragments, tensor by tensor, and flush them to disk."""
    held = list(fragments)
    header: dict[str, Any] = {}
    offset = 0
    for fragment in held:
        for kind in STATE_KINDS:
            end = offset + 4 * fragment.numel
            key = f"{kind}|{fragment.start}|{fragment.name}"
            header[key] = {"dtype": "F32", "shape": [fragment.numel], "data_offsets": [offset, end]}
            offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants the tensors aligned
    with (folder / _shard_name(rank, world_size)).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for fragment in held:
            for kind in STATE_KINDS:
                file.write(fragment.state[kind].detach().float().cpu().contiguous().numpy().data)
        file.flush()
        os.fsync(file.fileno())


def finish_checkpoint(folder: Path, meta: CheckpointMeta, *, world_size: int) -> None:
    """Declare the checkpoint complete, once every rank's shard is on disk."""
    write_atomic(folder / META, json.dumps(asdict(meta)))
    names = [META, *(_shard_name(rank, world_size) for rank in range(world_size))]
    sizes = {name: (folder / name).stat().st_size for name in names}
    write_atomic(folder / COMPLETE, json.dumps(sizes, indent=1))


def _shard_name(rank: int, world_size: int) -> str:
    return f"shard_{rank:05d}-of-{world_size:05d}.safetensors"


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, marker first: a deletion cut short leaves something that no one takes for complete."""
    (folder / COMPLETE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)


class Checkpoint:
    """A complete checkpoint, read lazily."""

    def __init__(self, path: Path, meta: CheckpointMeta, shards: list[Path]) -> None:
        self.path = path
        self.meta = meta
        self._files = ExitStack()
        # (kind, name) -> fragments as (start, stop, open shard, key), in order of start
        self._index: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        for shard in shards:
            self._add_shard(shard)
        for entries in self._index.values():
            entries.sort(key=lambda entry: entry[:2])

    @classmethod
    def open(cls, path: Path) -> "Checkpoint":
        """Open and check completeness: marker, version and the size of every file.

        Raises:
            DataError: naming the file, what was expected and what was found.
        """
        files = _promised_files(path)
        meta = _read_meta(path / META)
        return cls(path, meta, [file for file in files if file.name != META])

    def fill(self, fragment: Fragment) -> None:
        """Copy the stored state into the tensors of ``fragment``, from as many stored fragments as it takes.

        Raises:
            DataError: the checkpoint does not hold these elements: it belongs to another model.
        """
        for kind, target in fragment.state.items():
            self._read_into(target, kind=kind, name=fragment.name, start=fragment.start)

    def tensors(self, kind: str = "param") -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter's fp32 state of one kind, whole and in its own shape."""
        for name, shape in self.meta.parameter_shapes.items():
            flat = torch.empty(prod(shape))
            self._read_into(flat, kind=kind, name=name, start=0)
            yield name, flat.view(shape)

    def _add_shard(self, shard: Path) -> None:
        try:
            file = self._files.enter_context(safe_open(shard, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{shard}: not a readable safetensors file ({error}); copy the checkpoint again") from None
        for key in file.keys():  # noqa: SIM118 - an open safetensors file is no mapping
            match, shape = _KEY.fullmatch(key), file.get_slice(key).get_shape()
            if match is None or len(shape) != 1:
                raise DataError(
                    f"{shard}: tensor {key} of shape {shape} is no fragment; was it written by another program?"
                )
            start, stop = int(match["start"]), int(match["start"]) + shape[0]
            self._index.setdefault((match["kind"], match["name"]), []).append((start, stop, file, key))

    def _read_into(self, target: torch.Tensor, *, kind: str, name: str, start: int) -> None:
        entries = self._index.get((kind, name), [])
        position, stop = start, start + target.numel()
        at = max(0, bisect_right(entries, start, key=lambda entry: entry[0]) - 1)
        while position < stop:
            if at >= len(entries) or not entries[at][0] <= position < entries[at][1]:
                rule = f"elements {position} to {stop} of {kind} {name} are not in it"
                raise DataError(f"{self.path}: {rule}; is it a checkpoint of another model?")
            first, last, file, key = entries[at]
            until = min(last, stop)
            piece = file.get_slice(key)[position - first : until - first]
            target[position - start : until - start].copy_(piece)
            position, at = until, at + 1


def is_usable(path: Path) -> bool:
    """Whether every file that the marker promises is there in its size; reads no tensor."""
    try:
        return bool(_promised_files(path))
    except DataError:
        return False


def _promised_files(path: Path) -> list[Path]:
    if not path.is_dir():
        raise DataError(f"{path}: no such checkpoint folder")
    marker = path / COMPLETE
    if not marker.is_file():
        raise DataError(f"{path}: incomplete checkpoint, it has no {COMPLETE} file; its save was cut short")
    files = []
    for name, expected in _read_json(marker).items():
        file = path / Path(name).name
        found = file.stat().st_size if file.is_file() else None
        if found != expected:
            raise DataError(f"{file}: {COMPLETE} promises {expected} bytes, found {found}; copy the checkpoint again")
        files.append(file)
    return files


def _read_meta(path: Path) -> CheckpointMeta:
    raw = _read_json(path)
    if raw.get("format_version") != FORMAT_VERSION:
        found = raw.get("format_version")
        raise DataError(f"{path}: format_version is {found!r}, this version of cpt reads {FORMAT_VERSION}")
    expected = {field.name for field in fields(CheckpointMeta)}
    if missing := sorted(expected ^ set(raw)):
        raise DataError(f"{path}: fields {missing} are missing or unknown")
    return CheckpointMeta(**raw)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def latest_complete(checkpoints: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be opened, and why each newer one cannot; None where no save was ever completed.

    Raises:
        DataError: saves were completed, but all of them are damaged now. Going back to step 0 is not for us to decide.
    """
    skipped: list[str] = []
    folders = [folder for folder in checkpoints.glob("step_*") if step_of(folder) is not None]
    for folder in sorted(folders, reverse=True):
        try:
            return Checkpoint.open(folder), skipped
        except DataError as error:
            skipped.append(str(error))
    if any((folder / COMPLETE).is_file() for folder in folders):
        reasons = "\n  ".join(skipped)
        fix = "restore one from a copy, or start a new run"
        raise DataError(f"{checkpoints}: none of its checkpoints can be used; {fix}:\n  {reasons}")
    return None, skipped
