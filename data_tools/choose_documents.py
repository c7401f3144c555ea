"""Which documents of a token store a view takes, and in which order: by score, by length, by a list of numbers.

Owns the rules and the file of scores (``scores.npy``, float32, one per document, lower is better, with ``scores.json``
beside it). Filters (length, list, highest score) come first, then at most one rule by rank. Documents without a score
(NaN) are left out as soon as scores are used. Ties are settled by document number. Example, scores 3 1 2 nan 1:

    keep_best 0.5 -> 1 4      quantile 0.5:1 -> 0 2      max_score 2 -> 1 2 4
    order ascending -> 1 4 2 0      order descending -> 0 2 1 4

Refuses: scores of another store, rules by score without scores, two rules by rank, and a choice of nothing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.data.store_selection import Order, Split, ViewManifest, ViewRequest, open_split, write_view
from cpt.rundir import DataError

Scores = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """What is asked for; None: not asked. ``keep_best`` is a share of documents, ``keep_tokens`` a number of tokens."""

    keep_best: float | None = None
    keep_tokens: int | None = None
    quantile: tuple[float, float] | None = None
    max_score: float | None = None
    min_length: int | None = None
    max_length: int | None = None
    documents: Sequence[int] | NDArray[np.int64] | None = None
    order: Order = "none"

    def __post_init__(self) -> None:
        by_rank = [name for name in ("keep_best", "keep_tokens", "quantile") if getattr(self, name) is not None]
        if len(by_rank) > 1:
            raise DataError(f"{' and '.join(by_rank)} both choose by rank; give one of them")
        if self.keep_best is not None and not 0 < self.keep_best <= 1:
            raise DataError(f"keep_best is {self.keep_best}; it is a share of the documents, above 0 and up to 1")
        if self.keep_tokens is not None and self.keep_tokens < 1:
            raise DataError(f"keep_tokens is {self.keep_tokens}; it must be a number of tokens")
        if self.quantile is not None and not 0 <= self.quantile[0] < self.quantile[1] <= 1:
            low, high = self.quantile
            raise DataError(f"quantile is {low}:{high}; it must be LO:HI with 0 <= LO < HI <= 1, e.g. 0:0.1")

    @property
    def by_score(self) -> list[str]:
        """Names of the rules that need scores."""
        names = ("keep_best", "keep_tokens", "quantile", "max_score")
        asked = [name for name in names if getattr(self, name) is not None]
        return [*asked, *(["order"] if self.order != "none" else [])]

    def rule(self) -> dict[str, Any]:
        """For ``view.json``: what was asked, the list of documents as a count."""
        asked = {name: value for name, value in asdict(self).items() if value is not None and name != "order"}
        return asked | ({"documents": len(self.documents)} if self.documents is not None else {})


def choose(lengths: NDArray[np.int64], scores: Scores | None, choice: Choice) -> NDArray[np.int64]:
    """Document numbers in the view's order; without an order by score, in the store's."""
    if scores is None and choice.by_score:
        raise DataError(f"{', '.join(choice.by_score)} needs --scores; `cpt data score STORE` makes them")
    numbers = np.flatnonzero(_passing(lengths, scores, choice))
    if choice.documents is not None:
        numbers = np.intersect1d(numbers, _listed(choice.documents, len(lengths)))
    if scores is None:
        return numbers
    ranked = numbers[np.argsort(scores[numbers], kind="stable")]
    ranked = ranked[_ranks(lengths[ranked], choice)]
    if choice.order == "none":
        return np.sort(ranked)
    if choice.order == "ascending":
        return ranked
    kept = np.sort(ranked)  # not the ranking reversed: that would turn ties round
    return kept[np.argsort(-scores[kept], kind="stable")]


def _passing(lengths: NDArray[np.int64], scores: Scores | None, choice: Choice) -> NDArray[np.bool_]:
    passing = np.ones(len(lengths), np.bool_)
    if choice.min_length is not None:
        passing &= lengths >= choice.min_length
    if choice.max_length is not None:
        passing &= lengths <= choice.max_length
    if scores is not None:
        passing &= ~np.isnan(scores)
        if choice.max_score is not None:
            passing &= scores <= choice.max_score
    return passing


def _listed(documents: Sequence[int] | NDArray[np.int64], num_documents: int) -> NDArray[np.int64]:
    """As given, twice or not; only numbers that the store has."""
    listed = np.array(documents, np.int64)
    outside = listed[(listed < 0) | (listed >= num_documents)]
    if len(outside):
        raise DataError(f"document {outside[0]} is listed; the store has {num_documents}, numbered from 0")
    return listed


def _ranks(lengths: NDArray[np.int64], choice: Choice) -> slice:
    """The ranks to keep; adjacent quantiles share no document and leave none out."""
    number = len(lengths)
    if choice.keep_best is not None:
        return slice(0, math.ceil(choice.keep_best * number * (1 - 1e-12)))  # 0.07 of 100 is 7.000000000000001
    if choice.keep_tokens is not None:
        return slice(0, int(np.searchsorted(np.cumsum(lengths), choice.keep_tokens, side="right")))
    if choice.quantile is not None:
        low, high = choice.quantile
        return slice(round(low * number), round(high * number))
    return slice(0, number)


def read_scores(file: Path, store: Split) -> Scores:
    """The scores of a store's documents.

    Raises:
        DataError: not readable, or made for another store.
    """
    about = file.with_suffix(".json")
    try:
        facts = json.loads(about.read_bytes())
        scores = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        rule = f"the scores and {about.name} beside them cannot be read ({error})"
        raise DataError(f"{file}: {rule}; run `cpt data score` again") from None
    found = facts.get("store_content_hash") if isinstance(facts, dict) else None
    if found != store.manifest.content_hash:
        raise DataError(
            f"{about}: store_content_hash is {found!r:.80}, {store.path} has {store.manifest.content_hash!r}: the "
            "scores are of another store or split; run `cpt data score` on this one"
        )
    if scores.shape != (store.num_documents,) or scores.dtype.kind != "f":
        raise DataError(
            f"{file}: holds {scores.dtype} of shape {scores.shape}; {store.path} has {store.num_documents} documents, "
            "one floating-point score each; run `cpt data score` again"
        )
    return np.asarray(scores)


def read_documents(file: Path) -> NDArray[np.int64]:
    """Document numbers from a ``.npy`` of integers or a text of one number per line."""
    try:
        if file.suffix == ".npy":
            found = np.load(file, allow_pickle=False)
            if found.dtype.kind not in "iu" or found.ndim != 1:
                raise DataError(f"{file}: holds {found.dtype} of shape {found.shape}; a list of integers is needed")
            return np.asarray(found, np.int64)
        return np.array(file.read_text(encoding="utf-8").split(), np.int64)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a list of document numbers ({error})") from None


def parse_quantile(text: str) -> tuple[float, float]:
    """``0.1:0.5`` as two numbers."""
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise DataError(f"quantile is {text!r:.80}; it must be LO:HI, e.g. 0.1:0.5") from None
    return low, high


def whole_tokens(asked: float) -> int:
    """``5e9`` from the command line as a number of tokens."""
    if not math.isfinite(asked):
        raise DataError(f"keep_tokens is {asked}; it must be a number of tokens, e.g. 5e9")
    return int(asked)


def make_view(
    store: Path, out: Path, choice: Choice, *, scores: Path | None = None, heldout_scores: Path | None = None
) -> dict[str, Any]:
    """Write a view of both splits and say what is in it; the held-out split is chosen from only where it has scores.

    Raises:
        DataError: a rule that cannot be followed, nothing chosen, or ``out`` holds something else.
    """
    if out.absolute().is_relative_to(store.absolute()):
        raise DataError(f"{out}: lies inside the store; give the view a folder of its own")
    train, heldout = open_split(store / "train"), open_split(store / "heldout")
    values = read_scores(scores, train) if scores else None
    numbers = choose(train.document_lengths(), values, choice)
    if not len(numbers):
        raise DataError(f"{store}: no document of {train.num_documents} is left by {choice.rule()}; ask for more")
    requests = {"train": ViewRequest(train, numbers, choice.rule(), choice.order)}
    if heldout_scores:
        same = Choice(**{**asdict(choice), "documents": None, "order": "none"})
        chosen = choose(heldout.document_lengths(), read_scores(heldout_scores, heldout), same)
        requests["heldout"] = ViewRequest(heldout, chosen, same.rule())
    else:
        requests["heldout"] = ViewRequest(heldout, np.arange(heldout.num_documents), {})
    written = write_view(out, requests)
    facts = {name: _split_facts(manifest, requests[name].store) for name, manifest in written.items()}
    if values is not None:
        kept = values[numbers]
        facts["train"]["scores"] = {"lowest": float(kept.min()), "highest": float(kept.max())}
    return {"view": str(out), "store": str(store), "order": choice.order, "rule": choice.rule(), "splits": facts}


def _split_facts(manifest: ViewManifest, store: Split) -> dict[str, Any]:
    return {
        "documents": manifest.documents,
        "of_documents": store.num_documents,
        "tokens": manifest.tokens,
        "of_tokens": store.num_tokens,
        "content_hash": manifest.content_hash,
        "bytes_on_disk": 16 * manifest.documents + 8,
    }


def render_view(facts: Mapping[str, Any]) -> RenderableType:
    """What a view holds of its store."""
    by_score = f"trained in {facts['order']} order of score"
    order = "shuffled in training" if facts["order"] == "none" else by_score
    table = Table(box=None, pad_edge=False)
    for name in ("split", "documents", "of", "tokens", "of", "share", "lowest", "highest score"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in facts["splits"].items():
        scores = split.get("scores")
        table.add_row(
            name,
            *(f"{split[field]:,}" for field in ("documents", "of_documents", "tokens", "of_tokens")),
            f"{split['tokens'] / max(split['of_tokens'], 1):.1%}",
            *((f"{scores['lowest']:.4g}", f"{scores['highest']:.4g}") if scores else ("", "")),
        )
    return Group(Text(f"{facts['view']}: a view of {facts['store']}, {order}", style="bold"), table)
