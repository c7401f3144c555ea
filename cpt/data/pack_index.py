"""The index of a best-fit packing: which document pieces make row r. Built once per store and row length, then mapped.

Owns the folder ``best_fit_SEQLEN`` beside a store's split (``STORE/train/packs``) or in a folder of the user's choice:

    pieces.bin   little-endian int64 pairs: token start and tokens of each piece, row by row
    rows.bin     little-endian int64: where each row's pieces start, then the end
    index.json   written last: the store's content hash, counts, the sha256 of both files

Documents are packed a million at a time, in order, so memory is bounded (about 150 MB) whatever the store holds, and
the pieces of a row lie near each other on disk. The folder appears whole, by renaming; builders wait for one another,
and a builder that dies leaves nothing that counts. The index holds nothing that the store does not say: one that is
damaged, or of another store, is built again. Refuses: a place that cannot be written.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cpt.data.best_fit import best_fit, cut
from cpt.data.mapped import NumberFiles
from cpt.data.packing import Rows, concat_rows, pieces_row
from cpt.data.store_selection import Split, is_ordered
from cpt.json_fields import take_fields
from cpt.rundir import DataError, write_atomic

FORMAT_VERSION = 1
INDEX_NAME, PIECES_NAME, ROWS_NAME = "index.json", "pieces.bin", "rows.bin"
DOCUMENTS_AT_ONCE = 1 << 20
PIECES_AT_ONCE = 1 << 21  # bounds memory where documents are long

Progress = Callable[[int, int], None]  # documents done, of


@dataclass(frozen=True)
class IndexManifest:
    """``index.json``."""

    store_content_hash: str
    seq_len: int
    rows: int
    pieces: int
    rows_sha256: str
    pieces_sha256: str
    packing: str = "best_fit"
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class PackIndex:
    """An open index; ``pieces(row)`` are (token start, tokens) pairs."""

    path: Path
    manifest: IndexManifest
    files: NumberFiles

    def pieces(self, row: int) -> NDArray[np.int64]:
        """Raises DataError where the index was cut short since it was opened."""
        assert 0 <= row < self.manifest.rows, f"row {row} is outside the index"
        first, last = self.files.read(ROWS_NAME, np.dtype("<i8"), row, row + 2).tolist()
        if not 0 <= first < last <= self.manifest.pieces:
            raise DataError(f"{self.path / ROWS_NAME}: row {row} has pieces {first} to {last}; delete {self.path}")
        return self.files.read(PIECES_NAME, np.dtype("<i8"), 2 * first, 2 * last).reshape(-1, 2)


def rule_for(store: Split, packing: str) -> str:
    """The rule for a source of a run packed by ``packing``: best fit would undo the order of a curriculum."""
    return "concat" if is_ordered(store) else packing


def open_rows(store: Split, packing: str, seq_len: int, pack_dir: Path | None = None) -> Rows:
    """The rows of a source; a best-fit index that is not there yet is built.

    Raises:
        DataError: the index is missing and its place cannot be written; a store without documents.
    """
    if rule_for(store, packing) == "concat":
        return concat_rows(store, seq_len)
    index = ensure_index(store, seq_len, pack_dir)
    pad_id = store.manifest.eos_id
    return Rows(
        index.manifest.rows,
        store.num_tokens,
        lambda row: pieces_row(store, index.pieces(row), seq_len, pad_id=pad_id),
    )


def index_folder(store: Split, seq_len: int, pack_dir: Path | None = None) -> Path:
    """Where the index lies: beside the store, or in ``pack_dir`` under the store's content hash."""
    root = store.path / "packs" if pack_dir is None else pack_dir / store.manifest.content_hash[:16]
    return root / f"best_fit_{seq_len}"


def ensure_index(
    store: Split, seq_len: int, pack_dir: Path | None = None, *, verify: bool = False, progress: Progress | None = None
) -> PackIndex:
    """Open the index, building it if it is missing, damaged or of another store; ``verify`` reads its files again."""
    if not store.num_documents:
        raise DataError(f"{store.path}: holds no document, there is nothing to pack")
    folder = index_folder(store, seq_len, pack_dir)
    if (found := _open(folder, store, seq_len, verify=verify)) is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_builder(folder) as alone:
            if (found := _open(folder, store, seq_len, verify=verify)) is None:  # else another process built it
                _build(folder, store, seq_len, alone=alone, progress=progress)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise _not_writable(folder, error) from None
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        raise _not_writable(folder, error) from None
    found = found or _open(folder, store, seq_len, verify=False)
    assert found is not None, f"{folder} was built and cannot be opened"
    return found


def document_chunks(store: Split, seq_len: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(token starts, lengths) of the store's documents in order, a bounded number of them and of their pieces at a
    time: the unit of packing.
    """
    first = 0
    while first < store.num_documents:
        bounds = store.document_bounds(first, min(first + DOCUMENTS_AT_ONCE, store.num_documents))
        lengths = np.diff(bounds)
        number = max(1, int(np.searchsorted(np.cumsum(lengths // seq_len + 1), PIECES_AT_ONCE, side="right")))
        yield bounds[:-1][:number], lengths[:number]
        first += min(number, len(lengths))


def _open(folder: Path, store: Split, seq_len: int, *, verify: bool) -> PackIndex | None:
    """None where the index is missing, or is not what this program would build for this store."""
    try:
        fields = take_fields(json.loads((folder / INDEX_NAME).read_bytes()), IndexManifest, INDEX_NAME)
        manifest = IndexManifest(**fields)
        wanted = IndexManifest(
            store.manifest.content_hash,
            seq_len,
            manifest.rows,
            manifest.pieces,
            manifest.rows_sha256,
            manifest.pieces_sha256,
        )
        rows_file, pieces_file = folder / ROWS_NAME, folder / PIECES_NAME
        sizes = rows_file.stat().st_size, pieces_file.stat().st_size
        if manifest != wanted or sizes != ((manifest.rows + 1) * 8, manifest.pieces * 16) or not manifest.rows:
            return None
        if verify and (_sha256(rows_file), _sha256(pieces_file)) != (manifest.rows_sha256, manifest.pieces_sha256):
            return None
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    files = NumberFiles(folder)
    for name in (ROWS_NAME, PIECES_NAME):
        files.read(name, np.dtype("<i8"), 0, 0)  # opened now: what is put in their place later changes no row
    return PackIndex(folder, manifest, files)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def _only_builder(folder: Path) -> Iterator[bool]:
    """Wait until no other process builds this index; False where the file system has no locks."""
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            alone = False  # two may build at once; the first to rename wins
        yield alone


def _build(folder: Path, store: Split, seq_len: int, *, alone: bool, progress: Progress | None) -> None:
    if alone:
        for left_over in folder.parent.glob(f".{folder.name}.*.part"):
            shutil.rmtree(left_over, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        _write_index(temporary, store, seq_len, progress)
        if folder.exists():
            folder.rename(temporary / "replaced")  # what could not be used; open maps of it stay valid
        try:
            temporary.rename(folder)
        except OSError:
            if alone or _open(folder, store, seq_len, verify=False) is None:
                raise
        shutil.rmtree(folder / "replaced", ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _Hashed:
    """A file of int64 and the sha256 of what was written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()

    def write(self, array: NDArray[np.int64]) -> None:
        raw = np.ascontiguousarray(array, "<i8").data
        self.file.write(raw)
        self.sha256.update(raw)

    def close(self) -> str:
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.sha256.hexdigest()


def _write_index(folder: Path, store: Split, seq_len: int, progress: Progress | None) -> None:
    rows = pieces = documents = 0
    with (folder / ROWS_NAME).open("wb") as rows_file, (folder / PIECES_NAME).open("wb") as pieces_file:
        rows_out, pieces_out = _Hashed(rows_file), _Hashed(pieces_file)
        rows_out.write(np.zeros(1, np.int64))
        for starts, lengths in document_chunks(store, seq_len):
            row_ends, row_pieces = _pack(starts, lengths, seq_len)
            rows_out.write(row_ends + pieces)
            pieces_out.write(row_pieces)
            rows, pieces, documents = rows + len(row_ends), pieces + len(row_pieces), documents + len(lengths)
            if progress:
                progress(documents, store.num_documents)
        manifest = IndexManifest(
            store.manifest.content_hash, seq_len, rows, pieces, rows_out.close(), pieces_out.close()
        )
    write_atomic(folder / INDEX_NAME, json.dumps(asdict(manifest), indent=1) + "\n")


def _pack(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], seq_len: int
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Rows of some documents: where each row's pieces end, and all pieces as (token start, tokens)."""
    found = cut(starts, lengths, seq_len)
    order, row_starts = best_fit(found.lengths, seq_len)
    whole = np.stack([found.whole, np.full(len(found.whole), seq_len)], axis=1)
    packed = np.stack([found.starts[order], found.lengths[order]], axis=1)
    row_ends = np.concatenate([np.arange(1, len(whole) + 1), row_starts[1:] + len(whole)])
    return row_ends, np.concatenate([whole, packed])


def _not_writable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: the best-fit index cannot be written there ({error.strerror}); name a folder that can with "
        "data.pack_dir in the run file (cpt data pack --pack-dir), or build it once with a user who may write"
    )
