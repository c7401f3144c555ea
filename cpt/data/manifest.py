"""`manifest.json` of a token store's split: what the split is, what is in it, and the hashes that prove it.

Refused: another format version, missing and unknown keys, values of another type, totals that are not the shards'.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from cpt.rundir import DataError

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
VIEW_NAME = "view.json"  # in its place where a folder is a view of a store
REBUILD = "delete the store folder and tokenize again"
_COUNTS = ("vocab_size", "eos_id", "bos_id", "documents", "tokens", "utf8_bytes", "format_version")


@dataclass(frozen=True)
class TokenizerFacts:
    """Which tokenizer made the ids; ``fingerprint`` is the sha256 hex of its canonical content."""

    name: str
    fingerprint: str
    class_name: str


@dataclass(frozen=True)
class Shard:
    """One pair of files; the sha256 values are of the raw file contents, in hex."""

    tokens: int
    documents: int
    tokens_sha256: str
    documents_sha256: str


@dataclass(frozen=True)
class StoreLabel:
    """What a split is, known before its first token. ``bos_id``: stands before every document; None: nothing does."""

    source: str
    domain: str
    split: str
    vocab_size: int
    eos_id: int
    tokenizer: TokenizerFacts
    bos_id: int | None = None

    @property
    def dtype(self) -> str:
        """``"uint16"`` where every id fits, else ``"uint32"``."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"


@dataclass
class SplitState:
    """All a restarted writer needs of the finished shards of a split; kept in the builder's progress file."""

    shards: list[Shard] = field(default_factory=list)
    utf8_bytes: int = 0
    content_hash: str = hashlib.sha256().hexdigest()

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Self:
        return cls([Shard(**shard) for shard in raw["shards"]], raw["utf8_bytes"], raw["content_hash"])


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``. ``utf8_bytes`` counts the text of the split without its BOS and EOS tokens."""

    source: str
    domain: str
    split: str
    dtype: str
    vocab_size: int
    eos_id: int
    bos_id: int | None
    tokenizer: TokenizerFacts
    documents: int
    tokens: int
    utf8_bytes: int
    content_hash: str
    shards: tuple[Shard, ...]
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        raw = asdict(self)
        tokenizer = raw["tokenizer"]
        tokenizer["class"] = tokenizer.pop("class_name")
        return json.dumps({"format_version": raw.pop("format_version"), **raw}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, path: Path) -> Self:
        """Raises DataError: not JSON, another version, a missing or unknown key, a value of another type or range."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path}: not a token store manifest ({error!r}); {REBUILD}") from None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; {REBUILD}")
        _require_keys(raw, {entry.name for entry in fields(cls)}, path)
        _require_keys(raw["tokenizer"], {"name", "fingerprint", "class"}, path)
        _require_list(raw["shards"], path)
        for shard in raw["shards"]:
            _require_keys(shard, {entry.name for entry in fields(Shard)}, path)
        _require_values(raw, path)
        raw["tokenizer"]["class_name"] = raw["tokenizer"].pop("class")
        raw["tokenizer"] = TokenizerFacts(**raw["tokenizer"])
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        return cls(**raw)


def _require_keys(raw: Any, known: set[str], path: Path) -> None:
    found = set(raw) if isinstance(raw, dict) else set()
    if found != known:
        raise DataError(
            f"{path}: unknown keys {sorted(found - known)}, missing keys {sorted(known - found)}; "
            f"the file is of another version of this program or was edited: {REBUILD}"
        )


def _require_list(shards: Any, path: Path) -> None:
    if not isinstance(shards, list):
        raise DataError(f"{path}: shards is {shards!r:.60}, must be a list; {REBUILD}")


def _require_values(raw: dict[str, Any], path: Path) -> None:
    """Types and ranges of a manifest whose keys are right, and that its totals are those of its shards."""
    rows = [("", raw), ("tokenizer.", raw["tokenizer"])]
    rows += [(f"shards[{index}].", shard) for index, shard in enumerate(raw["shards"])]
    for where, row in rows:
        for key, value in row.items():
            rule = _broken_rule(key, value)
            if rule:
                raise DataError(f"{path}: {where}{key} is {value!r:.60}, must be {rule}; {REBUILD}")
    for key in ("tokens", "documents"):
        total = sum(shard[key] for shard in raw["shards"])
        if total != raw[key]:
            raise DataError(f"{path}: {key} is {raw[key]}, the shards have {total}; {REBUILD}")
    for key in ("eos_id", "bos_id"):
        if (raw[key] or 0) >= raw["vocab_size"]:
            raise DataError(f"{path}: {key} is {raw[key]}, vocab_size is {raw['vocab_size']}; {REBUILD}")


def _broken_rule(key: str, value: Any) -> str:
    """What the value must be and is not; "" where it is."""
    if key in ("tokenizer", "shards") or (key == "bos_id" and value is None):
        return ""
    if key == "dtype":
        return "" if value in ("uint16", "uint32") else "uint16 or uint32"
    if key in _COUNTS:
        return "" if type(value) is int and 0 <= value < 1 << 63 else "a count"
    return "" if isinstance(value, str) else "text"
