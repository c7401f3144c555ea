"""Estimates an n-gram model from reference texts: interpolated modified Kneser-Ney (Chen and Goodman 1998).

With a(g) the count of an n-gram of the highest order, and for lower orders the number of different words before it
(its count where it starts with ``<s>``), and D1, D2, D3 of its order:

    p(w | h) = max(a(h w) - D(a(h w)), 0) / a(h .) + weight(h) * p(w | h without its first word)
    weight(h) = what the discounts took / a(h .);   below the unigrams stands 1 / (V - 1), V without <s>

Pruned n-grams give what they had to ``weight(h)``, so that every context still sums to 1. All orders are counted by
sorting numbers, one order after another: some 60 (order 3) to 100 (order 5) bytes of memory per word of reference at
the peak, which ``max_words`` bounds, and 100 per different word for the vocabulary.
"""

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt.rundir import DataError
from data_tools.clean.ngram import (
    BEGIN,
    END,
    MAX_WORD,
    SPECIAL,
    UNKNOWN,
    Ids,
    NgramModel,
    Numbers,
    Order,
    tokenize_line,
)

_FALLBACK = (0.5, 1.0, 1.5)  # KenLM's, where an order is too small to estimate discounts from


@dataclass(frozen=True)
class TrainOptions:
    """``prune``: n-grams of order 3 and above seen so often or less are dropped; ``min_count``: rarer words are
    ``<unk>``; ``max_words``: of the reference, the rest is not read.
    """

    order: int = 3
    prune: int = 1
    min_count: int = 2
    max_vocabulary: int = 500_000
    max_words: int = 20_000_000


@dataclass(frozen=True)
class _Counts:
    """One order: ``keys`` sorted, ``count`` as seen, ``suffix``: number of each n-gram without its first word."""

    keys: Ids
    count: Ids
    suffix: Ids
    starts: NDArray[np.bool_]  # whether it starts with <s>


def train_ngram(texts: Iterable[str], options: TrainOptions) -> NgramModel:
    """Raises DataError: no words in the texts, an order out of range."""
    if not 1 <= options.order <= 6:
        raise DataError(f"--order is {options.order}; fix: 1 to 6, 3 is usual for a filter")
    words, ids, facts = _read(texts, options)
    counts = _count(ids, len(words), options.order)
    adjusted = [_adjust(low, high) for low, high in pairwise(counts)] + [counts[-1].count]
    below: Numbers = np.full(len(words), 1.0 / (len(words) - 1))
    below[BEGIN] = 0.0
    probs, weights, discounts = [], [], []
    for number, (order, a) in enumerate(zip(counts, adjusted, strict=True), 1):
        context = order.keys // len(words) if number > 1 else np.zeros(len(words), np.int64)
        num_contexts = len(counts[number - 2].keys) if number > 1 else 1
        discounts.append(_discounts(a))
        left = _discounted(a, discounts[-1], order.count > options.prune if number >= 3 else None)
        total = np.bincount(context, a, num_contexts)
        taken = np.bincount(context, left, num_contexts)
        weight = 1.0 - np.divide(taken, total, out=np.zeros(num_contexts), where=total > 0)
        below = left / np.maximum(total, 1.0)[context] + weight[context] * below[order.suffix]
        probs.append(below)
        weights.append(weight)
    orders = _without_pruned(counts, probs, weights[1:], options.prune, len(words))
    facts |= {"discounts": discounts, "ngrams": [len(order.keys) for order in orders], **asdict(options)}
    return NgramModel(words, orders, facts)


def _read(texts: Iterable[str], options: TrainOptions) -> tuple[tuple[str, ...], NDArray[np.int32], dict[str, Any]]:
    """Vocabulary, ids of all sentences end to end, and what was read; frequent words come first."""
    numbers = {word: number for number, word in enumerate(SPECIAL)}
    ids = array("i")
    documents = 0
    for text in texts:
        documents += 1
        for line in text.splitlines():
            if tokens := tokenize_line(line):
                ids.append(BEGIN)
                ids.extend(
                    numbers.setdefault(token, len(numbers)) if len(token) <= MAX_WORD else UNKNOWN for token in tokens
                )
                ids.append(END)
        if len(ids) >= options.max_words:
            break
    if not ids:
        raise DataError("the reference has no words; fix: check --input and --text-key")
    raw = np.frombuffer(ids, np.int32)
    frequency = np.bincount(raw, minlength=len(numbers))
    ranked = np.argsort(-frequency[len(SPECIAL) :], kind="stable") + len(SPECIAL)
    kept = ranked[frequency[ranked] >= options.min_count][: options.max_vocabulary]
    renumber = np.full(len(numbers), UNKNOWN, np.int32)
    renumber[: len(SPECIAL)] = range(len(SPECIAL))
    renumber[kept] = np.arange(len(SPECIAL), len(SPECIAL) + len(kept))
    spelled = list(numbers)
    words = (*SPECIAL, *(spelled[number] for number in kept.tolist()))
    facts = {"documents": documents, "tokens": int((raw != BEGIN).sum()), "unknown_types": len(ranked) - len(kept)}
    return words, renumber[raw], facts


def _count(ids: NDArray[np.int32], vocabulary: int, order: int) -> list[_Counts]:
    """Orders 1 ... ``order``; ``found[i]``: number of the n-gram that ends at i, -1 where it would cross ``<s>``."""
    seen = np.bincount(ids, minlength=vocabulary)
    seen[BEGIN] = 0  # given, never predicted
    everything = np.arange(vocabulary)
    counts = [_Counts(everything, seen, everything, everything == BEGIN)]
    found = ids.astype(np.int64)
    for _ in range(1, order):
        ends = 1 + np.flatnonzero((found[:-1] >= 0) & (ids[1:] != BEGIN))
        keys, number, count = np.unique(
            found[ends - 1] * vocabulary + ids[ends], return_inverse=True, return_counts=True
        )
        suffix = np.empty(len(keys), np.int64)
        suffix[number] = found[ends]
        counts.append(_Counts(keys, count, suffix, counts[-1].starts[keys // vocabulary]))
        found = np.full(len(ids), -1)
        found[ends] = number
    return counts


def _adjust(low: _Counts, high: _Counts) -> Ids:
    """Different words before each n-gram; behind ``<s>`` there is none, so its own count."""
    return np.where(low.starts, low.count, np.bincount(high.suffix, minlength=len(low.keys)))


def _discounts(adjusted: Ids) -> list[float]:
    """D1, D2, D3+ of an order from how many n-grams have the counts 1, 2, 3 and 4."""
    n = np.bincount(np.minimum(adjusted, 5), minlength=6)[1:5].tolist()
    if 0 in n:
        return list(_FALLBACK)
    y = n[0] / (n[0] + 2 * n[1])
    discounts = [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
    return discounts if all(0 < d <= k for k, d in enumerate(discounts, 1)) else list(_FALLBACK)


def _discounted(adjusted: Ids, discounts: list[float], kept: NDArray[np.bool_] | None) -> Numbers:
    left = np.maximum(adjusted - np.array([0.0, *discounts])[np.minimum(adjusted, 3)], 0.0)
    return left if kept is None else np.where(kept, left, 0.0)


def _without_pruned(
    counts: list[_Counts], probs: list[Numbers], weights: list[Numbers], prune: int, vocabulary: int
) -> tuple[Order, ...]:
    """The n-grams that stay, numbered anew. A prefix was seen as often as what it begins, or more: it stays too."""
    orders: list[Order] = []
    renumbered = np.arange(vocabulary)
    for number, (order, prob) in enumerate(zip(counts, probs, strict=True), 1):
        kept = order.count > (prune if number >= 3 else -1)
        weight = weights[number - 1] if number <= len(weights) else np.ones(len(prob))
        keys = order.keys[kept]
        if number > 1:
            keys = renumbered[keys // vocabulary] * vocabulary + keys % vocabulary
        with np.errstate(divide="ignore"):  # <s> has probability 0
            orders.append(Order(keys, np.log(prob[kept]).astype(np.float32), np.log(weight[kept]).astype(np.float32)))
        renumbered = np.cumsum(kept) - 1
    return tuple(orders)
