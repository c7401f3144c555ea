"""`build.json`: how far a store, or a part of one, has come; all that a killed job needs to go on.

It is written after every finished segment, atomically. Refused: the file of another version or of another request, a
folder that holds something else.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, get_origin

from cpt.data.token_store import Shard, SplitState, StoreLabel, TokenizerFacts
from cpt.json_fields import check_integer, take_fields, take_list
from cpt.rundir import DataError, write_atomic
from data_tools.folder_lock import LOCK_NAME, differences
from data_tools.tokenizing.request import SPLITS

BUILD_NAME = "build.json"
REJECTS_NAME = "rejects.jsonl"
PARTS_NAME = "parts"
BUILD_VERSION = 2


@dataclass
class Build:
    """The request, the position behind the last finished segment and the shards up to there.

    ``rejected``: bad records by reason; ``rejects_bytes``: how much of rejects.jsonl belongs to finished segments.
    """

    request: dict[str, Any]
    label: dict[str, Any]
    encoder: str = ""
    input_index: int = 0
    record: int = 0
    empty_documents: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    rejects_bytes: int = 0
    finished: bool = False
    splits: dict[str, SplitState] = field(default_factory=lambda: {split: SplitState() for split in SPLITS})

    def save(self, folder: Path) -> None:
        write_atomic(
            folder / BUILD_NAME, json.dumps({"format_version": BUILD_VERSION, **asdict(self)}, indent=1) + "\n"
        )

    def split_label(self, split: str) -> StoreLabel:
        """The label of a split's manifest."""
        raw = self.label | {"split": split, "tokenizer": TokenizerFacts(**self.label["tokenizer"])}
        return StoreLabel(**raw)

    @property
    def stored_bytes(self) -> int:
        """What the finished shards take on disk."""
        tokens = sum(state.tokens for state in self.splits.values())
        documents = sum(state.documents + len(state.shards) for state in self.splits.values())
        return tokens * (2 if self.split_label(SPLITS[0]).dtype == "uint16" else 4) + documents * 8

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """What ``folder`` holds; None where it holds no build.

        Raises:
            DataError: a damaged file, or one of another version.
        """
        file = folder / BUILD_NAME
        if not file.is_file():
            return None
        build = cls(**load_state(file, BUILD_VERSION, cls))
        with _damage_named(file):  # what the rest of the program takes for granted
            build.split_label(SPLITS[0])
            for name in ("inputs", "heldout_fraction"):
                build.request[name]
            for reason, count in build.rejected.items():
                check_integer(f"rejected.{reason}", count, low=0)
        return build


def load_state(file: Path, version: int, kind: Any) -> dict[str, Any]:
    """The values of dataclass ``kind`` from a progress file, its ``splits`` as ``SplitState``.

    Raises:
        DataError: a damaged file, or one of another version.
    """
    with _damage_named(file):
        raw = json.loads(file.read_text(encoding="utf-8"))
        found = raw.pop("format_version", None)
    if found != version:
        raise DataError(f"{file}: format_version is {found!r}, this program writes {version}; fix: use a new folder")
    with _damage_named(file):
        values = take_fields(raw, kind, "the object")
        for entry in fields(kind):
            wanted: Any = get_origin(entry.type) or entry.type
            value = values[entry.name]
            if type(value) is not wanted:
                raise DataError(f"{entry.name} is {value!r:.80}; it must be of the type {wanted.__name__}")
            if wanted is int:
                check_integer(entry.name, value, low=0)
        values["splits"] = {split: _split_state(values["splits"][split], f"splits.{split}") for split in SPLITS}
    return values


def _split_state(raw: object, where: str) -> SplitState:
    state = take_fields(raw, SplitState, where)
    shards = take_list(state["shards"], Shard, f"{where}.shards")
    for shard in shards:
        check_integer(f"{where}.shards: tokens", shard.tokens, low=0)
        check_integer(f"{where}.shards: documents", shard.documents, low=0)
    check_integer(f"{where}.utf8_bytes", state["utf8_bytes"], low=0)
    bytes.fromhex(state["content_hash"])
    return SplitState.from_dict(state)


@contextlib.contextmanager
def _damage_named(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = str(error) if isinstance(error, ValueError) else repr(error)
        raise DataError(f"{file}: damaged ({problem[:200]}); fix: delete the folder and run again") from None


def open_build(folder: Path, fresh: Build) -> Build:
    """``fresh``, or the build found in the folder if it is of the same request."""
    build = Build.load(folder)
    if build is None:
        _require_own(folder)
        return fresh
    if changes := differences(build.request, fresh.request):
        raise DataError(
            f"{folder}: holds the store of another command ({changes}); "
            "fix: --out with a new folder, or delete this one"
        )
    return build


def _require_own(folder: Path) -> None:
    """Only what a build that never finished a segment leaves behind."""
    if (folder / PARTS_NAME).is_dir():
        raise DataError(
            f"{folder}: holds parts made with --task; fix: finish the tasks, then `cpt data merge {folder}`, or --out "
            "with a new folder"
        )
    known = (*SPLITS, LOCK_NAME, REJECTS_NAME)
    foreign = [
        entry.name
        for entry in folder.iterdir()
        if entry.name not in known and not entry.name.startswith(f".{BUILD_NAME}")
    ]
    foreign += [f"{split}/manifest.json" for split in SPLITS if (folder / split / "manifest.json").exists()]
    if foreign:
        raise DataError(f"{folder}: holds {sorted(foreign)[:5]} but no {BUILD_NAME}; fix: --out with a new folder")
