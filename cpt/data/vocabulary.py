"""How an extended tokenizer grew out of another: ``extension.json`` beside it, enough to make a model's new rows.

Old ids keep their numbers; the new ones follow. Each new token names the old ids it stands in the place of, so that
whoever holds the weights needs no tokenizer library. Refuses a file of another format or with ids that cannot be.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from cpt.rundir import DataError, write_atomic

NAME = "extension.json"
_FORMAT = 1


@dataclass(frozen=True)
class VocabularyExtension:
    """``subtokens[i]``: the old ids in the place of which token ``base_vocab_size + i`` stands."""

    base_name: str
    base_fingerprint: str
    fingerprint: str  # of the extended tokenizer
    base_vocab_size: int  # old ids end here, so new ones start here
    subtokens: tuple[tuple[int, ...], ...]

    @property
    def vocab_size(self) -> int:
        return self.base_vocab_size + len(self.subtokens)


def write_extension(folder: Path, extension: VocabularyExtension) -> None:
    write_atomic(folder / NAME, json.dumps({"format": _FORMAT, **asdict(extension)}) + "\n")


def read_extension(tokenizer: Path) -> VocabularyExtension | None:
    """Of a tokenizer folder, or the folder that a tokenizer file lies in; None for a tokenizer that was not extended.

    Raises:
        DataError: the file is damaged, of another format, or names ids that cannot be.
    """
    file = (tokenizer if tokenizer.is_dir() else tokenizer.parent) / NAME
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content.pop("format") != _FORMAT:
            raise DataError(f"{file}: written by another version; fix: extend the tokenizer again")
        rows = tuple(tuple(int(part) for part in parts) for parts in content.pop("subtokens"))
        extension = VocabularyExtension(subtokens=rows, **content)
        if all(parts and 0 <= min(parts) <= max(parts) < extension.base_vocab_size for parts in rows):
            return extension
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: cannot be read ({error!r}); fix: extend the tokenizer again") from None
    raise DataError(f"{file}: a new token stands for ids that the base has not; fix: extend the tokenizer again")
