"""Intervals, tests and words, against hand-computed values, a naive bootstrap, and each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.stats import binomtest, ks_2samp

from cpt.eval.significance import (
    Difference,
    FloatArray,
    difference,
    difference_apart,
    holm,
    mean_stderr,
    pair_means,
    pair_ratios,
    wording,
)

FEW = 200  # resamples where only the logic counts


def of_items(before: FloatArray | list[float], after: FloatArray | list[float], resamples: int = FEW) -> Difference:
    stratum = pair_means(before, after, name="task", resamples=resamples)
    return difference([stratum] if stratum else [])


def of_documents(before: FloatArray, after: FloatArray, tokens: FloatArray, resamples: int = FEW) -> Difference:
    stratum = pair_ratios(before, after, tokens, name="source", resamples=resamples)
    return difference([stratum] if stratum else [])


def known(value: float | None) -> float:
    assert value is not None
    return value


scores = st.sampled_from([0.0, 1.0])
grades = st.sampled_from([0.0, 0.25, 0.5, 1.0])
losses = st.floats(0.0, 1000.0, allow_subnormal=False)


def pairs(values: st.SearchStrategy[float]) -> st.SearchStrategy[FloatArray]:
    return st.integers(2, 60).flatmap(lambda number: arrays(np.float64, (2, number), elements=values))


def test_the_example_at_the_top_of_the_file() -> None:
    found = of_items([1, 1, 0, 1], [1, 0, 0, 0])
    assert (found.before, found.after, found.value, found.units) == (0.75, 0.25, -0.5, 4)
    assert found.p == pytest.approx(0.5)
    assert wording(found.value, found.p, higher_is_better=True) == "within noise"


def test_a_standard_error_is_that_of_the_sample() -> None:
    assert mean_stderr([1.0, 0.0, 1.0, 1.0]) == pytest.approx(math.sqrt(0.25 / 4))  # variance 0.25 with n - 1
    assert mean_stderr([1.0, math.nan]) is None


@given(pairs(st.one_of(scores, grades)))
def test_an_interval_contains_the_estimate(sides: FloatArray) -> None:
    found = of_items(*sides)
    assert known(found.low) <= known(found.value) <= known(found.high)
    assert 0.0 <= known(found.p) <= 1.0


@given(pairs(losses), st.integers(1, 50))
def test_an_interval_of_losses_contains_the_estimate(sides: FloatArray, tokens: int) -> None:
    found = of_documents(*sides, np.full(sides.shape[1], float(tokens)))
    assert known(found.low) <= known(found.value) <= known(found.high)
    assert found.value == pytest.approx((sides[1].sum() - sides[0].sum()) / (tokens * sides.shape[1]), abs=1e-9)


@pytest.mark.parametrize("values", [scores, grades, losses], ids=["scores", "grades", "losses"])
def test_exchanging_before_and_after_changes_signs_only(values: st.SearchStrategy[float]) -> None:
    @given(pairs(values))
    def exchange(sides: FloatArray) -> None:
        there, back = of_items(sides[0], sides[1]), of_items(sides[1], sides[0])
        negated = there.negated()
        assert (there.before, there.after) == (back.after, back.before)
        assert [known(back.value), known(back.low), known(back.high)] == pytest.approx(
            [known(negated.value), known(negated.low), known(negated.high)], rel=1e-9, abs=1e-9
        )
        assert back.p == there.p

    exchange()


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 40))
def test_scores_of_0_and_1_get_the_exact_sign_test(lost: int, gained: int, same: int) -> None:
    before = np.array([1.0] * lost + [0.0] * gained + [1.0] * same)
    after = np.array([0.0] * lost + [1.0] * gained + [1.0] * same)
    if lost + gained >= 1 and len(before) >= 2:
        assert of_items(before, after).p == pytest.approx(binomtest(lost, lost + gained).pvalue)


def naive(change: FloatArray, weight: FloatArray, resamples: int) -> FloatArray:
    """A bootstrap as the book has it: indices, one resample after the other."""
    rng = np.random.default_rng(7)
    drawn = (rng.integers(len(change), size=len(change)) for _ in range(resamples))
    return np.array([change[rows].sum() / weight[rows].sum() for rows in drawn])


SAMPLE = np.random.default_rng(1)
GRADED = SAMPLE.choice([0.0, 0.25, 0.5, 1.0], size=(2, 80))
BINARY = (SAMPLE.random((2, 400)) < 0.6).astype(np.float64)
REAL = SAMPLE.normal(3.0, 1.0, size=(2, 80))


@pytest.mark.parametrize("sides", [GRADED, REAL], ids=["few values: counts", "many values: indices"])
def test_resamples_are_distributed_like_those_of_a_naive_bootstrap(sides: FloatArray) -> None:
    stratum = pair_means(*sides, name="task", resamples=4000)
    assert stratum is not None
    reference = naive(sides[1] - sides[0], np.ones(80), 2000)
    assert ks_2samp(stratum.tops, reference).pvalue > 0.001
    assert stratum.tops.std() == pytest.approx(reference.std(), rel=0.06)


@pytest.mark.parametrize("number", [5, 80])
def test_the_standard_error_is_that_of_the_mean_change_also_of_few_documents(number: int) -> None:
    old, new = REAL[:, :number]
    expected = (new - old).std(ddof=1) / math.sqrt(number)
    assert of_documents(old, new, np.ones(number), 8000).stderr == pytest.approx(expected, rel=0.03)


def test_the_item_added_to_scores_of_0_and_1_is_not_felt_among_many() -> None:
    stratum = pair_means(*BINARY, name="task", resamples=4000)
    assert stratum is not None
    reference = naive(BINARY[1] - BINARY[0], np.ones(400), 2000)
    assert np.quantile(stratum.tops, [0.025, 0.975]) == pytest.approx(np.quantile(reference, [0.025, 0.975]), abs=0.006)


def test_documents_are_resampled_whole_like_in_a_naive_bootstrap() -> None:
    tokens = np.random.default_rng(3).integers(10, 500, 80).astype(np.float64)
    stratum = pair_ratios(REAL[0] * tokens, (REAL[1] + 5.0) * tokens, tokens, name="source", resamples=4000)
    assert stratum is not None
    reference = naive((REAL[1] + 5.0 - REAL[0]) * tokens, tokens, 2000)
    assert ks_2samp(stratum.tops / stratum.bottoms, reference).pvalue > 0.001


def test_pieces_of_one_document_are_one_observation() -> None:
    """A hundred equal tokens of each of eight documents say no more than one token of each does."""
    old, new = np.full(8, 3.0), 3.0 + np.random.default_rng(0).normal(0.05, 0.1, 8)
    short, long = of_documents(old, new, np.ones(8)), of_documents(100 * old, 100 * new, np.full(8, 100.0))
    assert (long.low, long.high, long.p) == pytest.approx((short.low, short.high, short.p))


@pytest.mark.parametrize("number", [6, 12, 200])
def test_95_of_100_intervals_contain_the_truth(number: int) -> None:
    """True change 0.1 nats; the widened percentiles hold for six documents, too, where plain ones hold in 87 of 100."""
    rng, inside = np.random.default_rng(11), 0
    for _ in range(300):
        old = rng.normal(3.0, 0.5, number)
        found = of_documents(old, old + rng.normal(0.1, 0.2, number), np.ones(number))
        inside += known(found.low) <= 0.1 <= known(found.high)
    assert 0.91 <= inside / 300 <= 0.99


@pytest.mark.parametrize("share", [0.003, 0.05, 0.4])
def test_intervals_of_accuracies_contain_the_truth_also_where_hardly_an_item_changes(share: float) -> None:
    rng, inside = np.random.default_rng(13), 0
    for _ in range(300):
        draw = rng.random(300)
        before, after = np.ones(300), np.where(draw < share, 0.0, 1.0)
        found = of_items(before, after)
        inside += known(found.low) <= -share <= known(found.high)
    assert inside / 300 >= 0.91


@pytest.mark.parametrize("graded", [False, True])
def test_where_nothing_changed_5_of_100_tests_say_so_at_most(graded: bool) -> None:
    rng, wrong = np.random.default_rng(17), 0
    for _ in range(400):
        sides = rng.normal(3.0, 1.0, (2, 100)) if graded else (rng.random((2, 100)) < 0.5).astype(np.float64)
        wrong += known(of_items(*sides).p) < 0.05
    assert wrong / 400 <= 0.08


def test_ten_items_of_which_none_changed_are_not_certain() -> None:
    found = of_items([1.0] * 10, [1.0] * 10, 2000)
    assert found.value == 0.0 and found.p == 1.0
    assert known(found.low) < 0.0 < known(found.high)


def test_the_same_figures_come_out_every_time_and_do_not_depend_on_other_rows() -> None:
    assert of_items(*BINARY) == of_items(*BINARY)
    other = pair_means(*BINARY, name="another task", resamples=FEW)
    assert other is not None and difference([other]) != of_items(*BINARY)


def test_pairs_with_a_nan_are_left_out() -> None:
    found = of_items([1.0, math.nan, 0.0, 1.0], [1.0, 1.0, math.inf, 0.0])
    assert (found.before, found.after, found.units) == (1.0, 0.5, 2)
    assert pair_means([math.nan], [1.0], name="task") is None
    assert pair_ratios([1.0], [1.0], [0.0], name="source") is None
    assert difference([]) == Difference(None, None, None)


def test_of_one_item_nothing_is_known_but_the_value() -> None:
    assert of_items([1.0], [0.0]) == Difference(1.0, 0.0, -1.0, units=1)


def test_a_group_of_tasks_is_the_mean_of_their_means() -> None:
    small = pair_means([1.0, 1.0], [0.0, 1.0], name="small", resamples=FEW)
    large = pair_means(np.ones(100), np.ones(100), name="large", resamples=FEW)
    assert small is not None and large is not None
    found = difference([small, large])
    assert (found.before, found.after, found.units) == (1.0, 0.75, 102)


def test_a_group_of_sources_is_the_loss_over_all_their_tokens() -> None:
    strata = [
        pair_ratios([30.0, 30.0], [40.0, 30.0], [10.0, 10.0], name="web", resamples=FEW),
        pair_ratios([80.0, 80.0], [40.0, 40.0], [20.0, 60.0], name="law", resamples=FEW),
    ]
    found = difference([stratum for stratum in strata if stratum])
    assert (found.before, found.after) == (pytest.approx(2.2), pytest.approx(1.5))


def test_many_small_drops_are_a_drop_of_the_group() -> None:
    """Each of 30 tasks loses 4 of 100 items and regains 1: nothing by itself, much together."""
    after = np.array([0.0] * 4 + [1.0] * 96)
    before = np.array([1.0] * 99 + [0.0])
    tasks = [pair_means(before, after, name=f"task {number}", resamples=2000) for number in range(30)]
    alone, together = (
        difference([known_stratum for known_stratum in tasks[:1] if known_stratum]),
        difference([known_stratum for known_stratum in tasks if known_stratum]),
    )
    assert known(alone.p) > 0.05 > known(together.p)
    assert known(together.high) < 0.0


def test_a_change_beyond_all_exchanges_has_a_p_below_one_in_their_number() -> None:
    """Of 1000 resamples none comes near 300 documents that all lost; a bound says how rare that is."""
    old = np.random.default_rng(5).normal(3.0, 0.1, 300)
    found = of_documents(old, old + 1.0 + 0.001 * old, np.ones(300), 1000)
    assert 0.0 < known(found.p) < 1e-6


def test_figures_without_shared_items_are_compared_by_their_standard_errors() -> None:
    found = difference_apart(0.5, 0.03, 0.6, 0.04)
    assert (found.value, found.stderr) == (pytest.approx(0.1), pytest.approx(0.05))
    assert (found.low, found.high) == (pytest.approx(0.002, abs=1e-3), pytest.approx(0.198, abs=1e-3))
    assert found.p == pytest.approx(0.0455, abs=1e-4)
    assert difference_apart(0.5, None, 0.6, 0.04) == Difference(0.5, 0.6, pytest.approx(0.1))
    assert difference_apart(0.5, 0.1, None, 0.1) == Difference(0.5, None, None)
    assert (difference_apart(0.5, 0.0, 0.6, 0.0).p, difference_apart(0.5, 0.0, 0.5, 0.0).p) == (0.0, 1.0)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), pytest.approx(0.06), None, pytest.approx(0.06)]
    assert holm([]) == []


@given(st.lists(st.one_of(st.none(), st.floats(0.0, 1.0)), max_size=30))
def test_holm_keeps_the_order_never_lowers_a_p_and_stays_below_1(p_values: list[float | None]) -> None:
    corrected = holm(p_values)
    together = [(p, q) for p, q in zip(p_values, corrected, strict=True) if p is not None and q is not None]
    assert sum(q is None for q in corrected) == sum(p is None for p in p_values)
    assert all(p <= q <= 1.0 and q <= p * len(together) + 1e-12 for p, q in together)
    ordered = [q for _, q in sorted(together)]
    assert ordered == sorted(ordered)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20), st.floats(0.0, 1.0))
def test_one_more_comparison_makes_no_other_one_surer(p_values: list[float], another: float) -> None:
    alone, among = holm(p_values), holm([*p_values, another])
    assert all(known(q) <= known(r) for q, r in zip(alone, among, strict=False))


@pytest.mark.parametrize(
    ("value", "p", "higher_is_better", "word"),
    [
        (0.1, 0.01, True, "gain"),
        (-0.1, 0.01, True, "drop"),
        (0.1, 0.01, False, "drop"),
        (-0.1, 0.01, False, "gain"),
        (0.1, 0.05, True, "within noise"),
        (0.1, None, True, "not tested"),
        (None, None, True, "not tested"),
    ],
)
def test_words(value: float | None, p: float | None, higher_is_better: bool, word: str) -> None:
    assert wording(value, p, higher_is_better=higher_is_better) == word
