"""How well a law predicts what it was not fitted on: held-out shares, tokens and model sizes.

Owns the folds and the scores. Folds by share leave out one interior share at a time (a share at the edge would ask for
extrapolation); by tokens they leave out the largest third of the token counts, by size the largest model. A fold that
the data cannot give is None, never a made-up number.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cpt.planner.fitting import FloatArray, huber, log_residuals
from cpt.planner.laws.law import Law, Samples

KINDS = ("share", "tokens", "params")
Mask = NDArray[np.bool_]  # (n,)
Masks = NDArray[np.bool_]  # (F, n)


@dataclass(frozen=True)
class Score:
    """Errors of predictions: ``mae`` and ``rmse`` in nats, mean ``huber`` of log residuals, ``r2``."""

    mae: float
    rmse: float
    r2: float
    huber: float
    num_points: int


def score(predicted: FloatArray, observed: FloatArray) -> Score:
    """``r2`` is NaN where all observed values are equal."""
    error = predicted - observed
    spread = float(((observed - observed.mean()) ** 2).sum())
    return Score(
        mae=float(np.abs(error).mean()),
        rmse=float(np.sqrt((error**2).mean())),
        r2=1 - float((error**2).sum()) / spread if spread > 0 else math.nan,
        huber=float(huber(log_residuals(predicted, observed)).mean()),
        num_points=len(observed),
    )


def folds(samples: Samples) -> dict[str, Masks]:
    """Kind -> masks (F, n), True where a point is fitted on; F may be 0."""
    return {"share": share_folds(samples), "tokens": _token_fold(samples), "params": _size_fold(samples)}


def share_folds(samples: Samples, *, edges: bool = False) -> Masks:
    """One fold per distinct mixture. Of two sources only interior shares are left out, unless ``edges``; of many at
    most eight groups of mixtures, which cost as many fits.
    """
    mixtures, members = np.unique(samples.inputs.shares.round(6), axis=0, return_inverse=True)
    number = len(mixtures)
    if number < 3:
        return np.empty((0, len(samples)), dtype=bool)
    groups = np.arange(number)
    if mixtures.shape[1] == 2:  # sorted by their first share, so the first and the last are the edges
        left_out = groups if edges else groups[1:-1]
    else:
        groups = groups % min(8, number)
        left_out = np.unique(groups)
    return np.stack([groups[members.ravel()] != fold for fold in left_out])


def _token_fold(samples: Samples) -> Masks:
    cut = _token_cut(samples)
    if cut is None:
        return np.empty((0, len(samples)), dtype=bool)
    return np.asarray(samples.inputs.tokens <= cut)[None, :]


def _token_cut(samples: Samples) -> float | None:
    distinct = np.unique(samples.inputs.tokens)
    return float(distinct[len(distinct) - 1 - len(distinct) // 3]) if len(distinct) > 2 else None


def token_distance(samples: Samples, tokens: FloatArray) -> FloatArray:
    """How far ``tokens`` (n,) in billions lie beyond the measured ones, in units of what the token fold extrapolates.

    1 is as far as from the largest count that the fold is fitted on to the largest that it predicts; 0 is inside.
    """
    largest, cut = float(samples.inputs.tokens.max()), _token_cut(samples)
    beyond = np.log(np.maximum(tokens / largest, 1.0))
    return np.asarray(beyond / (np.log(2.0) if cut is None else np.log(largest / cut)))


def _size_fold(samples: Samples) -> Masks:
    sizes = np.unique(samples.inputs.params)
    if len(sizes) < 3:
        return np.empty((0, len(samples)), dtype=bool)
    return np.asarray(samples.inputs.params < sizes[-1])[None, :]


def held_out(law: Law, samples: Samples, seed: int = 0, judged: Mask | None = None) -> dict[str, Score | None]:
    """Kind -> score over all points that a fold left out, each predicted by the fit that did not see it.

    Only ``judged`` points (n,) are left out and scored, None: all; the others are always fitted on.
    """
    judged = np.ones(len(samples), dtype=bool) if judged is None else judged
    within = {kind: _among(judged, masks) for kind, masks in folds(samples.select(judged)).items()}
    chosen = {kind: masks for kind, masks in within.items() if len(masks) and (kind != "params" or law.sizes)}
    result: dict[str, Score | None] = dict.fromkeys(KINDS)
    if not chosen:
        return result
    predicted = law.predict_folds(samples, np.concatenate(list(chosen.values())), seed)
    first = 0
    for kind, masks in chosen.items():
        left_out = ~masks
        part = predicted[first : first + len(masks)]
        observed = np.broadcast_to(samples.losses, part.shape)
        result[kind] = score(part[left_out], observed[left_out])
        first += len(masks)
    return result


def _among(judged: Mask, masks: Masks) -> Masks:
    """Masks over the judged points as masks over all."""
    full = np.ones((len(masks), len(judged)), dtype=bool)
    full[:, judged] = masks
    return full
