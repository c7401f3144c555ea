"""Claim: `cpt data tokenize` is at least 20 times as fast as `datasets.map` of the same tokenizer, ids identical.

One run makes a jsonl.zst of about ``--megabytes`` of text from the corpora, builds a store from it end to end (start of
the process to manifests, as a user waits), and lets ``datasets.map(num_proc=2)`` + ``save_to_disk`` tokenize a sample
of the same documents. Rates are bytes of UTF-8 text per second; the baseline's comes from the sample, because the whole
would take minutes. Ids are compared on the sample.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import zstandard

from cpt.data.token_store import TokenStore
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

RESULT = Path(__file__).parent / "results" / "tokenize_throughput.json"
PACKAGES = ("gigatoken", "tokenizers", "datasets", "orjson", "zstandard")
BUILD = """
import sys
from pathlib import Path
from data_tools.store_builder import StoreRequest, build_store
if __name__ == "__main__":
    inputs, tokenizer, out, workers = sys.argv[1:]
    request = StoreRequest((inputs,), Path(tokenizer), Path(out), "benchmark", "general", 0.0, workers=int(workers))
    print(build_store(request).encoder)
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = measure(arguments, Path(scratch))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not result["identical_ids"]:
        sys.exit("the ids differ")


def parse_arguments() -> argparse.Namespace:
    shared = Path("..") / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpora", type=Path, default=shared / "corpora", help="folder of NAME/train.jsonl.zst")
    parser.add_argument("--tokenizer", type=Path, default=shared / "tokenizers" / "gpt_neox_20b")
    parser.add_argument("--megabytes", type=int, default=300, help="text given to cpt")
    parser.add_argument("--sample-megabytes", type=int, default=30, help="text given to datasets.map")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the faster of so many runs counts, for both sides")
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    corpus, sample = scratch / "corpus.jsonl.zst", scratch / "sample.jsonl"
    corpus_bytes = write_corpus(corpus, unique_documents(arguments.corpora), arguments.megabytes * 10**6)
    # every 25th document, so that the sample has the corpus' mixture of languages and lengths
    spread = itertools.islice(unique_documents(arguments.corpora), 0, None, 25)
    sample_bytes = write_corpus(sample, spread, min(arguments.sample_megabytes * 10**6, corpus_bytes))
    ours = [time_build(arguments, corpus, scratch / f"store{i}") for i in range(arguments.repeats)]
    theirs = [time_datasets_map(arguments, sample, scratch / f"map{i}") for i in range(arguments.repeats)]
    encoder, _ = time_build(arguments, sample, scratch / "sample_store")
    ours_row, theirs_row = rate_row(corpus_bytes, [seconds for _, seconds in ours]), rate_row(sample_bytes, theirs)
    return {
        "claim": "cpt data tokenize: at least 20x datasets.map(num_proc=2) + save_to_disk, identical ids",
        "tokenizer": arguments.tokenizer.name,
        "encoder": encoder,
        "workers": arguments.workers,
        "cpt": ours_row,
        "datasets_map": theirs_row,
        "baseline": "rate from every 25th document of the corpus; process start and imports are counted for cpt only",
        "ratio": ours_row["megabytes_per_second"] / theirs_row["megabytes_per_second"],
        "identical_ids": same_ids(scratch / "sample_store", scratch / "map0"),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def rate_row(text_bytes: int, seconds: list[float]) -> dict[str, Any]:
    rate = text_bytes / min(seconds) / 1e6
    return {"text_megabytes": text_bytes / 1e6, "seconds": seconds, "megabytes_per_second": rate}


def unique_documents(corpora: Path) -> Iterator[bytes]:
    """JSON lines of all training texts, round after round, each text with a suffix: no document comes twice."""
    inputs = resolve_inputs([str(corpora / "*" / "train.jsonl.zst")])
    for number in itertools.count():
        for entry in inputs:
            for index, text in enumerate(read_texts(entry, ReadOptions())):
                yield orjson.dumps({"id": f"{number}/{index}", "text": f"{text}\n\n[{number}/{index}]"})


def write_corpus(file: Path, documents: Iterator[bytes], text_bytes: int) -> int:
    """Write documents until they hold ``text_bytes`` of text; returns the exact number."""
    written = 0
    compress = file.suffix == ".zst"
    with file.open("wb") as raw:
        sink = zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False) if compress else raw
        for line in documents:
            sink.write(line + b"\n")
            written += len(orjson.loads(line)["text"].encode())
            if written >= text_bytes:
                break
        if compress:
            sink.close()
    return written


def time_build(arguments: argparse.Namespace, corpus: Path, out: Path) -> tuple[str, float]:
    """(encoder note, seconds) of a whole process."""
    inputs = [str(corpus), str(arguments.tokenizer), str(out), str(arguments.workers)]
    command = [sys.executable, "-c", BUILD, *inputs]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    start = time.perf_counter()
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    return output.strip(), time.perf_counter() - start


def time_datasets_map(arguments: argparse.Namespace, sample: Path, out: Path) -> float:
    """The usual way: a fast tokenizer in a batched map over two processes, save_to_disk; loading is not counted."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(arguments.tokenizer / "tokenizer.json"))
    raw = datasets.load_dataset("json", data_files=str(sample), split="train", cache_dir=str(out) + ".cache")

    def encode(batch: dict[str, list[str]]) -> dict[str, Any]:
        return {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]}

    start = time.perf_counter()
    encoded = raw.map(encode, batched=True, num_proc=2, remove_columns=raw.column_names, load_from_cache_file=False)
    encoded.save_to_disk(str(out))
    return time.perf_counter() - start


def same_ids(store: Path, saved: Path) -> bool:
    """Every document of the store, without its EOS, against the saved data set."""
    import datasets

    rows = datasets.load_from_disk(str(saved)).with_format("numpy")
    documents = TokenStore.open(store / "train").documents()
    return all(np.array_equal(document[:-1], row["input_ids"]) for document, row in zip(documents, rows, strict=True))


if __name__ == "__main__":
    main()
