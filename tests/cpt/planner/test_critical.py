"""Critical shares: the reference answers, what cannot be met, what lies beyond the data, and the figure."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cpt.planner.critical import critical, render
from cpt.planner.critical_figure import draw_critical
from cpt.planner.fitting import FloatArray
from cpt.planner.laws.chinchilla import CHINCHILLA
from cpt.planner.laws.cmr import CMR
from cpt.planner.laws.law import Inputs, Samples
from cpt.planner.picture_style import save_figure
from cpt.planner.share_search import SHARES, CriticalQuery, first_share
from cpt.problems import ConfigError
from cpt.rundir import DataError

BASE = 2.8
BUDGETS = np.geomspace(2, 200, 9)


def at(share: FloatArray, tokens: FloatArray) -> FloatArray:
    """General loss that rises and turns at a budget that grows with the domain share (arXiv 2407.17467's curves)."""
    ratio = 1 - share
    return np.asarray(BASE - 0.04 + (0.02 + 0.04 * ratio) * tokens**0.3 - 0.006 * (1.2 - ratio) * tokens**0.6)


def samples(
    shares: tuple[float, ...] = (0.4, 0.55, 0.7, 0.85),
    budgets: FloatArray = BUDGETS,
    *,
    base: float = BASE,
    target: str = "general",
) -> Samples:
    share, tokens = (v.ravel() for v in np.meshgrid(np.array(shares), budgets, indexing="ij"))
    count = len(share)
    own = share if target == "general" else 1 - share
    losses = at(share, tokens) if target == "general" else 2.0 - (0.1 + 0.05 * own) * tokens**0.2
    columns = np.column_stack((share, 1 - share))
    fixed = np.full(count, 0.07), np.full(count, np.nan), np.full(count, base)
    inputs = Inputs(target, ("general", "domain"), fixed[0], tokens, columns, fixed[1], fixed[2])
    return Samples(inputs, losses, np.unique(share, return_inverse=True)[1])


def exact(tokens: float, epsilon: float) -> float:
    shares = np.linspace(0, 1, 100_001)
    return float(shares[np.argmax(at(shares, np.full(shares.shape, tokens)) <= BASE + epsilon)])


def query(tokens: float = 100e9, *epsilons: float, **options: float) -> CriticalQuery:
    return CriticalQuery(tokens, epsilons or (0.0, 0.02), num_replicas=20, **options)  # type: ignore[arg-type]


def test_the_released_pythia_losses_give_the_reference_shares() -> None:
    """Pythia-70M, Pile against Python, at step 10k (losses released with arXiv 2403.16952)."""
    shares = np.array([0.125, 0.25, 0.375, 0.5])
    inputs = Inputs(
        *("general", ("general", "domain"), np.full(4, 0.07), np.full(4, 10.48576)),
        *(np.column_stack((shares, 1 - shares)), np.full(4, np.nan), np.full(4, 2.873368)),
    )
    measured = Samples(inputs, np.array([2.926166, 2.880493, 2.857072, 2.838757]), np.arange(4))
    facts = critical(measured, CriticalQuery(10_000 * 4096 * 256, num_replicas=100))
    found = [row["share_general"] for row in facts["critical"]]
    assert found == pytest.approx([0.285, 0.247, 0.212, 0.129], abs=0.01)
    assert all(row["interval"][0] <= row["share_general"] <= row["interval"][1] for row in facts["critical"])


def test_measured_budgets_and_budgets_between_agree_with_the_generator() -> None:
    for tokens in (float(BUDGETS[6]), 80.0):
        facts = critical(samples(), query(tokens * 1e9))
        for row in facts["critical"]:
            assert row["share_general"] == pytest.approx(exact(tokens, row["epsilon"]), abs=0.01)
            assert row["feasible"]
    assert not facts["warnings"]


def test_the_share_falls_with_the_tolerance_and_the_curves_cover_the_question() -> None:
    facts = critical(samples(), query(100e9, 0.0, 0.01, 0.02))
    shares = [row["share_general"] for row in facts["critical"]]
    assert shares == sorted(shares, reverse=True)
    curve = [row["share_general"] for row in facts["epsilon_curve"]]
    assert curve == sorted(curve, reverse=True)
    assert {row["epsilon"] for row in facts["curve"]} == {0.0, 0.01, 0.02}
    assert max(row["tokens"] for row in facts["curve"]) == pytest.approx(200e9)


def test_turning_points_and_feasible_sets_are_those_of_the_curves() -> None:
    facts = critical(samples(), query(100e9, 0.0, 0.02))
    for row in facts["turning_points"]:
        ratio = 1 - row["share_general"]
        turn = ((0.02 + 0.04 * ratio) * 0.3 / (0.006 * (1.2 - ratio) * 0.6)) ** (1 / 0.3)
        assert row["tokens"] == pytest.approx(turn * 1e9, rel=0.05)
        assert row["feasible"] == (turn <= 100)
    kept = [row["shares_general"] for row in facts["feasible_set"]]
    assert kept == [
        [share for share in (0.4, 0.55, 0.7, 0.85) if at(np.array(share), np.array(100.0)) <= BASE + epsilon]
        for epsilon in (0.0, 0.02)
    ]
    assert 0.4 < 1 - facts["turning_share"] < 0.6  # the reference fit has R = .4246 at 100, with lambda 1000


def test_a_finite_penalty_moves_turning_points_earlier_and_needs_the_domain() -> None:
    general, domain = samples(), samples(target="domain")
    far, near = (critical(general, query(penalty=penalty), domain) for penalty in (math.inf, 200.0))
    for one, other in zip(near["turning_points"], far["turning_points"], strict=True):
        assert one["tokens"] < other["tokens"]
    with pytest.raises(ConfigError, match=r"penalty = 200\.0: needs the domain's losses"):
        critical(general, query(penalty=200.0))


def test_an_unreachable_tolerance_is_infeasible_and_says_what_would_do() -> None:
    facts = critical(samples(), query(10e9, -0.05))
    row = facts["critical"][0]
    assert (row["feasible"], row["share_general"]) == (False, None)
    text = next(text for text in facts["warnings"] if text.startswith("epsilon -0.05 is met at no share"))
    assert "would be, or a budget of" in text
    needed = float(text.split("epsilon ")[2].split(" ")[0])
    assert critical(samples(), query(10e9, needed))["critical"][0]["feasible"]


def test_a_tolerance_that_every_share_meets_needs_no_general_data() -> None:
    row = critical(samples(), query(100e9, 5.0))["critical"][0]
    assert (row["share_general"], row["feasible"]) == (0.0, True)


def test_budgets_beyond_the_data_are_warned_of_with_their_factor() -> None:
    facts = critical(samples(), query(600e9, 0.05))
    assert any("6e+11 tokens lie 3 times beyond the measured 2e+11" in text for text in facts["warnings"])
    before = critical(samples(), query(1e9, 0.05))
    assert any("before the first measurement" in text for text in before["warnings"])


def test_shares_outside_the_trained_ones_are_warned_of() -> None:
    facts = critical(samples((0.75, 0.8, 0.85, 0.9)), query(100e9, 0.03))
    assert any("lies outside the trained general shares 0.750 to 0.900" in text for text in facts["warnings"])


def test_a_law_of_the_users_choice_is_used() -> None:
    facts = critical(samples(), CriticalQuery(100e9, (0.02,), law=CMR, num_replicas=10))
    assert facts["law"] == "cmr"
    assert facts["critical"][0]["share_general"] == pytest.approx(exact(100, 0.02), abs=0.01)
    blind = critical(samples(), CriticalQuery(100e9, (0.02,), law=CHINCHILLA, num_replicas=0))
    assert blind["critical"][0]["interval"] is None


def joined(sizes: tuple[float, ...]) -> Samples:
    part = samples()
    columns = {n: np.concatenate([getattr(part.inputs, n)] * len(sizes)) for n in ("tokens", "shares", "lr")}
    params = np.repeat(sizes, len(part))
    bases = np.repeat([BASE - 0.1 * index for index in range(len(sizes))], len(part))
    inputs = Inputs("general", ("general", "domain"), params=params, base_loss=bases, **columns)
    losses = np.concatenate([part.losses - 0.1 * index for index in range(len(sizes))])
    return Samples(inputs, losses, np.arange(len(losses)))


def test_of_several_sizes_the_largest_is_taken_and_said() -> None:
    facts = critical(joined((0.07, 0.4)), query(100e9, 0.02))
    assert facts["params"] == pytest.approx(0.4e9)
    assert any("2 model sizes were trained and params is not given" in text for text in facts["warnings"])
    with pytest.raises(DataError, match=r"params = 1e\+09: the law cmr"):
        critical(joined((0.07, 0.4)), query(100e9, 0.02, params=1e9, base_loss=2.7))
    with pytest.raises(DataError, match=r"no base row .* for 1e\+09 parameters"):
        critical(joined((0.07, 0.4)), query(100e9, 0.02, params=1e9))


def test_a_law_that_sees_the_size_goes_to_sizes_that_were_not_trained() -> None:
    asked = CriticalQuery(100e9, (0.3,), law=CHINCHILLA, params=1e9, base_loss=2.7, num_replicas=5)
    facts = critical(joined((0.07, 0.2, 0.4)), asked)
    assert facts["turning_points"] == []
    assert facts["critical"][0]["feasible"]


def test_a_missing_base_row_is_refused() -> None:
    with pytest.raises(DataError, match=r"loss_general: no base row \(tokens = 0\) for 7e\+07 parameters"):
        critical(samples(base=math.nan), query())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (query(-1.0), r"tokens = -1\.0: must be a positive number"),
        (query(1e9, math.nan), r"epsilon = \[nan\]: must be one or more numbers"),
        (query(1e9, params=0.0), r"params = 0\.0: must be a positive number"),
        (query(1e9, penalty=0.0), r"penalty = 0\.0: must be positive"),
    ],
)
def test_options_that_cannot_be_are_refused(asked: CriticalQuery, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        critical(samples(), asked)


def test_the_first_share_is_found_between_grid_points_and_missing_where_none_is() -> None:
    losses = np.stack((3 - SHARES, np.full(SHARES.shape, 3.0), np.full(SHARES.shape, 1.0)))
    found = first_share(losses, 2.6547)
    assert found[0] == pytest.approx(0.3453, abs=1e-9)
    assert math.isnan(found[1])
    assert found[2] == 0.0


def test_facts_are_json_and_the_table_and_figure_show_them(tmp_path: Path) -> None:
    facts = critical(samples(), query(100e9, -9.0, 0.02))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    console = Console(width=200, record=True, file=(tmp_path / "out.txt").open("w"))
    console.print(render(facts))
    text = console.export_text()
    assert "infeasible" in text
    assert "warning: epsilon -9 is met at no share" in text
    png, svg = save_figure(draw_critical(facts), tmp_path / "critical")
    assert png.read_bytes().startswith(b"\x89PNG")
    drawing = svg.read_text()
    assert "Change of general loss" in drawing
    assert "At least" in drawing
    assert save_figure(draw_critical(facts), tmp_path / "again")[1].read_text() == drawing


def test_the_figure_says_when_there_is_nothing_to_draw() -> None:
    asked = CriticalQuery(100e9, (-9.0,), law=CHINCHILLA, params=1e9, base_loss=-1.0, num_replicas=0)
    figure = draw_critical(critical(joined((0.07, 0.2, 0.4)), asked))
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["infeasible at every tolerance shown", "this size was not trained"]
