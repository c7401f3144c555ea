"""The corpus that needs no download: English prose and Python code that every installation already has on disk.

general   prose of the language reference in ``pydoc_data.topics`` and of docstrings: standard library, dependencies
domain    source of the standard library without docstrings and comments; dependencies only if that is too little

Same interpreter and packages, same corpus: files are visited in sorted order, documents are unique, near-identical
paragraphs are kept once. Nothing is imported, only parsed. Test folders, which some distributions leave out, come last
and only to fill up.
"""

import ast
import contextlib
import gc
import itertools
import re
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import orjson

from cpt.rundir import DataError, write_atomic
from data_tools.prose import paragraph_key, prose_paragraphs
from data_tools.python_source import take_apart

MIN_GENERAL_BYTES = 4_000_000
MIN_DOMAIN_BYTES = 8_000_000
_TARGET_GENERAL_BYTES = 4_600_000
_TARGET_DOMAIN_BYTES = 8_600_000
_MAX_DOCUMENT_CHARACTERS = 16_000
_MIN_DOCUMENT_CHARACTERS = 200
_FILES_AT_ONCE = 128
_TOP_LEVEL_GAP = re.compile(r"\n\n+(?=\S)")
# Most prose per parsed byte first, so that few files need reading.
_DEPENDENCIES = (
    "networkx", "huggingface_hub", "datasets", "numpy", "scipy", "pydantic", "matplotlib",
    "pandas", "transformers", "torch", "sympy", "deepspeed", "wandb",
)  # fmt: skip

ParseFiles = Callable[[Sequence[Path]], Iterable["_Parts"]]


@dataclass(frozen=True)
class Document:
    """One line of a written corpus: ``{"id": ..., "text": ...}``; ``origin`` is the package it is from."""

    id: str
    text: str
    origin: str


@dataclass(frozen=True)
class EmbeddedCorpus:
    """Where the two corpora are, their UTF-8 bytes of text and their numbers of documents."""

    general: Path
    domain: Path
    general_bytes: int
    domain_bytes: int
    general_documents: int
    domain_documents: int


@dataclass(frozen=True)
class Roots:
    """What to read: the standard library and the folder of the installed packages."""

    stdlib: Path
    packages: Path


@dataclass(frozen=True)
class _Parts:
    """What a file gives to the two corpora."""

    paragraphs: list[str]
    code: str


@dataclass(frozen=True)
class _Module:
    """A parsed file; ``name`` is its path below the root, with '/'."""

    name: str
    origin: str
    parts: _Parts


@dataclass
class _Collector:
    """Unique documents up to a target size."""

    target_bytes: int
    documents: list[Document] = field(default_factory=list)
    num_bytes: int = 0
    seen: set[str] = field(default_factory=set)

    def fill(self, documents: Iterable[Document]) -> None:
        """Take documents until the target is reached; pulls no further one from the iterator then."""
        iterator = iter(documents)
        while self.num_bytes < self.target_bytes and (document := next(iterator, None)):
            if document.text not in self.seen:
                self.seen.add(document.text)
                self.documents.append(document)
                self.num_bytes += len(document.text.encode())

    def write(self, path: Path) -> Path:
        import zstandard

        lines = b"".join(orjson.dumps({"id": doc.id, "text": doc.text}) + b"\n" for doc in self.documents)
        write_atomic(path, zstandard.ZstdCompressor(level=3).compress(lines))
        return path


def installed_roots() -> Roots:
    paths = sysconfig.get_paths()
    return Roots(Path(paths["stdlib"]), Path(paths["purelib"]))


def write_embedded_corpus(
    out: Path,
    *,
    roots: Roots | None = None,
    workers: int = 2,
    min_bytes: tuple[int, int] = (MIN_GENERAL_BYTES, MIN_DOMAIN_BYTES),
) -> EmbeddedCorpus:
    """Write ``out``/general.jsonl.zst and ``out``/domain.jsonl.zst; ``workers`` > 1 parses in spawned processes.

    Raises:
        DataError: this installation holds less than ``min_bytes`` (general, domain); says what was found where.
    """
    roots = roots or installed_roots()
    out.mkdir(parents=True, exist_ok=True)
    general, domain = _Collector(_TARGET_GENERAL_BYTES), _Collector(_TARGET_DOMAIN_BYTES)
    with _file_parser(workers) as parse:
        library = list(_modules(_library_files(roots.stdlib, tests=False), roots.stdlib, parse))
        general.fill(_prose_documents(itertools.chain(_topics(roots.stdlib), library, _dependencies(roots, parse))))
        tests = _modules(_library_files(roots.stdlib, tests=True), roots.stdlib, parse)
        domain.fill(_code_documents(itertools.chain(library, tests, _dependencies(roots, parse))))
    _require("general", general, min_bytes[0], roots)
    _require("domain", domain, min_bytes[1], roots)
    return EmbeddedCorpus(
        general=general.write(out / "general.jsonl.zst"),
        domain=domain.write(out / "domain.jsonl.zst"),
        general_bytes=general.num_bytes,
        domain_bytes=domain.num_bytes,
        general_documents=len(general.documents),
        domain_documents=len(domain.documents),
    )


def _require(name: str, found: _Collector, minimum: int, roots: Roots) -> None:
    if found.num_bytes >= minimum:
        return
    by_origin = Counter(document.origin for document in found.documents)
    raise DataError(
        f"the embedded {name} corpus has only {found.num_bytes:,} bytes of at least {minimum:,}; documents found: "
        f"{dict(by_origin) or 'none'} under {roots.stdlib} and {roots.packages}; fix: install the Python sources "
        "(some distributions split them off, e.g. libpython3-stdlib) and the dependencies, or use a corpus of your own"
    )


# --- files


def _library_files(stdlib: Path, *, tests: bool) -> list[Path]:
    files = (file for file in _python_files(stdlib) if not {"site-packages", "dist-packages"} & set(file.parts))
    return [file for file in files if _is_test(file.relative_to(stdlib)) == tests]


def _is_test(name: Path) -> bool:
    return any(part in ("test", "tests", "idle_test") for part in name.parts)


def _python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix())


def _dependencies(roots: Roots, parse: ParseFiles) -> Iterator[_Module]:
    for package in _DEPENDENCIES:
        files = [
            file for file in _python_files(roots.packages / package) if not _is_test(file.relative_to(roots.packages))
        ]
        yield from _modules(files, roots.packages, parse)


def _modules(files: Sequence[Path], root: Path, parse: ParseFiles) -> Iterator[_Module]:
    for first in range(
        0, len(files), _FILES_AT_ONCE
    ):  # not all at once: the corpus may be full before the package ends
        some = files[first : first + _FILES_AT_ONCE]
        for file, parts in zip(some, parse(some), strict=True):
            name = file.relative_to(root)
            yield _Module(name.as_posix(), name.parts[0] if len(name.parts) > 1 else "stdlib", parts)


@contextlib.contextmanager
def _file_parser(workers: int) -> Iterator[ParseFiles]:
    """Parses files in order; in processes, as `ast` holds the GIL; syntax trees hold no cycles, so no collector."""
    if workers == 1:
        yield lambda files: map(_parse_file, files)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=gc.disable)
    try:
        yield lambda files: pool.map(_parse_file, files, chunksize=16)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _parse_file(file: Path) -> _Parts:
    """Empty for a file that is no Python of this version: some packages ship templates and bad examples."""
    try:
        with tokenize.open(file) as source, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            parts = take_apart(source.read())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return _Parts([], "")
    return _Parts([paragraph for text in parts.docstrings for paragraph in prose_paragraphs(text)], parts.code)


# --- documents


def _topics(stdlib: Path) -> Iterator[_Module]:
    """The language reference, read from the one dictionary of literals in its file."""
    file = stdlib / "pydoc_data" / "topics.py"
    if not file.is_file():
        return
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in sorted(ast.literal_eval(node.value).items()):
                yield _Module(f"pydoc_data/topics/{name}", "pydoc_data", _Parts(list(prose_paragraphs(text)), ""))


def _prose_documents(modules: Iterable[_Module]) -> Iterator[Document]:
    """One document per module, unless long; of paragraphs that start alike only the corpus' first is kept."""
    seen: set[str] = set()
    for module in modules:
        kept: list[str] = []
        for paragraph in module.parts.paragraphs:
            key = paragraph_key(paragraph)
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        yield from _documents(module, kept)


def _code_documents(modules: Iterable[_Module]) -> Iterator[Document]:
    for module in modules:
        yield from _documents(module, _TOP_LEVEL_GAP.split(module.parts.code.rstrip("\n")))


def _documents(module: _Module, blocks: Sequence[str]) -> Iterator[Document]:
    """Blocks joined to documents of bounded length, so that a held-out split by document has enough of them."""
    start, size, number = 0, 0, 0
    for i in range(1, len(blocks) + 1):
        size += len(blocks[i - 1])
        if i == len(blocks) or size + len(blocks[i]) > _MAX_DOCUMENT_CHARACTERS:
            text = "\n\n".join(blocks[start:i])
            if len(text) >= _MIN_DOCUMENT_CHARACTERS:
                yield Document(f"{module.name}#{number}", text, module.origin)
            start, size, number = i, 0, number + 1
