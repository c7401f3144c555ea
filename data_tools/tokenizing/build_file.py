"""`build.json`: how far a store, or a part of one, has come; all that a killed job needs to go on.

It is written after every finished segment, atomically. Refused: the file of another version or of another request, a
folder that holds something else.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from cpt.data.token_store import SplitState, StoreLabel, TokenizerFacts
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
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            version = raw.pop("format_version", None)
        except (ValueError, AttributeError) as error:
            raise DataError(f"{file}: damaged ({error}); fix: delete the folder and tokenize again") from None
        if version != BUILD_VERSION:
            raise DataError(
                f"{file}: format_version is {version!r}, this program writes {BUILD_VERSION}; fix: use a new folder"
            )
        return cls(**raw | {"splits": {name: SplitState.from_dict(state) for name, state in raw["splits"].items()}})


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
