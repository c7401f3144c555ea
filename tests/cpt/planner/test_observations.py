"""observations.csv: what is understood, what is refused with which words, which points count."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt.planner.observations import read_observations, samples
from cpt.rundir import DataError

Rows = list[dict[str, Any]]


def test_rows_become_columns_in_single_parameters_tokens_and_nats(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    found = read_observations(write_csv(observation_rows()))
    assert found.two_sided and found.sources == ("general", "domain")
    assert found.sizes.tolist() == [0.5e9, 1.8e9, 4e9]
    assert found.warnings == ()
    chosen, _ = samples(found, "general")
    assert set(chosen.inputs.params.tolist()) == {0.5, 1.8, 4.0}
    assert np.isfinite(chosen.inputs.base_loss).all()
    assert len(np.unique(chosen.runs)) == 15


def test_extra_columns_are_kept_and_more_sources_are_allowed(write_csv: Callable[..., Path]) -> None:
    row = {"run": "a", "base": "b", "params": 1e8, "tokens": 1e9, "share_web": 0.5, "share_law": 0.3, "share_code": 0.2}
    found = read_observations(write_csv([{**row, "loss_law": 2.0, "loss_web": 3.0, "cluster": "x7"}]))
    assert found.sources == ("web", "law", "code")
    assert set(found.losses) == {"law", "web"}
    assert found.extra == {"cluster": ("x7",)}
    assert not found.two_sided


@pytest.mark.parametrize("encode", ["bom", "semicolon", "tab", "crlf", "upper case"])
def test_tables_as_spreadsheets_save_them_read_alike(
    encode: str, observation_rows: Callable[..., Rows], write_csv: Callable[..., Path], tmp_path: Path
) -> None:
    plain = write_csv(observation_rows())
    text = plain.read_text()
    other = tmp_path / "other.csv"
    if encode == "bom":
        other.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif encode == "semicolon":
        other.write_text(text.replace(",", ";").replace(".", ","))
    elif encode == "tab":
        other.write_text(text.replace(",", "\t"))
    elif encode == "crlf":
        other.write_bytes(text.replace("\r\n", "\n").replace("\n", "\r\n").encode())
    else:
        other.write_text("\n".join([text.splitlines()[0].upper(), *text.splitlines()[1:]]))
    a, b = read_observations(plain), read_observations(other)
    assert np.array_equal(a.losses["domain"], b.losses["domain"])
    assert np.array_equal(a.shares["general"], b.shares["general"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share_domain": 0.3}, ["line 4", "share_general 0", "= 0.3", "sum to 1"]),
        ({"loss_domain": "nan"}, ["line 4", "loss_domain is nan", "diverged"]),
        ({"loss_general": "inf"}, ["line 4", "loss_general is inf"]),
        ({"loss_general": -1.0}, ["line 4", "loss_general is -1.0", "at least"]),
        ({"params": ""}, ["line 4", "params is empty"]),
        ({"params": "seven"}, ["line 4", "params is 'seven', not a number"]),
        ({"tokens": -5}, ["line 4", "tokens is -5"]),
        ({"share_general": 1.2, "share_domain": -0.2}, ["share_general is 1.2", "share_domain is -0.2"]),
        ({"run": ""}, ["line 4", "run is empty"]),
        ({"params": 7e9}, ["line 4", "another size, share or seed than in line 3"]),
    ],
)
def test_what_cannot_be_is_refused_with_its_line_value_and_rule(
    change: dict[str, Any], words: list[str], observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    rows[2].update(change)
    path = write_csv(rows)
    with pytest.raises(DataError) as error:
        read_observations(path)
    assert all(word in str(error.value) for word in [str(path), *words]), str(error.value)


def test_all_faulty_lines_are_listed_at_once(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    for row in rows[1:20]:
        row["loss_domain"] = "NaN"
    with pytest.raises(DataError, match=r"line 3.*\n.*line 4[\s\S]*and 7 more"):
        read_observations(write_csv(rows))


@pytest.mark.parametrize("column", ["run", "params", "tokens", "share_general", "share_domain", "loss_domain"])
def test_a_missing_column_is_named(
    column: str, observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = [{name: value for name, value in row.items() if name != column} for row in observation_rows()]
    with pytest.raises(DataError, match=rf"misses the column.*{column}"):
        read_observations(write_csv(rows))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"   \n", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"run,params\n" + b"a" * 200_000 + b",1\n", "is no CSV"),
        (b"run,params,tokens\xff\n", "not UTF-8"),
        (b"run,params\0,tokens\n", "zero bytes"),
        (b"run,base,params,tokens,share_general,share_domain,loss_general,loss_domain\n", "no rows"),
        (b"run,base,params,tokens,share_general,share_domain,loss_general,loss_domain\nb,b,1e9,0,,,2,2\n", "only base"),
        (b"run,base,params,tokens,share_general,share_domain,loss_general,loss_domain\na,b,1e9,1e9,.5\n", "5 cells"),
        (b"run,run,params,tokens,share_general,share_domain,loss_general,loss_domain\n", "run twice"),
    ],
)
def test_files_that_are_no_table_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_observations(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read"):
        read_observations(tmp_path / "absent.csv")


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.csv"
    path.touch()
    os.truncate(path, 300 * 2**20)
    with pytest.raises(DataError, match="no table of pilot runs"):
        read_observations(path)


def test_the_same_row_twice_counts_once_and_two_values_for_one_measurement_are_refused(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    found = read_observations(write_csv([*rows, dict(rows[4])]))
    assert len(found) == len(rows)
    assert any("1 duplicated row" in warning for warning in found.warnings)
    with pytest.raises(DataError, match="is also in line 6, with other values"):
        read_observations(write_csv([*rows, {**rows[4], "loss_general": 2.0}]))


def test_tokens_in_thousands_are_questioned_and_real_ones_are_not(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    assert read_observations(write_csv(rows)).warnings == ()
    for row in rows:
        row["tokens"] = float(row["tokens"]) / 1000
    (warning,) = read_observations(write_csv(rows)).warnings
    assert "thousands" in warning


def test_missing_base_rows_are_told(observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]) -> None:
    (warning,) = read_observations(write_csv(observation_rows(base_general=None))).warnings
    assert warning.startswith("no base row (tokens = 0)")


def test_the_first_twentieth_of_a_run_is_left_out(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    found = read_observations(write_csv(observation_rows(num_tokens=12)))
    chosen, notes = samples(found, "domain")
    assert chosen.inputs.tokens.min() >= 0.05 * 26
    assert any("first 5% of their run's tokens left out" in note for note in notes)


def test_one_phase_is_used_and_the_other_is_counted(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    for row in rows:
        annealed = float(row["tokens"]) > 20e9
        row["phase"] = "annealed" if annealed else "stable" if row["tokens"] else ""
    chosen, notes = samples(read_observations(write_csv(rows)), "domain")
    assert len(chosen) == 15
    assert any("another phase than 'annealed'" in note for note in notes)


def test_shares_rounded_in_the_file_sum_to_one_after_reading(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    rows[2].update(share_general=0.333, share_domain=0.666)
    rows[2]["run"] = "rounded"
    found = read_observations(write_csv(rows))
    assert found.shares["general"][2] + found.shares["domain"][2] == pytest.approx(1, abs=1e-12)


def test_an_unknown_target_is_told_with_the_known_ones(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    with pytest.raises(DataError, match="no column loss_french; its targets are general, domain"):
        samples(read_observations(write_csv(observation_rows())), "french")


def test_branches_count_as_one_run_with_their_trunk(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = [{**row, "trunk": str(row["run"]).split("-")[1]} for row in observation_rows()]
    chosen, _ = samples(read_observations(write_csv(rows)), "domain")
    assert len(np.unique(chosen.runs)) == 5


def test_shares_inside_a_group_are_details_beside_general_and_domain(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = [
        {**row, "share_web": row["share_general"] and float(row["share_general"]) / 2} for row in observation_rows()
    ]
    found = read_observations(write_csv(rows))
    assert found.two_sided and "share_web" in found.extra


def test_two_losses_of_one_base_are_refused(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path]
) -> None:
    rows = observation_rows()
    other = {**rows[0], "run": "again", "loss_general": float(str(rows[0]["loss_general"])) * 1.1}
    with pytest.raises(DataError, match=r"loss_general of the base is .*, in line 2 .*same held-out text"):
        read_observations(write_csv([*rows, other]))


def test_shares_off_by_a_rounding_error_and_old_line_ends_are_understood(
    observation_rows: Callable[..., Rows], write_csv: Callable[..., Path], tmp_path: Path
) -> None:
    rows = observation_rows()
    rows[2].update(share_general=-2.2e-16, share_domain=1.0000000000000002, run="rounded")
    path = write_csv(rows)
    found = read_observations(path)
    assert found.shares["general"][2] == 0.0 and found.shares["domain"][2] == 1.0
    old = tmp_path / "old.csv"
    old.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r"))
    assert len(read_observations(old)) == len(found)
