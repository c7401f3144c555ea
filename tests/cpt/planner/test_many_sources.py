"""Mixtures of more than two sources: weights files, caps, a limit on the general loss, what the answer holds."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.planner.answers import Ask, predicted_facts, recommend_facts
from cpt.planner.many_sources import read_weights
from cpt.planner.observations import Observations, read_observations
from cpt.planner.pledge import recommendation_of
from cpt.problems import ConfigError
from cpt.rundir import DataError

SOURCES = ("general", "law", "code")


@pytest.fixture
def table(write_csv: Callable[..., Path]) -> Observations:
    """30 mixtures; each loss falls with the share of its own source, and law helps general a little."""
    shares = np.random.default_rng(2).dirichlet([1.0, 1.0, 1.0], size=30)
    rows: list[dict[str, Any]] = [
        {"run": "base", "base": "b", "params": 1e8, "tokens": 0, "share_general": "", "share_law": "", "share_code": "",
         "loss_general": 3.0, "loss_law": 4.0, "loss_code": 4.0}
    ]  # fmt: skip
    for i, (g, a, c) in enumerate(shares):
        losses = (2.5 + 0.6 * np.exp(-3 * g - a), 1.5 + 2 * np.exp(-2 * a), 1.5 + 2 * np.exp(-2 * c))
        rows.append(
            {"run": f"m{i}", "base": "b", "params": 1e8, "tokens": 1e9, "share_general": g, "share_law": a,
             "share_code": c, "loss_general": losses[0], "loss_law": losses[1], "loss_code": losses[2]}
        )  # fmt: skip
    return read_observations(write_csv(rows))


ASKED = Ask(tokens=1e9, law="mixing")


def test_equal_rivals_share_what_the_objective_leaves_them(table: Observations) -> None:
    weights = recommend_facts(table, ASKED)["weights"]
    assert weights["law"] == pytest.approx(0.5, abs=0.03)
    assert weights["code"] == pytest.approx(0.5, abs=0.03)


def test_a_tolerance_on_the_general_loss_is_kept_by_giving_general_data_a_share(table: Observations) -> None:
    losses = {**table.losses, "general": np.where(table.trained, table.losses["general"], 2.7)}
    free = recommend_facts(table, ASKED)
    facts = recommend_facts(replace(table, losses=losses), replace(ASKED, tolerance=0.0, params=1e8))
    assert facts["limit_general"] == 2.7 < free["predicted"]["loss_general"]
    assert facts["predicted"]["loss_general"] == pytest.approx(2.7, abs=1e-3)
    assert facts["weights"]["general"] > free["weights"]["general"] + 0.05


def test_every_choice_has_weights_losses_and_a_regret_that_is_never_negative(table: Observations) -> None:
    facts = recommend_facts(table, ASKED)
    assert set(facts["weights_interval"]) == set(SOURCES)
    for low, high in facts["weights_interval"].values():
        assert 0 <= low <= high <= 1
    for line in facts["baselines"]:
        assert sum(line["weights"].values()) == pytest.approx(1)
        assert line["regret"] >= 0 and {"loss_general", "loss_law", "loss_code"} <= line.keys()
    plan = recommendation_of(table, facts)
    assert sum(plan.stages[0].weights.values()) == pytest.approx(1)
    assert plan.share_general == pytest.approx(facts["weights"]["general"])


def test_sources_that_cannot_fill_the_budget_are_told_with_what_is_missing(table: Observations, tmp_path: Path) -> None:
    file = tmp_path / "available.json"
    file.write_text(json.dumps({"general": 1e8, "law": 1e7, "code": 1e7}))
    with pytest.raises(DataError, match=r"tokens are missing; plan fewer tokens"):
        recommend_facts(table, Ask(tokens=1e9, law="mixing", available=file))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "must hold an object"),
        ('{"general": 1, "latin": 2}', "names the unknown source 'latin'; sources are general, law, code"),
        ('{"general": -1}', "--weights general = -1: must be a finite number >= 0"),
        ('{"general": NaN}', "must be a finite number"),
        ('{"general": true}', "must be a finite number"),
        ('{"general": 0}', "gives no source a weight above 0"),
    ],
)
def test_weights_files_that_say_nothing_are_refused(content: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_weights(file, SOURCES, "--weights")
    assert words in str(error.value)


def test_a_mixture_far_from_every_pilot_is_told(table: Observations, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text('{"code": 1}')
    facts = predicted_facts(table, "law", Ask(law="mixing", available=file))
    assert any("shares beyond every pilot: code 1" in line for line in facts["warnings"])
    assert facts["interval"][0] <= facts["loss"] <= facts["interval"][1]


def test_a_tolerance_that_no_mixture_keeps_is_refused_with_one_that_is_kept(table: Observations) -> None:
    losses = {**table.losses, "general": np.where(table.trained, table.losses["general"], 2.0)}
    with pytest.raises(ConfigError, match=r"no mixture keeps the general loss within it.*ask for --tolerance 0\.\d+"):
        recommend_facts(replace(table, losses=losses), Ask(tokens=1e9, law="mixing", tolerance=0.001, params=1e8))


def test_sizes_and_budgets_far_from_the_pilots_are_refused_or_told(table: Observations, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text('{"general": 1, "code": 1}')
    with pytest.raises(ConfigError, match="the observations hold one model size"):
        predicted_facts(table, "law", Ask(law="mixing", available=file, params=7e11))
    near = predicted_facts(table, "law", Ask(law="mixing", available=file))
    far = predicted_facts(table, "law", Ask(law="mixing", available=file, tokens=8e10))
    assert any("80 times outside the measured" in line for line in far["warnings"])
    width = [facts["interval"][1] - facts["interval"][0] for facts in (near, far)]
    assert width[1] >= width[0]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Ask(tokens=1e9, domain_tokens=1e8), "--domain-tokens = 100000000.0: has no meaning with 3 sources"),
        (Ask(flops=1e20, share_general=0.2), "--flops"),
    ],
)
def test_options_for_two_sources_are_refused_for_more(asked: Ask, words: str, table: Observations) -> None:
    with pytest.raises(ConfigError) as error:
        recommend_facts(table, asked)
    assert words in str(error.value)
