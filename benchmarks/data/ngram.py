"""Claim: the numpy n-gram model looks up what KenLM looks up, and trains a reference of 18 MB in seconds.

One model (law) is trained here, written as an ARPA file and loaded by KenLM (package kenlm, in the environment of
``--peers``, which has the look-up but not the estimator; the estimates are checked by the tests against the formula).
Both give the log probability of the same sentences, split into words beforehand; ours is timed with its splitting too.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.clean.ngram import BEGIN, NgramModel, tokenize_line
from data_tools.clean.ngram_training import TrainOptions, train_ngram
from data_tools.sources import ReadOptions, read_texts, resolve_inputs

RESULT = Path(__file__).parents[1] / "results" / "data_ngram.json"
KENLM = """
import json, sys, time
import kenlm
model = kenlm.Model(sys.argv[1])
documents = [[line for line in document.split("\\n")] for document in open(sys.argv[2]).read().split("\\0")]
start = time.process_time()
scores = [sum(model.score(line) for line in document) for document in documents]
print(json.dumps({"seconds": time.process_time() - start, "scores": scores}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    corpora = Path("..") / "shared" / "data" / "corpora"
    parser.add_argument("--corpora", type=Path, default=corpora, help="folder of NAME/train.jsonl.zst")
    parser.add_argument("--peers", type=Path, default=None, help="python of an environment with the package kenlm")
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--documents", type=int, default=300, help="scored documents per corpus")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    result = measure(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    reference = texts(arguments.corpora / "law_uscode" / "train.jsonl.zst", 10**6)
    start = time.process_time()
    model = train_ngram(reference, TrainOptions(order=arguments.order, prune=0, min_count=1))
    training = time.process_time() - start
    names = ("law_uscode", "en_gov_web", "fin_fed", "en_novels")
    documents = [
        text for name in names for text in texts(arguments.corpora / name / "train.jsonl.zst", arguments.documents)
    ]
    split = [[" ".join(tokens) for line in text.splitlines() if (tokens := tokenize_line(line))] for text in documents]
    encoded = [model.encode(text) for text in documents]
    size = sum(len(text.encode()) for text in documents) / 1e6
    words = sum(int((ids != BEGIN).sum()) for ids in encoded) / 1e6
    start = time.process_time()
    scores = [float(model.log_probs(ids).sum()) / np.log(10) for ids in encoded]
    look_up = time.process_time() - start
    start = time.process_time()
    for text in documents:
        model.perplexity(text)
    whole = time.process_time() - start
    result = {
        "claim": "n-gram look-ups equal KenLM's on the same model",
        "order": arguments.order,
        "ngrams": model.facts["ngrams"],
        "training_megabytes_per_second": sum(len(text.encode()) for text in reference) / 1e6 / training,
        "perplexity_megabytes_per_second": size / whole,
        "look_up_million_words_per_second": words / look_up,
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
    }
    if arguments.peers:
        theirs = run_kenlm(arguments.peers, model, split)
        differences = np.abs(np.array(theirs["scores"]) - scores) / np.abs(scores)
        result |= {
            "kenlm_million_words_per_second": words / theirs["seconds"],
            "speed_ratio": theirs["seconds"] / look_up,
            "largest_relative_difference": float(differences.max()),
        }
    return result


def texts(file: Path, at_most: int) -> list[str]:
    [source] = resolve_inputs([str(file)])
    return [text for _, text in zip(range(at_most), read_texts(source, ReadOptions()), strict=False)]


def run_kenlm(python: Path, model: NgramModel, documents: list[list[str]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arpa, sentences = Path(folder) / "model.arpa", Path(folder) / "sentences"
        with arpa.open("w", encoding="utf-8") as file:
            file.writelines(arpa_lines(model))
        sentences.write_text("\0".join("\n".join(lines) for lines in documents), encoding="utf-8")
        command = [str(python), "-c", KENLM, str(arpa), str(sentences)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def arpa_lines(model: NgramModel) -> Iterator[str]:
    """The model in the text format that n-gram tools share; logarithms to the base 10."""
    yield "\\data\\\n"
    for n, order in enumerate(model.orders, 1):
        yield f"ngram {n}={len(order.keys)}\n"
    spelled = list(model.words)
    for n, order in enumerate(model.orders, 1):
        yield f"\n\\{n}-grams:\n"
        if n > 1:
            keys = order.keys.tolist()
            spelled = [f"{spelled[key // len(model.words)]} {model.words[key % len(model.words)]}" for key in keys]
        log_probs = np.maximum(order.log_prob / np.log(10), -99).tolist()
        for gram, log_prob, backoff in zip(spelled, log_probs, (order.backoff / np.log(10)).tolist(), strict=True):
            yield f"{log_prob:.7f}\t{gram}" + (f"\t{backoff:.7f}\n" if n < len(model.orders) else "\n")
    yield "\n\\end\\\n"


if __name__ == "__main__":
    main()
