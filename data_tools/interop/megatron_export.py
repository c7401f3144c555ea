"""A token store's split as Megatron's .bin/.idx: one sequence per document, the same tokens, BOS and EOS included.

The .bin file is the store's token shards one behind the other: uint16 stays uint16, uint32 becomes int32, which has the
same bytes below 2^31. Hashes are compared with the manifest on the way. Both files are renamed to their names when
they are whole, the .idx file last; existing files are never overwritten.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cpt.data.token_store import TokenStore, documents_name, tokens_name
from cpt.rundir import DataError
from data_tools.interop.megatron_index import CODES, HEADER, MAGIC, with_suffix
from data_tools.whole_file import whole_file

_COPY_BYTES = 1 << 22
_PIECE = 1 << 18

Progress = Callable[[int, int], None]


def export_megatron(store: Path, prefix: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write ``prefix.bin`` and ``prefix.idx`` of one split; returns what was written.

    Raises:
        DataError: no finished split there, damaged shards, ids or documents that Megatron's types cannot hold, files
            that exist.
    """
    split = TokenStore.open(store)
    bin_path, index_path = with_suffix(prefix, ".bin"), with_suffix(prefix, ".idx")
    for target in (bin_path, index_path):
        if target.exists():
            raise DataError(f"{target}: exists; fix: --out with another prefix, or delete it")
    if split.vocab_size > 1 << 31:
        raise DataError(f"{store}: vocab_size is {split.vocab_size}, Megatron's int32 ids end at {1 << 31}")
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    kind = "uint16" if split.dtype.itemsize == 2 else "int32"
    with whole_file(index_path) as index_file, whole_file(bin_path) as tokens_file:
        _copy_tokens(split, tokens_file, progress)
        _write_index(split, kind, index_file)
    return {
        "bin": str(bin_path),
        "idx": str(index_path),
        "dtype": kind,
        "documents": split.num_documents,
        "tokens": split.num_tokens,
        "content_hash": split.manifest.content_hash,
    }


def _copy_tokens(split: TokenStore, target: BinaryIO, progress: Progress | None) -> None:
    done, total = 0, split.num_tokens * split.dtype.itemsize
    for index, shard in enumerate(split.manifest.shards):
        digest = hashlib.sha256()
        with (split.path / tokens_name(index)).open("rb") as file:
            while piece := file.read(_COPY_BYTES):
                digest.update(piece)
                target.write(piece)
                done += len(piece)
                if progress:
                    progress(done, total)
        _require_hash(split.path / tokens_name(index), digest.hexdigest(), shard.tokens_sha256)
        with (split.path / documents_name(index)).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        _require_hash(split.path / documents_name(index), found, shard.documents_sha256)


def _require_hash(file: Path, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(f"{file}: its sha256 is not the manifest's; fix: copy the store again")


def _write_index(split: TokenStore, kind: str, target: BinaryIO) -> None:
    count = split.num_documents
    code = next(code for code, name in CODES.items() if name == kind)
    target.write(HEADER.pack(MAGIC, 1, code, count, count + 1))
    for bounds in _bounds(split):
        lengths = np.diff(bounds)
        if lengths.max() >= 1 << 31:
            raise DataError(f"{split.path}: a document has {lengths.max()} tokens, Megatron's limit is {(1 << 31) - 1}")
        target.write(lengths.astype("<i4").tobytes())
    for bounds in _bounds(split):
        target.write((bounds[:-1] * split.dtype.itemsize).astype("<i8").tobytes())
    for at in range(0, count + 1, _PIECE):
        target.write(np.arange(at, min(at + _PIECE, count + 1), dtype="<i8").tobytes())


def _bounds(split: TokenStore) -> Iterator[NDArray[np.int64]]:
    for first in range(0, split.num_documents, _PIECE):
        yield split.document_bounds(first, min(first + _PIECE, split.num_documents))
