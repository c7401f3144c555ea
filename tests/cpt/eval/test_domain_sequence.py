"""Learned, retained and forgotten over a base and two runs, by hand and from files."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cpt.eval.domain_sequence import Stage, measure_sequence, read_sequence
from cpt.eval.records import EvalRecord, SourceEval, aggregate, write_eval
from cpt.rundir import DataError, RunDir

GROUPS = {"web": "general", "law": "domain", "medicine": "domain"}


def record(step: int, **losses: float | None) -> EvalRecord:
    sources = {name: SourceEval(GROUPS[name], loss, None, None, 10, 1) for name, loss in losses.items()}
    return EvalRecord(step, step, sources, aggregate(sources))


BASE = record(0, web=2.0, law=3.0, medicine=3.0)
AFTER_LAW = record(20, web=2.4, law=1.5, medicine=2.8)
AFTER_MEDICINE = record(20, web=2.3, law=1.9, medicine=1.0)
STAGES = [
    Stage("base", ("web",), (BASE,)),
    Stage("law_run", ("law",), (BASE, AFTER_LAW)),
    Stage("medicine_run", ("medicine",), (AFTER_LAW, AFTER_MEDICINE)),
]


def test_the_example_at_the_top_of_the_file() -> None:
    found = measure_sequence(STAGES)
    assert found.learned == pytest.approx(1.5)
    assert found.retained == pytest.approx(5.2 / 3)
    assert found.forgetting == pytest.approx(0.35)
    assert [domain.name for domain in found.domains] == ["base", "law_run", "medicine_run"]
    assert [domain["forgetting"] for domain in found.to_dict()["domains"]] == pytest.approx([0.3, 0.4, 0.0])
    assert found.notes == ()


def test_the_best_loss_may_come_in_the_middle_of_a_run() -> None:
    middle = record(10, web=2.1, law=1.2, medicine=2.9)
    found = measure_sequence([STAGES[0], Stage("law_run", ("law",), (BASE, middle, AFTER_LAW)), STAGES[2]])
    assert found.domains[1].best == 1.2
    assert found.forgetting == pytest.approx((0.3 + 0.7) / 2)


def test_a_domain_of_several_sources_is_the_loss_over_their_tokens() -> None:
    sources = {
        "a": SourceEval("domain", 1.0, None, None, 30, 1),
        "b": SourceEval("domain", 3.0, None, None, 10, 1),
    }
    found = measure_sequence([Stage("run", ("a", "b"), (EvalRecord(5, 5, sources, aggregate(sources)),))])
    assert found.learned == pytest.approx(1.5)
    assert found.forgetting is None  # nothing is older than the last domain


@pytest.mark.parametrize("law", [{}, {"law": None}], ids=["not held out", "not finite"])
def test_a_domain_that_is_not_measured_at_the_end_is_named(law: Mapping[str, float | None]) -> None:
    end = record(20, web=2.3, medicine=1.0, **law)
    found = measure_sequence([*STAGES[:2], Stage("medicine_run", ("medicine",), (end,))])
    assert (found.retained, found.forgetting) == (None, None)
    assert found.learned == pytest.approx(1.5)
    assert found.notes == (
        "law_run: no loss of law at the end of medicine_run; hold it out in every run of the sequence",
    )


def write_run(root: Path, name: str, *records: EvalRecord) -> Path:
    for each in records:
        write_eval(RunDir(root / name).eval_file(each.step), each)
    return root / name


def test_runs_are_read_in_the_order_given_each_with_what_it_was_the_first_to_learn(tmp_path: Path) -> None:
    first = record(0, web=2.0, law=3.0), record(20, web=2.4, law=1.5)
    second = record(0, web=2.4, law=1.5, medicine=2.8), AFTER_MEDICINE
    run_dirs = [write_run(tmp_path, "law_run", *first), write_run(tmp_path, "medicine_run", *second)]
    found = read_sequence(run_dirs)
    assert [(domain.name, domain.sources) for domain in found.domains] == [
        ("base", ("web",)),
        ("law_run", ("law",)),
        ("medicine_run", ("medicine",)),
    ]
    assert found.forgetting == pytest.approx(0.35)


def test_a_run_that_learns_no_new_domain_is_evaluated_but_is_none(tmp_path: Path) -> None:
    run_dirs = [write_run(tmp_path, "law_run", record(0, web=2.0, law=3.0), record(20, web=2.4, law=1.5))]
    run_dirs.append(write_run(tmp_path, "again", record(20, web=2.6, law=1.4)))
    found = read_sequence(run_dirs)
    assert [domain.name for domain in found.domains] == ["base", "law_run"]
    assert found.domains[1].final == 1.4


def test_a_sequence_needs_its_base_and_every_run_an_evaluation(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="law_run: a sequence of domains needs an evaluation of its base"):
        read_sequence([write_run(tmp_path, "law_run", AFTER_LAW)])
    good = write_run(tmp_path, "good", BASE, AFTER_LAW)
    with pytest.raises(DataError, match="empty: a sequence of domains needs evaluations"):
        read_sequence([good, tmp_path / "empty"])
