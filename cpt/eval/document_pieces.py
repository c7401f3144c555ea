"""Held-out loss per piece of a document, its sums by document and their standard error. No torch.

A row of held-out text holds one or more pieces of documents (:mod:`cpt.eval.perplexity` deals them out). Every
evaluation of a run measures the same pieces in the same order, so two evaluations compare piece by piece. The file they
are kept in is :mod:`cpt.eval.results`'s. Example, documents ``a b c #`` / ``d e #`` / ``f g h #`` in rows of 4:

    row 0   a b c #   document 0, 3 tokens: b c #
    row 1   d e # f   document 1, 2 tokens: e #     document 2, 1 token: g, for a row reads one token on

Refuses nothing: a loss that is not finite stays in its piece and document.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pieces:
    """Of one source, a piece each, shape (pieces,): number of its document in the held-out split, counted tokens, and
    their summed loss in nats. A document has a piece in each evaluated row that it reaches into.
    """

    document: NDArray[np.int64]
    tokens: NDArray[np.int32]
    nats: NDArray[np.float64]

    def are_those_of(self, other: "Pieces") -> bool:
        """Whether both are the same pieces of text, as far as documents and counts of tokens tell."""
        return np.array_equal(self.document, other.document) and np.array_equal(self.tokens, other.tokens)


@dataclass(frozen=True)
class DocumentSums:
    """The same by document, in the order of ``number``."""

    number: NDArray[np.int64]
    tokens: NDArray[np.int64]
    nats: NDArray[np.float64]


def by_document(pieces: Pieces) -> DocumentSums:
    """Pieces of one document added up."""
    number, place = np.unique(pieces.document, return_inverse=True)
    tokens, nats = (np.bincount(place, column, len(number)) for column in (pieces.tokens, pieces.nats))
    return DocumentSums(number, tokens.astype(np.int64), nats.astype(np.float64))


def ratio_stderr(sums: DocumentSums) -> float | None:
    """Standard error of ``sum(nats) / sum(tokens)`` where whole documents are what was drawn, not tokens.

    The ratio estimator of cluster sampling (Cochran, Sampling Techniques, 3rd ed. 1977, 6.4; the clustered standard
    error of arXiv 2411.00640 for clusters of unequal size): with R the ratio, n documents, X tokens in all,
    ``sqrt(n / (n - 1) * sum((nats_d - R * tokens_d)^2)) / X``. None with fewer than two documents, or where a sum is
    not finite.
    """
    number, total = len(sums.nats), float(sums.tokens.sum())
    if number < 2 or not np.isfinite(sums.nats).all():
        return None
    residuals = sums.nats - sums.nats.sum() / total * sums.tokens
    return float(np.sqrt(number / (number - 1) * np.square(residuals).sum()) / total)


def to_table(sources: Mapping[str, Pieces]) -> pa.Table:
    """The table of :func:`cpt.eval.results.write_pieces`: sources by name, each in the order of its rows."""
    names = sorted(sources)
    numbers = np.repeat(np.arange(len(names), dtype=np.int32), [len(sources[name].nats) for name in names])
    columns = {
        "source": pa.DictionaryArray.from_arrays(numbers, pa.array(names, pa.string())),
        "document": np.concatenate([np.empty(0, np.int64), *(sources[name].document for name in names)]),
        "tokens": np.concatenate([np.empty(0, np.int32), *(sources[name].tokens for name in names)]),
        "nats": np.concatenate([np.empty(0, np.float64), *(sources[name].nats for name in names)]),
    }
    return pa.table(columns)


def by_source(table: pa.Table) -> dict[str, Pieces]:
    """The inverse of ``to_table``; a source without a piece leaves no trace."""
    names = table.column("source").cast(pa.string())
    found = {}
    for name in pc.unique(names).to_pylist():
        rows = table.filter(pc.equal(names, name))
        found[name] = Pieces(*(rows.column(column).to_numpy() for column in ("document", "tokens", "nats")))
    return found
