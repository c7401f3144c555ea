"""Claim: `cpt data tokenize` needs less than 1.5 GB at its peak, all its processes together, however large the input
is, with a document of 200 MB in it.

Builds stores of two synthetic inputs, one five times the other, each with one document of ``--long-megabytes`` in its
middle, and watches the resident memory (RSS) of the process and all its children, summed, 20 times a second. Pages that
processes share count once for each of them, so the sum is an upper bound.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import orjson
import psutil
import zstandard

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "data_tokenize_memory.json"
BAR_MEGABYTES = 1500


def main() -> None:
    shared = ROOT.parent / "shared" / "data" / "tokenizers"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs=2, default=(1000, 5000))
    parser.add_argument("--long-megabytes", type=int, default=200)
    parser.add_argument("--tokenizers", type=Path, nargs="+", default=[shared / "gpt_neox_20b"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    rows: dict[str, Any] = {}
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
            source = Path(scratch) / "input.jsonl.zst"
            write_input(source, megabytes * 10**6, arguments.long_megabytes * 10**6)
            for tokenizer in arguments.tokenizers:
                row = watch(source, tokenizer, Path(scratch) / f"store_{tokenizer.stem}", arguments.workers)
                rows.setdefault(tokenizer.stem, {})[f"{megabytes}_megabytes"] = row
    result = {
        "claim": f"peak memory of all processes below {BAR_MEGABYTES} MB, independent of the input's size",
        "workers": arguments.workers,
        "long_document_megabytes": arguments.long_megabytes,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def write_input(file: Path, text_bytes: int, long_bytes: int) -> None:
    """Documents of about 5 kB of invented words, never the same twice, and the long one in the middle."""
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfglmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "is")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(200_000)]
    written, long_is_due = 0, True
    with file.open("wb") as raw, zstandard.ZstdCompressor(level=3).stream_writer(raw) as sink:
        while written < text_bytes:
            text = " ".join(draw.choices(words, k=800)) + ".\n"
            if long_is_due and written >= text_bytes // 2:
                text, long_is_due = text * (long_bytes // len(text)), False
            sink.write(orjson.dumps({"text": text}) + b"\n")
            written += len(text)


def watch(source: Path, tokenizer: Path, out: Path, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "cpt.cli", "data", "tokenize", "--input", str(source), "--tokenizer"]
    options = [str(tokenizer), "--out", str(out), "--source", "s", "--domain", "d", "--workers", str(workers)]
    peaks = {"sum": 0, "main": 0}
    start = time.perf_counter()
    with subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = [resident(each) for each in (watched, *children(watched))]
            peaks = {"sum": max(peaks["sum"], sum(sizes)), "main": max(peaks["main"], sizes[0])}
            time.sleep(0.05)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        sys.exit(f"ended with {process.returncode}: {printed}")
    encoder = next(line for line in printed.splitlines() if line.startswith("encoder: "))
    return {
        "peak_megabytes": peaks["sum"] / 1e6,
        "peak_megabytes_of_the_main_process": peaks["main"] / 1e6,
        "seconds": time.perf_counter() - start,
        "encoder": encoder,
    }


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.NoSuchProcess:
        return []


def resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


if __name__ == "__main__":
    main()
