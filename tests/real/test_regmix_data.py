"""RegMix's published runs: the power-transfer law predicts losses of mixtures that it has not seen better than trees."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr

from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.laws.power_transfer import POWER_TRANSFER
from cpt.planner.laws.regmix import REGMIX
from cpt.planner.simplex import at_scale, search_mixture

SHARED = Path(os.environ.get("CPT_SHARED_DATA", Path(__file__).parents[3] / "shared/data"))
RUNS = SHARED.parent / "planner_data/regmix"
pytestmark = pytest.mark.skipif(not RUNS.is_dir(), reason=f"{RUNS} is absent; set CPT_SHARED_DATA to its sibling data/")


def columns_of(name: str) -> dict[str, NDArray[np.float64]]:
    with (RUNS / name).open(newline="") as file:
        header, *rows = csv.reader(file)
    return {column: np.array([float(row[at]) for row in rows]) for at, column in enumerate(header) if column != "index"}


def samples_of(part: str, target: str) -> Samples:
    shares = columns_of(f"{part}_mixture_1m.csv")
    losses = columns_of(f"{part}_pile_loss_1m.csv")[f"metric/the_pile_{target}_val_loss"]
    sources = tuple(name.removeprefix("train_the_pile_") for name in shares)
    ones, unknown = np.ones(len(losses)), np.full(len(losses), np.nan)
    inputs = Inputs(target, sources, 1e-3 * ones, ones, np.column_stack(list(shares.values())), unknown, unknown)
    return Samples(inputs, losses, np.arange(len(losses)))


@pytest.mark.parametrize("target", ["stackexchange", "pile_cc"])
def test_power_transfer_predicts_unseen_mixtures_better_than_trees(target: str) -> None:
    train, test = samples_of("train", target), samples_of("test", target)
    ours, trees = (law.fit(train, 0, 0).predict(test.inputs) for law in (POWER_TRANSFER, REGMIX))
    assert np.abs(ours - test.losses).mean() < 0.9 * np.abs(trees - test.losses).mean()
    assert spearmanr(ours, test.losses).statistic > spearmanr(trees, test.losses).statistic


def test_eighty_mixtures_of_seventeen_sources_rank_the_others() -> None:
    train, test = samples_of("train", "uspto_backgrounds"), samples_of("test", "uspto_backgrounds")
    fitted = POWER_TRANSFER.fit(train.select(np.arange(80)), 0, 0)
    assert spearmanr(fitted.predict(test.inputs), test.losses).statistic > 0.97


def test_the_best_mixture_for_web_text_is_mostly_web_text_with_some_of_its_kin() -> None:
    train = samples_of("train", "pile_cc")
    fitted = POWER_TRANSFER.fit(train, 0, 0)
    sources = train.inputs.sources
    prior = train.inputs.shares.mean(axis=0)
    best = search_mixture(at_scale(fitted, "pile_cc", sources, 1e-3, 1.0), prior, np.ones(17), num_candidates=1024)
    share = dict(zip(sources, best, strict=True))
    assert 0.6 < share["pile_cc"] < 0.95
    assert share["wikipedia_en"] > share["github"]
