"""``cpt data score``: one perplexity per document of a token store, in the store's order, for store views.

    scores.npy     float32, lower is better; NaN for a document without words
    scores.json    what they are of: store_content_hash, documents, kind, model and its hash

Documents are decoded (without BOS and EOS) and scored in parts of ``_PART`` documents, by worker processes; finished
parts lie in ``scores.parts/`` until all are there, so a killed run goes on where it was. Memory: the model per worker,
and four bytes per document. Refused: a tokenizer that did not make the store.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.data.store_selection import open_split
from cpt.rundir import DataError, write_atomic
from data_tools.clean.ngram import NgramModel
from data_tools.corpus.units import advance, run_units
from data_tools.folder_lock import hold_folder
from data_tools.store_texts import matching_decoder, text_ids
from data_tools.whole_file import sha256_of

_PART = 5_000  # documents


@dataclass(frozen=True)
class ScoreRequest:
    """``store``: one split; ``out``: the .npy, its .json is written beside it."""

    store: Path
    model: Path
    tokenizer: Path
    out: Path
    workers: int = 1


def score_store(request: ScoreRequest, *, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Write the scores; what came of it. ``progress(documents_done, documents)``.

    Raises:
        DataError: no store, no model, another tokenizer, a name for ``out`` that is no .npy.
    """
    start = time.perf_counter()
    if request.out.suffix != ".npy":
        raise DataError(f"--out is {request.out}; fix: a name that ends in .npy, scores.json is written beside it")
    store = open_split(request.store)
    matching_decoder(store, request.tokenizer)
    _opened.cache_clear()  # the model's file may have changed since this process last scored
    documents = store.num_documents
    about = {
        "store_content_hash": store.manifest.content_hash,
        "documents": documents,
        "kind": "perplexity",
        "model": request.model.name,
        "model_sha256": sha256_of(request.model),
    }
    parts = request.out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    num_parts = -(-documents // _PART)
    with hold_folder(parts):
        _settle(parts, about | {"part": _PART})
        run_units(
            parts,
            num_parts,
            partial(_score_part, request, parts),
            workers=request.workers,
            progress=(lambda done: progress(done, documents)) if progress else None,
        )
        scores = [np.load(_part(parts, number), allow_pickle=False) for number in range(num_parts)]
        everything: NDArray[np.float32] = np.concatenate([np.zeros(0, np.float32), *scores])
        request.out.with_suffix(".json").unlink(missing_ok=True)  # never an old label beside new scores
        _save(request.out, everything)
        write_atomic(request.out.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    shutil.rmtree(parts)
    return about | _facts(everything) | {"out": str(request.out), "seconds": time.perf_counter() - start}


def _settle(parts: Path, identity: dict[str, Any]) -> None:
    """Parts of another store or model are not this run's: they go."""
    file = parts / "identity.json"
    text = json.dumps(identity, indent=1) + "\n"
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    shutil.rmtree(parts / "done", ignore_errors=True)
    write_atomic(file, text)


class _Scorer:
    """What a worker process opens once."""

    def __init__(self, request: ScoreRequest) -> None:
        self.store = open_split(request.store)
        self.model = NgramModel.load(request.model)
        self.decode = matching_decoder(self.store, request.tokenizer)

    def score(self, tokens: NDArray[Any]) -> float:
        text = self.decode(text_ids(tokens, self.store.manifest).tolist())
        return _finite(self.model.perplexity(text))


def _finite(perplexity: float) -> float:
    return perplexity if math.isfinite(perplexity) else math.nan


def _score_part(request: ScoreRequest, parts: Path, number: int) -> dict[str, Any]:
    scorer = _opened(request)
    first = number * _PART
    last = min(first + _PART, scorer.store.num_documents)
    bounds = scorer.store.document_bounds(first, last).tolist()
    scores = np.empty(last - first, np.float32)
    for i, (low, high) in enumerate(pairwise(bounds)):
        scores[i] = scorer.score(scorer.store.read(low, high))
        if i % 100 == 99:
            advance(100)
    advance((last - first) % 100)
    _save(_part(parts, number), scores)
    return {"documents": last - first}


@lru_cache(maxsize=1)
def _opened(request: ScoreRequest) -> _Scorer:
    """A worker process scores many parts with one model."""
    return _Scorer(request)


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:05d}.npy"


def _save(file: Path, scores: NDArray[np.float32]) -> None:
    unfinished = file.with_name(f".{file.name}.partial")
    with unfinished.open("wb") as handle:
        np.save(handle, scores, allow_pickle=False)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(unfinished, file)


def _facts(scores: NDArray[np.float32]) -> dict[str, Any]:
    known = scores[~np.isnan(scores)]
    shares = (1, 10, 50, 90, 99)
    quantiles = np.percentile(known, shares).tolist() if len(known) else [None] * len(shares)
    return {
        "without_words": len(scores) - len(known),
        "percentiles": dict(zip(map(str, shares), quantiles, strict=True)),
    }
