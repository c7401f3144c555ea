"""Curve and schedule files: the rate of every step, and what is wrong with a file, told with its line."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpt.planner.curves import read_curve, read_schedule, rise_end, thinned
from cpt.rundir import DataError

ROWS = [(10 * i, 3e-4, 4.0 - 0.1 * i) for i in range(1, 11)]


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def table(rows: list[tuple[float, ...]], header: str = "step,lr,loss", separator: str = ",") -> str:
    return "\n".join([header, *(separator.join(f"{cell:g}" for cell in row) for row in rows)]) + "\n"


def test_a_curve_has_one_rate_per_step_with_a_linear_warmup_before_its_first_row(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "c.csv", table(ROWS)))
    assert (curve.name, curve.steps.tolist(), len(curve.rates)) == ("c", list(range(10, 101, 10)), 101)
    np.testing.assert_allclose(curve.rates[:11], 3e-4 * np.arange(11) / 10)
    np.testing.assert_allclose(curve.rates[10:], 3e-4)
    assert curve.warmup_end == 10


def test_a_warmup_that_ended_before_the_first_row_can_be_named(tmp_path: Path) -> None:
    curve = read_curve(write(tmp_path / "c.csv", table(ROWS)), warmup_steps=4)
    np.testing.assert_allclose(curve.rates[:6], 3e-4 * np.array([0, 0.25, 0.5, 0.75, 1, 1]))
    assert curve.warmup_end == 4
    assert read_curve(tmp_path / "c.csv", warmup_steps=60).warmup_end == 10  # the rows know better


def test_rates_between_rows_are_interpolated_except_across_a_drop_that_is_level_on_both_sides(tmp_path: Path) -> None:
    rates = [3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 0.5, 0.25]
    path = write(tmp_path / "s.csv", table([(10 * i, lr) for i, lr in enumerate(rates)], "step,lr"))
    found = read_schedule(path).rates
    assert (found[20:30] == 3.0).all() and found[30] == 1.0
    np.testing.assert_allclose(found[50:71:5], [1.0, 0.75, 0.5, 0.375, 0.25])


def test_a_schedule_from_step_0_keeps_its_own_warmup(tmp_path: Path) -> None:
    path = write(tmp_path / "s.csv", table([(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.0), (4, 0.0)], "step,lr"))
    schedule = read_schedule(path)
    assert schedule.rates.tolist() == [0.0, 0.5, 1.0, 1.0, 0.0]
    assert schedule.warmup_end == 2


def test_a_byte_order_mark_semicolons_spaces_extra_columns_and_blank_lines_are_read(tmp_path: Path) -> None:
    text = table([(*row, 1) for row in ROWS], "Step; lr ;loss;note", ";").replace("\n", "\r\n") + "\r\n\r\n"
    curve = read_curve(write(tmp_path / "c.csv", text, "utf-8-sig"))
    assert len(curve.steps) == 10


@given(st.binary(max_size=60))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_after_a_good_table_are_read_or_refused(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(table(ROWS).encode() + tail)
    try:
        assert np.isfinite(read_curve(path).rates).all()
    except DataError as error:
        assert str(path) in str(error)


def changed(line: int, text: str) -> str:
    lines = table(ROWS).splitlines()
    lines[line - 1] = text
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "column 'step' is missing"),
        ("step,lr,loss\n", "has no rows"),
        (changed(1, "step,lr,value"), "column 'loss' is missing"),
        (changed(1, "step,lr,step"), "column 'step' stands there twice"),
        (changed(4, "30,0.0003"), r"c.csv:4: loss = '' is not a finite number"),
        (changed(4, "30,0.0003,nan"), r"c.csv:4: loss = 'nan' is not a finite number"),
        (changed(4, "30,0.0003,x"), r"c.csv:4: loss = 'x' is not a finite number"),
        (changed(4, "30,0.0003,0"), r"c.csv:4: loss = 0 must be above 0"),
        (changed(4, "30,-1,3"), r"c.csv:4: lr = -1 must not be negative"),
        (changed(4, "30.5,1,3"), r"c.csv:4: step = 30.5 must be a whole number"),
        (changed(4, "-30,1,3"), r"c.csv:4: step = -30 must be a whole number"),
        (changed(4, "1e12,1,3"), r"c.csv:4: step = 1e\+12 is above"),
        (changed(4, "20,1,3"), r"c.csv:4: step = 20 does not come after"),
        (changed(4, "15,1,3"), r"c.csv:4: step = 15 does not come after"),
        (table(ROWS[:7]), "7 rows; a curve needs at least 8"),
        (table([(step, 0.0, loss) for step, _, loss in ROWS]), "every lr is 0"),
        (table(ROWS) + "\0", "zero byte"),
        (table(ROWS) + '"' + "1" * 140_000, "is not CSV"),
    ],
)
def test_a_faulty_curve_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_curve(write(tmp_path / "c.csv", text))


def test_a_file_that_is_missing_a_folder_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    for name, message in (("absent.csv", "cannot be read"), (".", "cannot be read"), ("binary.csv", "not UTF-8")):
        with pytest.raises(DataError, match=message):
            read_schedule(tmp_path / name)


def test_a_schedule_of_one_row_or_without_a_rate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first and last step"):
        read_schedule(write(tmp_path / "s.csv", "step,lr\n5,0.1\n"))
    with pytest.raises(DataError, match="every lr is 0"):
        read_schedule(write(tmp_path / "s.csv", "step,lr\n5,0\n6,0\n"))


def test_many_rows_are_averaged_and_few_are_kept() -> None:
    steps = np.arange(100)
    assert thinned(steps, steps * 1.0, 200)[0].tolist() == steps.tolist()
    some, losses = thinned(steps, steps * 1.0, 30)
    assert len(some) == 25
    np.testing.assert_allclose(losses, some, atol=0.51)


def test_the_warmup_ends_where_the_rate_stops_rising() -> None:
    assert rise_end(np.array([0.0, 1.0, 2.0, 2.0, 3.0])) == 2
    assert rise_end(np.array([2.0, 1.0])) == 0
    assert rise_end(np.array([1.0, 2.0])) == 1
