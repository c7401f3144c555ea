"""What ``cpt plan fit``, ``compare``, ``predict`` and ``recommend`` print."""

from typing import Any

import pytest
from rich.console import Console, RenderableType

from cpt.planner.laws.table import LAWS
from cpt.planner.tables import render_compare, render_fit, render_predict, render_recommend


def printed(renderable: RenderableType, width: int = 80) -> str:
    console = Console(width=width, record=True, file=None, force_terminal=False, quiet=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def flat(text: str) -> str:
    """Without line breaks and repeated blanks: what is said, wherever it wraps."""
    return " ".join(text.split())


def fit_facts(**changes: Any) -> dict[str, Any]:
    facts = {
        "law": "dcpt", "title": "D-CPT L3: E + A/N^alpha", "paper": "arXiv 2406.01375", "target": "domain",
        "params": {"E": 0.68008, "B": 0.3244}, "params_interval": {"E": [0.56185, 0.78174]},
        "r2": 0.9964, "huber": 1.17e-6, "mae": 0.002335, "num_points": 40,
        "heldout": {"share": 0.002896, "tokens": 0.007365, "params": None},
        "heldout_r2": {"share": 0.99, "tokens": 0.88, "params": None},
        "heldout_huber": {"share": 1e-6, "tokens": 4e-6, "params": None},
        "points": [], "warnings": ["one model size", "one model size"],
    }  # fmt: skip
    return facts | changes


def ranked(law: str, target: str = "domain", mae: float | None = 0.005, excluded: str = "") -> dict[str, Any]:
    return {
        "law": law, "target": target, "heldout_mae": mae, "heldout_r2": 0.9, "title": f"title of {law}",
        "heldout": {"share": mae, "tokens": mae, "params": None}, "excluded": excluded,
    }  # fmt: skip


def compare_facts(*rows: dict[str, Any]) -> dict[str, Any]:
    return {"observations": "observations.csv", "num_points": 40, "ranking": list(rows), "warnings": []}


def baseline(name: str, share: float | None, general: float | None, **more: Any) -> dict[str, Any]:
    domain = None if general is None else 1.4
    row = {"name": name, "share_general": share, "loss_general": general, "loss_domain": domain, "regret": domain}
    return row | more


def recommend_facts(**changes: Any) -> dict[str, Any]:
    facts = {
        "usage": "tolerance", "share_general": 0.2917, "share_domain": 0.7083, "interval": [0.2488, 0.3434],
        "params": 70.4e6, "tokens": 10.48576e9, "limit_general": 2.8734, "tolerance": 0.0, "trusted_shares": [0.1, 1.0],
        "predicted": {"loss_general": 2.8734, "loss_domain": 1.3884, "interval_general": [2.8643, 2.8824],
                      "interval_domain": None},
        "baselines": [
            baseline("uniform", 0.5, 2.8433, regret=0.0385, feasible=True),
            baseline("replay 5%", 0.05, 2.9755, regret=0.1022, feasible=False),
            baseline("token-proportional", None, None, note="needs --general-tokens and --domain-tokens"),
        ],
        "law": {"general": "l1", "domain": "dcpt"}, "warnings": ["not trusted below 0.0355"],
    }  # fmt: skip
    return facts | changes


def many_sources() -> dict[str, Any]:
    weights = {"web": 0.5, "code": 0.3, "books": 0.15, "wiki": 0.05}
    return recommend_facts(
        usage="weights", share_general=None, share_domain=None, interval=None, limit_general=None, trusted_shares=None,
        weights=weights, weights_interval={"web": [0.45, 0.55]}, predicted={"loss_web": 2.5, "loss_code": 1.25},
        baselines=[{"name": "uniform", "weights": dict.fromkeys(weights, 0.25), "loss_web": 2.6, "regret": 0.02}],
        law={"web": "dcpt"},
    )  # fmt: skip


def sizes() -> dict[str, Any]:
    return recommend_facts(
        usage="flops", flops=1e22, params=6.3e9, tokens=2.6e11, params_interval=[4e9, 9e9], limit_general=None,
        trusted_shares=None, baselines=[baseline("5e+08 parameters, 3.3e+12 tokens", 0.2917, 2.9, regret=0.2)],
    )  # fmt: skip


def test_a_fit_begins_with_how_far_the_law_errs_and_names_its_paper() -> None:
    text = flat(printed(render_fit(fit_facts())))
    assert text.startswith("Law dcpt fits the domain loss to 0.0023 nats; errors where it was not fitted:")
    assert "held-out shares 0.0029, held-out tokens 0.0074." in text
    assert "D-CPT L3: E + A/N^alpha (arXiv 2406.01375)" in text
    assert "0.68008 0.56185 to 0.78174" in text
    assert "MAE, nats" in text


def test_a_fit_without_held_out_points_and_intervals_says_so_with_dashes() -> None:
    nothing = dict.fromkeys(("share", "tokens", "params"))
    facts = fit_facts(params_interval={}, heldout=nothing, heldout_r2=nothing, heldout_huber=nothing, r2=None)
    text = flat(printed(render_fit(facts)))
    assert "nothing is held out." in text
    assert "held-out size - - -" in text


def test_every_warning_is_told_once() -> None:
    assert printed(render_fit(fit_facts())).count("one model size") == 1


def test_the_best_law_is_marked_and_excluded_ones_are_told_with_one_reason() -> None:
    reason = "the general loss rises with tokens in some run, which this law cannot represent"
    facts = compare_facts(ranked("l1", "general", 0.004, reason), ranked("l5", "general", 0.01, reason), ranked("dcpt"))
    text = flat(printed(render_compare(facts)))
    assert text.startswith("No law may be chosen for general loss; domain loss is predicted best by dcpt (0.0050 nats)")
    assert text.count("not chosen (1)") == 2
    assert text.count(reason) == 1
    assert "dcpt 0.0050 0.0050 0.0050 - 0.900 best" in text
    assert "l1 title of l1" in text


@pytest.mark.parametrize("count", [0, 1, 12])
def test_any_number_of_laws_fits_into_80_columns(count: int) -> None:
    text = printed(render_compare(compare_facts(*(ranked(f"law_{i}", mae=None) for i in range(count)))))
    assert text.count("title of law_") == count
    assert max(map(len, text.splitlines())) <= 80


def test_a_prediction_states_loss_interval_and_where_it_holds() -> None:
    facts = {
        "target": "domain", "loss": 1.38979, "interval": [1.3842, 1.3954], "law": "dcpt", "params": 1e9,
        "tokens": 10.5e9, "share_general": 0.3, "share_domain": 0.7, "warnings": [],
    }  # fmt: skip
    text = flat(printed(render_predict(facts)))
    assert text.startswith("Predicted domain loss: 1.3898 nats per token (90%: 1.3842 to 1.3954).")
    assert "at 30.0% general and 70.0% domain data, 10.5 B tokens, 1 B parameters" in text
    assert LAWS["dcpt"].title in text


def test_a_prediction_for_many_sources_lists_their_shares() -> None:
    facts = {
        "target": "code", "loss": 1.2, "interval": None, "law": "nobody's", "params": 1e9, "tokens": None,
        "weights": {"web": 0.25, "code": 0.75}, "warnings": [],
    }  # fmt: skip
    text = flat(printed(render_predict(facts)))
    assert text.startswith("Predicted code loss: 1.2000 nats per token.")
    assert "code 75.0% web 25.0%" in text
    assert "- tokens" in text


def test_a_recommendation_begins_with_one_sentence() -> None:
    text = flat(printed(render_recommend(recommend_facts())))
    sentence = "Train with 29.2% general data (90%: 24.9% to 34.3%): general loss 2.873, domain loss 1.388 nats."
    assert text.startswith(sentence)
    assert "for 29.2% general and 70.8% domain data, 10.5 B tokens, 70.4 M parameters" in text
    assert "searched where the laws can be trusted: 10.0% to 100.0% general data" in text


def test_baselines_show_both_shares_and_regret_and_which_break_the_limit() -> None:
    text = printed(render_recommend(recommend_facts()), width=100)
    lines = {line.split("  ")[0]: flat(line) for line in text.splitlines()}
    assert lines["recommended"] == "recommended 29.2% 70.8% 2.8734 1.3884 0.0000"
    assert lines["uniform"] == "uniform 50.0% 50.0% 2.8433 1.4000 0.0385"
    assert lines["replay 5%"] == "replay 5% 5.0% 95.0% 2.9755 1.4000 0.1022 breaks the limit"
    assert lines["token-proportional"] == "token-proportional - - - - -"
    assert "token-proportional: needs --general-tokens and --domain-tokens" in text


def test_a_recommendation_is_readable_at_80_columns() -> None:
    text = printed(render_recommend(recommend_facts()))
    assert max(map(len, text.splitlines())) <= 80
    assert "token-proportional" in text
    assert "…" not in text


def test_a_tolerance_is_told_as_the_limit_that_it_sets() -> None:
    text = flat(printed(render_recommend(recommend_facts(tolerance=0.03, limit_general=2.9596))))
    assert "limit: general loss at most 2.9596 nats, 3.0% above the base's" in text
    unlimited = flat(printed(render_recommend(recommend_facts(tolerance=None, limit_general=None))))
    assert "limit:" not in unlimited


def test_many_sources_are_told_by_name_with_the_heaviest_first() -> None:
    text = flat(printed(render_recommend(many_sources()), width=100))
    sentence = "Train with web 50.0%, code 30.0%, books 15.0% and 1 more: web loss 2.500, code loss 1.250 nats."
    assert text.startswith(sentence)
    assert "source share 90% interval uniform" in text
    assert "web 50.0% 45.0% to 55.0% 25.0% code 30.0% - 25.0%" in text


def test_a_model_size_is_recommended_for_given_compute() -> None:
    text = flat(printed(render_recommend(sizes())))
    assert text.startswith(
        "Train a model of 6.3 B parameters (90%: 4 B to 9 B) on 260 B tokens with 29.2% general data"
    )
    assert "1e+22 floating-point operations" in text
    assert "0.2000" in text


def test_names_in_brackets_are_no_markup() -> None:
    facts = recommend_facts(warnings=["source [red]web[/red] is small"])
    assert "[red]web[/red]" in printed(render_recommend(facts))


def test_values_that_are_not_known_are_dashes_and_do_not_crash() -> None:
    nan = float("nan")
    facts = recommend_facts(interval=[nan, None], predicted={"loss_general": None, "loss_domain": nan}, tokens=None)
    assert flat(printed(render_recommend(facts))).startswith("Train with 29.2% general data.")
    assert "- to" not in printed(render_fit(fit_facts(mae=nan, params_interval={"E": [nan, nan]})))
