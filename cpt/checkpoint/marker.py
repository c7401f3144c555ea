"""What makes a checkpoint folder complete: the marker, the names it may promise, and what is done to whole folders. No
torch.

``COMPLETE`` is JSON, written last: file name -> size in bytes and xxh3_128 of the content. Nothing that it does not
promise is ever read, and it can promise nothing but ``meta.json`` and the shards of one save: a name from outside the
folder, half a set of shards or a file of another size is refused here, before any of them is opened.

A checkpoint is *full*, or *weights-only* after its optimizer state was given up: the same files without the shards of
the part ``state``. ``DAMAGED`` is a marker taken back because the content is not what it promised.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from cpt.rundir import DataError, step_of, write_atomic

FORMAT_VERSION = 2
META, COMPLETE, DAMAGED = "meta.json", "COMPLETE", "DAMAGED"
PARTS = ("param", "state")  # weights, and what the optimizer keeps beside them
HASH_CHUNK = 2**23
_SHARD = re.compile(r"shard_(?P<rank>\d{5,9})-of-(?P<world>\d{5,9})\.(?P<part>param|state)\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{32}")
# What could be taken for weights; other files that somebody laid beside them (notes, listings) do no harm.
_WEIGHT_LIKE = frozenset({".safetensors", ".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt", ".distcp"})


@dataclass(frozen=True)
class FileFacts:
    """What the marker promises of one file."""

    bytes: int
    xxh3_128: str  # 32 hexadecimal digits


def shard_name(rank: int, world_size: int, part: str) -> str:
    return f"shard_{rank:05d}-of-{world_size:05d}.{part}.safetensors"


def is_state_shard(name: str) -> bool:
    match = _SHARD.fullmatch(name)
    return match is not None and match["part"] == "state"


def content_hash(path: Path) -> str:
    """xxh3_128 of a file, read in pieces."""
    digest, buffer = xxhash.xxh3_128(), bytearray(HASH_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return str(digest.hexdigest())


def damage_of(path: Path, facts: FileFacts) -> str | None:
    """What is wrong with the content of a file, or None. Reads all of it."""
    try:
        found = content_hash(path)
    except OSError as error:
        return f"{path}: cannot be read ({error})"
    if found == facts.xxh3_128:
        return None
    return f"{path}: its content is damaged: {COMPLETE} promises xxh3_128 {facts.xxh3_128}, found {found}"


def read_marker(folder: Path) -> dict[str, FileFacts]:
    """The files that ``COMPLETE`` promises, each of them there in its size; reads meta.json, but no tensor.

    Raises:
        DataError: naming the file, what was expected and what was found.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such checkpoint folder")
    marker = folder / COMPLETE
    if (folder / DAMAGED).is_file():
        raise DataError(f"{folder}: its content was found to be damaged at an earlier start; copy the checkpoint again")
    if not marker.is_file():
        raise DataError(f"{folder}: incomplete checkpoint, it has no {COMPLETE} file; its save was cut short")
    files = {name: _facts(marker, name, raw) for name, raw in read_json(marker).items()}
    _check_set(marker, set(files))
    for name, facts in files.items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != facts.bytes:
            fix = "copy the checkpoint again"
            raise DataError(f"{file}: {COMPLETE} promises {facts.bytes} bytes, found {found}; {fix}")
    if damage := damage_of(folder / META, files[META]):
        raise DataError(damage)
    return files


def is_usable(folder: Path) -> bool:
    """Whether every file that the marker promises is there in its size; reads no tensor."""
    try:
        return bool(read_marker(folder))
    except DataError:
        return False


def is_full(files: Mapping[str, FileFacts]) -> bool:
    """Whether the optimizer's state is among the promised files."""
    return any(is_state_shard(name) for name in files)


def check_strangers(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Raises DataError for a file that looks like weights, or a pickle, and is not promised: it belongs elsewhere."""
    for path in sorted(folder.iterdir()):
        left_behind = is_state_shard(path.name) and not is_full(files)  # by a reduction to weights that was cut short
        if path.suffix in _WEIGHT_LIKE and path.name not in files and not left_behind:
            rule = f"{COMPLETE} promises no such file, and none but its own belongs here"
            raise DataError(f"{path}: {rule}; move it out of the checkpoint folder")


def write_marker(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Declare these files, all of them on disk already, a complete checkpoint."""
    write_atomic(folder / COMPLETE, json.dumps({name: asdict(facts) for name, facts in files.items()}, indent=1))
    sync_folder(folder)


def delete_checkpoint(folder: Path) -> None:
    """Remove a checkpoint, marker first: a deletion cut short leaves something that no one takes for complete. Another
    process may be removing it just now: a pilot its older ones, and the planner what no branch waits for.
    """

    def unless_gone(function: object, path: str, raised: tuple[object, BaseException, object]) -> None:
        if not isinstance(raised[1], FileNotFoundError):
            raise raised[1]

    (folder / COMPLETE).unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder, onerror=unless_gone)


def reduce_to_weights(folder: Path) -> None:
    """Give up the optimizer's state. Cut short at any moment, what is left is a full checkpoint, or a weights-only one
    with files to sweep up; calling it again sweeps.
    """
    files = {name: facts for name, facts in read_marker(folder).items() if not is_state_shard(name)}
    write_marker(folder, files)
    for path in folder.iterdir():
        if is_state_shard(path.name):
            path.unlink()


def set_aside(folder: Path) -> None:
    """Take the marker back from a checkpoint whose content is damaged, so that it no longer counts as one."""
    (folder / COMPLETE).replace(folder / DAMAGED)


def clear_unfinished(checkpoints: Path) -> None:
    """Remove what saves and deletions that were cut short left behind; call it while no save is under way."""
    for folder in checkpoints.glob("step_*"):
        known = (folder / COMPLETE).exists() or (folder / DAMAGED).exists()
        if folder.is_dir() and step_of(folder) is not None and not known:
            delete_checkpoint(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, as fsync of a file does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Raises DataError: not readable, or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not readable JSON ({error}); copy the checkpoint again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object, found {type(content).__name__}")
    return content


def wrong_version(path: Path, found: object) -> DataError:
    rule = f"format_version is {found!r}, this version of cpt reads {FORMAT_VERSION}"
    return DataError(f"{path}: {rule}; export it with the version that wrote it and start from that (model.init_from)")


def _facts(marker: Path, name: str, raw: object) -> FileFacts:
    if isinstance(raw, int):  # sizes alone
        raise wrong_version(marker, 1)
    if name != META and not _SHARD.fullmatch(name):
        raise DataError(f"{marker}: promises {name!r}, which is no file of a checkpoint; copy the checkpoint again")
    if isinstance(raw, dict) and raw.keys() == {"bytes", "xxh3_128"}:
        size, digest = raw["bytes"], raw["xxh3_128"]
        if type(size) is int and size >= 0 and isinstance(digest, str) and _DIGEST.fullmatch(digest):
            return FileFacts(size, digest)
    raise DataError(f"{marker}: says {raw!r} of {name}, not its bytes and xxh3_128; copy the checkpoint again")


def _check_set(marker: Path, names: set[str]) -> None:
    """The files of one save: meta.json, the weights of every rank, and the state of every rank or of none."""
    worlds = {int(match["world"]) for name in names if (match := _SHARD.fullmatch(name))}
    if len(worlds) != 1:
        raise DataError(f"{marker}: names shards of {len(worlds)} saves, not of one; copy the checkpoint again")
    (world_size,) = worlds
    parts = PARTS if any(is_state_shard(name) for name in names) else PARTS[:1]
    if len(names) != 1 + world_size * len(parts):  # before a set is built of a size that somebody made up
        raise DataError(f"{marker}: names {len(names)} files of {world_size} ranks, some are missing or too many")
    expected = {META} | {shard_name(rank, world_size, part) for rank in range(world_size) for part in parts}
    if names != expected:
        rule = f"does not name {sorted(expected - names)}"
        raise DataError(f"{marker}: {rule}; copy the checkpoint again")
