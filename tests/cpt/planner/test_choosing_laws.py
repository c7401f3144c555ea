"""Held-out scores, the ranking of laws, and what a fit says about itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.planner.admissibility import at_shares, base_at, extrapolation, rising_runs, widening
from cpt.planner.base_losses import base_loss
from cpt.planner.compare import Ranked, Wanted, choose, compare_facts, rank, unable
from cpt.planner.fit_law import fit_facts
from cpt.planner.fitting import random_starts, solve
from cpt.planner.forecast import Forecaster, band, forecaster
from cpt.planner.laws.dcpt import DCPT, L1, L5, _dcpt_ranges
from cpt.planner.laws.dcpt import dcpt as DCPT_FORMULA
from cpt.planner.laws.law import Samples, fit_warnings, problem_of
from cpt.planner.laws.table import LAWS
from cpt.planner.observations import read_observations, samples
from cpt.planner.scores import folds, held_out, score, share_folds, token_distance
from cpt.problems import ConfigError
from cpt.rundir import DataError

Rows = list[dict[str, Any]]


def test_scores_are_what_their_names_say() -> None:
    found = score(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    assert found.mae == pytest.approx(1 / 3)
    assert found.rmse == pytest.approx((1 / 3) ** 0.5)
    assert found.r2 == pytest.approx(0.5)


def test_folds_leave_out_interior_shares_late_tokens_and_the_largest_size(synthetic: Any, parameter_sets: Any) -> None:
    chosen, _ = synthetic(parameter_sets["P"], shares=(0.1, 0.4, 0.7, 0.9), num_tokens=6)
    masks = folds(chosen)
    left_out = [set(np.round(chosen.inputs.own_share[~mask], 6)) for mask in masks["share"]]
    assert sorted(left_out, key=min) == [{0.4}, {0.7}]
    (late,) = masks["tokens"]
    assert set(chosen.inputs.tokens[~late]) == set(np.unique(chosen.inputs.tokens)[4:])
    (small,) = masks["params"]
    assert set(chosen.inputs.params[~small]) == {4.0}
    assert len(share_folds(chosen, edges=True)) == 4


def test_what_cannot_be_held_out_is_none_and_not_a_number(synthetic: Any, parameter_sets: Any) -> None:
    chosen, _ = synthetic(parameter_sets["P"], sizes=(1.8,), shares=(0.1, 0.9), num_tokens=2)
    assert held_out(DCPT, chosen) == {"share": None, "tokens": None, "params": None}


def test_the_law_that_made_the_data_is_ranked_above_its_simpler_rivals(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(observation_rows(shares=(0.0, 0.1, 0.25, 0.4, 0.6, 0.8, 1.0), num_tokens=8)))
    ranking = rank(table, "domain", [L5, L1, DCPT])
    assert ranking[-1].law is L5
    assert choose(table, "domain", Wanted("dcpt")).law is DCPT
    with pytest.raises(ConfigError, match="no such law; choose auto or one of dcpt"):
        choose(table, "domain", Wanted("nope"))


def rising_at_share_0(rows: Rows) -> Rows:
    for row in rows:
        if row["share_general"] == 0.0 and row["tokens"]:
            row["loss_general"] = 2.6 + 0.1 * np.log(float(row["tokens"]) / 1e9)
    return rows


def test_a_law_that_cannot_rise_is_fitted_and_trusted_above_the_shares_where_the_loss_rises(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(rising_at_share_0(observation_rows())))
    facts = {line["law"]: line for line in compare_facts(table, ["general"])["ranking"]}
    assert facts["dcpt"]["trusted_above_share"] == 0.0 and facts["cmr"]["trusted_above_share"] is None
    by = forecaster(table, "general", Wanted("dcpt"), num_replicas=2)
    assert by.samples.inputs.own_share.min() == pytest.approx(0.1)
    assert any("rises with tokens at shares up to 0" in note for note in by.notes)
    assert np.abs(by.fitted.predict(by.samples.inputs) - by.samples.losses).mean() < 0.002


def test_a_law_that_cannot_rise_is_never_chosen_where_too_few_shares_are_left_for_it(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(rising_at_share_0(observation_rows(shares=(0.0, 0.1, 0.5)))))
    facts = compare_facts(table, ["general"])
    excluded = {line["law"] for line in facts["ranking"] if "rises with tokens" in line["excluded"]}
    assert {"dcpt", "l1", "l5"} <= excluded
    assert facts["ranking"][0]["law"] not in excluded
    assert choose(table, "general", Wanted("auto")).law.rises
    assert any("rises with tokens" in line for line in fit_facts(table, "dcpt", "general")["warnings"])


def test_a_law_that_can_rise_is_preferred_until_it_errs_half_as_much_again(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    ranking = rank(read_observations(write_csv(rising_at_share_0(observation_rows()))), "general")
    dcpt = next(one for one in ranking if one.law is DCPT)
    assert dcpt.order()[1] == pytest.approx(1.5 * (dcpt.mean("mae") or 0))
    assert [one.order() for one in ranking] == sorted(one.order() for one in ranking)


def test_a_law_whose_curves_reach_not_far_is_not_asked_far_away(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(observation_rows(sizes=(1.8,))))
    chosen, _ = samples(table, "general")
    cmr = LAWS["cmr"]
    assert unable(cmr, chosen, Wanted(tokens=51.0)) == ""
    assert "reaches 2 times the measured tokens" in unable(cmr, chosen, Wanted(tokens=60.0))
    assert "measured model sizes alone" in unable(cmr, chosen, Wanted(varies_size=True))
    assert unable(DCPT, chosen, Wanted(tokens=600.0, varies_size=True)) == ""
    assert choose(table, "general", Wanted(tokens=600.0)).law is not cmr


def test_the_error_of_an_extrapolation_grows_with_its_distance_in_log_tokens(
    synthetic: Any, parameter_sets: Any
) -> None:
    chosen, _ = synthetic(parameter_sets["P"], num_tokens=6)
    late = np.unique(chosen.inputs.tokens)
    assert token_distance(chosen, np.array([10.0, late[-1], late[-1] ** 2 / late[3]])) == pytest.approx([0, 0, 1])
    one = Ranked(DCPT, "domain", held_out(DCPT, chosen))
    inside, further = one.error(np.array([0.0, 2.0]))
    assert inside == pytest.approx(one.scores["share"].rmse)
    assert further == pytest.approx(np.hypot(inside, 2 * one.scores["tokens"].rmse))


def test_rising_runs_are_found_and_noise_is_not_one(two_source_inputs: Any) -> None:
    tokens = np.tile(np.geomspace(1, 20, 8), 3)
    inputs = two_source_inputs(1.0, tokens, np.repeat([0.2, 0.5, 0.9], 8), "general")
    runs = np.repeat([0, 1, 2], 8)
    noise = 0.003 * np.random.default_rng(1).normal(size=24)
    flat = Samples(inputs, 2.5 + noise, runs)
    assert rising_runs(flat) == []
    rising = Samples(inputs, 2.5 + noise + np.where(runs == 2, 0.05 * np.log(tokens), 0), runs)
    assert rising_runs(rising) == [2]


def test_extrapolation_is_a_factor_beyond_the_nearest_measurement(synthetic: Any, parameter_sets: Any) -> None:
    chosen, _ = synthetic(parameter_sets["P"], shares=(0.2, 0.5, 0.8))
    inside = extrapolation(chosen, params=1.0, tokens=10.0)
    assert inside == {"params": 1.0, "tokens": 1.0}
    assert widening(chosen, inside) == 1.0
    outside = extrapolation(chosen, params=8.0, tokens=52.0)
    assert outside == pytest.approx({"params": 2.0, "tokens": 2.0})
    assert widening(chosen, outside) == pytest.approx(1 + np.log(2) / np.log(8) + np.log(2) / np.log(20))


def test_the_base_loss_of_a_size_is_the_measured_one_or_lies_on_a_power_through_the_others(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    like = samples(read_observations(write_csv(observation_rows())), "general")[0].inputs
    known = dict(like.bases)
    between = base_at(like, np.array([1.8, 1.805, 8.0, 2.5]))
    assert between[0] == between[1] == known[1.8]
    assert between[2] < known[4.0] < between[3] < known[1.8]


def test_rates_known_for_a_part_of_the_rows_count_as_unknown(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    like = samples(read_observations(write_csv(rows)), "domain")[0].inputs
    assert at_shares(like, np.array([0.5]), params=1.8, tokens=10.0).lr[0] == 3e-5
    for row in rows[::2]:
        row["lr"] = ""
    like = samples(read_observations(write_csv(rows)), "domain")[0].inputs
    assert np.isnan(at_shares(like, np.array([0.5]), params=1.8, tokens=10.0).lr[0])


def test_a_law_called_by_name_says_what_speaks_against_it(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(rising_at_share_0(observation_rows(shares=(0.0, 0.1, 0.5)))))
    by = forecaster(table, "general", Wanted("dcpt"), num_replicas=0)
    assert any("law dcpt is not chosen by auto" in note and "cannot represent" in note for note in by.notes)
    one = read_observations(write_csv(observation_rows(sizes=(1.8,))))
    far = forecaster(one, "general", Wanted("cmr", tokens=900.0), num_replicas=0)
    assert any("reaches 2 times the measured tokens; the question lies beyond" in note for note in far.notes)


def test_a_fit_that_has_not_settled_is_told(synthetic: Any, parameter_sets: Any) -> None:
    chosen, _ = synthetic(parameter_sets["P"])
    problem = problem_of(chosen, DCPT_FORMULA, _dcpt_ranges(chosen))
    starts = random_starts(problem.parameters, 8, 0)
    weights = np.ones((8, len(chosen)))
    assert not solve(problem, starts, weights, iterations=3).converged.all()
    assert solve(problem, starts, weights, iterations=400).best().converged[0]
    assert fit_warnings(chosen, False, ())[0].startswith("the fit did not converge")


def test_an_interval_holds_new_measurements_about_as_often_as_it_says(synthetic: Any, parameter_sets: Any) -> None:
    """Twelve tables of noisy pilots; nine in ten intervals should hold the exact loss at shares that no pilot had."""
    hits = []
    for seed in range(12):
        chosen, _ = synthetic(parameter_sets["P"], num_tokens=6, noise=0.01, seed=seed)
        by = Forecaster(Ranked(DCPT, "domain", held_out(DCPT, chosen)), DCPT.fit(chosen, 100, seed), chosen, ())
        wanted = replace(chosen.inputs, shares=np.clip(chosen.inputs.shares + np.array([0.04, -0.04]), 0, 1))
        order = ("E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "eps")
        exact = DCPT_FORMULA(np.array([[parameter_sets["P"][name] for name in order]]), wanted)[0][0]
        found = band(by, wanted)
        hits.append(((found.low <= exact) & (exact <= found.high)).mean())
    assert np.mean(hits) >= 0.9


def test_the_base_loss_is_taken_as_measured_or_drawn_through_other_sizes(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    table = read_observations(write_csv(observation_rows()))
    assert base_loss(table, "general", 1.8e9).loss == pytest.approx(2.8)
    drawn = base_loss(table, "general", 8e9)
    assert 2.3 < drawn.loss < 2.75 and "drawn through" in drawn.warnings[0]
    one = read_observations(write_csv(observation_rows(sizes=(1.8,))))
    with pytest.raises(DataError, match=r"its base row is of 1\.8e"):
        base_loss(one, "general", 8e9)


def test_a_fit_states_its_quality_its_points_and_what_is_wrong_with_it(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    facts = fit_facts(read_observations(write_csv(observation_rows(sizes=(0.5, 1.8)))), "dcpt", "domain")
    assert facts["num_points"] == len(facts["points"]) == 50
    assert any("cannot be told apart with 2 model sizes" in line and "E, A" in line for line in facts["warnings"])
    assert any("two model sizes: how the loss changes with size" in line for line in facts["warnings"])
    low, high = facts["params_interval"]["B"]
    assert low <= facts["params"]["B"] <= high


def test_a_law_with_too_few_points_for_its_parameters_warns_and_does_not_fail(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    few = read_observations(write_csv(observation_rows(sizes=(1.8,), shares=(0.1, 0.4, 0.8), num_tokens=2)))
    by = forecaster(few, "domain", Wanted("dcpt"), num_replicas=20)
    assert any("cannot be told apart" in line for line in by.fitted.warnings)
    assert np.isfinite(by.fitted.predict(samples(few, "domain")[0].inputs)).all()
