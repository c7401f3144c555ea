"""Gain and forgetting by hand: three evaluations, two groups."""

import pytest

from cpt.eval.records import EvalRecord, SourceEval, aggregate
from cpt.eval.retention import measure_retention
from cpt.rundir import DataError


def record(step: int, general: float | None, domain: float | None) -> EvalRecord:
    sources = {
        "web": SourceEval("general", general, None, None, tokens=10, documents=1),
        "law": SourceEval("domain", domain, None, None, tokens=10, documents=1),
    }
    return EvalRecord(step, step * 100, sources, aggregate(sources))


RUN = [record(0, 2.0, 3.0), record(10, 2.6, 2.0), record(20, 2.3, 1.5)]


def test_gain_and_forgetting_of_a_run() -> None:
    retention = measure_retention(RUN)
    assert retention.domain_gain == pytest.approx(1.5)
    assert retention.general_forgetting == pytest.approx(0.3)
    assert retention.relative_forgetting == pytest.approx(0.15)
    assert retention.worst_forgetting == pytest.approx(0.6)
    assert (retention.base_step, retention.final_step) == (0, 20)


def test_worst_and_best_points_carry_their_steps() -> None:
    general, domain = measure_retention(RUN).groups["general"], measure_retention(RUN).sources["law"]
    assert (general.worst, general.worst_step, general.best, general.best_step) == (2.6, 10, 2.0, 0)
    assert (domain.worst, domain.worst_step, domain.best, domain.best_step) == (3.0, 0, 1.5, 20)


def test_the_order_of_the_records_does_not_matter() -> None:
    assert measure_retention(RUN[::-1]) == measure_retention(RUN)


def test_an_outside_base_replaces_step_zero() -> None:
    base = record(0, 1.9, 3.5)
    retention = measure_retention(RUN[1:], base=base)
    assert retention.general_forgetting == pytest.approx(0.4)
    assert retention.domain_gain == pytest.approx(2.0)


def test_general_text_that_improved_is_negative_forgetting() -> None:
    assert measure_retention([record(0, 2.0, 3.0), record(5, 1.5, 2.9)]).general_forgetting == pytest.approx(-0.5)


def test_a_run_that_ended_at_nan_has_no_gain_and_says_where() -> None:
    retention = measure_retention([*RUN, record(30, 2.2, None)])
    assert retention.domain_gain is None
    assert retention.groups["domain"].unmeasured_steps == (30,)
    assert retention.groups["domain"].best == 1.5
    assert retention.general_forgetting == pytest.approx(0.2)


def test_a_run_without_a_domain_source_has_no_gain() -> None:
    sources = {"web": SourceEval("general", 2.0, None, None, 10, 1)}
    retention = measure_retention([EvalRecord(0, 0, sources, aggregate(sources))])
    assert retention.domain_gain is None
    assert retention.general_forgetting == 0.0


def test_a_base_of_loss_zero_has_no_relative_forgetting() -> None:
    assert measure_retention([record(0, 0.0, 1.0), record(1, 0.1, 1.0)]).relative_forgetting is None


@pytest.mark.parametrize(("records", "said"), [([], "there are none"), (RUN[1:], "step 10")])
def test_evaluations_without_a_base_are_refused(records: list[EvalRecord], said: str) -> None:
    with pytest.raises(DataError, match=said):
        measure_retention(records)


def test_the_dictionary_form_is_flat_numbers() -> None:
    raw = measure_retention(RUN).to_dict()
    assert raw["domain_gain"] == pytest.approx(1.5)
    assert raw["groups"]["general"]["worst_step"] == 10
    assert raw["sources"]["web"]["change"] == pytest.approx(0.3)
