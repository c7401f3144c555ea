"""What lm_eval logged of a task, as a table of items with scores and as metrics with standard errors.

Standard errors: of a mean, s / sqrt(n), as lm_eval has it; of exp(mean), that of the mean times the value (delta
method); of a ratio of sums such as bits per byte, the linearised one over items (Cochran, Sampling Techniques, 6.4);
of anything else, a bootstrap over items. Log-likelihoods are in nats. Refuses nothing: what is not finite stays NaN, is
counted, and makes the metrics that it enters unknown.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cpt.eval.cache import OUTCOME_ITEMS, Metric, Pooling
from cpt.eval.results import LONGEST, TEXTS

BOOTSTRAPS = 200
PREFERRED = ("acc", "exact_match", "acc_norm", "em", "f1", "pass@1", "bits_per_byte")
Sample = Mapping[str, Any]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class ItemScores:
    """Scores (n,) of a task's items on one metric; their weighted mean, or exp of it, is the task's value."""

    score: Array
    weight: Array
    pooling: Pooling


@dataclass(frozen=True)
class Reading:
    """How to read a task's samples. ``gold`` gives the numbers of the right choices, none where there are no choices;
    ``line``: an item's in its file, from 1, or -1.
    """

    name: str
    output_type: str
    choices: Callable[[Any], Sequence[str]]
    gold: Callable[[Any, Sequence[str]], Collection[int]]
    subset_field: str | None
    line: Callable[[Sample], int]


def primary_metric(stated: str | None, keys: Sequence[str]) -> str:
    """``acc`` or ``exact_match,strict-match`` (a filter after the comma): the stated one or the first known one."""
    names = [stated] if stated else [*PREFERRED, *keys]
    return next(key for name in names for key in keys if name in (key, key.partition(",")[0]))


def item_scores(raw: Sequence[Any], aggregation: str) -> ItemScores:
    """From what lm_eval keeps per item: a number, or for perplexities of texts (log-likelihood, words or bytes)."""
    ones = np.ones(len(raw))
    if aggregation in ("mean", "nanmean"):
        return ItemScores(np.array([float(value) for value in raw]), ones, "mean")
    if aggregation == "perplexity":
        return ItemScores(-np.array([float(value) for value in raw]), ones, "exp_mean")
    if aggregation in ("weighted_perplexity", "bits_per_byte"):
        pairs = np.array([(float(nats), float(size)) for nats, size in raw]).reshape(-1, 2)
        unit = math.log(2) if aggregation == "bits_per_byte" else 1.0
        pooling: Pooling = "mean" if aggregation == "bits_per_byte" else "exp_mean"
        return ItemScores(-pairs[:, 0] / np.maximum(pairs[:, 1], 1) / unit, np.maximum(pairs[:, 1], 1), pooling)
    pairs_of_labels = [value for value in raw if isinstance(value, tuple | list) and len(value) == 2]
    if len(pairs_of_labels) == len(raw):  # f1, mcc: (gold, predicted)
        return ItemScores(np.array([float(np.array_equal(gold, found)) for gold, found in raw]), ones, "other")
    return ItemScores(np.full(len(raw), math.nan), ones, "other")


def pooled(scores: ItemScores, chosen: NDArray[np.bool_] | None = None) -> Metric:
    """Value and standard error over all items, or the ``chosen`` ones; unknown where only lm_eval knows the pooling."""
    score, weight = scores.score, scores.weight
    if chosen is not None:
        score, weight = score[chosen], weight[chosen]
    if scores.pooling == "other" or len(score) == 0:
        return Metric(None, None)
    mean = math.fsum(score * weight) / math.fsum(weight)
    stderr = _ratio_stderr(score, weight, mean)
    if scores.pooling == "exp_mean":
        value = math.exp(min(mean, 700.0)) if math.isfinite(mean) else math.nan
        mean, stderr = value, stderr * value
    return metric(mean, stderr)


def metric(value: object, stderr: object) -> Metric:
    """Finite floats, or None."""

    def known(number: object) -> float | None:
        return float(number) if isinstance(number, int | float | np.number) and math.isfinite(number) else None

    return Metric(known(value), known(stderr))


def _ratio_stderr(score: Array, weight: Array, mean: float) -> float:
    """Of sum(w s) / sum(w); with equal weights s / sqrt(n), s with n - 1."""
    number = len(score)
    if number < 2:
        return math.nan
    residual = weight * (score - mean)
    return math.sqrt(number / (number - 1) * math.fsum(residual**2)) / math.fsum(weight)


def measured(value: object, raw: Sequence[Any], aggregate: Callable[[Any], Any], *, name: str) -> Metric:
    """lm_eval's value of a metric with our standard error; ``name`` is that of the aggregation."""
    scores = item_scores(raw, name)
    error: object = pooled(scores).stderr
    if scores.pooling == "other" and len(raw) > 1:
        draw = random.Random(1234)
        resampled = [aggregate([raw[draw.randrange(len(raw))] for _ in raw]) for _ in range(BOOTSTRAPS)]
        numbers = [found for entry in resampled if (found := metric(entry, None).value) is not None]
        error = float(np.std(numbers, ddof=1)) if len(numbers) == BOOTSTRAPS else None
    return metric(value, error)


def items_table(
    samples: Sequence[Sample], reading: Reading, scores: ItemScores, *, truncated: Collection[Any]
) -> pa.Table:
    """Rows of OUTCOME_ITEMS; ``truncated`` holds the requests of which a part was left out."""
    rows: dict[str, list[Any]] = {name: [] for name in OUTCOME_ITEMS.names}
    normed = reading.output_type == "multiple_choice"
    for number, sample in enumerate(samples):
        choices, doc = reading.choices(sample["doc"]), sample["doc"]
        found = _log_likelihoods(sample, len(choices)) if normed else np.empty(0)
        gold = reading.gold(doc, choices)
        for name, value in (
            ("task", reading.name),
            ("item", sample["doc_id"]),
            ("line", reading.line(sample)),
            ("score", scores.score[number]),
            ("weight", scores.weight[number]),
            ("margin", _margin(found, gold)),
            ("chosen", _chosen(sample, choices, found)),
            ("truncated", any(_request(arguments) in truncated for arguments in sample["arguments"])),
        ):
            rows[name].append(value)
    return pa.Table.from_pydict(rows, schema=OUTCOME_ITEMS)


def texts_table(samples: Sequence[Sample], reading: Reading) -> pa.Table:
    """Rows of TEXTS, long texts cut."""
    rows: dict[str, list[Any]] = {name: [] for name in TEXTS.names}
    for sample in samples:
        doc = sample["doc"]
        choices = [str(choice) for choice in reading.choices(doc)]
        gold = [choices[number] for number in sorted(reading.gold(doc, choices))]
        first = sample["arguments"][0]
        rolling = reading.output_type == "loglikelihood_rolling"
        subset = doc.get(reading.subset_field) if reading.subset_field and isinstance(doc, Mapping) else None
        rows["task"].append(reading.name)
        rows["item"].append(sample["doc_id"])
        rows["subset"].append(None if subset in (None, "") else str(subset))
        rows["prompt"].append(str(first[0])[: LONGEST["prompt"]] if rolling else str(first[0])[-LONGEST["prompt"] :])
        rows["gold"].append("" if rolling else (" | ".join(gold) or str(sample["target"]))[: LONGEST["gold"]])
        rows["choices"].append([choice[: LONGEST["gold"]] for choice in choices])
    return pa.Table.from_pydict(rows, schema=TEXTS)


def not_finite(samples: Sequence[Sample]) -> NDArray[np.bool_]:
    """(n,): items with a log-likelihood that is not finite. lm_eval takes the first NaN for the likeliest choice."""
    return np.array([not all(map(math.isfinite, _numbers(sample["filtered_resps"]))) for sample in samples], bool)


def _numbers(answers: Sequence[Any]) -> list[float]:
    firsts = [answer[0] if isinstance(answer, tuple | list) and answer else answer for answer in answers]
    return [float(first) for first in firsts if isinstance(first, float | np.floating)]


def _log_likelihoods(sample: Sample, number: int) -> Array:
    """Nats of each choice; unconditional ones, which mutual information appends, are left out."""
    return np.array([float(answer[0]) for answer in sample["filtered_resps"]][:number])


def _margin(found: Array, gold: Collection[int]) -> float:
    """Nats by which the best right choice leads the best wrong one."""
    right = [found[number] for number in gold if number < len(found)]
    wrong = [value for number, value in enumerate(found) if number not in gold]
    return float(max(right) - max(wrong)) if right and wrong else math.nan


def _chosen(sample: Sample, choices: Sequence[str], found: Array) -> str:
    """The choice that is likeliest as a whole, or what was generated; "" where the model only gave a probability."""
    if len(found):
        return "" if not np.isfinite(found).all() else str(choices[int(np.argmax(found))])[: LONGEST["chosen"]]
    first = sample["filtered_resps"][0]
    return first[: LONGEST["chosen"]] if isinstance(first, str) else ""


def _request(arguments: Sequence[Any]) -> tuple[str, str]:
    """(context, continuation); a request to generate has no continuation."""
    second = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], str) else ""
    return str(arguments[0]), second
