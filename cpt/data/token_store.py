"""The token store: tokenized documents of one source and split; writer and reader together, so that they agree.

A split folder (``STORE/train``, ``STORE/heldout``) is immutable once ``manifest.json`` exists, which is written last:

    tokens_00000.bin      little-endian uint16 (vocabulary <= 65,536) or uint32 token ids
    documents_00000.bin   little-endian int64: where each document of the shard starts, then the shard's end
    manifest.json         format version, tokenizer, counts, content hash, the list of shards

Documents [5 7 0] [9 0] [4 0] (EOS 0) in two shards of two and one documents:

    tokens_00000 = 5 7 0 9 0   documents_00000 = 0 3 5     tokens_00001 = 4 0   documents_00001 = 0 2
    read(3, 7) -> 9 0 4 0      document_starts(1, 7) -> 3 5

Where the tokenizer has a BOS token, it stands before every document and counts as a token of it.
A document never straddles two shards; a shard may be empty. The content hash is a chain over documents,
``h = sha256(h + token bytes)``, hence independent of shard sizes, and its 32 bytes are all a resumed writer needs.
Refused: unknown versions and manifest keys, files shorter or longer than the manifest says, documents without tokens.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from cpt.data.manifest import (
    MANIFEST_NAME,
    REBUILD,
    VIEW_NAME,
    Manifest,
    Shard,
    SplitState,
    StoreLabel,
    TokenizerFacts,
)
from cpt.data.mapped import NumberFiles
from cpt.rundir import DataError, write_atomic

__all__ = [
    "MANIFEST_NAME",
    "Manifest",
    "Shard",
    "SplitState",
    "SplitWriter",
    "StoreLabel",
    "TokenStore",
    "TokenizerFacts",
    "write_split",
]

Tokens = NDArray[np.uint16] | NDArray[np.uint32]


def tokens_name(index: int) -> str:
    return f"tokens_{index:05d}.bin"


def documents_name(index: int) -> str:
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


@dataclass
class _LongDocument:
    """A document that arrives in pieces: its link of the content hash so far, and its tokens."""

    link: Any
    tokens: int = 0


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
        self._long: _LongDocument | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, tokens: NDArray[Any], lengths: NDArray[np.int64], *, utf8_bytes: int) -> None:
        """Add whole documents: their ids end to end and the token count of each (EOS included)."""
        assert lengths.sum() == len(tokens) and (lengths > 0).all(), "documents must cover the tokens and be non-empty"
        assert self._long is None, "finish the long document first"
        if not len(lengths):
            return
        stored = np.ascontiguousarray(tokens, dtype=self._dtype)
        self._write(stored)
        self._lengths.append(lengths)
        self.state.content_hash = _chain(self.state.content_hash, _cut(stored, lengths.cumsum()))
        self.state.utf8_bytes += utf8_bytes

    def append_piece(self, tokens: NDArray[Any], *, utf8_bytes: int, ends_document: bool) -> None:
        """Add the next tokens of one long document, which therefore is never in memory as a whole."""
        stored = np.ascontiguousarray(tokens, dtype=self._dtype)
        self._write(stored)
        self._long = self._long or _LongDocument(hashlib.sha256(bytes.fromhex(self.state.content_hash)))
        self._long.link.update(_raw(stored))
        self._long.tokens += len(stored)
        self.state.utf8_bytes += utf8_bytes
        if ends_document:
            self._lengths.append(np.array([self._long.tokens], np.int64))
            self.state.content_hash = self._long.link.hexdigest()
            self._long = None

    def _write(self, stored: NDArray[Any]) -> None:
        raw = _raw(stored)
        self._open_file().write(raw)
        self._sha256.update(raw)

    def _open_file(self) -> BinaryIO:
        if self._file is None:
            self._file = (self.folder / tokens_name(len(self.state.shards))).open("wb")
        return self._file

    def finish_shard(self) -> None:
        """Flush both files of the shard to disk and add it to ``state``; a shard without documents is allowed."""
        assert self._long is None, "a document never straddles two shards"
        index = len(self.state.shards)
        tokens_file = self._open_file()
        _sync_and_close(tokens_file)
        starts = np.concatenate([np.zeros(1, np.int64), *self._lengths]).cumsum().astype("<i8")
        with (self.folder / documents_name(index)).open("wb") as file:
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
        self._first_documents = np.cumsum([0, *(shard.documents for shard in manifest.shards)], dtype=np.int64)
        self._files = NumberFiles(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open ``STORE/train`` or ``STORE/heldout``.

        Raises:
            DataError: no manifest, another format version, unknown keys, a file of another size than it says.
        """
        file = path / MANIFEST_NAME
        if not file.is_file():
            raise DataError(f"{path}: no {MANIFEST_NAME} there; {_missing_manifest_hint(path)}")
        manifest = Manifest.from_json(file.read_bytes(), file)
        store = cls(path, manifest)
        for index, shard in enumerate(manifest.shards):
            _require_size(path / tokens_name(index), shard.tokens * store.dtype.itemsize)
            _require_size(path / documents_name(index), (shard.documents + 1) * 8)
        return store

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of all shards laid end to end, copied; needs 0 <= start <= stop <= num_tokens.

        Raises:
            DataError: a shard was cut short since it was opened.
        """
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.path}, which has {self.num_tokens}")
        disk = _disk_dtype(self.manifest.dtype)
        pieces = [self._files.read(tokens_name(i), disk, low, high) for i, low, high in self._overlaps(start, stop)]
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
        return np.diff(self.document_bounds(0, self.num_documents))

    def document_bounds(self, first: int, last: int) -> NDArray[np.int64]:
        """Where documents [first, last) start, and where the last of them ends: [0 3 5 7] for all in the example."""
        parts = [np.zeros(1, np.int64)]
        while first < last:
            i = int(np.searchsorted(self._first_documents, first, side="right")) - 1
            number = int(self._first_documents[i])
            local = self._starts(i)[first - number : last - number + 1] + self._bases[i]
            parts[-1] = parts[-1][:-1]  # an end is the next one's start
            parts.append(local)
            first += len(local) - 1
        return np.concatenate(parts)

    def verify(self) -> None:
        """Read everything and compare all hashes with the manifest.

        Raises:
            DataError: names the first damaged file, or the manifest when only its content hash is wrong.
        """
        state = SplitState().content_hash
        for i, shard in enumerate(self.manifest.shards):
            files = self.path / tokens_name(i), self.path / documents_name(i)
            state = verify_shard(*files, shard, self.manifest.dtype, state)
        if state != self.manifest.content_hash:
            raise DataError(
                f"{self.path / MANIFEST_NAME}: content_hash is {self.manifest.content_hash}, the shards give {state}; "
                f"{REBUILD}"
            )

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
        return self._files.map(tokens_name(index), _disk_dtype(self.manifest.dtype))

    def _starts(self, index: int) -> NDArray[np.int64]:
        return self._files.map(documents_name(index), np.dtype("<i8"))


def verify_shard(tokens_file: Path, documents_file: Path, shard: Shard, dtype: str, content_hash: str) -> str:
    """The content hash behind a shard, given the one before it, after both files were read and compared.

    Raises:
        DataError: a file that is not the one the shard's hashes are of.
    """
    for path, expected in ((tokens_file, shard.tokens_sha256), (documents_file, shard.documents_sha256)):
        if not path.is_file():
            raise DataError(f"{path}: is missing; {REBUILD}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(f"{path}: sha256 is {found}, the manifest says {expected}; {REBUILD}")
    if not shard.documents:
        return content_hash
    tokens = np.memmap(tokens_file, _disk_dtype(dtype), "r")
    starts = np.memmap(documents_file, "<i8", "r")
    return _chain(content_hash, _cut(np.asarray(tokens), np.asarray(starts)[1:]))


def _require_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected:
        state = "is missing" if found is None else f"has {found} bytes"
        raise DataError(f"{file}: {state}, the manifest says {expected} bytes; copy it again or {REBUILD}")


def _missing_manifest_hint(path: Path) -> str:
    splits = sorted(child.parent.name for child in path.glob(f"*/{MANIFEST_NAME}"))
    if splits:
        return f"it is a store with the splits {splits}: open one of them, e.g. {path / splits[0]}"
    if (path / VIEW_NAME).is_file():
        return "it is a view, which holds no tokens, and this needs the store itself"
    return "the store is unfinished or the path is wrong: run the same `cpt data tokenize` command again to finish it"
