"""Claim: best-fit packing of >= 5 M documents/min on one core, >= 99.8 % fill; no document that fits a row is cut.

Two corpora of ``--documents`` documents, rows of 2048: lengths from a log-normal distribution (median 400 tokens, mean
670), and lengths drawn from real corpora tokenized here with GPT-2's vocabulary. Measured is what a user waits for, the
index built from the lengths and written to disk, in a process of its own; its allocations (tracemalloc, in a run that
is not timed) at a quarter of the size too, because they must not grow with the number of documents. The resident memory
does, by the mapped lengths, which the system may drop. Documents cut are counted at two row lengths, all of them and
those that fit a row: one longer than a row is cut under every rule. The rival is what trl's ``pack_dataset`` calls for
``bfd_split``, a segment tree as in the paper, where ``--peer-python`` names an interpreter that has it, on the first
``--peer-documents`` documents; both must need the same number of rows.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.best_fit import cut, num_best_fit_rows
from cpt.data.pack_effect import packing_effect
from cpt.data.pack_index import ensure_index
from cpt.data.packing import pieces_row
from cpt.data.store_selection import open_split

RESULT = Path(__file__).parents[1] / "results" / "data_packing.json"
SEQ_LEN = 2048
ROWS_READ = 2000
TRL = """
import sys, time
import numpy as np, pyarrow as pa
from trl.data_utils import _pack_bfd
lengths = np.load(sys.argv[1])
offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
table = pa.table({"input_ids": tokens})
start = time.perf_counter()
packed = _pack_bfd(table, int(sys.argv[2]), on_seq_length_overflow="split")
import trl
print(time.perf_counter() - start, len(packed), trl.__version__)
"""


@dataclass(frozen=True)
class Lengths:
    """What packing asks of a store, without its tokens: mapped, as a store's document files are."""

    path: Path
    bounds: NDArray[np.int64]

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(content_hash="0" * 64, eos_id=0)

    @property
    def num_documents(self) -> int:
        return len(self.bounds) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.bounds[-1])

    def document_bounds(self, first: int, last: int) -> NDArray[np.int64]:
        return self.bounds[first : last + 1]

    def document_starts(self, start: int, stop: int) -> NDArray[np.int64]:
        first, last = np.searchsorted(self.bounds[:-1], (start, stop))
        return self.bounds[first:last]

    def read(self, start: int, stop: int) -> NDArray[np.uint16]:
        return np.zeros(stop - start, np.uint16)


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(build(arguments.worker)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = measure(arguments, Path(scratch))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def parse_arguments() -> argparse.Namespace:
    shared = Path("..") / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000_000)
    parser.add_argument("--corpora", type=Path, default=shared / "corpora", help="folder of NAME/train.jsonl.zst")
    parser.add_argument("--tokenizer", type=Path, default=shared / "tokenizers" / "gpt2")
    parser.add_argument("--peer-python", type=Path, help="interpreter with trl, datasets and transformers")
    parser.add_argument("--peer-documents", type=int, default=200_000)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    number = arguments.documents
    found = {"log_normal": np.maximum(rng.lognormal(6.0, 1.0, number).astype(np.int64), 1)}
    if arguments.corpora.is_dir():
        found["real"] = rng.choice(real_lengths(arguments, scratch), number)
    result: dict[str, Any] = {
        "claim": __doc__.partition("\n")[0],
        "seq_len": SEQ_LEN,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "distributions": {name: measure_lengths(lengths, scratch / name, arguments) for name, lengths in found.items()},
    }
    return result


def real_lengths(arguments: argparse.Namespace, scratch: Path) -> NDArray[np.int64]:
    """Tokens of every training document of the corpora."""
    command = [sys.executable, "-m", "cpt.cli", "data", "tokenize", "--tokenizer", str(arguments.tokenizer)]
    command += ["--out", str(scratch / "store"), "--source", "all", "--domain", "general", "--heldout-fraction", "0.01"]
    for file in sorted(arguments.corpora.glob("*/train.jsonl.zst")):
        command += ["--input", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return open_split(scratch / "store" / "train").document_lengths()


def measure_lengths(lengths: NDArray[np.int64], scratch: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    whole, quarter = (run_worker(part, scratch / name) for name, part in
                      (("whole", lengths), ("quarter", lengths[: len(lengths) // 4])))  # fmt: skip
    effects = {seq_len: effect(lengths, scratch, seq_len) for seq_len in (SEQ_LEN, 4 * SEQ_LEN)}
    row: dict[str, Any] = {
        "documents": len(lengths),
        "mean_tokens": float(lengths.mean()),
        "median_tokens": float(np.median(lengths)),
        "seconds": whole["seconds"],
        "documents_per_minute": len(lengths) / whole["seconds"] * 60,
        "effects": effects,
        "allocated_megabytes": whole["allocated_megabytes"],
        "allocated_megabytes_at_a_quarter": quarter["allocated_megabytes"],
        "resident_megabytes": whole["resident_megabytes"],
        "rows_read_per_second": whole["rows_per_second"],
    }
    if arguments.peer_python:
        row["trl_bfd_split"] = against_trl(lengths[: arguments.peer_documents], scratch, arguments.peer_python)
        row["ratio"] = row["documents_per_minute"] / row["trl_bfd_split"]["documents_per_minute"]
    return row


def effect(lengths: NDArray[np.int64], scratch: Path, seq_len: int) -> dict[str, Any]:
    store: Any = Lengths(scratch, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    concat, best = (packing_effect(store, packing, seq_len) for packing in ("concat", "best_fit"))
    return {
        "fill": best.fill,
        "rows_over_concat": best.rows / concat.rows - 1,
        "cut": {"concat": concat.cut_documents, "best_fit": best.cut_documents},
        "cut_ratio": best.cut_documents / concat.cut_documents,
        "cut_needlessly": {"concat": concat.cut_needlessly, "best_fit": best.cut_needlessly},
    }


def run_worker(lengths: NDArray[np.int64], scratch: Path) -> dict[str, Any]:
    scratch.mkdir(parents=True)
    np.save(scratch / "bounds.npy", np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    command = [sys.executable, "-m", "benchmarks.data.packing", "--worker", str(scratch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def build(scratch: Path) -> dict[str, Any]:
    """In a process of its own: build the index and read some rows, every piece of which is its own read."""
    store: Any = Lengths(scratch, np.load(scratch / "bounds.npy", mmap_mode="r"))
    start = time.perf_counter()
    index = ensure_index(store, SEQ_LEN)
    seconds = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    tracemalloc.start()
    ensure_index(store, SEQ_LEN, scratch / "again")
    allocated = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    rows = np.random.default_rng(0).integers(0, index.manifest.rows, ROWS_READ).tolist()
    start = time.perf_counter()
    for row in rows:
        pieces_row(store, index.pieces(row), SEQ_LEN, pad_id=0)
    return {
        "seconds": seconds,
        "resident_megabytes": resident,
        "allocated_megabytes": allocated,
        "rows_per_second": len(rows) / (time.perf_counter() - start),
    }


def against_trl(lengths: NDArray[np.int64], scratch: Path, python: Path) -> dict[str, Any]:
    np.save(scratch / "lengths.npy", lengths)
    command = [str(python), "-c", TRL, str(scratch / "lengths.npy"), str(SEQ_LEN)]
    seconds, rows, version = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    pieces = cut(np.cumsum(lengths) - lengths, lengths, SEQ_LEN)
    ours = len(pieces.whole) + num_best_fit_rows(pieces.lengths, SEQ_LEN)
    assert ours == int(rows), f"{ours} rows here, {rows} by trl"
    rate = len(lengths) / float(seconds) * 60
    return {"documents": len(lengths), "documents_per_minute": rate, "rows": ours, "version": version}


if __name__ == "__main__":
    main()
