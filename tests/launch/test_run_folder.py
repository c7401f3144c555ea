"""The run folder seen by launchers: storage without an answer is asked again, and no link is followed to a file."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.rundir import DataError
from launch import run_folder
from launch.run_folder import newest_step, patiently, plain_file


def test_only_checkpoints_with_their_marker_count_as_progress(tmp_path: Path) -> None:
    assert newest_step(tmp_path) is None
    for name, complete in (("step_00000010", True), ("step_00000020", True), ("step_00000030", False)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (tmp_path / "checkpoints" / name / "COMPLETE").touch()
    assert newest_step(tmp_path) == 20


def failing(*errors: int) -> Callable[[], str]:
    """Work that fails so often before it is done."""
    left = list(errors)

    def work() -> str:
        if left:
            number = left.pop(0)
            raise OSError(number, os.strerror(number), "/runs/x/events.jsonl")
        return "done"

    return work


def test_storage_that_has_no_answer_is_asked_again_and_that_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    waited: list[float] = []
    assert patiently(failing(errno.ESTALE, errno.EIO), pause=waited.append) == "done"
    assert waited == [1.0, 2.0]
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 2 and "Stale file handle: '/runs/x/events.jsonl'; trying again in 1 s" in told[0]


def test_patience_has_an_end_and_none_is_had_for_what_waiting_does_not_mend() -> None:
    waited: list[float] = []
    with pytest.raises(OSError, match="Input/output error"):
        patiently(failing(*[errno.EIO] * 100), pause=waited.append)
    assert waited == list(run_folder.WAITS)
    with pytest.raises(OSError, match="No space left"):
        patiently(failing(errno.ENOSPC), pause=waited.append)
    assert waited == list(run_folder.WAITS)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "run/launch").mkdir(parents=True)
    return tmp_path / "run/launch/log"


def test_a_file_is_made_added_to_and_read(log: Path) -> None:
    for word in ("one", "two"):
        with open(log, "a", opener=plain_file) as file:
            print(word, file=file)
    assert log.read_text() == "one\ntwo\n" and stat.S_IMODE(log.stat().st_mode) & 0o133 == 0
    with open(log, "rb", opener=plain_file) as raw:
        assert raw.read() == b"one\ntwo\n"
    with pytest.raises(FileNotFoundError), open(log.with_name("other"), opener=plain_file):
        pass


@pytest.mark.parametrize("way", ["file", "missing file", "folder", "pipe", "a folder itself"])
@pytest.mark.parametrize("mode", ["a", "r"])
def test_nobody_can_lead_the_output_elsewhere(log: Path, tmp_path: Path, way: str, mode: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "log").write_text("kept\n")
    if way == "file":
        log.symlink_to(theirs / "log")
    elif way == "missing file":
        log.symlink_to(theirs / "new")
    elif way == "folder":
        log.parent.rmdir()
        log.parent.symlink_to(theirs)
    elif way == "pipe":
        os.mkfifo(log)
    else:
        log.mkdir()
    with pytest.raises(DataError, match="launch/log: it, or its folder, is a link"), open(log, mode, opener=plain_file):
        pass
    assert (theirs / "log").read_text() == "kept\n" and not (theirs / "new").exists()


def test_the_run_folder_itself_may_be_a_link_as_on_clusters_it_often_is(log: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").symlink_to(tmp_path / "run")
    with open(tmp_path / "scratch/launch/log", "a", opener=plain_file) as file:
        print("here", file=file)
    assert log.read_text() == "here\n"
