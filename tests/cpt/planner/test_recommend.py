"""From laws to a share: published worked examples, intervals, baselines, and every way a question can be impossible."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.planner.allocate import best_size
from cpt.planner.answers import Ask, recommend_facts
from cpt.planner.compare import Ranked
from cpt.planner.forecast import Forecaster
from cpt.planner.laws.dcpt import DCPT
from cpt.planner.laws.law import Samples
from cpt.planner.observations import Observations, read_observations
from cpt.planner.pledge import recommendation_of
from cpt.planner.recommend import (
    Question,
    Sides,
    allowed_range,
    best_pilot,
    choose_share,
    domain_inputs,
    pick,
    refine,
)
from cpt.problems import ConfigError
from cpt.rundir import DataError

Rows = list[dict[str, Any]]

# Chemistry, 1.8B, 10B tokens (arXiv 2406.01375): measured losses against the domain share.
CHEMISTRY_DOMAIN_SHARE = np.array([0.90, 0.91, 0.92, 0.924, 0.93, 0.94, 1.0])
CHEMISTRY_GENERAL = np.array([2.9052, 2.9193, 2.9376, 2.9445, 2.9644, 2.9848, 3.4667])
CHEMISTRY_DOMAIN = np.array([1.7321, 1.7312, 1.7311, 1.7291, 1.7279, 1.7265, 1.7220])


def exact(name: str, target: str, exact_law: Any, two_source_inputs: Any) -> Forecaster:
    inputs = two_source_inputs([0.5, 1.8, 4.0], 10.0, [0.1, 0.5, 0.9], target)
    law = exact_law(name)
    samples = Samples(inputs, law.predict(inputs), np.arange(3))
    return Forecaster(Ranked(DCPT, target, {}), law, samples, ())


@pytest.fixture
def sides(exact_law: Any, two_source_inputs: Any) -> Sides:
    return Sides(
        exact("G", "general", exact_law, two_source_inputs), exact("P", "domain", exact_law, two_source_inputs)
    )


@pytest.mark.parametrize(
    ("tolerance", "share_domain", "loss_domain"),
    [(0.01, 0.706079, 1.977288), (0.02, 0.762327, 1.969346), (0.03, 0.806560, 1.963679), (0.05, 0.871288, 1.956197)],
)
def test_bounded_forgetting_finds_the_share_where_the_limit_is_tight(
    tolerance: float, share_domain: float, loss_domain: float, sides: Sides
) -> None:
    question = Question(params=1.8, tokens=10.0, tolerance=tolerance)
    choice = choose_share(replace(sides, limit=2.80 * (1 + tolerance)), question, 0.0, 1.0)
    assert 1 - choice.share_general == pytest.approx(share_domain, abs=1e-6)
    inputs = domain_inputs(sides.domain, question, np.array([choice.share_general]))
    assert sides.domain.fitted.predict(inputs)[0] == pytest.approx(loss_domain, abs=1e-6)


@pytest.mark.parametrize(("tolerance", "answer"), [(0.02, 0.9087), (0.03, 0.92445), (0.04, 0.9350)])
def test_the_measured_chemistry_table_gives_the_published_share(tolerance: float, answer: float) -> None:
    def measured(share_general: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return (
            np.interp(1 - share_general, CHEMISTRY_DOMAIN_SHARE, CHEMISTRY_GENERAL),
            np.interp(1 - share_general, CHEMISTRY_DOMAIN_SHARE, CHEMISTRY_DOMAIN),
        )

    assert 1 - refine(measured, 2.8602 * (1 + tolerance), 0.0, 0.1) == pytest.approx(answer, abs=1e-4)


@pytest.mark.parametrize(("domain_tokens", "share_domain"), [(0.1, 0.73826), (0.5, 1.0), (1.0, 1.0), (5.0, 1.0)])
def test_a_small_domain_corpus_used_once_has_an_inner_optimum(
    domain_tokens: float, share_domain: float, sides: Sides
) -> None:
    question = Question(params=1.8, tokens=None, domain_tokens=domain_tokens)
    choice = choose_share(sides, question, 0.0, 0.99)
    assert 1 - choice.share_general == pytest.approx(share_domain, abs=1e-5)
    loss = sides.domain.fitted.predict(domain_inputs(sides.domain, question, np.array([choice.share_general])))[0]
    if domain_tokens == 0.1:
        assert loss == pytest.approx(2.043923, abs=1e-6)


@pytest.mark.parametrize(
    ("share_domain", "params", "tokens"),
    [(0.2, 1480.18, 0.012161), (0.5, 313.606, 0.057397), (0.9, 115.896, 0.155312)],
)
def test_compute_is_split_between_size_and_tokens_as_in_the_closed_form(
    share_domain: float, params: float, tokens: float, sides: Sides
) -> None:
    found = best_size(sides.domain, 18.0, 1 - share_domain)
    assert found == pytest.approx(params, rel=1e-4)
    assert 18.0 / found == pytest.approx(tokens, rel=1e-4)


def test_repeated_domain_tokens_count_for_what_they_are_worth(sides: Sides) -> None:
    share = np.array([0.2])
    plenty = domain_inputs(sides.domain, Question(params=1.8, tokens=10.0, domain_tokens=100.0), share)
    scarce = domain_inputs(sides.domain, Question(params=1.8, tokens=10.0, domain_tokens=2.0), share)
    assert (plenty.tokens[0], plenty.own_share[0]) == pytest.approx((10.0, 0.8))
    assert scarce.tokens[0] == pytest.approx(2.0 + 2.0 * 3.7257, abs=1e-3)  # 2B general, 4 passes over 2B
    assert scarce.own_share[0] < 0.8
    assert sides.domain.fitted.predict(scarce)[0] > sides.domain.fitted.predict(plenty)[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_the_pick_is_the_lowest_domain_loss_within_the_limit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid, general, domain = np.linspace(0, 1, 30), rng.random((4, 30)), rng.random((4, 30))
    for row, share in enumerate(pick(grid, general, domain, 0.3)):
        index = int(np.argmin(np.abs(grid - share)))
        within = general[row] <= 0.3
        if within.any():
            assert within[index] and domain[row, index] == domain[row][within].min()
        else:
            assert general[row, index] == general[row].min()


@pytest.fixture
def table(observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]) -> Observations:
    return read_observations(write_csv(observation_rows()))


ASKED = Ask(params=1.8e9, tokens=20e9, tolerance=0.03, law="dcpt")


def test_a_recommendation_from_noisy_pilots_is_near_the_truth_and_its_interval_holds_it(
    table: Observations, sides: Sides
) -> None:
    facts = recommend_facts(table, ASKED)
    question = Question(params=1.8, tokens=20.0, tolerance=0.03)
    truth = choose_share(replace(sides, limit=2.8 * 1.03), question, 0.0, 1.0).share_general
    assert facts["share_general"] == pytest.approx(truth, abs=0.02)
    assert facts["interval"][0] <= truth <= facts["interval"][1]
    assert facts["interval"][1] - facts["interval"][0] < 0.2
    assert facts["share_general"] + facts["share_domain"] == pytest.approx(1)
    assert facts["predicted"]["loss_general"] == pytest.approx(facts["limit_general"], abs=1e-6)


def test_the_baselines_are_all_there_and_none_has_less_regret_than_the_recommendation(table: Observations) -> None:
    facts = recommend_facts(table, replace(ASKED, general_tokens=90e9, domain_tokens=30e9))
    found = {line["name"]: line for line in facts["baselines"]}
    assert set(found) == {"uniform", "token-proportional", "replay 5%", "replay 25%", "best pilot"}
    assert found["token-proportional"]["share_general"] == pytest.approx(0.75)
    assert all(line["regret"] >= 0 for line in found.values())
    assert found["replay 5%"]["feasible"] is False and found["replay 5%"]["regret"] > 0
    assert found["uniform"]["loss_domain"] > facts["predicted"]["loss_domain"]


def test_the_same_seed_gives_the_same_recommendation(table: Observations) -> None:
    assert recommend_facts(table, ASKED) == recommend_facts(table, ASKED)


def test_an_extrapolation_is_told_and_widens_the_interval(table: Observations) -> None:
    near, far = recommend_facts(table, ASKED), recommend_facts(table, replace(ASKED, tokens=2000e9))
    assert any("times outside the measured" in line for line in far["warnings"])
    assert not any("times outside the measured" in line for line in near["warnings"])
    width = [
        facts["predicted"]["interval_domain"][1] - facts["predicted"]["interval_domain"][0] for facts in (near, far)
    ]
    assert width[1] > width[0]


def test_the_plan_file_carries_the_choice_and_its_promise(table: Observations) -> None:
    facts = recommend_facts(table, ASKED)
    plan = recommendation_of(table, facts)
    assert plan.share_general == facts["share_general"]
    assert plan.tokens == 20_000_000_000
    assert plan.promise[-1].tokens == pytest.approx(20e9)
    assert plan.promise[-1].loss_general == pytest.approx(facts["predicted"]["loss_general"])
    assert plan.base_loss.general == pytest.approx(2.8)
    assert plan.lr == 3e-5


def test_an_empty_feasible_set_says_what_would_make_it_feasible(table: Observations) -> None:
    impossible = read_observations(table.path)
    losses = {**impossible.losses, "general": np.where(impossible.trained, impossible.losses["general"], 2.0)}
    with pytest.raises(
        ConfigError, match=r"--tolerance = 0.03: no trusted share .* ask for --tolerance 0\.\d+ or more"
    ):
        recommend_facts(replace(impossible, losses=losses), ASKED)


def test_the_tolerance_it_names_is_feasible(table: Observations) -> None:
    losses = {**table.losses, "general": np.where(table.trained, table.losses["general"], 2.5)}
    low = replace(table, losses=losses)
    with pytest.raises(ConfigError) as error:
        recommend_facts(low, replace(ASKED, tolerance=0.001))
    named = float(str(error.value).split("ask for --tolerance ")[1].split(" or more")[0])
    facts = recommend_facts(low, replace(ASKED, tolerance=named))
    assert facts["predicted"]["loss_general"] <= facts["limit_general"] + 1e-6


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Ask(), "--tokens: is required"),
        (Ask(tokens=-5.0), "--tokens = -5.0: must be a positive number"),
        (Ask(tokens=float("nan")), "--tokens = nan"),
        (Ask(tokens=1e9, tolerance=-0.1), "--tolerance = -0.1"),
        (Ask(tokens=1e9, law="dpct"), "--law = 'dpct': no such law"),
        (Ask(flops=1e22), "--share-general: is required with --flops"),
        (Ask(flops=1e22, share_general=0.2, tokens=1e9), "--tokens = 1000000000.0: is chosen by --flops"),
        (Ask(tokens=1e9, share_general=0.3), "--share-general = 0.3: is what recommend answers"),
        (Ask(flops=1e22, share_general=1.5), "--share-general = 1.5"),
    ],
)
def test_impossible_options_are_refused_with_their_name_and_value(asked: Ask, words: str, table: Observations) -> None:
    with pytest.raises(ConfigError) as error:
        recommend_facts(table, asked)
    assert words in str(error.value)


def test_a_size_far_from_the_only_measured_one_is_refused(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    one = read_observations(write_csv(observation_rows(sizes=(1.8,))))
    with pytest.raises(ConfigError, match=r"--params = 8000000000\.0: the observations hold one model size, 1\.8e\+09"):
        recommend_facts(one, replace(ASKED, params=8e9))
    assert recommend_facts(one, replace(ASKED, params=2.0e9))["law"] == {"general": "dcpt", "domain": "dcpt"}


def test_two_sizes_are_warned_of_when_a_third_is_asked_for(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    two = read_observations(write_csv(observation_rows(sizes=(0.5, 1.8))))
    facts = recommend_facts(two, replace(ASKED, params=8e9, tolerance=0.1))
    assert any("two model sizes cannot tell the floor E" in line for line in facts["warnings"])
    assert any("E, A and alpha" in line and "2 model sizes" in line for line in facts["warnings"])


def test_too_few_shares_are_told_with_what_to_run(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    few = read_observations(write_csv(observation_rows(shares=(0.1, 0.5))))
    with pytest.raises(DataError, match=r"needs 3 shares, the observations hold 2\. Run pilots at more shares"):
        recommend_facts(few, ASKED)
    with pytest.raises(DataError, match="hold 2"):
        recommend_facts(few, replace(ASKED, law="auto"))


def test_without_a_base_row_forgetting_cannot_be_bounded(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    path = write_csv(observation_rows(base_general=None))
    with pytest.raises(DataError, match=r"no base row \(tokens = 0\) with loss_general; add a row with tokens 0"):
        recommend_facts(read_observations(path), ASKED)


def test_a_domain_loss_that_rises_in_every_run_is_refused(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    for row in rows:
        row["loss_domain"] = 2.0 + float(row["tokens"]) / 100e9
    with pytest.raises(DataError, match="domain loss rises with tokens in all of 15 runs"):
        recommend_facts(read_observations(write_csv(rows)), ASKED)


def test_a_recommendation_stays_above_the_shares_where_the_general_loss_rises_and_the_law_cannot(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    for row in rows:
        if row["share_general"] in (0.0, 0.1) and row["tokens"]:
            row["loss_general"] = float(row["loss_general"]) + 0.3 * np.log(float(row["tokens"]) / 1e9)
    facts = recommend_facts(read_observations(write_csv(rows)), replace(ASKED, tolerance=5.0))
    assert facts["share_general"] >= 0.25
    assert facts["trusted_shares"] == pytest.approx([0.25, 0.75])
    assert any("is the lowest share that may be recommended here" in line for line in facts["warnings"])


def test_shares_that_no_pilot_came_near_are_not_recommended(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(observation_rows(shares=(0.2, 0.4, 0.6))))
    assert recommend_facts(table, replace(ASKED, tolerance=1.0))["share_general"] == pytest.approx(0.2)


def test_the_interval_stays_among_the_shares_that_may_be_recommended(table: Observations) -> None:
    facts = recommend_facts(table, replace(ASKED, tokens=500e9, tolerance=0.05))
    low, high = facts["trusted_shares"]
    assert low <= facts["interval"][0] <= facts["interval"][1] <= high


def test_laws_whose_trusted_shares_do_not_meet_give_no_recommendation(exact_law: Any, two_source_inputs: Any) -> None:
    """Set Q trusts domain shares up to 0.325 alone; general shares above 0.675 were not measured."""
    general = exact("G", "general", exact_law, two_source_inputs)
    near = replace(general, samples=general.samples.select(general.samples.inputs.own_share < 0.6))
    sides = Sides(near, exact("Q", "domain", exact_law, two_source_inputs))
    with pytest.raises(ConfigError, match=r"law dcpt is trusted at general shares 0\.675 to 1"):
        allowed_range(sides, Question(params=1.8, tokens=10.0))


def test_many_passes_over_the_domain_corpus_are_told(table: Observations) -> None:
    facts = recommend_facts(table, replace(ASKED, domain_tokens=1e8))
    assert facts["domain_passes"] == pytest.approx(20e9 * facts["share_domain"] / 1e8)
    assert any("the domain corpus is read" in line for line in facts["warnings"])
    assert any("harms a model" in line for line in facts["warnings"])
    assert recommend_facts(table, ASKED)["domain_passes"] is None


def test_the_advice_on_tokens_points_the_way_in_which_the_general_loss_falls(table: Observations) -> None:
    losses = {**table.losses, "general": np.where(table.trained, table.losses["general"], 2.5)}
    with pytest.raises(ConfigError, match="train more tokens"):
        recommend_facts(replace(table, losses=losses), ASKED)


def test_a_compute_budget_has_an_interval_around_its_size_and_all_warnings(table: Observations) -> None:
    facts = recommend_facts(table, Ask(flops=1e21, share_general=0.2, law="dcpt"))
    low, high = facts["params_interval"]
    assert low <= facts["params"] <= high
    assert facts["params"] * facts["tokens"] * 6 == pytest.approx(1e21)
    assert any(line.startswith("general, law dcpt") for line in facts["warnings"])


def test_the_best_pilot_is_one_whose_domain_loss_was_measured(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    for row in rows:
        if row["params"] == 4e9:
            row["loss_domain"] = ""
    assert best_pilot(read_observations(write_csv(rows)), None) == 0.0
