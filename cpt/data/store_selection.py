"""Views of a token store: some of its documents in some order, without a copy of a token.

Owns the folder format of a view and reading it; a view opens wherever a store opens. How documents are chosen is
:mod:`data_tools.choose_documents`'s. A view's split (``VIEW/train``, ``VIEW/heldout``) holds 16 bytes per document:

    documents.bin   little-endian int64: numbers of the store's documents, in the order of the view
    starts.bin      little-endian int64: where each starts in the view's own stream of tokens, then the stream's end
    view.json       written last: the store and its content hash, the rule, counts, the view's own content hash

Documents [5 7 0] [9 0] [4 0], the view 2 0:  documents = 2 0   starts = 0 2 5   read(1, 4) -> 0 5 7

Refuses: a store that is not the one the view was made of, a damaged or unknown file, a document twice.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from cpt.data.manifest import VIEW_NAME
from cpt.data.mapped import NumberFiles
from cpt.data.token_store import Tokens, TokenStore
from cpt.json_fields import take_fields
from cpt.rundir import DataError, write_atomic

FORMAT_VERSION = 1
DOCUMENTS_NAME, STARTS_NAME = "documents.bin", "starts.bin"
RUN_DOCUMENTS = 4096  # documents looked up at a time when all are read
_REBUILD = "delete the view's folder and run `cpt data view` again"

Order = Literal["none", "ascending", "descending"]


@dataclass(frozen=True)
class ViewManifest:
    """``view.json``. ``store`` is the split's folder as seen from the view's, ``store_absolute`` where it lay then."""

    store: str
    store_absolute: str
    store_content_hash: str
    rule: Mapping[str, Any]
    order: Order
    documents: int
    tokens: int
    utf8_bytes: int  # all of the store's where all documents are taken, else in proportion to tokens
    content_hash: str
    documents_sha256: str
    starts_sha256: str
    format_version: int = FORMAT_VERSION

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises DataError: not JSON, another version, a missing or unknown key."""
        try:
            raw = json.loads(file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not a complete JSON file ({error}); {_REBUILD}") from None
        if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
            found = raw.get("format_version")
            raise DataError(f"{file}: format_version is {found!r:.80}; this program reads {FORMAT_VERSION}; {_REBUILD}")
        try:
            fields = take_fields(raw, cls, VIEW_NAME)
        except DataError as error:
            raise DataError(f"{file}: {error}; {_REBUILD}") from None
        for name in ("documents", "tokens", "utf8_bytes"):
            if type(fields[name]) is not int or fields[name] < 0:
                raise DataError(f"{file}: {name} is {fields[name]!r:.80}; it must be a count; {_REBUILD}")
        for name in ("store", "store_absolute", "store_content_hash", "content_hash", "order"):
            if not isinstance(fields[name], str) or "\0" in fields[name]:
                raise DataError(f"{file}: {name} is {fields[name]!r:.80}; it must be a text; {_REBUILD}")
        return cls(**fields)


class StoreView:
    """Read access to one split of a view; what a ``TokenStore`` has, this has too."""

    def __init__(self, path: Path, view: ViewManifest, store: TokenStore) -> None:
        self.path = path
        self.view = view
        self.store = store
        self.manifest = replace(
            store.manifest,
            documents=view.documents,
            tokens=view.tokens,
            utf8_bytes=view.utf8_bytes,
            content_hash=view.content_hash,
            shards=(),
        )
        self.num_tokens = view.tokens
        self.num_documents = view.documents
        self.vocab_size = store.vocab_size
        self.dtype = store.dtype
        self._files = NumberFiles(path)
        _require_size(path / DOCUMENTS_NAME, view.documents)
        _require_size(path / STARTS_NAME, view.documents + 1)
        if (int(self._starts[0]), int(self._starts[-1])) != (0, view.tokens):
            raise DataError(
                f"{path / STARTS_NAME}: ends at {self._starts[-1]}, not at {view.tokens} tokens; {_REBUILD}"
            )

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Numbers of the store's documents, in the view's order."""
        return self._files.map(DOCUMENTS_NAME, np.dtype("<i8")) if self.num_documents else np.empty(0, np.int64)

    @property
    def _starts(self) -> NDArray[np.int64]:
        return self._files.map(STARTS_NAME, np.dtype("<i8"))

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open ``VIEW/train`` or ``VIEW/heldout`` and the store below it.

        Raises:
            DataError: no view there, a damaged file, a store that is gone or has changed.
        """
        view = ViewManifest.read(path / VIEW_NAME)
        return cls(path, view, _store_of(path, view))

    def read(self, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of the view's documents laid end to end, copied."""
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {stop}) of {self.path}, which has {self.num_tokens}")
        if start == stop:
            return np.empty(0, self.dtype)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        if not 0 <= first < last <= self.num_documents:
            raise DataError(f"{self.path / STARTS_NAME}: its positions do not rise; {_REBUILD}")
        pieces: list[Any] = [self._read_run(low, high) for low, high in self._runs(first, last)]
        tokens: Tokens = np.concatenate(pieces)
        skipped = start - int(self._starts[first])
        return tokens[skipped : skipped + stop - start]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        """Positions p in [start, stop) at which a document starts."""
        first, last = np.searchsorted(self._starts[:-1], (start, stop))
        return self._starts[first:last].copy()

    def documents(self) -> Iterator[Tokens]:
        """Every document in the view's order, EOS included."""
        for first in range(0, self.num_documents, RUN_DOCUMENTS):
            for low, high in self._runs(first, min(first + RUN_DOCUMENTS, self.num_documents)):
                tokens: Any = self._read_run(low, high)
                yield from np.split(tokens, self._starts[low + 1 : high] - self._starts[low])

    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document in the view's order, EOS included."""
        return np.diff(self._starts)

    def document_bounds(self, first: int, last: int) -> NDArray[np.int64]:
        """Where documents [first, last) of the view start, and where the last of them ends."""
        return self._starts[first : last + 1]

    def verify(self) -> None:
        """Compare the view's and the store's files with their hashes; DataError names the first damaged one."""
        for name, expected in ((DOCUMENTS_NAME, self.view.documents_sha256), (STARTS_NAME, self.view.starts_sha256)):
            with (self.path / name).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != expected:
                raise DataError(f"{self.path / name}: sha256 is {found}, {VIEW_NAME} says {expected}; {_REBUILD}")
        self.store.verify()

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """[first, last) cut where documents do not follow each other in the store too."""
        breaks = np.flatnonzero(np.diff(self.numbers[first:last]) != 1) + first + 1
        low = first
        for high in (*breaks.tolist(), last):
            yield low, high
            low = high

    def _read_run(self, low: int, high: int) -> Tokens:
        number, tokens = int(self.numbers[low]), int(self._starts[high] - self._starts[low])
        last = number + high - low
        bounds = (
            self.store.document_bounds(number, last) if 0 <= number < last <= self.store.num_documents else np.zeros(2)
        )
        if int(bounds[-1] - bounds[0]) != tokens:
            raise DataError(f"{self.path}: documents {number} to {last - 1} are not where it says; {_REBUILD}")
        return self.store.read(int(bounds[0]), int(bounds[-1]))


Split = TokenStore | StoreView


def open_split(path: Path) -> Split:
    """Open a split of a store or of a view.

    Raises:
        DataError: neither is there, or it is damaged.
    """
    return StoreView.open(path) if (path / VIEW_NAME).is_file() else TokenStore.open(path)


def is_ordered(store: Split) -> bool:
    """Whether the order of the documents is meant: a curriculum, to be read from its first row to its last."""
    return isinstance(store, StoreView) and store.view.order != "none"


@dataclass(frozen=True)
class ViewRequest:
    """Documents of a split in the view's order, the rule that chose them, and whether their order is meant."""

    store: Split
    numbers: NDArray[np.int64]
    rule: Mapping[str, Any]
    order: Order = "none"


def write_view(out: Path, splits: Mapping[str, ViewRequest]) -> dict[str, ViewManifest]:
    """Write a view, all splits at once or nothing; ``splits`` by name (train, heldout).

    Raises:
        DataError: ``out`` exists and is not the same view; a document number twice or outside the store.
    """
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        os.chmod(temporary, 0o755)  # mkdtemp makes it private
        written = {name: _write_split(temporary / name, request, out / name) for name, request in splits.items()}
        if not out.exists():
            with contextlib.suppress(FileExistsError, NotADirectoryError):
                os.rename(temporary, out)
        _check_same(out, written)  # true of what was just renamed; else it was there, or another process came first
        return written
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_split(folder: Path, request: ViewRequest, final: Path) -> ViewManifest:
    numbers, store = np.ascontiguousarray(request.numbers, "<i8"), request.store
    _check_numbers(numbers, store)
    lengths = store.document_lengths()[numbers]
    base, parent_hash = store, store.manifest.content_hash
    if isinstance(store, StoreView):  # a view of a view names the store's documents: one look-up, however deep
        base, numbers = store.store, np.ascontiguousarray(store.numbers[numbers], "<i8")
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]).astype("<i8")
    folder.mkdir()
    hashes = [_write(folder / name, array) for name, array in ((DOCUMENTS_NAME, numbers), (STARTS_NAME, starts))]
    tokens, whole = int(starts[-1]), store.manifest
    manifest = ViewManifest(
        store=os.path.relpath(base.path.resolve(), final.resolve()),
        store_absolute=str(base.path.absolute()),
        store_content_hash=base.manifest.content_hash,
        rule={**request.rule, "of": parent_hash},
        order=request.order,
        documents=len(numbers),
        tokens=tokens,
        utf8_bytes=round(whole.utf8_bytes * tokens / max(whole.tokens, 1)),
        content_hash=hashlib.sha256(f"{base.manifest.content_hash} {request.order} {hashes[0]}".encode()).hexdigest(),
        documents_sha256=hashes[0],
        starts_sha256=hashes[1],
    )
    write_atomic(folder / VIEW_NAME, json.dumps(asdict(manifest), indent=1) + "\n")
    return manifest


def _write(file: Path, array: NDArray[np.int64]) -> str:
    with file.open("wb") as handle:
        handle.write(array.data)
        handle.flush()
        os.fsync(handle.fileno())
    return hashlib.sha256(array.data).hexdigest()


def _check_numbers(numbers: NDArray[np.int64], store: Split) -> None:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < store.num_documents):
        raise DataError(
            f"documents {numbers.min()} to {numbers.max()} are asked for; {store.path} has {store.num_documents}, "
            "numbered from 0"
        )
    ordered = np.sort(numbers)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise DataError(f"document {twice[0]} is named twice; to see documents more often give the source more tokens")


def _check_same(out: Path, written: Mapping[str, ViewManifest]) -> None:
    for name, manifest in written.items():
        file = out / name / VIEW_NAME
        if not file.is_file() or ViewManifest.read(file).content_hash != manifest.content_hash:
            raise DataError(f"{out}: exists and is not this view; choose another --out or delete it")


def _store_of(path: Path, view: ViewManifest) -> TokenStore:
    folders = ((path.resolve() / view.store).resolve(), Path(view.store_absolute))
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        raise DataError(
            f"{path / VIEW_NAME}: its store is neither at {view.store} from here nor at {view.store_absolute}; "
            "put it back, or make the view again"
        )
    store = TokenStore.open(folder)
    if store.manifest.content_hash != view.store_content_hash:
        raise DataError(
            f"{path}: a view of a store with content_hash {view.store_content_hash}, but {folder} has "
            f"{store.manifest.content_hash}: the store was made anew; {_REBUILD}"
        )
    return store


def _require_size(file: Path, expected: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != expected * 8:
        state = "is missing" if found is None else f"has {found} bytes"
        raise DataError(f"{file}: {state}, {VIEW_NAME} says {expected * 8} bytes; {_REBUILD}")
