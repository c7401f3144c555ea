"""A word n-gram language model in numpy: interpolated modified Kneser-Ney, as KenLM estimates it. Model and look-up.

A line is a sentence: ``<s> w1 w2 ... </s>``. Words are lower-cased runs of letters, digits (each written 0) and single
marks; a kanji or kana is a word of its own. Words not in the vocabulary are ``<unk>``. A document's perplexity is
exp(-mean log probability) over its words and line ends, so lower means more like the reference.

The n-grams of each order are the sorted array of their keys ``(number of the prefix among the order below) * V + last
word``; beside it lie the log probability and the log weight of the order below where it is a context (ARPA's
back-off). Worked example with V = 100: "the law" with the = 7, law = 9 has the key 7 * 100 + 9 = 709; if it is number 3
among the bigrams, "the law of" (of = 5) has the key 3 * 100 + 5 = 305 among the trigrams.

The file is an npz of plain arrays, read without pickle. Training is in ``data_tools.clean.ngram_training``.
"""

import json
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError
from data_tools.clean.words import KANA_AND_KANJI

FORMAT_VERSION = 1
BEGIN, END, UNKNOWN = 0, 1, 2
SPECIAL = ("<s>", "</s>", "<unk>")
MAX_WORD = 64  # characters; longer ones are unknown
_TOKEN = re.compile(
    rf"[{KANA_AND_KANJI}]|[^\W\d_{KANA_AND_KANJI}]+(?:['\u2019][^\W\d_{KANA_AND_KANJI}]+)?|0+|[^\w\s]|_"
)
_DIGITS = {ord("1") + i: "0" for i in range(9)}
_PIECE = 1 << 18  # words scored at once, which bounds the memory of a very long document

Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


def tokenize_line(line: str) -> list[str]:
    """``"In 1999, it's law."`` -> ``["in", "0000", ",", "it's", "law", "."]``"""
    return _TOKEN.findall(line.lower().translate(_DIGITS))


@dataclass(frozen=True)
class Order:
    """The n-grams of one order. ``keys`` are sorted; ``backoff`` is 0 where an n-gram is no context."""

    keys: Ids
    log_prob: NDArray[np.float32]
    backoff: NDArray[np.float32]


@dataclass(frozen=True)
class NgramModel:
    """``orders[0]`` holds the unigrams, its keys are 0 ... V - 1; ``facts``: what it was made of, for people."""

    words: tuple[str, ...]
    orders: tuple[Order, ...]
    facts: Mapping[str, Any]

    @cached_property
    def _index(self) -> dict[str, int]:
        return {word: number for number, word in enumerate(self.words)}

    def perplexity(self, text: str) -> float:
        """inf for a text without words."""
        ids = self.encode(text)
        predicted = ids != BEGIN
        count = int(predicted.sum())
        if count <= int((ids == END).sum()):
            return math.inf
        total = float(self.log_probs(ids)[predicted].sum())
        # <unk> stands for all the words that were left out; one of them is so much less likely than any of them
        total -= int((ids == UNKNOWN).sum()) * math.log(self.facts["unknown_types"] + 1)
        return math.exp(-total / count)

    def encode(self, text: str) -> Ids:
        """Ids of all sentences end to end; lines without words give none."""
        index = self._index
        ids: list[int] = []
        for line in text.splitlines():
            if tokens := tokenize_line(line):
                ids.append(BEGIN)
                ids += [index.get(token, UNKNOWN) for token in tokens]
                ids.append(END)
        return np.array(ids, np.int64)

    def log_probs(self, ids: Ids) -> Numbers:
        """Natural log probability of each id given those before it in its sentence; 0 for ``<s>``."""
        context = len(self.orders) - 1
        pieces = []
        for start in range(0, len(ids), _PIECE):
            first = max(start - context, 0)
            pieces.append(self._log_probs(ids[first : start + _PIECE])[start - first :])
        return np.concatenate(pieces) if pieces else np.zeros(0)

    def _log_probs(self, ids: Ids) -> Numbers:
        """From the longest known n-gram down: its probability, times the weight of each longer context that is known.

        ``found[i]``: number of the n-gram that ends at i, -1 if it is unknown or would reach over ``<s>``.
        """
        unigrams = self.orders[0]
        found = ids
        log_prob = unigrams.log_prob[ids].astype(np.float64)
        open_context = ids != BEGIN  # an n-gram never has <s> behind its first place
        for below, order in pairwise(self.orders):
            if not len(order.keys):  # all pruned
                break
            context = np.where(open_context, np.concatenate([[-1], found[:-1]]), -1)
            longer = self._find(order, context, ids)
            hit = longer >= 0
            # an unknown n-gram keeps the lower order's probability, weighted by its context
            log_prob += np.where((context >= 0) & ~hit, below.backoff[np.maximum(context, 0)], 0.0)
            log_prob[hit] = order.log_prob[longer[hit]]
            found = longer
        log_prob[ids == BEGIN] = 0.0
        return log_prob

    def _find(self, order: Order, context: Ids, ids: Ids) -> Ids:
        """Number of each n-gram (context, word) in ``order``, -1 where it has none."""
        wanted = np.where(context >= 0, context * len(self.words) + ids, -1)
        ascending = np.argsort(wanted)  # neighbours in the array are looked up together: twice as fast
        place = np.empty(len(ids), np.int64)
        place[ascending] = np.searchsorted(order.keys, wanted[ascending])
        place = np.minimum(place, len(order.keys) - 1)
        return np.where(order.keys[place] == wanted, place, -1)

    def save(self, path: Path) -> None:
        """Write ``path`` whole or not at all; equal models give equal bytes.

        Raises:
            DataError: a folder where a file name belongs.
        """
        if path.name in ("", "..") or path.is_dir():
            raise DataError(f"{path}: a folder, not a file name; fix: end it with a name, e.g. {path / 'model.npz'}")
        arrays: dict[str, NDArray[Any]] = {
            "facts": _bytes(json.dumps({"format_version": FORMAT_VERSION, **self.facts}, sort_keys=True)),
            "words": _bytes("\n".join(self.words)),
        }
        for number, order in enumerate(self.orders, 1):
            arrays |= {f"log_prob_{number}": order.log_prob, f"backoff_{number}": order.backoff}
            if number > 1:
                arrays[f"keys_{number}"] = order.keys
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial.npz")
        try:
            np.savez(partial, allow_pickle=False, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises DataError: no such file, not a model, damaged, another version."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                facts = json.loads(arrays["facts"].tobytes())
                if facts.pop("format_version") != FORMAT_VERSION:
                    raise DataError(f"{path}: an n-gram model of another version; fix: train it again")
                words = tuple(arrays["words"].tobytes().decode("utf-8", "surrogatepass").split("\n"))
                numbers = range(1, int(facts["order"]) + 1)
                keys = [np.arange(len(words)), *(arrays[f"keys_{n}"] for n in numbers[1:])]
                orders = tuple(Order(keys[n - 1], arrays[f"log_prob_{n}"], arrays[f"backoff_{n}"]) for n in numbers)
                if any(not len(o.keys) == len(o.log_prob) == len(o.backoff) for o in orders) or words[:3] != SPECIAL:
                    raise ValueError("its parts do not fit together")
        except FileNotFoundError:
            raise DataError(f"{path}: no such file; fix: cpt data train-ngram --out {path}") from None
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: not an n-gram model ({error!r}); fix: train it again") from None
        return cls(words, orders, facts)


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
