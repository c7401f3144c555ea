"""Claim: `cpt data tokenize` makes a store of 1 GB of jsonl.zst at 60 MB of text per second on two cores, 12 times as
fast as datatrove's DocumentTokenizer and 5 times as fast as Megatron's script with gigatoken, with identical ids; and
with encoders that have no gigatoken it keeps 0.85 of what their library does alone on all cores.

One run, whole processes timed, as a user waits. The peers live in an environment of their own (``--peers``: its Python,
with datatrove[processing], tokenizers, gigatoken, megatron-core, torch). They get every 13th document, uncompressed; so
does the WordPiece row, the sentencepiece row four times as many. Megatron's `preprocess_data_fast` is no part of its
wheel and is done again here: gigatoken's ``encode_files`` over a jsonl, EOD behind each document, then in one of three
ways into an indexed data set: 128 processes that flatten, as the script says; one process that flattens; one document
at a time, as its first version did.
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

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "data_tokenize_speed.json"
PACKAGES = ("gigatoken", "tokenizers", "sentencepiece", "orjson", "zstandard")
DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    folder, pattern, tokenizer, eos, out = sys.argv[1:]
    steps = [JsonlReader(folder, glob_pattern=pattern),
             DocumentTokenizer(out, tokenizer, eos_token=eos, shuffle_documents=False)]
    LocalPipelineExecutor(steps, tasks=2, workers=2, logging_dir=out + ".logs").run()
"""
MEGATRON = """
import multiprocessing, sys
import awkward as ak
import gigatoken, numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
def flatten(pair):
    chunk, dtype = pair
    return numpy.asarray(ak.flatten(chunk), dtype=dtype), numpy.asarray(ak.num(chunk, axis=1))
def add_flat(builder, documents, processes):
    borders = numpy.linspace(0, len(documents), processes + 1, dtype=int)
    chunks = [(documents[low:high], builder.dtype) for low, high in zip(borders[:-1], borders[1:])]
    if processes == 1:
        results = map(flatten, chunks)
    else:
        with multiprocessing.Pool(processes) as pool:
            results = pool.map(flatten, chunks)
    for flat, lengths in results:
        builder.data_file.write(flat.tobytes())
        first = len(builder.sequence_lengths)
        builder.sequence_lengths.extend(lengths.tolist())
        builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))
if __name__ == "__main__":
    source, tokenizer_file, eod, out, processes = sys.argv[1:]
    tokenizer = gigatoken.Tokenizer(tokenizer_file)
    documents = tokenizer.encode_files(gigatoken.JsonlFileSource([source], field="text"))
    ends = ak.singletons(ak.Array(numpy.full(len(documents), int(eod), dtype=numpy.uint32)))
    documents = ak.concatenate([documents, ends], axis=1)
    builder = IndexedDatasetBuilder(out + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    if processes == "documents":
        for document in documents:
            builder.add_document(document, [len(document)])
    else:
        add_flat(builder, documents, int(processes))
    builder.finalize(out + ".idx")
"""
LIBRARY = """
import json, multiprocessing, sys, time
def encode(kind, path, batches):
    if kind == "sentencepiece":
        from sentencepiece import SentencePieceProcessor
        processor = SentencePieceProcessor(model_file=path)
        return sum(sum(map(len, processor.encode(batch, num_threads=1))) for batch in batches)
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(path)
    return sum(len(e.ids) for batch in batches for e in tokenizer.encode_batch_fast(batch, add_special_tokens=False))
if __name__ == "__main__":
    kind, path, source = sys.argv[1:]
    texts = [json.loads(line)["text"] for line in open(source)]
    batches = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    start = time.perf_counter()
    if kind == "sentencepiece":  # its own threads lose to two processes
        context = multiprocessing.get_context("fork")
        halves = [context.Process(target=encode, args=(kind, path, batches[i::2])) for i in (0, 1)]
        for half in halves: half.start()
        for half in halves: half.join()
    else:
        encode(kind, path, batches)
    print(time.perf_counter() - start)
"""


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        result = measure(arguments, Path(scratch))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if not all(result["identical_ids"].values()):
        sys.exit("the ids differ")


def parse_arguments() -> argparse.Namespace:
    shared = ROOT.parent / "shared" / "data"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True, help="Python of the peers' environment")
    parser.add_argument("--corpora", type=Path, default=shared / "corpora", help="folder of NAME/train.jsonl.zst")
    parser.add_argument("--tokenizers", type=Path, default=shared / "tokenizers")
    parser.add_argument("--megabytes", type=int, default=1000, help="text given to cpt")
    parser.add_argument("--sample-megabytes", type=int, default=78, help="text given to peers and libraries")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="the faster of so many runs counts, for all sides")
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULT)
    return parser.parse_args()


def measure(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    corpus, sample = scratch / "corpus.jsonl.zst", scratch / "sample.jsonl"
    corpus_bytes = write_corpus(corpus, unique_documents(arguments.corpora), arguments.megabytes * 10**6)
    spread = itertools.islice(unique_documents(arguments.corpora), 0, None, 13)
    sample_bytes = write_corpus(sample, spread, arguments.sample_megabytes * 10**6)
    neox = arguments.tokenizers / "gpt_neox_20b"
    rates = {
        "cpt": build_rate(arguments, corpus, corpus_bytes, neox, scratch / "whole"),
        "cpt_on_the_sample": build_rate(arguments, sample, sample_bytes, neox, scratch / "sample"),
        "datatrove": datatrove_rate(arguments, sample, sample_bytes, neox, scratch),
        "megatron_128_processes": megatron_rate(arguments, sample, sample_bytes, neox, scratch / "mega128", "128"),
        "megatron_one_process": megatron_rate(arguments, sample, sample_bytes, neox, scratch / "mega1", "1"),
        "megatron_by_document": megatron_rate(arguments, sample, sample_bytes, neox, scratch / "megadoc", "documents"),
    }
    own, same_size = rates["cpt"]["megabytes_per_second"], rates["cpt_on_the_sample"]["megabytes_per_second"]
    peers = [name for name in rates if not name.startswith("cpt")]
    store = scratch / "sample0"
    return {
        "claim": "cpt data tokenize: >= 60 MB/s on two cores, >= 12x datatrove, >= 5x Megatron's fast script; >= 0.85 "
        "of the library alone without gigatoken; identical ids",
        "workers": arguments.workers,
        "rates": rates,
        "ratios": {name: own / rates[name]["megabytes_per_second"] for name in peers},
        "ratios_on_the_same_sample": {name: same_size / rates[name]["megabytes_per_second"] for name in peers},
        "identical_ids": {
            "datatrove": same_as_flat(store, sorted((scratch / "datatrove0").glob("*.ds"))),
            "megatron": same_as_flat(store, [Path(f"{scratch / 'mega128'}0.bin")]),
            "tokenizers": same_as_tokenizers(store, sample, neox),
        },
        "without_gigatoken": library_rows(arguments, sample, sample_bytes, scratch),
        "cpu_count": os.cpu_count(),
        "load_average": os.getloadavg(),
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


def timed(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{command[:4]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds


def build_rate(
    arguments: argparse.Namespace, source: Path, text_bytes: int, tokenizer: Path, out: Path, *more: str
) -> dict[str, Any]:
    command = [sys.executable, "-m", "cpt.cli", "data", "tokenize", "--input", str(source), "--tokenizer"]
    options = [str(tokenizer), "--source", "benchmark", "--domain", "general", "--heldout-fraction", "0", *more]
    options += ["--workers", str(arguments.workers)]
    runs = [timed([*command, *options, "--out", f"{out}{i}"]) for i in range(arguments.repeats)]
    return rate_row(text_bytes, runs)


def datatrove_rate(
    arguments: argparse.Namespace, sample: Path, text_bytes: int, tokenizer: Path, scratch: Path
) -> dict[str, Any]:
    """Two tasks on two halves of the sample, which is how it uses two cores."""
    lines = sample.read_bytes().splitlines(keepends=True)
    folder = scratch / "halves"
    folder.mkdir()
    for number, half in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        (folder / f"{number}.jsonl").write_bytes(b"".join(half))
    options = [str(folder), "*.jsonl", str(tokenizer / "tokenizer.json"), "<|endoftext|>"]
    command = [str(arguments.peers), "-c", DATATROVE, *options]
    return rate_row(text_bytes, [timed([*command, str(scratch / f"datatrove{i}")]) for i in range(arguments.repeats)])


def megatron_rate(
    arguments: argparse.Namespace, sample: Path, text_bytes: int, tokenizer: Path, out: Path, way: str
) -> dict[str, Any]:
    script = Path(f"{out}.py")
    script.write_text(MEGATRON)
    options = [str(sample), str(tokenizer / "tokenizer.json"), "0"]
    command = [str(arguments.peers), str(script), *options]
    runs = [timed([*command, f"{out}{i}", way]) for i in range(arguments.repeats)]
    return rate_row(text_bytes, runs)


def library_rows(
    arguments: argparse.Namespace, sample: Path, sample_bytes: int, scratch: Path
) -> dict[str, dict[str, Any]]:
    """A sentencepiece unigram model, and a WordPiece tokenizer, which gigatoken refuses; against their libraries."""
    wordpiece = train_wordpiece(sample, scratch / "wordpiece")
    # the fast library gets more text: its process start is not timed, and that of cpt is half a second
    larger = scratch / "larger.jsonl"
    spread = itertools.islice(unique_documents(arguments.corpora), 0, None, 3)
    larger_bytes = write_corpus(larger, spread, 4 * sample_bytes)
    t5 = arguments.tokenizers / "t5" / "spiece.model"
    rows = {}
    for kind, path, source, source_bytes, more in (
        ("sentencepiece", t5, larger, larger_bytes, ()),
        ("tokenizers", wordpiece / "tokenizer.json", sample, sample_bytes, ("--eos-token", "[SEP]")),
    ):
        command = [sys.executable, "-c", LIBRARY, kind, str(path), str(source)]
        alone = [
            float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            for _ in range(arguments.repeats)
        ]
        library = rate_row(source_bytes, alone)
        own = build_rate(arguments, source, source_bytes, path, scratch / kind, *more)
        ratio = own["megabytes_per_second"] / library["megabytes_per_second"]
        rows[kind] = {"tokenizer": path.name, "library_alone": library, "cpt": own, "ratio": ratio}
    return rows


def train_wordpiece(sample: Path, out: Path) -> Path:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=20_000, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    texts = itertools.islice(read_texts(resolve_inputs([str(sample)])[0], ReadOptions()), 0, None, 20)
    tokenizer.train_from_iterator(texts, trainer)
    out.mkdir()
    tokenizer.save(str(out / "tokenizer.json"))
    return out


def same_as_flat(store: Path, files: list[Path]) -> bool:
    """All ids, EOS included, end to end, against files of 16-bit ids."""
    found = TokenStore.open(store / "train")
    expected = np.concatenate([np.fromfile(file, np.uint16) for file in files])
    return np.array_equal(found.read(0, found.num_tokens), expected)


def same_as_tokenizers(store: Path, sample: Path, tokenizer: Path) -> bool:
    """Every 10th document of the sample."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    pairs = zip(
        read_texts(resolve_inputs([str(sample)])[0], ReadOptions()),
        TokenStore.open(store / "train").documents(),
        strict=True,
    )
    return all(
        plain.encode(text, add_special_tokens=False).ids == document[:-1].tolist()
        for text, document in itertools.islice(pairs, 0, None, 10)
    )


if __name__ == "__main__":
    main()
