"""The figures of the planner: what is written on them, and that they become the same files every time."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from cpt.planner.picture_style import Label, place_labels
from cpt.planner.pictures import draw_compare, draw_fit, draw_predict, draw_recommend, save_figure

NAN = float("nan")


def texts(figure: Figure) -> list[str]:
    """Everything that is written on a figure."""
    figure.draw_without_rendering()
    return [found.get_text() for found in figure.findobj(Text) if found.get_visible() and found.get_text()]


def said(figure: Figure) -> str:
    return " | ".join(" ".join(text.split()) for text in texts(figure))


def axis_labels(figure: Figure) -> list[str]:
    return [label for axes in figure.findobj(lambda part: hasattr(part, "get_xlabel")) for label in
            (axes.get_xlabel(), axes.get_ylabel()) if label and axes.get_visible()]  # fmt: skip


def fit_facts(sizes: int = 1, tokens: int = 4, **changes: Any) -> dict[str, Any]:
    points = [
        {"params": 1e8 * 3**n, "tokens": 1e9 * 2**d, "share_general": share, "measured": 3 - 0.1 * d + share - 0.2 * n,
         "predicted": 3.01 - 0.1 * d + share - 0.2 * n}
        for n in range(sizes) for d in range(tokens) for share in (0.125, 0.5)
    ]  # fmt: skip
    held_out = {"share": 0.0029, "tokens": 0.0074, "params": None}
    facts = {"law": "dcpt", "title": "D-CPT", "target": "domain", "mae": 0.0023, "heldout": held_out, "points": points}
    return facts | changes


def compare_facts(count: int, spread: float = 1.2) -> dict[str, Any]:
    rows = [
        {"law": f"law_{i}", "target": target, "heldout_mae": 0.002 * spread**i, "title": "", "heldout_r2": 0.9,
         "heldout": {"share": 0.002 * spread**i, "tokens": None, "params": NAN},
         "excluded": "ignores the mixture" if i and i == count - 1 else ""}
        for target in ("general", "domain") for i in range(count)
    ]  # fmt: skip
    return {"num_points": 40, "ranking": rows}


def predict_facts(**changes: Any) -> dict[str, Any]:
    curve = [
        {"share_general": s / 10, "loss": 1.3 + s / 50, "interval": [1.29 + s / 50, 1.31 + s / 50]} for s in range(11)
    ]
    facts = {
        "target": "domain", "loss": 1.36, "interval": [1.35, 1.37], "law": "dcpt", "params": 7e7, "tokens": 1e10,
        "share_general": 0.3, "share_domain": 0.7, "curve": curve,
    }  # fmt: skip
    return facts | changes


def recommend_facts(**changes: Any) -> dict[str, Any]:
    shares = np.linspace(0.1, 1.0, 31)
    curve = [
        {"share_general": float(s), "loss_general": 3 - 0.2 * s, "general_interval": [2.99 - 0.2 * s, 3.01 - 0.2 * s],
         "loss_domain": 1.3 + 0.2 * s, "domain_interval": [1.29 + 0.2 * s, 1.31 + 0.2 * s]}
        for s in shares
    ]  # fmt: skip
    rules = {"uniform": 0.5, "replay 25%": 0.25, "best pilot": 0.251}
    baselines: list[dict[str, Any]] = [
        {"name": name, "share_general": s, "loss_general": 3 - 0.2 * s, "loss_domain": 1.3 + 0.2 * s, "regret": 0.1}
        for name, s in rules.items()
    ]
    baselines.append({"name": "token-proportional", "share_general": None, "regret": None})
    facts = {
        "usage": "tolerance", "share_general": 0.3, "share_domain": 0.7, "interval": [0.25, 0.36], "params": 7e7,
        "tokens": 1e10, "limit_general": 2.94, "tolerance": 0.03, "trusted_shares": [0.1, 1.0], "curve": curve,
        "predicted": {"loss_general": 2.94, "loss_domain": 1.36}, "baselines": baselines,
        "law": {"general": "l1", "domain": "dcpt"},
    }  # fmt: skip
    return facts | changes


def weight_facts(**changes: Any) -> dict[str, Any]:
    weights = {"web": 0.5, "code $x$": 0.3, "books": None}
    return recommend_facts(
        usage="weights", share_general=None, interval=None, curve=[], weights=weights,
        weights_interval={"web": [0.4, 0.6], "books": [None, None]}, predicted={"loss_web": 2.5},
        baselines=[{"name": "uniform", "weights": dict.fromkeys(weights, 1 / 3), "regret": 0.02}],
    ) | changes  # fmt: skip


def size_facts() -> dict[str, Any]:
    named = {"name": "4e+09 parameters, 4e+11 tokens", "loss_general": 2.32, "loss_domain": 1.22, "regret": 0.01}
    counted = {"name": "x", "params": 5e8, "tokens": 3e12, "loss_general": 2.5, "loss_domain": 1.4, "regret": NAN}
    return recommend_facts(
        usage="flops", flops=1e22, params=6.3e9, tokens=2.6e11, params_interval=[NAN, NAN], baselines=[named, counted]
    )


DRAWN = {
    "fit": lambda: draw_fit(fit_facts()),
    "compare": lambda: draw_compare(compare_facts(3)),
    "predict": lambda: draw_predict(predict_facts()),
    "recommend": lambda: draw_recommend(recommend_facts()),
    "weights": lambda: draw_recommend(weight_facts()),
    "sizes": lambda: draw_recommend(size_facts()),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_every_figure_has_a_message_and_axes_with_units(name: str) -> None:
    figure = DRAWN[name]()
    assert figure.texts and figure.texts[0].get_text()
    assert any("nats per token" in label for label in axis_labels(figure))


@pytest.mark.parametrize("name", list(DRAWN))
def test_nothing_that_is_written_leaves_the_figure(name: str) -> None:
    figure = DRAWN[name]()
    figure.draw_without_rendering()
    needed = figure.get_tightbbox()  # inches
    width, height = figure.get_size_inches()
    assert needed.x0 >= 0 and needed.y0 >= 0
    assert needed.x1 <= width and needed.y1 <= height


def test_both_files_appear_and_are_the_same_on_a_second_run(tmp_path: Path) -> None:
    first = save_figure(draw_recommend(recommend_facts()), tmp_path / "plan-7.5")
    second = save_figure(draw_recommend(recommend_facts()), tmp_path / "again")
    assert [path.name for path in first] == ["plan-7.5.png", "plan-7.5.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "again.png",
        "again.svg",
        "plan-7.5.png",
        "plan-7.5.svg",
    ]
    assert "date" not in first[1].read_text().split("</metadata>")[0]


def test_a_missing_folder_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        save_figure(draw_predict(predict_facts(curve=None)), tmp_path / "missing" / "plan")


def test_a_fit_names_its_held_out_errors_and_each_size() -> None:
    told = said(draw_fit(fit_facts(sizes=4)))
    assert "held out by share 0.0029, by tokens 0.0074" in told
    for size in ("100 M", "300 M", "900 M", "2.7 B"):
        assert f"{size} parameters" in told
    assert "12.5%" in told and "share of general data" in told


def test_a_fit_at_one_token_count_is_drawn_over_the_share() -> None:
    labels = axis_labels(draw_fit(fit_facts(tokens=1)))
    assert "share of general data" in labels
    assert "training tokens" not in labels


def test_a_fit_of_many_sources_is_coloured_by_the_targets_own_share() -> None:
    point = {"params": 1e9, "share_code": 0.2, "share_web": 0.8, "measured": 2.0, "predicted": 2.1}
    points = [point | {"tokens": tokens, "share_code": share} for tokens in (1e9, 2e9) for share in (0.2, 0.4)]
    assert "share of code" in said(draw_fit(fit_facts(target="code", points=points)))
    assert "share of code" in said(draw_fit(fit_facts(target="code", points=points[:2])))


@pytest.mark.parametrize("count", [1, 12])
def test_one_law_and_twelve_are_compared(count: int) -> None:
    told = said(draw_compare(compare_facts(count)))
    assert told.count(f"law_{count - 1}") == 2
    assert "0.0020" in told
    assert ("(1) not chosen: ignores the mixture" in told) == (count > 1)


def test_errors_of_many_orders_are_drawn_on_a_logarithmic_axis_that_says_so() -> None:
    assert "logarithmic" not in said(draw_compare(compare_facts(3)))
    figure = draw_compare(compare_facts(3, spread=10.0))
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    assert "held-out error (nats per token, logarithmic axis)" in said(figure)


def test_a_prediction_marks_the_point_that_was_asked_for() -> None:
    assert "asked: 1.3600" in said(draw_predict(predict_facts()))
    assert "share of general data" in said(draw_predict(predict_facts()))
    assert "law not to be trusted" in said(draw_predict(predict_facts(trusted_shares=[0.0, 0.9])))
    assert "1.3600" in said(draw_predict(predict_facts(curve=None, share_general=None, weights={"web": 1.0})))


def test_a_recommendation_names_its_limit_and_every_rule_in_both_panels() -> None:
    told = said(draw_recommend(recommend_facts()))
    assert "Train with 30.0% general data (90%: 25.0% to 36.0%): general loss 2.940, domain loss 1.360 nats." in told
    assert "limit 2.940, 3.0% above the base's" in told
    for label in ("recommended, 2.940", "recommended, 1.360", "uniform, 2.900", "uniform, 1.400"):
        assert label in told
    assert "replay 25% = best pilot" in told
    assert "laws not to be trusted" in told


def test_labels_of_a_recommendation_do_not_cover_one_another() -> None:
    figure = draw_recommend(recommend_facts())
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_labels_are_placed_apart_even_on_one_point() -> None:
    axes = Figure().subplots()
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    place_labels(axes, [Label(0.5, 0.5, f"name {i}") for i in range(5)], [np.array([[0.0, 0.0], [1.0, 1.0]])])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not [1 for i, box in enumerate(boxes) for other in boxes[:i] if box.overlaps(other)]


def test_weights_of_many_sources_stand_beside_what_other_rules_choose() -> None:
    told = said(draw_recommend(weight_facts()))
    assert "code $x$" in told and "uniform" in told and "0.0200" in told
    assert "no other choice is known" in said(draw_recommend(weight_facts(baselines=[])))


def test_sizes_are_told_as_counts_where_they_are_known() -> None:
    told = said(draw_recommend(size_facts()))
    assert "best: 6.3 B parameters, 260 B tokens" in told
    assert "500 M parameters, 3 T tokens" in told
    assert "4e+09 parameters, 4e+11 tokens" in told


@pytest.mark.parametrize(
    "draw",
    [
        lambda: draw_fit(fit_facts(points=[], heldout={}, mae=None)),
        lambda: draw_fit(fit_facts(points=[{"params": 1e8, "tokens": 1e9, "measured": 2.0, "predicted": None}])),
        lambda: draw_compare({"ranking": []}),
        lambda: draw_compare({"ranking": [{"law": "l1", "target": "general", "heldout_mae": None}]}),
        lambda: draw_predict(predict_facts(loss=NAN, interval=[None, NAN])),
        lambda: draw_predict(predict_facts(loss=None, curve=[])),
        lambda: draw_recommend(recommend_facts(curve=[], predicted={}, baselines=[], interval=None, trusted_shares=None)),
        lambda: draw_recommend(recommend_facts(limit_general=None, predicted={"loss_general": None, "loss_domain": NAN})),
    ],
)  # fmt: skip
def test_values_that_are_not_known_are_left_out(draw: Any) -> None:
    assert "nan" not in said(draw())
