"""Loss by document: pairing, intervals, lists and the table, from files as an evaluation writes them."""

import math
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cpt.eval.document_losses import document_facts, measured_steps, render_documents, source_facts
from cpt.eval.document_pieces import Pieces, by_document, by_source, to_table
from cpt.eval.document_texts import document_texts_file, write_document_texts
from cpt.eval.results import pieces_file, read_pieces, write_pieces
from cpt.rundir import DataError


def pieces(document: list[int], tokens: list[int], loss: list[float]) -> Pieces:
    """``loss``: nats per token of each piece."""
    return Pieces(
        np.array(document, np.int64), np.array(tokens, np.int32), np.array(loss, np.float64) * np.array(tokens)
    )


def many(change: float = 0.0, number: int = 40) -> Pieces:
    """Documents of 50 tokens whose losses differ; ``change`` is added to all."""
    return pieces(list(range(number)), [50] * number, [2 + 0.1 * (i % 7) + change for i in range(number)])


def write(evals: Path, step: int, **sources: Pieces) -> None:
    write_pieces(pieces_file(evals, step), to_table(sources))


def shown(evals: Path) -> str:
    out = StringIO()
    Console(file=out, width=200, markup=False).print(render_documents(document_facts(evals)))
    return out.getvalue()


def test_pieces_come_back_from_their_file_as_they_were(tmp_path: Path) -> None:
    law = pieces([3, 4, 4], [10, 20, 5], [1.5, 2.5, math.nan])
    write(tmp_path, 0, law=law, web=many())
    found = by_source(read_pieces(pieces_file(tmp_path, 0)))
    assert list(found) == ["law", "web"]
    assert found["law"].are_those_of(law) and not found["law"].are_those_of(found["web"])
    assert np.array_equal(found["law"].nats, law.nats, equal_nan=True)
    assert found["law"].nats.dtype == np.float64


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9), st.floats(-9, 9)), max_size=30))
def test_the_sums_by_document_are_those_of_its_pieces(rows: list[tuple[int, int, float]]) -> None:
    document, tokens, loss = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    sums = by_document(pieces(document, tokens, loss))
    assert sums.number.tolist() == sorted(set(document))
    for number, count, nats in zip(sums.number, sums.tokens, sums.nats, strict=True):
        own = [row for row in rows if row[0] == number]
        assert count == sum(row[1] for row in own)
        assert nats == pytest.approx(sum(row[1] * row[2] for row in own), abs=1e-9)


def test_the_documents_that_lost_and_gained_most_are_named_with_their_text(tmp_path: Path) -> None:
    before, after = many(), many()
    after.nats[7] += 50 * 1.5
    after.nats[9] -= 50 * 1.25
    write(tmp_path, 0, law=before)
    write(tmp_path, 8, law=after)
    write_document_texts(document_texts_file(tmp_path), {"law": {7: "The lessee shall", 9: "A tenant"}})
    facts = document_facts(tmp_path, shown=1)
    law = facts["sources"]["law"]
    assert (facts["base_step"], facts["step"]) == (0, 8)
    assert law["change"] == pytest.approx(0.25 / 40)
    (lost,), (gained,) = law["most_lost"], law["most_gained"]
    assert (lost["document"], lost["text"]) == (7, "The lessee shall")
    assert lost["change"] == pytest.approx(1.5) and lost["after"] - lost["before"] == pytest.approx(1.5)
    assert (gained["document"], gained["text"]) == (9, "A tenant")
    assert (law["worse"], law["better"], law["documents"], law["tokens"]) == (1, 1, 40, 2000)
    assert lost["low"] < lost["change"] < lost["high"]


@pytest.mark.parametrize(("sign", "listed", "counted"), [(1, "most_lost", "worse"), (-1, "most_gained", "better")])
def test_a_document_of_few_tokens_does_not_lead_the_list_by_chance(sign: int, listed: str, counted: str) -> None:
    number = 60
    tokens = [1000] * (number - 1) + [2]
    before = pieces(list(range(number)), tokens, [3.0] * number)
    moved = [0.05 * (-1) ** i for i in range(number)]
    moved[10], moved[-1] = 0.9, 1.4
    after = pieces(list(range(number)), tokens, [3.0 + sign * change for change in moved])
    facts = source_facts(before, after, name="web", texts={})
    assert facts[listed][0]["document"] == 10
    assert facts[counted] == 1


def test_the_interval_of_a_document_by_hand() -> None:
    before, after = (pieces([0, 1, 2], [10, 10, 20], loss) for loss in ([2.0] * 3, [2.1, 2.3, 2.2]))
    found = source_facts(before, after, name="web", texts={})["most_lost"]
    last = next(entry for entry in found if entry["document"] == 2)
    # s^2 = (10 * 0.01 + 10 * 0.01 + 0) / 2 = 0.1; t(2) = 4.302653
    assert last["high"] - last["change"] == pytest.approx(4.302653 * (0.1 / 20) ** 0.5)


def test_the_interval_of_a_document_gets_shorter_with_its_length() -> None:
    rng = np.random.default_rng(0)
    tokens = [25, 100] * 50
    before = pieces(list(range(100)), tokens, [3.0] * 100)
    after = pieces(list(range(100)), tokens, (3 + rng.normal(size=100) / np.sqrt(tokens)).tolist())
    facts = source_facts(before, after, name="web", texts={}, shown=100)
    listed = facts["most_lost"] + facts["most_gained"]
    assert len(listed) == 100
    lengths = {entry["tokens"]: entry["high"] - entry["low"] for entry in listed}
    assert lengths[25] == pytest.approx(2 * lengths[100])
    # Documents that moved by chance alone: about 5 of 100 leave their interval.
    assert facts["worse"] + facts["better"] < 15
    assert facts["low"] < facts["change"] < facts["high"]


def test_losses_that_are_not_finite_are_counted_and_left_out(tmp_path: Path) -> None:
    after = many(0.5)
    after.nats[3] = math.nan
    write(tmp_path, 0, law=many())
    write(tmp_path, 4, law=after)
    law = document_facts(tmp_path)["sources"]["law"]
    assert (law["documents"], law["unmeasured"]) == (39, 1)
    assert law["change"] == pytest.approx(0.5)
    assert "1 without a finite loss" in shown(tmp_path)


def test_a_source_without_any_finite_loss_says_so(tmp_path: Path) -> None:
    write(tmp_path, 0, law=many(), web=many())
    write(tmp_path, 4, law=many(math.nan), web=many())
    law = document_facts(tmp_path)["sources"]["law"]
    assert law["change"] is None and law["most_lost"] == [] and law["documents"] == 0
    assert "no document with a finite loss" in shown(tmp_path)


def test_a_single_document_has_a_change_without_an_interval(tmp_path: Path) -> None:
    write(tmp_path, 0, law=pieces([0], [10], [2.0]))
    write(tmp_path, 4, law=pieces([0], [10], [2.5]))
    law = document_facts(tmp_path)["sources"]["law"]
    assert law["change"] == pytest.approx(0.5)
    assert law["most_lost"][0]["low"] is None
    assert (law["worse"], law["better"]) == (0, 0)  # without an interval nobody knows
    assert "+0.500" in shown(tmp_path)


def test_a_source_of_which_nothing_was_measured_is_left_out_with_the_reason(tmp_path: Path) -> None:
    empty = pieces([], [], [])
    write(tmp_path, 0, law=many(), web=many())
    write(tmp_path, 4, law=many(), web=empty)
    facts = document_facts(tmp_path)
    assert list(facts["sources"]) == ["law"]
    assert "measured at step 0 only" in facts["left_out"]["web"]
    assert "web: not compared" in shown(tmp_path)


def test_evaluations_of_other_pieces_are_not_compared(tmp_path: Path) -> None:
    write(tmp_path, 0, law=many())
    write(tmp_path, 4, law=many(number=39))
    facts = document_facts(tmp_path)
    assert facts["sources"] == {}
    assert "different pieces" in facts["left_out"]["law"]


def test_a_step_that_was_not_measured_is_refused_with_those_that_were(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of no step"):
        document_facts(tmp_path)
    write(tmp_path, 4, law=many())
    with pytest.raises(DataError, match=r"the base, step 0, has no losses by document; there are some only of 4"):
        document_facts(tmp_path)
    write(tmp_path, 0, law=many())
    with pytest.raises(DataError, match="step 7 has no losses"):
        document_facts(tmp_path, step=7)
    assert measured_steps(tmp_path) == [0, 4]


def test_a_step_is_not_compared_with_itself(tmp_path: Path) -> None:
    write(tmp_path, 0, law=many())
    with pytest.raises(DataError, match="step 0 is what is compared with"):
        document_facts(tmp_path)


def test_text_in_the_table_cannot_move_the_cursor(tmp_path: Path) -> None:
    after = many()
    after.nats[7] += 100
    write(tmp_path, 0, law=many())
    write(tmp_path, 8, law=after)
    write_document_texts(document_texts_file(tmp_path), {"law": {7: "\x1b[2J[red]gone[/red]\u202eabc"}})
    text = shown(tmp_path)
    assert "␛[2J[red]gone[/red]⟨202e⟩abc" in text
    assert "\x1b" not in text
