"""RegMix (arXiv 2407.01492): boosted regression trees from the mixture to the loss.

    L(N, D, h) = a sum of 1000 small regression trees over h_1 ... h_m, log N and log D

N parameters and D tokens in billions, L in nats per token, h the shares of all sources; one model per target, which
need not be a source. Trees by LightGBM with the paper's settings (1000 rounds at rate 0.01). Bootstrap replicates are
refits under one Dirichlet weight per run, with five times fewer and larger steps. Trees are constant outside the data:
this law cannot extrapolate, neither to larger models or budgets nor beyond the sampled mixtures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.planner.fitting import FloatArray, bootstrap_weights
from cpt.planner.laws.law import Inputs, Law, Samples, predict_folds_by_fitting
from cpt.planner.laws.scale_terms import num_mixtures

ROUNDS, RATE = 1000, 0.01
FEW_MIXTURES = 64
MAX_REPLICAS = 50
SETTINGS = {"objective": "regression", "num_threads": 1, "deterministic": True, "force_row_wise": True, "verbosity": -1}


@dataclass(frozen=True)
class RegMixFit:
    """The trees fitted on all observations, and one set of trees per bootstrap replicate."""

    trees: Any
    replicates: tuple[Any, ...]
    warnings: tuple[str, ...]

    @property
    def params(self) -> Mapping[str, float]:
        return {"trees": float(self.trees.num_trees())}

    def predict(self, inputs: Inputs) -> FloatArray:
        return np.asarray(self.trees.predict(features(inputs)), dtype=np.float64)

    def replicas(self, inputs: Inputs) -> FloatArray:
        rows = features(inputs)
        found = [np.asarray(trees.predict(rows), dtype=np.float64) for trees in self.replicates]
        return np.stack(found) if found else np.empty((0, len(inputs)))


def features(inputs: Inputs) -> FloatArray:
    """(n, m + 2): shares, log params, log tokens. A column of one value is never split on."""
    return np.column_stack((inputs.shares, np.log(inputs.params), np.log(inputs.tokens)))


def fit(samples: Samples, num_replicas: int, seed: int) -> RegMixFit:
    """Trees on all samples, and at most ``MAX_REPLICAS`` times on resampled ones: each costs as much as a whole law."""
    weights = bootstrap_weights(samples.runs, min(num_replicas, MAX_REPLICAS), seed)
    replicates = tuple(_train(samples, weight, seed, quick=True) for weight in weights)
    return RegMixFit(_train(samples, None, seed), replicates, _warnings(samples))


def _train(samples: Samples, weight: FloatArray | None, seed: int, *, quick: bool = False) -> Any:
    import lightgbm  # takes half a second, which every verb that only looks at the table of laws would wait

    smallest_leaf = int(np.clip(len(samples) // 10, 1, 20))  # LightGBM's own 20, where there are points enough
    speed = 5 if quick else 1
    settings = {**SETTINGS, "learning_rate": speed * RATE, "min_data_in_leaf": smallest_leaf, "seed": seed}
    table = lightgbm.Dataset(features(samples.inputs), samples.losses, weight=weight, params={"verbosity": -1})
    return lightgbm.train(settings, table, num_boost_round=ROUNDS // speed)


def _warnings(samples: Samples) -> tuple[str, ...]:
    mixtures = num_mixtures(samples)
    if mixtures >= FEW_MIXTURES:
        return ()
    return (f"regression trees want hundreds of mixtures, the observations hold {mixtures}; prefer a parametric law",)


REGMIX = Law(
    name="regmix",
    title="RegMix: boosted regression trees over shares, log N and log D",
    paper="arXiv 2407.01492",
    fit=fit,
    predict_folds=predict_folds_by_fitting(fit),
    many_sources=True,
    rises=True,
    min_shares=8,
    reach=1.0,  # a tree is constant beyond its data
)
