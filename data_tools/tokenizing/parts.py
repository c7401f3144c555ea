"""One store built by many tasks: which inputs a task takes, and one store made of what all of them wrote.

    OUT/parts/00003-of-00016/      a whole store of its own inputs, built and continued like any other
    merge -> OUT/train, OUT/heldout

A task takes consecutive inputs, of about equal size on disk, so that the parts in their order are the documents in the
order of the inputs and the content hash is that of one process over all of them. ``merge`` reads and checks everything,
then renames the shards; a killed merge goes on, because each file is in exactly one of two places.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from cpt.data.token_store import SplitState, SplitWriter, documents_name, tokens_name, verify_shard
from cpt.rundir import DataError
from data_tools.folder_lock import differences, hold_folder
from data_tools.tokenizing.build_file import BUILD_NAME, PARTS_NAME, REJECTS_NAME, Build
from data_tools.tokenizing.request import SPLITS

_NAMES = (tokens_name, documents_name)


def part_folder(out: Path, task: tuple[int, int]) -> Path:
    return out / PARTS_NAME / f"{task[0]:05d}-of-{task[1]:05d}"


def share_of(sizes: Sequence[int], task: tuple[int, int]) -> range:
    """Which inputs a task takes: sizes 5 1 1 5 for two tasks -> 0 1 and 2 3.

    Raises:
        DataError: more tasks than inputs.
    """
    index, tasks = task
    if tasks > len(sizes):
        raise DataError(
            f"--task {index}/{tasks}: there are {len(sizes)} inputs, and a task takes whole ones; fix: at most "
            f"{len(sizes)} tasks, or more and smaller files"
        )
    start = 0
    for turn in range(tasks):
        stop = _end_of_share(sizes, start, tasks - turn)
        if turn == index:
            return range(start, stop)
        start = stop
    raise AssertionError(f"task {index} of {tasks}")


def _end_of_share(sizes: Sequence[int], start: int, tasks_left: int) -> int:
    """Where the share that begins at ``start`` ends, with at least one input left for each later task."""
    last = len(sizes) - (tasks_left - 1)
    goal, taken, stop = sum(sizes[start:]) / tasks_left, sizes[start], start + 1
    while stop < last and (tasks_left == 1 or taken + sizes[stop] / 2 <= goal):
        taken += sizes[stop]
        stop += 1
    return stop


def merge_parts(out: Path) -> Build:
    """Make one store of the finished parts in ``out``, or find it made.

    Raises:
        DataError: parts that are missing, unfinished, damaged or of another request.
    """
    if not out.is_dir():
        raise DataError(f"{out}: no such folder; fix: name the --out of the tasks")
    with hold_folder(out):
        build = Build.load(out)
        if build is None or not build.finished:
            build = _merge(out)
        shutil.rmtree(out / PARTS_NAME, ignore_errors=True)
    return build


def _merge(out: Path) -> Build:
    folders = _part_folders(out)
    parts = [_finished_part(folder) for folder in folders]
    for folder, part in zip(folders[1:], parts[1:], strict=True):
        if changes := differences(parts[0].request, part.request):
            raise DataError(f"{folder}: a part of another command than {folders[0].name} ({changes}); fix: delete one")
    merged = Build(parts[0].request, parts[0].label, parts[0].encoder, input_index=len(parts[0].request["inputs"]))
    for split in SPLITS:
        merged.splits[split] = _check_split(out, split, folders, parts)
    if not any(state.documents for state in merged.splits.values()):
        raise DataError(f"{out}: no document with text in any part; fix: check the files and --text-key")
    for split in SPLITS:
        (out / split).mkdir(exist_ok=True)
        for source, target in _moves(out, split, folders, parts):
            if not target.exists():
                os.replace(source, target)
        SplitWriter(out / split, merged.split_label(split), merged.splits[split]).write_manifest()
    _join_rejects(out, folders, parts, merged)
    merged.finished = True
    merged.save(out)
    return merged


def _part_folders(out: Path) -> list[Path]:
    """All parts, in order."""
    names = sorted(path.name for path in (out / PARTS_NAME).glob("*-of-*"))
    if not names:
        raise DataError(f"{out}: holds no {PARTS_NAME} made with --task; fix: name the --out of the tasks")
    counts = sorted({name.partition("-of-")[2] for name in names})
    if len(counts) > 1:
        raise DataError(
            f"{out / PARTS_NAME}: holds parts of {' and of '.join(str(int(count)) for count in counts)} tasks; "
            "fix: delete those that are not wanted"
        )
    tasks = int(counts[0])
    missing = [f"{i}/{tasks}" for i in range(tasks) if not (part_folder(out, (i, tasks)) / BUILD_NAME).is_file()]
    if missing:
        raise DataError(
            f"{out}: {len(missing)} of {tasks} parts are missing; fix: run --task {', '.join(missing[:10])}"
        )
    return [part_folder(out, (i, tasks)) for i in range(tasks)]


def _finished_part(folder: Path) -> Build:
    part = Build.load(folder)
    if part is None or not part.finished:
        task = "/".join(str(int(number)) for number in folder.name.split("-of-"))
        raise DataError(f"{folder}: this part is unfinished; fix: run --task {task} again, it goes on where it stopped")
    return part


def _shards(split: str, folders: Sequence[Path], parts: Sequence[Build]) -> Iterator[tuple[Path, int, int]]:
    """(folder, number there, number in the merged store) of every shard, in order."""
    number = 0
    for folder, part in zip(folders, parts, strict=True):
        for index in range(len(part.splits[split].shards)):
            yield folder / split, index, number
            number += 1


def _moves(out: Path, split: str, folders: Sequence[Path], parts: Sequence[Build]) -> Iterator[tuple[Path, Path]]:
    for folder, index, number in _shards(split, folders, parts):
        yield from ((folder / name(index), out / split / name(number)) for name in _NAMES)


def _check_split(out: Path, split: str, folders: Sequence[Path], parts: Sequence[Build]) -> SplitState:
    """Read every shard where it is now, compare its hashes, and chain the content hash over all of them."""
    merged = SplitState()
    shards = [shard for part in parts for shard in part.splits[split].shards]
    dtype = parts[0].split_label(split).dtype
    for (folder, index, number), shard in zip(_shards(split, folders, parts), shards, strict=True):
        moved = [(out / split / name(number), folder / name(index)) for name in _NAMES]
        tokens_file, documents_file = (new if new.is_file() else old for new, old in moved)
        try:
            merged.content_hash = verify_shard(tokens_file, documents_file, shard, dtype, merged.content_hash)
        except DataError as error:
            raise DataError(f"{error}; of one part only: delete {folder.parent} and run its task again") from None
        merged.shards.append(shard)
    merged.utf8_bytes = sum(part.splits[split].utf8_bytes for part in parts)
    return merged


def _join_rejects(out: Path, folders: Sequence[Path], parts: Sequence[Build], merged: Build) -> None:
    for part in parts:
        merged.empty_documents += part.empty_documents
        for reason, count in part.rejected.items():
            merged.rejected[reason] = merged.rejected.get(reason, 0) + count
    merged.rejects_bytes = sum(part.rejects_bytes for part in parts)
    if not merged.rejected:
        return
    temporary = out / f".{REJECTS_NAME}"
    with temporary.open("wb") as joined:
        for folder, part in zip(folders, parts, strict=True):
            if part.rejects_bytes:
                with (folder / REJECTS_NAME).open("rb") as file:
                    shutil.copyfileobj(file, joined)
        joined.flush()
        os.fsync(joined.fileno())
    os.replace(temporary, out / REJECTS_NAME)
