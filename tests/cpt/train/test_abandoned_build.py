"""A lock that a killed build left is taken away; one that may be alive is not."""

import os
from pathlib import Path

import pytest

from cpt.train.abandoned_build import QUIET_SECONDS, clear_abandoned_build

NOW = 1_000_000.0


@pytest.fixture
def build(tmp_path: Path) -> Path:
    for name in ("lock", "build.ninja", "first.o"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (NOW, NOW))
    return tmp_path


def test_the_lock_of_a_build_that_wrote_nothing_for_long_is_removed_and_named(build: Path) -> None:
    said = clear_abandoned_build(build, now=NOW + QUIET_SECONDS)
    assert said is not None and str(build / "lock") in said and "removed" in said
    assert not (build / "lock").exists() and (build / "first.o").exists()


@pytest.mark.parametrize("written", ["lock", "first.o"])
def test_a_build_that_wrote_anything_lately_keeps_its_lock(build: Path, written: str) -> None:
    os.utime(build / written, (NOW + 60, NOW + 60))
    assert clear_abandoned_build(build, now=NOW + QUIET_SECONDS) is None
    assert (build / "lock").exists()


def test_without_a_lock_or_a_folder_there_is_nothing_to_do(tmp_path: Path) -> None:
    assert clear_abandoned_build(tmp_path) is None
    assert clear_abandoned_build(tmp_path / "none") is None
