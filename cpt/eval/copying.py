"""An in-context copying probe: does the model still continue what it has just read?

Continual pre-training can cost a model this ability, and much of what in-context learning rests on it, while the
held-out loss hardly moves (Elhady, Agirre, Artetxe 2025, arXiv 2506.00288, whose Copain benchmark measures the same;
the items here are our own). Items are random tokens of the model's own vocabulary, so no language and no knowledge is
in them. Two kinds, each at several distances (tokens from what is copied to its copy), rows of 4 tokens here:

    passage   BOS  a b c d  x y z  a b c d      the copy's tokens behind its first two are scored: c and d
    pairs     BOS  a b  c d  e f   c d  a b     every second token of the repeated pairs is scored: d and b

Exact: under teacher forcing every scored token is the most likely one if and only if greedy decoding copies them all.
The same seed gives the same items on every machine. Standard errors are clustered by row (sample deviation of the rows'
shares over sqrt of their number). Refuses nothing: a context too short for a distance leaves it out, and logits that
are not finite make the values unknown.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpt.eval.results import CopyingProbe, Measured
from cpt.eval.significance import mean_stderr
from cpt.model.attention import bare_model

PASSAGE_TOKENS = 16
CUE_TOKENS = 2  # of the copy, from which the model can know that it is one
DISTANCES = (16, 64, 256)
ROWS = 32  # of each kind at each distance
ROWS_PER_PASS = 8

IntArray = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class CopyTask:
    """Rows (ROWS, T) of one kind and distance; ``scored``: positions of the tokens to be copied."""

    kind: str
    distance: int
    rows: IntArray
    scored: IntArray

    @property
    def name(self) -> str:
        return f"{self.kind} {self.distance} back"


def probe(model: torch.nn.Module, vocab_size: int, *, seed: int, device: torch.device | str) -> CopyingProbe:
    """Measure ``model``, a transformers causal LM or an engine around one, as it stands: its dtype, or the caller's
    autocast. ``vocab_size``: of the tokenizer, for rows that a model has beyond it were never trained. Every rank of a
    sharded model must call it.
    """
    config = bare_model(model).config.get_text_config()  # type: ignore[union-attr, operator]
    was_training = model.training
    model.eval()
    try:
        return probe_by(lambda task: _copied(model, task, device), config, vocab_size, seed=seed)
    finally:
        model.train(was_training)


def probe_by(copied: Callable[[CopyTask], Shares], config: Any, vocab_size: int, *, seed: int) -> CopyingProbe:
    """Measure by ``copied``, which says of a task's items whether each scored token is the most likely one: (ROWS,
    scored), 1 or 0, or NaN where that is not known. ``config``: of transformers.
    """
    found = [(task, copied(task)) for task in copy_tasks(config, vocab_size, seed=seed)]
    passages = [right for task, right in found if task.kind == "passage"]
    whole = _measure([right.min(axis=1) for right in passages])
    by_token = _measure([right.mean(axis=1) for right in passages])
    return CopyingProbe(
        exact_match=whole.value,
        exact_match_stderr=whole.stderr,
        token_accuracy=by_token.value,
        token_accuracy_stderr=by_token.stderr,
        passages=sum(len(right) for right in passages),
        passage_tokens=_passage_tokens(config),
        parts={task.name: _measure([right.mean(axis=1)]) for task, right in found},
    )


def copy_tasks(config: Any, vocab_size: int, *, seed: int) -> list[CopyTask]:
    """All items for a model with this transformers config; distances that its context has room for."""
    length, positions = _passage_tokens(config), _positions(config)
    fitting = [distance for distance in DISTANCES if distance >= length and 1 + distance + length <= positions]
    tokens = _ordinary_tokens(config, vocab_size)
    return [
        make(tokens, length, distance, seed=seed, bos=config.bos_token_id)
        for distance in fitting or [length]
        for make in (_passages, _pairs)
    ]


def _passage_tokens(config: Any) -> int:
    """16, or as many as a tiny context has room for twice; even, for they are pairs too."""
    return max(CUE_TOKENS + 2, min(PASSAGE_TOKENS, (_positions(config) - 1) // 2 // 2 * 2))


def _positions(config: Any) -> int:
    """The model's context; models without learned positions need not say."""
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def _ordinary_tokens(config: Any, vocab_size: int) -> IntArray:
    """Every token but those that begin, end or fill a text."""
    special: set[Any] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(config, name, None)
        special |= set(found) if isinstance(found, list | tuple) else {found}
    return np.array([token for token in range(vocab_size) if token not in special], dtype=np.int64)


def _passages(tokens: IntArray, length: int, distance: int, *, seed: int, bos: int | None) -> CopyTask:
    """``distance`` random tokens, then the first ``length`` of them again."""
    drawn = np.stack([_draw(tokens, distance, rng) for rng in _generators(seed, "passage", distance)])
    first = distance + CUE_TOKENS
    return _task("passage", distance, [drawn, drawn[:, :length]], np.arange(first, distance + length), bos=bos)


def _pairs(tokens: IntArray, length: int, distance: int, *, seed: int, bos: int | None) -> CopyTask:
    """``distance`` random tokens as pairs, then ``length / 2`` of the pairs again in random order.

    The distance is that of the first pair to the first repeated one; each pair's own depends on the order.
    """
    number = distance // 2
    rows, again = [], []
    for rng in _generators(seed, "pairs", distance):
        pairs = _draw(tokens, 2 * number, rng).reshape(number, 2)
        rows.append(pairs.ravel())
        again.append(pairs[rng.permutation(number)[: length // 2]].ravel())
    scored = 2 * number + np.arange(1, length, 2)
    return _task("pairs", distance, [np.stack(rows), np.stack(again)], scored, bos=bos)


def _task(kind: str, distance: int, parts: list[IntArray], scored: IntArray, *, bos: int | None) -> CopyTask:
    begin = np.full((ROWS, 0 if bos is None else 1), 0 if bos is None else bos, dtype=np.int64)
    rows = np.concatenate([begin, *parts], axis=1)
    return CopyTask(kind, distance, rows, scored + begin.shape[1])


def _generators(seed: int, kind: str, distance: int) -> Iterator[np.random.Generator]:
    """One per row: what a row holds depends on nothing but (seed, kind, distance, its number)."""
    purpose = int.from_bytes(kind.encode(), "big")
    return (np.random.default_rng([seed, purpose, distance, row]) for row in range(ROWS))


def _draw(tokens: IntArray, number: int, rng: np.random.Generator) -> IntArray:
    """Random tokens, all different where there are enough: a token seen once has one continuation."""
    return rng.choice(tokens, number, replace=len(tokens) < number)


@torch.no_grad()
def _copied(model: torch.nn.Module, task: CopyTask, device: torch.device | str) -> NDArray[np.float64]:
    """Whether each scored token is the most likely one, (ROWS, scored): 1, 0, or NaN where logits are not finite."""
    found = []
    for first in range(0, ROWS, ROWS_PER_PASS):
        ids_BT = torch.from_numpy(task.rows[first : first + ROWS_PER_PASS]).to(device)
        logits_BTV: Tensor = model(input_ids=ids_BT, use_cache=False).logits
        scored = torch.from_numpy(task.scored).to(device)
        logits_BSV = logits_BTV[:, scored - 1].float()
        right_BS = (logits_BSV.argmax(dim=-1) == ids_BT[:, scored]).double()
        right_BS[~logits_BSV.isfinite().all(dim=-1)] = torch.nan
        found.append(right_BS.cpu().numpy())
    return np.concatenate(found)


def _measure(shares: list[NDArray[Any]]) -> Measured:
    """Mean over rows; unknown where one of them is."""
    values = np.concatenate(shares).astype(np.float64)
    known = bool(np.isfinite(values).all())
    return Measured(float(values.mean()) if known else None, mean_stderr(values) if known else None)
