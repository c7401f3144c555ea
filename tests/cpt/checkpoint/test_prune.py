"""Retention: what is deleted, and above all what never is."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt.checkpoint.portable import COMPLETE
from cpt.checkpoint.prune import prune, to_delete
from cpt.rundir import step_name, step_of


def checkpoints(root: Path, complete: set[int], incomplete: set[int]) -> Path:
    for step in complete | incomplete:
        (root / step_name(step)).mkdir(parents=True)
        (root / step_name(step) / "shard").write_text("x")
        if step in complete:
            (root / step_name(step) / COMPLETE).write_text('{"shard": 1}')
    return root


def steps_left(root: Path) -> set[int | None]:
    return {step_of(path) for path in root.iterdir()}


STEPS = st.sets(st.integers(0, 10**8 - 1), max_size=6)


@given(STEPS, STEPS, st.integers(1, 8))
def test_the_newest_complete_checkpoint_and_any_save_in_progress_survive(
    tmp_path_factory: pytest.TempPathFactory, complete: set[int], incomplete: set[int], keep_last: int
) -> None:
    root = checkpoints(tmp_path_factory.mktemp("any"), complete, incomplete - complete)
    deleted = {step_of(path) for path in prune(root, keep_last=keep_last)}
    left = steps_left(root)
    assert left | deleted == complete | incomplete and not left & deleted
    assert left & complete == set(sorted(complete)[-keep_last:])
    newest = max(complete, default=-1)
    assert left - complete == {step for step in incomplete - complete if step > newest}


def test_a_damaged_checkpoint_that_claims_to_be_complete_pushes_out_no_usable_one(tmp_path: Path) -> None:
    checkpoints(tmp_path, {400, 450, 500}, set())
    (tmp_path / step_name(500) / "shard").write_text("")  # shorter than its marker promises
    prune(tmp_path, keep_last=1)
    assert steps_left(tmp_path) == {450, 500}


def test_with_nothing_complete_nothing_is_deleted(tmp_path: Path) -> None:
    assert to_delete(checkpoints(tmp_path, set(), {5, 10}), keep_last=1) == []


@pytest.mark.parametrize("keep_last", [0, -3])
def test_the_newest_survives_even_a_nonsensical_number_to_keep(tmp_path: Path, keep_last: int) -> None:
    prune(checkpoints(tmp_path, {5, 10}, set()), keep_last=keep_last)
    assert steps_left(tmp_path) == {10}


def test_more_to_keep_than_there_are_keeps_all(tmp_path: Path) -> None:
    assert prune(checkpoints(tmp_path, {5, 10}, set()), keep_last=100) == []


def test_the_oldest_goes_first_and_foreign_folders_stay(tmp_path: Path) -> None:
    checkpoints(tmp_path, {5, 10, 15, 20}, {7})
    for name in ("best", "step_00000005.bak", "step_5"):
        (tmp_path / name).mkdir()
    assert [step_of(path) for path in prune(tmp_path, keep_last=2)] == [5, 7, 10]
    assert {path.name for path in tmp_path.iterdir()} == {
        "best",
        "step_00000005.bak",
        "step_5",
        step_name(15),
        step_name(20),
    }


def test_a_run_without_checkpoints_has_nothing_to_prune(tmp_path: Path) -> None:
    assert prune(tmp_path / "checkpoints", keep_last=1) == []
