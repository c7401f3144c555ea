"""What failed is tried again after a pause, a bounded number of times over all watchers, and says why."""

import json
from pathlib import Path

import pytest

from cpt.eval import tries
from cpt.eval.tries import Failure, Tries, failure_file, read_failures
from cpt.rundir import DataError


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(tries.time, "monotonic", lambda: now[0])
    return now


def test_each_failure_lengthens_the_pause_until_it_is_given_up(tmp_path: Path, clock: list[float]) -> None:
    mine = Tries(tmp_path, (10.0, 60.0))
    assert mine.seconds_until(5) == 0.0
    assert mine.failed(5, "OSError: no") == "again in 10 s" and mine.seconds_until(5) == 10.0
    clock[0] += 10.0
    assert mine.seconds_until(5) == 0.0
    assert mine.failed(5, "OSError: no") == "again in 60 s" and not mine.is_given_up(5)
    assert mine.failed(5, "OSError: never") == "given up after 3 tries" and mine.is_given_up(5)
    assert mine.given_up == {5: Failure(3, "OSError: never")}
    assert read_failures(tmp_path) == mine.given_up


def test_tries_of_all_watchers_count_together(tmp_path: Path, clock: list[float]) -> None:
    mine, theirs = Tries(tmp_path, (10.0,)), Tries(tmp_path, (10.0,))
    mine.failed(5, "first")
    assert theirs.changed(5)
    theirs.look()
    assert not theirs.changed(5) and theirs.seconds_until(5) == 10.0  # its pause begins when it hears of it
    theirs.failed(5, "second")
    assert mine.changed(5)
    mine.look()
    assert mine.is_given_up(5)


def test_a_look_does_not_prolong_a_pause(tmp_path: Path, clock: list[float]) -> None:
    mine = Tries(tmp_path, (10.0,))
    mine.failed(5, "no")
    clock[0] += 4.0
    mine.look()
    assert mine.seconds_until(5) == 6.0


def test_success_and_a_deleted_file_give_another_chance(tmp_path: Path) -> None:
    mine = Tries(tmp_path, (10.0,))
    for step in (5, 6):
        for _ in range(2):
            mine.failed(step, "no")
    mine.succeeded(5)
    failure_file(tmp_path, 6).unlink()
    mine.look()
    assert mine.given_up == {} and read_failures(tmp_path) == {}


def test_where_no_file_can_be_written_the_process_remembers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tries, "write_atomic", full)
    mine = Tries(tmp_path, (10.0,))
    mine.failed(5, "no")
    mine.look()
    mine.failed(5, "no")
    assert mine.is_given_up(5) and "No space left" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{", '{"tries": "3", "reason": ""}', '{"tries": 0, "reason": ""}', "{}"])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    path = failure_file(tmp_path, 5)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError, match=r"step_00000005\.json: .*delete it"):
        read_failures(tmp_path)


def test_a_file_that_another_watcher_deletes_meanwhile_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_text

    def too_late(path: Path, **how: str) -> str:
        path.unlink()
        return read(path, **how)

    Tries(tmp_path, (1.0,)).failed(5, "no")
    monkeypatch.setattr(Path, "read_text", too_late)
    assert read_failures(tmp_path) == {}


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    Tries(tmp_path, (1.0,)).failed(5, "x" * 10**6)
    assert len(json.loads(failure_file(tmp_path, 5).read_text())["reason"]) == tries.LONGEST_REASON
