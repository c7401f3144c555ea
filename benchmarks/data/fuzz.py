"""Claim: damaged input gives an error or a counted reject: no other exception, no hang, no crash, no silent loss.

Each case is a valid small file, mutated by a generator seeded with (format, number): bits, bytes, runs cut out,
doubled, overwritten, moved, the file cut short, or random bytes throughout. It is read by ``read_documents`` and by
``read_texts``, or by the reader of the artifact. Checked beyond "nothing but DataError":

- both ways of reading agree on every record (but for unreadable values beside the text), and reading from a later
  record gives the rest of the same list
- JSON lines: as many items as lines, whatever is in them; untouched lines come through unchanged
- checksummed streams (gz, zst): the whole original content or an error; tables: all rows or an error
- every text and every field can be written again
- Megatron indices and token stores: an error, or the original content if only unchecked bytes were touched

Workers are processes with a time limit per case and a limit on memory; a worker that dies is a finding of its case.
Replay one case with ``--case jsonl:17``.
"""

import argparse
import functools
import gzip
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from cpt.rundir import DataError
from data_tools.corpus.document import BadRecord, Document
from data_tools.readers.records import dump_json
from data_tools.sources import ReadOptions, read_documents, read_texts, resolve_inputs

RESULT = Path(__file__).parents[1] / "results" / "data_fuzz.json"
PACKAGES = ("orjson", "pyarrow", "zstandard", "warcio", "datasets")
CASE_SECONDS = 20
MEMORY_BYTES = 12 << 30  # of addresses; pyarrow and zstandard reserve far more than they touch


class Finding(AssertionError):
    """A broken promise."""


@dataclass(frozen=True)
class Format:
    """``make`` builds valid content, ``check`` reads the mutated file; ``share`` of the cases relative to others."""

    suffix: str
    make: Callable[[], bytes]
    check: Callable[[Path, bytes, bytes], str]
    mutate: "Mutate"
    share: int = 4


Mutate = Callable[[random.Random, bytes], bytes]


# --- mutations


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    raw = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        raw = rng.choice(_MUTATIONS)(rng, raw)
    return bytes(raw)


def _place(rng: random.Random, raw: bytearray, longest: int = 64) -> tuple[int, int]:
    start = rng.randrange(len(raw) + 1)
    return start, min(len(raw), start + rng.randrange(1, longest))


def _flip(rng: random.Random, raw: bytearray) -> bytearray:
    if raw:
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return raw


def _overwrite(rng: random.Random, raw: bytearray) -> bytearray:
    start, stop = _place(rng, raw, 16)
    choices = (rng.randbytes(stop - start), b"\xff" * (stop - start), bytes(stop - start))
    raw[start:stop] = rng.choice(choices)
    return raw


def _insert(rng: random.Random, raw: bytearray) -> bytearray:
    start, _ = _place(rng, raw)
    raw[start:start] = rng.choice((rng.randbytes(rng.randrange(1, 32)), *_TOKENS))
    return raw


def _delete(rng: random.Random, raw: bytearray) -> bytearray:
    start, stop = _place(rng, raw)
    del raw[start:stop]
    return raw


def _double(rng: random.Random, raw: bytearray) -> bytearray:
    start, stop = _place(rng, raw, 256)
    raw[start:start] = raw[start:stop] * rng.choice((1, 2, 50))
    return raw


def _move(rng: random.Random, raw: bytearray) -> bytearray:
    start, stop = _place(rng, raw)
    piece = raw[start:stop]
    del raw[start:stop]
    target, _ = _place(rng, raw)
    raw[target:target] = piece
    return raw


def _truncate(rng: random.Random, raw: bytearray) -> bytearray:
    return raw[: rng.randrange(len(raw) + 1)]


def _integer(rng: random.Random, raw: bytearray) -> bytearray:
    """A little-endian number in the middle becomes one at a border of its range."""
    size = rng.choice((1, 2, 4, 8))
    start = rng.randrange(max(len(raw) - size, 1))
    value = rng.choice((0, 1, 127, 128, (1 << 8 * size) - 1, (1 << 8 * size - 1) - 1, 1 << 8 * size - 1))
    raw[start : start + size] = (value % (1 << 8 * size)).to_bytes(size, "little")
    return raw


def _noise(rng: random.Random, raw: bytearray) -> bytearray:
    return bytearray(rng.randbytes(rng.randrange(400)))


_MUTATIONS = (_flip, _flip, _overwrite, _insert, _delete, _double, _move, _truncate, _integer, _noise)
_TOKENS = (
    b"\n", b"\r\n\r\n", b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b"{", b"}", b"[" * 2000, b"null",
    b"\\ud800", b"1e999", b"-1", b"9" * 400, b"NaN", b'{"text":"x"}\n', b"WARC/1.0\r\n",
    b"Content-Length: 99999999999\r\n", b"<script>", b"</", b"<!--", b"&#xD800;", b"charset=utf-7",
    b"charset=punycode", b"&#" + b"9" * 5000, b"<a " * 4000,
    b"Transfer-Encoding: chunked\r\n",
)  # fmt: skip


def mutate_lines(rng: random.Random, content: bytes) -> bytes:
    """Whole lines damaged, the others untouched: nothing in here makes or removes a line."""
    lines = content.split(b"\n")[:-1]
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        lines[at] = mutate_bytes(rng, lines[at]).replace(b"\n", b" ")
    return b"\n".join(lines) + b"\n"


def mutate_json(rng: random.Random, content: bytes) -> bytes:
    """A value somewhere in the JSON replaced, a key lost or added: still JSON."""
    root = json.loads(content)
    for _ in range(rng.randrange(1, 3)):
        node = root
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.7:
                node = node[key]
                continue
            _change(rng, node, key)
            break
    return json.dumps(root).encode()


def _change(rng: random.Random, node: Any, key: Any) -> None:
    values = (
        None,
        True,
        -1,
        0,
        2**31,
        2**63,
        2**70,
        1.5,
        "",
        "x",
        "../../etc",
        "\ud800",
        [],
        [[]],
        {},
        {"a": 1},
        1e308,
    )
    action = rng.choice(("set", "set", "set", "delete", "add"))
    if action == "set":
        node[key] = rng.choice(values)
    elif action == "delete":
        del node[key]
    elif isinstance(node, dict):
        node["added"] = rng.choice(values)
    else:
        node.append(rng.choice(values))


# --- valid files


ROWS: list[dict[str, Any]] = [
    {"text": f"Text {i} äöü 😀 " + "word " * (i * 7 % 23), "id": i, "tags": ["a", "b"][: i % 3], "meta": {"url": None}}
    for i in range(12)
]


@functools.cache
def jsonl() -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in ROWS)


@functools.cache
def gz() -> bytes:
    return gzip.compress(jsonl(), mtime=0)


@functools.cache
def zst() -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_checksum=True).compress(jsonl())


@functools.cache
def table(kind: str) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pa.Table.from_pylist(ROWS)
    days = pa.array(range(len(ROWS)), pa.int64()).cast(pa.timestamp("us"))
    rows = rows.append_column("day", days).append_column("kind", pa.array(["x", "y", "x"] * 4).dictionary_encode())
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(rows, sink, row_group_size=5)
    else:
        make = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
        options = pa.ipc.IpcWriteOptions(compression="zstd") if kind == "feather" else None
        with make(sink, rows.schema, options=options) as writer:
            writer.write_table(rows, max_chunksize=5)
    return bytes(sink.getvalue())


def txt() -> bytes:
    return "\ufeffone\nstill one\n\nzwei äöü\r\n \n\nthree 😀\n".encode() * 3


def _warc_record(kind: str, content_type: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Type: {content_type}\r\nWARC-Target-URI: https://a.org/ü\r\n"
    return f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


@functools.cache
def warc() -> bytes:
    page = (
        "<html><head><meta charset=utf-8><title>t</title></head><body><p>Grüße &amp; mehr<script>x</script><pre>a</pre>"
    )
    http = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n"
    chunked = f"{http}Transfer-Encoding: chunked\r\nContent-Encoding: gzip\r\n\r\n".encode()
    packed = gzip.compress(page.encode(), mtime=0)
    return b"".join(
        [
            _warc_record("warcinfo", "application/warc-fields", b"software: x\r\n"),
            _warc_record("response", "application/http; msgtype=response", f"{http}\r\n{page}".encode()),
            _warc_record("response", "application/http", chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(packed), packed)),
            _warc_record("conversion", "text/plain", "Klartext äöü\nzwei".encode()),
        ]
    )


@functools.cache
def saved_files() -> dict[str, bytes]:
    """A saved Hugging Face dataset, by file name."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        datasets.Dataset.from_list(ROWS).save_to_disk(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


@functools.cache
def megatron_index() -> bytes:
    import numpy as np

    from data_tools.interop.megatron_index import HEADER, MAGIC

    lengths = np.array([3, 0, 5, 2, 7], "<i4")
    pointers = ((lengths.cumsum() - lengths) * 4).astype("<i8")
    header = HEADER.pack(MAGIC, 1, 4, len(lengths), 5)
    return header + lengths.tobytes() + pointers.tobytes() + np.array([0, 1, 3, 4, 5], "<i8").tobytes()


def _store(folder: Path) -> Path:
    from cpt.data.token_store import StoreLabel, TokenizerFacts, write_split

    facts = TokenizerFacts("t", "f" * 64, "T")
    write_split(folder, StoreLabel("s", "general", "train", 100, 0, facts), [[[5, 7, 0], [9, 0]], [[4, 0]]])
    return folder


@functools.cache
def store_file(name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return (_store(Path(folder)) / name).read_bytes()


# --- checks


Item = Document | BadRecord


def _read(file: Path, options: ReadOptions, start: int = 0) -> list[Item]:
    [source] = resolve_inputs([str(file)])
    return list(read_documents(source, options, start=start))


def check_documents(file: Path, original: bytes, mutated: bytes, txt_documents: Any = "file") -> str:
    """``read_documents`` and ``read_texts`` agree, from any start, and all can be written."""
    options = ReadOptions(txt_documents=txt_documents)
    try:
        items = _read(file, options)
    except DataError as error:
        _require(len(str(error)) < 2000 and file.name in str(error), f"a useless message: {str(error)[:200]}")
        _require_error(file, options)
        return "error"
    _check_writable(items)
    _check_texts(file, options, items)
    start = len(mutated) % (len(items) + 1)
    _require(_read(file, options, start) == items[start:], f"other records from number {start} on")
    return "rejects" if any(isinstance(item, BadRecord) for item in items) else "documents"


def _require(good: bool, problem: str) -> None:
    if not good:
        raise Finding(problem)


def _require_error(file: Path, options: ReadOptions) -> None:
    try:
        [source] = resolve_inputs([str(file)])
        for _ in read_texts(source, options):
            pass
    except DataError:
        return
    # read_texts looks at one column: damage in the others does not concern it
    _require(
        file.suffix in (".parquet", ".arrow", ".feather", ""), "read_documents refuses the file, read_texts does not"
    )


def _check_writable(items: list[Item]) -> None:
    for item in items:
        if isinstance(item, Document):
            _require(bool(item.text), "an empty document")
            dump_json({"text": item.text, **item.fields})
        else:
            _require(item.reason.startswith("bad_record.") and bool(item.detail), f"no reason: {item}")
            dump_json({"detail": item.detail, "text": item.raw.decode("utf-8", "replace")})


def _check_texts(file: Path, options: ReadOptions, items: list[Item]) -> None:
    [source] = resolve_inputs([str(file)])
    read: list[str] = []
    try:
        read.extend(read_texts(source, options))
        complete = True
    except DataError:
        complete = False
    for text, item in zip(read, items, strict=False):
        expected = item.text if isinstance(item, Document) else ""
        # a value of another column can be unreadable; who asks for the text only does not see it
        same = text == expected or (isinstance(item, BadRecord) and item.reason == "bad_record.unreadable")
        _require(same, "read_texts and read_documents differ")
    if complete:
        _require(len(read) == len(items), f"{len(read)} texts of {len(items)} records")
    else:
        stopped = next((item for item in items if isinstance(item, BadRecord)), None)
        _require(stopped is not None, "read_texts refuses what read_documents accepts")


def check_lines(file: Path, original: bytes, mutated: bytes) -> str:
    outcome = check_documents(file, original, mutated)
    _require(outcome != "error", "JSON lines have no damage of the file as a whole")
    items = _read(file, ReadOptions())
    lines = mutated.split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    _require(len(items) == len(lines), f"{len(items)} items of {len(lines)} lines")
    known = {orjson.dumps(row): row for row in ROWS}
    for item, line in zip(items, lines, strict=True):
        if line in known:
            whole = isinstance(item, Document) and {"text": item.text, **item.fields} == known[line]
            _require(whole, "an untouched line did not come through")
    return outcome


def check_stream(file: Path, original: bytes, mutated: bytes) -> str:
    outcome = check_documents(file, original, mutated)
    if outcome != "error":
        found = [item.text for item in _read(file, ReadOptions()) if isinstance(item, Document)]
        times = max(len(found) // len(ROWS), 1)  # a file doubled as a whole is a valid file
        same = found == [row["text"] for row in ROWS] * times
        _require(same, f"{len(found)} of {len(ROWS)} documents, without an error")
    return outcome


def check_table(file: Path, original: bytes, mutated: bytes) -> str:
    """Values have no checksum, rows have a count."""
    outcome = check_documents(file, original, mutated)
    if outcome != "error":
        found = len(_read(file, ReadOptions()))
        _require(found == len(ROWS), f"{found} of {len(ROWS)} rows, without an error")
    return outcome


def check_saved(file: Path, original: bytes, mutated: bytes) -> str:
    folder = file.parent / "saved"
    folder.mkdir(exist_ok=True)
    for name, content in saved_files().items():
        (folder / name).write_bytes(mutated if name == file.name else content)
    return check_table(folder, original, mutated)


def check_blank_lines(file: Path, original: bytes, mutated: bytes) -> str:
    return check_documents(file, original, mutated, "blank-line")


def check_megatron(file: Path, original: bytes, mutated: bytes) -> str:
    from data_tools.interop.megatron_index import open_index

    file.with_suffix(".bin").write_bytes(bytes(17 * 4))
    try:
        index = open_index(file)
    except DataError:
        return "error"
    ends = [end for ends in index.document_ends() for end in ends.tolist()]
    _require(len(ends) == index.documents and (not ends or ends[-1] == index.tokens), f"ends are {ends}")
    _require(ends == sorted(ends) and len(index.map_tokens()) == index.tokens, f"ends are {ends}")
    return "documents"


def check_store(file: Path, original: bytes, mutated: bytes) -> str:
    from cpt.data.token_store import TokenStore
    from data_tools.interop.datasets_view import as_dataset

    folder = _store(file.parent / "store")
    (folder / file.name).write_bytes(mutated)
    try:
        store = TokenStore.open(folder)
        as_dataset(folder)
        store.verify()
        documents = [document.tolist() for document in store.documents()]
    except DataError:
        return "error"
    _require(documents == [[5, 7, 0], [9, 0], [4, 0]], f"other documents: {documents}")
    return "documents"


def _saved_file(name: str) -> bytes:
    return saved_files()[name]


_SAVED_MUTATIONS: dict[str, Mutate] = {
    "data-00000-of-00001.arrow": mutate_bytes, "state.json": mutate_json, "dataset_info.json": mutate_json
}  # fmt: skip
FORMATS: dict[str, Format] = {
    "jsonl": Format(".jsonl", jsonl, check_lines, mutate_bytes, 12),
    "jsonl_records": Format(".jsonl", jsonl, check_lines, mutate_lines, 12),
    "jsonl.gz": Format(".jsonl.gz", gz, check_stream, mutate_bytes, 6),
    "jsonl.zst": Format(".jsonl.zst", zst, check_stream, mutate_bytes, 12),
    "parquet": Format(".parquet", lambda: table("parquet"), check_table, mutate_bytes, 12),
    "arrow_file": Format(".arrow", lambda: table("file"), check_table, mutate_bytes, 8),
    "arrow_stream": Format(".arrow", lambda: table("stream"), check_table, mutate_bytes, 8),
    "feather": Format(".feather", lambda: table("feather"), check_table, mutate_bytes, 4),
    **{
        f"saved_{name}": Format(name, functools.partial(_saved_file, name), check_saved, mutate, 1)
        for name, mutate in _SAVED_MUTATIONS.items()
    },
    "txt": Format(".txt", txt, check_documents, mutate_bytes, 2),
    "txt_blank_lines": Format(".txt", txt, check_blank_lines, mutate_bytes, 4),
    "warc": Format(".warc", warc, check_documents, mutate_bytes, 12),
    "warc.gz": Format(".warc.gz", lambda: gzip.compress(warc(), mtime=0), check_documents, mutate_bytes, 2),
    "megatron_idx": Format(".idx", megatron_index, check_megatron, mutate_bytes, 6),
    "manifest": Format("manifest.json", lambda: store_file("manifest.json"), check_store, mutate_json, 6),
    "manifest_bytes": Format("manifest.json", lambda: store_file("manifest.json"), check_store, mutate_bytes, 4),
    "store_positions": Format(
        "documents_00000.bin", lambda: store_file("documents_00000.bin"), check_store, mutate_bytes, 2
    ),
}  # fmt: skip


# --- running


def run_case(name: str, number: int, folder: Path) -> str:
    """The outcome; raises what went wrong."""
    form = FORMATS[name]
    original = form.make()
    mutated = form.mutate(random.Random(f"{name}:{number}"), original)
    file = folder / (f"x{form.suffix}" if form.suffix.startswith(".") else form.suffix)
    file.write_bytes(mutated)
    return form.check(file, original, mutated)


def _alarm(signum: int, frame: Any) -> None:
    raise Finding(f"more than {CASE_SECONDS} s")


def worker(name: str, numbers: range, at: Any, outcomes: Any, findings: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, _alarm)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        for number in numbers:
            at.value = number
            signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
            try:
                counts[run_case(name, number, Path(folder))] += 1
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                findings.put((name, number, f"{type(error).__name__}: {str(error)[:300]} ({where})"))
                counts["finding"] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    outcomes.put((name, dict(counts)))


def run_numbers(name: str, numbers: range) -> tuple[Counter[str], list[tuple[str, int, str]]]:
    """All cases in a child process, which is started again behind a case that kills it."""
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    found: list[tuple[str, int, str]] = []
    while numbers:
        at, outcomes, findings = context.Value("q", numbers.start), context.SimpleQueue(), context.Manager().Queue()
        process = context.Process(target=worker, args=(name, numbers, at, outcomes, findings))
        process.start()
        process.join()
        while not findings.empty():
            found.append(findings.get())
        if process.exitcode == 0:
            counts.update(outcomes.get()[1])
            break
        found.append((name, at.value, f"the process died with {process.exitcode}"))
        counts.update({"finding": 1, "not counted before a crash": at.value - numbers.start})
        numbers = range(at.value + 1, numbers.stop)
    return counts, found


def shares(cases: int, names: list[str]) -> Iterator[tuple[str, int]]:
    total = sum(FORMATS[name].share for name in names)
    return ((name, -(-cases * FORMATS[name].share // total)) for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case of each format")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--case", help="FORMAT:NUMBER, replayed in this process")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    if arguments.case:
        name, _, number = arguments.case.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print(run_case(name, int(number), Path(folder)))
        return
    rows, findings = {}, []
    for name, count in shares(arguments.cases, arguments.formats):
        start = time.perf_counter()
        counts, found = run_numbers(name, range(arguments.first, arguments.first + count))
        rows[name] = {"cases": count, "seconds": round(time.perf_counter() - start, 1), "outcomes": dict(counts)}
        findings += [{"case": f"{name}:{number}", "what": what} for name, number, what in found]
        print(name, rows[name], flush=True)
    result = {
        "claim": "damaged input gives an error or a counted reject: no other exception, hang, crash or silent loss",
        "cases": sum(row["cases"] for row in rows.values()),
        "findings": findings,
        "formats": rows,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for finding in findings[:40]:
        print(finding)
    sys.exit(f"{len(findings)} findings" if findings else 0)


if __name__ == "__main__":
    main()
