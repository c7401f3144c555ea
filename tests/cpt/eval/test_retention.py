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
    assert retention.worst_forgetting == pytest.approx(0.6)


def test_the_order_of_the_records_does_not_matter() -> None:
    assert measure_retention(RUN[::-1]) == measure_retention(RUN)


def test_a_loss_that_was_not_finite_on_the_way_is_no_worst_point() -> None:
    retention = measure_retention([*RUN, record(15, None, 2.0)])
    assert retention == measure_retention(RUN)
    assert measure_retention([record(0, None, 3.0), *RUN[1:]]).worst_forgetting is None


def test_general_text_that_improved_is_negative_forgetting() -> None:
    assert measure_retention([record(0, 2.0, 3.0), record(5, 1.5, 2.9)]).general_forgetting == pytest.approx(-0.5)


def test_a_run_that_ended_at_nan_has_no_gain() -> None:
    retention = measure_retention([*RUN, record(30, 2.2, None)])
    assert retention.domain_gain is None
    assert retention.general_forgetting == pytest.approx(0.2)


def test_a_run_without_a_domain_source_has_no_gain() -> None:
    sources = {"web": SourceEval("general", 2.0, None, None, 10, 1)}
    retention = measure_retention([EvalRecord(0, 0, sources, aggregate(sources))])
    assert retention.domain_gain is None
    assert retention.general_forgetting == 0.0


@pytest.mark.parametrize(("records", "said"), [([], "there are none"), (RUN[1:], "step 10")])
def test_evaluations_without_a_base_are_refused(records: list[EvalRecord], said: str) -> None:
    with pytest.raises(DataError, match=said):
        measure_retention(records)
