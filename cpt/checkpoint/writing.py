"""The writing side of the checkpoint format: make room, write shards one by one, declare them complete.

Owns sizes and the order of writes: shards with their hash (computed while they are written, never by a second read),
then ``meta.json``, then the marker. Refuses to start where the space is short. Who writes when, and how ranks agree,
is ``background.py``'s.
"""

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import xxhash

from cpt.checkpoint.marker import (
    HASH_CHUNK,
    META,
    PARTS,
    FileFacts,
    clear_unfinished,
    delete_checkpoint,
    shard_name,
    sync_folder,
    write_marker,
)
from cpt.checkpoint.portable import CheckpointMeta, Fragment
from cpt.rundir import write_atomic

_PER_FILE = 110  # bytes of one line in the marker
_MARGIN = 2**20  # folders, temporary files


@dataclass(frozen=True)
class Receipt:
    """What one rank wrote: its files, and the kinds of optimizer state by parameter."""

    files: dict[str, FileFacts]
    kinds: dict[str, list[str]]


def predicted_bytes(fragments: Sequence[Fragment], meta: CheckpointMeta | None = None) -> int:
    """Size on disk of one rank's shards, headers included and exact; with ``meta`` also of meta.json and the marker's
    lines.
    """
    size = 0
    for part in PARTS:
        header, tensors = _header(fragments, part), 4 * sum(tensor.numel() for _, tensor in _entries(fragments, part))
        size += len(header) + tensors + _PER_FILE
    if meta is not None:
        kinds = next((list(_others(fragment)) for fragment in fragments), [])
        whole = replace(meta, state_kinds=dict.fromkeys(meta.parameter_shapes, kinds))
        size += len(json.dumps(asdict(whole))) + _PER_FILE
    return size


def start_checkpoint(folder: Path, num_bytes: int) -> None:
    """Make room for a checkpoint of ``num_bytes``: remove what interrupted saves left, then check the free space.

    Older checkpoints that retention will give up do not count as space: they go only once this one is complete.

    Raises:
        OSError: not enough space; nothing was written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_unfinished(folder.parent)
    delete_checkpoint(folder)
    needed, free = int(num_bytes * 1.01) + _MARGIN, shutil.disk_usage(folder.parent).free
    if free < needed:
        rule = f"a checkpoint needs {_size(needed)} but {_size(free)} are free"
        raise OSError(f"{folder}: {rule}; older ones are given up only after it is complete")
    folder.mkdir()


def write_shard(
    folder: Path, fragments: Sequence[Fragment], *, rank: int, world_size: int, parts: Sequence[str] = PARTS
) -> Receipt:
    """Write one rank's fragments, tensor by tensor, and flush them to disk. ``parts``: weights alone are ("param",)."""
    files = {}
    for part in parts:
        name = shard_name(rank, world_size, part)
        files[name] = _write_file(folder / name, fragments, part)
    kinds = {fragment.name: list(_others(fragment)) for fragment in fragments} if "state" in parts else {}
    return Receipt(files, kinds)


def finish_checkpoint(folder: Path, meta: CheckpointMeta, receipts: Iterable[Receipt]) -> int:
    """Declare the checkpoint complete, once every rank's shards are on disk; returns its size in bytes."""
    files: dict[str, FileFacts] = {}
    kinds: dict[str, list[str]] = {}
    for receipt in receipts:
        files |= receipt.files
        kinds |= receipt.kinds
    ordered = {name: kinds[name] for name in meta.parameter_shapes if name in kinds}
    content = json.dumps(asdict(replace(meta, state_kinds=ordered))).encode()
    write_atomic(folder / META, content)
    promised = {META: FileFacts(len(content), xxhash.xxh3_128(content).hexdigest()), **dict(sorted(files.items()))}
    sync_folder(folder)  # the files' names must be on disk before the marker's
    write_marker(folder, promised)
    sync_folder(folder.parent)
    return sum(facts.bytes for facts in promised.values())


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _others(fragment: Fragment) -> Iterator[str]:
    return (kind for kind in fragment.state if kind != "param")


def _entries(fragments: Iterable[Fragment], part: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(key, tensor) of one part, in the order of the file."""
    for fragment in fragments:
        for kind in ("param",) if part == "param" else _others(fragment):
            yield f"{kind}|{fragment.start}|{fragment.name}", fragment.state[kind]


def _header(fragments: Iterable[Fragment], part: str) -> bytes:
    """The safetensors header: its length in 8 bytes, then JSON padded so that the tensors are aligned."""
    header: dict[str, Any] = {}
    offset = 0
    for key, tensor in _entries(fragments, part):
        end = offset + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def _write_file(path: Path, fragments: Sequence[Fragment], part: str) -> FileFacts:
    digest, size = xxhash.xxh3_128(), 0
    with path.open("wb") as file:
        size += _put(file, digest, np.frombuffer(_header(fragments, part), np.uint8))
        for _, tensor in _entries(fragments, part):
            size += _put(file, digest, tensor.detach().float().cpu().contiguous().numpy().view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
    return FileFacts(size, digest.hexdigest())


def _put(file: IO[bytes], digest: Any, content: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """In pieces, so that what was hashed is still in the processor's cache when it is written."""
    for start in range(0, len(content), HASH_CHUNK):
        piece = content[start : start + HASH_CHUNK].data
        digest.update(piece)
        file.write(piece)
    return len(content)
