"""What lm_eval logs, as item tables and metrics with standard errors: numbers by hand, and against lm_eval's own."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.eval.harness_items import (
    ItemScores,
    Reading,
    item_scores,
    items_table,
    measured,
    not_finite,
    pooled,
    primary_metric,
    texts_table,
)


def reading(**fields: Any) -> Reading:
    plain: dict[str, Any] = {
        "name": "own", "output_type": "multiple_choice", "choices": lambda doc: doc.get("choices", []),
        "gold": lambda doc, choices: {doc["answer"]} if choices else (), "subset_field": "subset",
        "line": lambda sample: sample["doc_id"] + 1,
    }  # fmt: skip
    return Reading(**{**plain, **fields})


def sample(number: int, nats: list[float], **fields: Any) -> dict[str, Any]:
    doc = {"choices": ["yes", "no", "maybe"][: len(nats)], "answer": 0, "subset": "easy"}
    answers = [(value, False) for value in nats]
    arguments = [("Q?", f" {choice}") for choice in doc["choices"]]
    return {"doc_id": number, "doc": {**doc, **fields}, "filtered_resps": answers, "arguments": arguments, "target": 0}


def test_a_mean_has_the_standard_error_of_a_sample() -> None:
    found = pooled(item_scores([1, 1, 0, 1], "mean"))
    assert found.value == 0.75
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 4))  # s^2 = 0.75/3


def test_one_item_has_a_value_and_no_standard_error() -> None:
    found = pooled(item_scores([1], "mean"))
    assert (found.value, found.stderr) == (1.0, None)


def test_perplexity_is_exp_of_the_mean_and_its_error_by_the_delta_method() -> None:
    found = pooled(item_scores([-1.0, -3.0], "perplexity"))
    assert found.value == pytest.approx(math.exp(2))
    assert found.stderr == pytest.approx(math.exp(2) * 1.0)  # s = sqrt(2), over sqrt(2)


def test_bits_per_byte_weighs_texts_by_their_bytes() -> None:
    found = pooled(item_scores([(-10 * math.log(2), 10), (-90 * math.log(2), 30)], "bits_per_byte"))
    assert found.value == pytest.approx(100 / 40)
    residuals = np.array([10 - 25, 90 - 75])  # nats beyond the ratio, in bits
    assert found.stderr == pytest.approx(math.sqrt(2 * (residuals**2).sum()) / 40)


def test_a_part_of_the_items_is_pooled_alone() -> None:
    scores = item_scores([1, 0, 1, 1], "mean")
    found = pooled(scores, np.array([True, True, False, False]))
    assert found.value == 0.5
    assert pooled(scores, np.zeros(4, bool)).value is None


@settings(deadline=None)  # the first call imports lm_eval
@given(st.lists(st.floats(-50, 0), min_size=2, max_size=40))
def test_pooling_agrees_with_lm_eval(nats: list[float]) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    assert pooled(item_scores(nats, "mean")).value == pytest.approx(metrics.mean(nats), rel=1e-12, abs=1e-12)
    assert pooled(item_scores(nats, "mean")).stderr == pytest.approx(metrics.mean_stderr(nats), rel=1e-9, abs=1e-12)
    assert pooled(item_scores(nats, "perplexity")).value == pytest.approx(metrics.perplexity(nats), rel=1e-9)
    pairs = [(value, 3 + number) for number, value in enumerate(nats)]
    assert pooled(item_scores(pairs, "bits_per_byte")).value == pytest.approx(metrics.bits_per_byte(pairs), abs=1e-9)
    wanted = metrics.weighted_perplexity(pairs)
    assert pooled(item_scores(pairs, "weighted_perplexity")).value == pytest.approx(wanted, rel=1e-9)


def test_an_aggregation_that_is_no_mean_gets_a_bootstrap_error() -> None:
    raw = [(1, 1), (0, 1), (1, 0), (0, 0)] * 10

    def share_of_ones(items: Any) -> float:
        return float(np.mean([found for _, found in items]))

    found = measured(0.5, raw, share_of_ones, name="f1_score")
    assert found.value == 0.5
    assert found.stderr == pytest.approx(math.sqrt(0.25 / 40), rel=0.25)
    assert item_scores(raw, "f1_score").score.tolist()[:4] == [1.0, 0.0, 0.0, 1.0]


def test_what_is_not_finite_is_unknown_and_not_an_answer() -> None:
    samples = [sample(0, [-1.0, -2.0]), sample(1, [math.nan, -2.0]), sample(2, [-math.inf, -2.0])]
    assert not_finite(samples).tolist() == [False, True, True]
    scores = item_scores([1, 1, 1], "mean")
    scores.score[not_finite(samples)] = math.nan
    assert pooled(scores).value is None
    table = items_table(samples, reading(), scores, truncated=())
    assert table["chosen"].to_pylist() == ["yes", "", ""]
    assert math.isnan(table["score"][1].as_py())


def test_the_margin_is_gold_minus_the_best_other_one() -> None:
    samples = [sample(0, [-1.0, -3.0, -2.5]), sample(1, [-4.0, -3.0, -2.5])]
    table = items_table(samples, reading(), item_scores([1, 0], "mean"), truncated={("Q?", " no")})
    assert table["margin"].to_pylist() == [1.5, -1.5]
    assert table["chosen"].to_pylist() == ["yes", "maybe"]
    assert table["truncated"].to_pylist() == [True, True]
    assert table["line"].to_pylist() == [1, 2]


def test_a_text_or_a_generation_has_no_margin() -> None:
    rolled = {"doc_id": 0, "doc": {"text": "abc"}, "filtered_resps": [-3.0], "arguments": [("abc",)], "target": "abc"}
    wrote = {"doc_id": 0, "doc": {}, "filtered_resps": ["42"], "arguments": [("Q?", {"until": []})], "target": "41"}
    for one, kind, chosen in ((rolled, "loglikelihood_rolling", ""), (wrote, "generate_until", "42")):
        own = reading(output_type=kind, line=lambda sample: -1)
        table = items_table([one], own, item_scores([1.0], "mean"), truncated={("Q?", "")})
        assert math.isnan(table["margin"][0].as_py()) and table["chosen"].to_pylist() == [chosen]
        assert table["line"].to_pylist() == [-1] and table["truncated"].to_pylist() == [kind == "generate_until"]
    [text] = texts_table([rolled], reading(output_type="loglikelihood_rolling")).to_pylist()
    assert (text["prompt"], text["gold"], text["choices"]) == ("abc", "", [])


def test_texts_keep_the_end_of_a_prompt_and_the_subset() -> None:
    long = sample(0, [-1.0, -2.0])
    long["arguments"] = [("x" * 3000 + "Q?", " yes")]
    [text] = texts_table([long], reading()).to_pylist()
    assert len(text["prompt"]) == 2000 and text["prompt"].endswith("xQ?")
    assert (text["gold"], text["choices"], text["subset"]) == ("yes", ["yes", "no"], "easy")
    named = sample(0, [-1.0, -2.0], field="syntax")
    assert texts_table([named], reading(subset_field="field"))["subset"].to_pylist() == ["syntax"]


@pytest.mark.parametrize(
    ("stated", "keys", "chosen"),
    [
        (None, ["acc_norm,none", "acc,none"], "acc,none"),
        (None, ["exact_match,strict-match", "exact_match,flexible-extract"], "exact_match,strict-match"),
        (None, ["word_perplexity,none", "bits_per_byte,none"], "bits_per_byte,none"),
        (None, ["mcc,none"], "mcc,none"),
        ("acc_norm", ["acc,none", "acc_norm,none"], "acc_norm,none"),
        ("exact_match,flexible-extract", ["exact_match,strict-match", "exact_match,flexible-extract"],
         "exact_match,flexible-extract"),
    ],
)  # fmt: skip
def test_the_metric_that_speaks_for_a_task(stated: str | None, keys: list[str], chosen: str) -> None:
    assert primary_metric(stated, keys) == chosen


def test_scores_of_another_kind_have_no_value_of_their_own() -> None:
    found = item_scores(["abc", "def"], "bleu")
    assert isinstance(found, ItemScores) and found.pooling == "other" and np.isnan(found.score).all()
    assert pooled(found).value is None
