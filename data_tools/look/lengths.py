"""Document lengths as percentiles and as a histogram whose bins double."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILES = (0, 10, 50, 90, 99, 100)


def length_facts(lengths: NDArray[np.int64], unit: str, of: int | None) -> dict[str, Any]:
    """``of``: documents there are, where known; each percentile is a real document's length, not interpolated."""
    return {
        "unit": unit,
        "documents": len(lengths),
        "of": of,
        "percentiles": percentiles(lengths),
        "bins": doubling_bins(lengths),
    }


def percentiles(lengths: NDArray[np.int64]) -> dict[str, int]:
    if not len(lengths):
        return {}
    values = np.percentile(lengths, PERCENTILES, method="nearest")
    return {f"p{percentile}": int(value) for percentile, value in zip(PERCENTILES, values, strict=True)}


def doubling_bins(lengths: NDArray[np.int64]) -> list[dict[str, int]]:
    """``{"from": 4, "below": 8, "documents": n}`` and so on, from the first to the last that holds a document."""
    if not len(lengths):
        return []
    exponents = np.frexp(np.maximum(lengths, 1).astype(np.float64))[1] - 1
    counts = np.bincount(exponents)
    first = int(exponents.min())
    return [
        {"from": 1 << exponent, "below": 2 << exponent, "documents": int(counts[exponent])}
        for exponent in range(first, len(counts))
    ]
