"""Claim: the held-out loss of every source is the one that a few lines of transformers find on the exported folder.

    python -m benchmarks.eval.loss_against_transformers      # writes results/eval_loss_against_transformers.json

The weights stories260K (a real pre-trained Llama) are continued for some steps on real corpora. The records that the
run wrote are compared with transformers' own forward pass on the exported checkpoint and, for step 0, on the folder of
the weights: one piece of one document at a time, read from the raw files of the token store, so nothing of packing,
batching, attention over packed rows, chunked losses or the store's reader is shared. Relative difference, fp32; bar
1e-5, for losses of sources, and told for the worst single document as well.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from benchmarks.engine.result import write_result
from cpt.eval.document_pieces import by_document, by_source
from cpt.eval.results import pieces_file, read_pieces
from cpt.rundir import RunDir

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = SHARED / "weights" / "stories260K"
BAR = 1e-5
SEQ_LEN, STEPS, BATCH_TOKENS = 512, 20, 4096
SOURCES = {  # corpus -> (domain, documents)
    "en_tinystories": ("general", 600),
    "en_novels": ("general", 50),
    "law_uscode": ("law", 300),
    "med_qa": ("medicine", 150),
    "de_novels": ("german", 60),
    "code_python": ("code", 40),
}


def cpt(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "cpt.cli", *map(str, arguments)], check=True, timeout=900)


def tokenize(folder: Path, corpus: str, domain: str, documents: int) -> None:
    raw = folder / f"{corpus}.jsonl"
    with zstandard.open(SHARED / "corpora" / corpus / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
        raw.write_text("".join(itertools.islice(lines, documents)), encoding="utf-8")
    labels = ("--source", corpus, "--domain", domain, "--heldout-fraction", "0.12")
    cpt("data", "tokenize", "--input", raw, "--tokenizer", WEIGHTS, "--out", folder / corpus, *labels)


def train(folder: Path) -> RunDir:
    config = {
        "run": {"name": "continued", "dir": str(folder / "runs")},
        "model": {"init_from": str(WEIGHTS)},
        "data": {"stores": {name: str(folder / name) for name in SOURCES}, "seq_len": SEQ_LEN},
        "replay": {"share_general": 0.25},
        "train": {
            "tokens": STEPS * BATCH_TOKENS,
            "global_batch_tokens": BATCH_TOKENS,
            "micro_batch_size": 4,
            "peak_lr": 1e-3,
            "precision": "fp32",
        },
        "eval": {"tokens_per_source": 10**9},
        "log": {"wandb": "disabled"},
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    cpt("train", file)
    return RunDir(folder / "runs" / "continued")


def pieces(store: Path) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """(document, tokens) of every piece that lies in a whole row; a row reads one token more than it holds."""
    tokens, starts = np.fromfile(store / "tokens_00000.bin", "<u2"), np.fromfile(store / "documents_00000.bin", "<i8")
    end_of_rows = (len(tokens) - 1) // SEQ_LEN * SEQ_LEN
    for number, (start, stop) in enumerate(itertools.pairwise(starts.tolist())):
        cuts = [
            start,
            *range((start // SEQ_LEN + 1) * SEQ_LEN, min(stop, end_of_rows), SEQ_LEN),
            min(stop, end_of_rows),
        ]
        for first, last in itertools.pairwise(cuts):
            if first < last:
                yield number, tokens[first : min(last + 1, stop)].astype(np.int64)


@torch.no_grad()
def with_transformers(model: Any, store: Path) -> dict[int, tuple[float, int]]:
    """Document -> (nats, counted tokens)."""
    found: dict[int, tuple[float, int]] = {}
    for number, ids in pieces(store):
        if len(ids) > 1:
            row = torch.from_numpy(ids)[None]
            nats = cross_entropy(model(input_ids=row[:, :-1]).logits[0].double(), row[0, 1:], reduction="sum").item()
            before = found.get(number, (0.0, 0))
            found[number] = (before[0] + nats, before[1] + len(ids) - 1)
    return found


def compare(rundir: RunDir, step: int, model_folder: Path, stores: Path) -> dict[str, Any]:
    """Per source: both losses, their relative difference, and that of the worst document."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    record = json.loads(rundir.eval_file(step).read_text())["sources"]
    measured = by_source(read_pieces(pieces_file(rundir.evals, step)))
    found = {}
    for name in SOURCES:
        expected = with_transformers(model, stores / name / "heldout")
        tokens = sum(count for _, count in expected.values())
        loss = sum(nats for nats, _ in expected.values()) / tokens
        sums = by_document(measured[name])
        assert (sums.number.tolist(), sums.tokens.tolist()) == (list(expected), [n for _, n in expected.values()])
        nats = np.array([value for value, _ in expected.values()])
        found[name] = {
            "cpt": record[name]["loss"],
            "transformers": loss,
            "relative_difference": abs(record[name]["loss"] / loss - 1),
            "worst_document": float(np.max(np.abs(sums.nats / nats - 1))),
            "tokens": tokens,
            "documents": len(expected),
        }
        assert record[name]["tokens"] == tokens
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for corpus, (domain, documents) in SOURCES.items():
            tokenize(folder, corpus, domain, documents)
        rundir = train(folder)
        cpt("export", rundir.checkpoint(STEPS), "--out", folder / "hf")
        steps = {0: WEIGHTS, STEPS: folder / "hf"}
        found = {f"step {step}": compare(rundir, step, model, folder) for step, model in steps.items()}
    worst = max(source["relative_difference"] for part in found.values() for source in part.values())
    write_result(
        "eval_loss_against_transformers.json",
        {"bar": BAR, "worst_relative_difference": worst, "met": worst <= BAR, "evaluations": found},
    )
    if worst > BAR:
        raise SystemExit(f"the losses differ by {worst:.2e}, more than {BAR:g}")


if __name__ == "__main__":
    main()
