"""The token store: tokenized documents of one source and split; writer and reader together, so that they agree.

A split folder (``STORE/train``, ``STORE/heldout``) is immutable once ``manifest.json`` exists, which is written last:

    tokens_00000.bin      little-endian uint16 (vocabulary <= 65,536) or uint32 token ids
    documents_00000.bin   little-endian int64: where each document of the shard starts, then the shard's end
    manifest.json         format version, tokenizer, counts, content hash, the list of shards

Documents [5 7 0] [9 0] [4 0] (EOS 0) in two shards of two and one documents:

    tokens_00000 = 5 7 0 9 0   documents_00000 = 0 3 5     tokens_00001 = 4 0   documents_00001 = 0 2
    read(3, 7) -> 9 0 4 0      document_starts(1, 7) -> 3 5

A document never straddles two shards; a shard may be empty. The content hash is a chain over documents,
``h = sha256(h + token bytes)``, hence independent of shard sizes, and its 32 bytes are all a resumed writer needs.
Refused: unknown versions and manifest keys, files shorter or longer than the manifest says, documents without tokens.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError, write_atomic

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
_REBUILD = "delete the store folder and tokenize again"

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


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
    """What a split is, known before its first token."""

    source: str
    domain: str
    split: str
    vocab_size: int
    eos_id: int
    tokenizer: TokenizerFacts

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
    """``manifest.json``. ``utf8_bytes`` counts the text of the split without its EOS tokens."""

    source: str
    domain: str
    split: str
    dtype: str
    vocab_size: int
    eos_id: int
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
    def from_json(cls, text: str, path: Path) -> Self:
        """Raises DataError: not JSON, another version, a missing or unknown key."""
        try:
            raw = json.loads(text)
            version = raw["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a token store manifest ({error!r}); {_REBUILD}") from None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format_version is {version!r}, this program reads {FORMAT_VERSION}; {_REBUILD}")
        _require_keys(raw, {entry.name for entry in fields(cls)}, path)
        _require_keys(raw["tokenizer"], {"name", "fingerprint", "class"}, path)
        raw["tokenizer"]["class_name"] = raw["tokenizer"].pop("class")
        for shard in raw["shards"]:
            _require_keys(shard, {entry.name for entry in fields(Shard)}, path)
        raw["tokenizer"] = TokenizerFacts(**raw["tokenizer"])
        raw["shards"] = tuple(Shard(**shard) for shard in raw["shards"])
        return cls(**raw)


def _require_keys(raw: Any, known: set[str], path: Path) -> None:
    found = set(raw) if isinstance(raw, dict) else set()
    if found != known:
        raise DataError(
            f"{path}: unknown keys {sorted(found - known)}, missing keys {sorted(known - found)}; "
            f"the file is of another version of this program or was edited: {_REBUILD}"
        )


def _tokens_name(index: int) -> str:
    return f"tokens_{index:05d}.bin"


def _documents_name(index: int) -> str:
    return f"documents_{index:05d}.bin"


def _disk_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _chain(state: str, documents: Iterable[memoryview]) -> str:
    """The content hash after ``documents``, each the raw bytes of one document's tokens."""
    digest = bytes.fromhex(state)
    for document in documents:
        link = hashlib.sha256(digest)
        link.update(document)
        digest = link.digest()
    return digest.hex()


def _raw(array: NDArray[Any]) -> memoryview:
    return array.view(np.uint8).data


def _cut(tokens: NDArray[Any], ends: NDArray[np.int64]) -> Iterator[memoryview]:
    """Raw bytes of each document of a flat array, without copying."""
    raw = _raw(tokens)
    start = 0
    for end in (ends * tokens.itemsize).tolist():
        yield raw[start:end]
        start = end


class SplitWriter:
    """Writes one split shard by shard; nothing counts until ``finish_shard`` returned and ``state`` was recorded."""

    def __init__(self, folder: Path, label: StoreLabel, state: SplitState | None = None) -> None:
        self.folder = folder
        self.label = label
        self.state = state or SplitState()
        self._dtype = _disk_dtype(label.dtype)
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._lengths: list[NDArray[np.int64]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, tokens: NDArray[Any], lengths: NDArray[np.int64], *, utf8_bytes: int) -> None:
        """Add whole documents: their ids end to end and the token count of each (EOS included)."""
        assert lengths.sum() == len(tokens) and (lengths > 0).all(), "documents must cover the tokens and be non-empty"
        if not len(lengths):
            return
        stored = np.ascontiguousarray(tokens, dtype=self._dtype)
        raw = _raw(stored)
        self._open_file().write(raw)
        self._sha256.update(raw)
        self._lengths.append(lengths)
        self.state.content_hash = _chain(self.state.content_hash, _cut(stored, lengths.cumsum()))
        self.state.utf8_bytes += utf8_bytes

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            self._file = (self.folder / _tokens_name(len(self.state.shards))).open("wb")
        return self._file

    def finish_shard(self) -> None:
        """Flush both files of the shard to disk and add it to ``state``; a shard without documents is allowed."""
        index = len(self.state.shards)
        tokens_file = self._open_file()
        _sync_and_close(tokens_file)
        starts = np.concatenate([np.zeros(1, np.int64), *self._lengths]).cumsum().astype("<i8")
        with (self.folder / _documents_name(index)).open("wb") as file:
            file.write(starts.tobytes())
            file.flush()
            os.fsync(file.fileno())
        shard = Shard(
            int(starts[-1]), len(starts) - 1, self._sha256.hexdigest(), hashlib.sha256(starts.tobytes()).hexdigest()
        )
        self.state.shards.append(shard)
        self._file, self._sha256, self._lengths = None, hashlib.sha256(), []

    def close(self) -> None:
        """Let go of an unfinished shard; its file is overwritten by the next writer."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write_manifest(self) -> Manifest:
        """The last act: from here on the split is complete and immutable."""
        assert self._file is None, "finish_shard first"
        manifest = Manifest(
            **{entry.name: getattr(self.label, entry.name) for entry in fields(self.label)},
            dtype=self.label.dtype,
            documents=self.state.documents,
            tokens=self.state.tokens,
            utf8_bytes=self.state.utf8_bytes,
            content_hash=self.state.content_hash,
            shards=tuple(self.state.shards),
        )
        write_atomic(self.folder / MANIFEST_NAME, manifest.to_json())
        return manifest


def _sync_and_close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def write_split(
    folder: Path, label: StoreLabel, shards: Iterable[Sequence[Sequence[int]]], *, utf8_bytes: int = 0
) -> Manifest:
    """Write a whole split from shards of documents of ids (EOS included): for converters and tests."""
    writer = SplitWriter(folder, label)
    for shard in shards:
        lengths = np.array([len(document) for document in shard], np.int64)
        flat = np.array([token for document in shard for token in document], label.dtype)
        writer.append(flat, lengths, utf8_bytes=utf8_bytes if not writer.state.shards else 0)
        writer.finish_shard()
    return writer.write_manifest()


class TokenStore:
    """Read access to one finished split; opening costs the manifest and a stat per file, mapping comes at first use."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.num_tokens = manifest.tokens
        self.num_documents = manifest.documents
        self.vocab_size = manifest.vocab_size
        self.dtype = np.dtype(manifest.dtype)
        self._bases = np.concatenate([[0], np.cumsum([shard.tokens for shard in manifest.shards], dtype=np.int64)])
        self._maps: dict[str, NDArray[Any]] = {}

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open ``STORE/train`` or ``STORE/heldout``.

        Raises:
            DataError: no manifest, another format version, unknown keys, a file of another size than it says.
        """
        file = path / MANIFEST_NAME
        if not file.is_file():
            raise DataError(f"{path}: no {MANIFEST_NAME} there; {_missing_manifest_hint(path)}")
        manifest = Manifest.from_json(file.read_text(encoding="utf-8"), file)
        store = cls(path, manifest)
        for index, shard in enumerate(manifest.shards):
            _require_size(path / _tokens_name(index), shard.tokens * store.dtype.itemsize)
            _require_size(path / _documents_name(index), (shard.documents + 1) * 8)
        return store

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of all shards laid end to end, copied; needs 0 <= start <= stop <= num_tokens."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.path}, which has {self.num_tokens}")
        pieces = [self._tokens(i)[low:high] for i, low, high in self._overlaps(start, stop)]
        return np.concatenate(pieces) if pieces else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions p in [start, stop) at which a document starts; O(log documents + hits)."""
        pieces = []
        for i, low, high in self._overlaps(start, stop):
            starts = self._starts(i)[:-1]
            first, last = np.searchsorted(starts, (low, high))
            pieces.append(starts[first:last] + self._bases[i])
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def documents(self) -> Iterator[Tokens]:
        """Every document in order, EOS included, as read-only views."""
        for i, shard in enumerate(self.manifest.shards):
            if shard.documents:
                tokens, starts = self._tokens(i), self._starts(i)
                for low, high in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                    yield tokens[low:high]

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, EOS included; reads the document files only, 8 bytes of memory per document."""
        lengths = [np.diff(self._starts(i)) for i in range(len(self.manifest.shards))]
        return np.concatenate(lengths) if lengths else np.empty(0, np.int64)

    def verify(self) -> None:
        """Read everything and compare all hashes with the manifest.

        Raises:
            DataError: names the first damaged file, or the manifest when only its content hash is wrong.
        """
        state = SplitState().content_hash
        for i, shard in enumerate(self.manifest.shards):
            self._verify_file(_tokens_name(i), shard.tokens_sha256)
            self._verify_file(_documents_name(i), shard.documents_sha256)
            if shard.documents:
                state = _chain(state, _cut(self._tokens(i), self._starts(i)[1:]))
        if state != self.manifest.content_hash:
            raise DataError(
                f"{self.path / MANIFEST_NAME}: content_hash is {self.manifest.content_hash}, the shards give {state}; "
                f"{_REBUILD}"
            )

    def _verify_file(self, name: str, expected: str) -> None:
        with (self.path / name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(f"{self.path / name}: sha256 is {found}, the manifest says {expected}; {_REBUILD}")

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, low, high) in local positions for every shard with a token in [start, stop)."""
        first = int(np.searchsorted(self._bases, start, side="right")) - 1
        for i in range(max(first, 0), len(self.manifest.shards)):
            base, end = int(self._bases[i]), int(self._bases[i + 1])
            if base >= stop:
                return
            low, high = max(start, base), min(stop, end)
            if low < high:
                yield i, low - base, high - base

    def _tokens(self, index: int) -> NDArray[Any]:
        return self._map(_tokens_name(index), _disk_dtype(self.manifest.dtype))

    def _starts(self, index: int) -> NDArray[np.int64]:
        return self._map(_documents_name(index), np.dtype("<i8"))

    def _map(self, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        if name not in self._maps:
            # asarray: slicing np.memmap objects costs microseconds per slice in subclass hooks
            self._maps[name] = np.asarray(np.memmap(self.path / name, dtype=dtype, mode="r"))
        return self._maps[name]


def _require_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise DataError(f"{file}: {state}, the manifest says {expected} bytes; copy it again or {_REBUILD}")


def _missing_manifest_hint(path: Path) -> str:
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST_NAME}"))
    if splits:
        return f"it is a store with the splits {splits}: open one of them, e.g. {path / splits[0]}"
    return "the store is unfinished or the path is wrong: run the same `cpt data tokenize` command again to finish it"
