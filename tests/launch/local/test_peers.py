"""What hosts that nobody supervises tell one another, and when one takes another for lost."""

from pathlib import Path

import pytest

import launch.local.peers
from launch.local.peers import Peers
from launch.local.ranks import Ended


@pytest.fixture(autouse=True)
def always_looking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.local.peers, "LOOK_SECONDS", -1.0)


def host(folder: Path, number: int) -> Peers:
    return Peers(folder, host=number, num_hosts=2)


def look_once(peers: Peers) -> bool:
    """One look of a host that waits for the others; whether it would go on waiting."""
    asked: list[float] = []
    peers.meet(pause=asked.append, enough=lambda: bool(asked))
    return bool(asked)


def meet(first: Peers, second: Peers) -> None:
    waiting = [first, second]
    for _ in range(4):
        waiting = [peers for peers in waiting if look_once(peers)]
    assert not waiting


def test_hosts_that_live_meet_and_lose_nobody(tmp_path: Path) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    meet(first, second)
    assert [peers.lost() for _ in range(2) for peers in (first, second)] == [None] * 4


def test_nobody_is_met_who_has_not_said_to_see_everybody(tmp_path: Path) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    assert all(look_once(first) for _ in range(3))  # alone
    assert look_once(second)  # it is there, and the first does not know yet
    assert look_once(first) is False and look_once(second) is False


def test_a_host_whose_ranks_failed_is_lost_with_its_reason(tmp_path: Path) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    meet(first, second)
    second.conclude(Ended(137, "rank 3 was killed by SIGKILL", 3))
    assert first.lost() == "host 1 failed: rank 3 was killed by SIGKILL"


def test_a_host_that_vanished_is_lost_once_another_start_takes_its_place(tmp_path: Path) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    meet(first, second)
    look_once(host(tmp_path, 1))  # a new pod; the one before could say nothing any more
    assert first.lost() == "host 1 was started again: the one that this job was joined with is gone"


@pytest.mark.parametrize("code", [0, 143])
def test_a_host_that_finished_or_saved_is_no_loss_even_when_it_is_started_again(tmp_path: Path, code: int) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    meet(first, second)
    second.conclude(Ended(code, "all ranks ended"))
    assert first.lost() is None
    look_once(host(tmp_path, 1))
    assert first.lost() is None


def test_what_earlier_starts_left_behind_is_neither_met_nor_lost(tmp_path: Path) -> None:
    before = host(tmp_path, 0), host(tmp_path, 1)
    meet(*before)
    before[0].conclude(Ended(3, "it was alone"))  # and host 1 was killed with its last word "running"
    first = host(tmp_path, 0)
    assert all(look_once(first) for _ in range(3)) and first.lost() is None
    second = host(tmp_path, 1)
    meet(second, first)
    assert first.lost() is None and second.lost() is None


def test_hosts_that_are_started_out_of_step_meet_in_the_end(tmp_path: Path) -> None:
    first, second = host(tmp_path, 0), host(tmp_path, 1)
    look_once(first)
    second.conclude(Ended(3, "the one before was lost"))
    assert look_once(first) and first.lost() is None  # it was never met
    meet(first, host(tmp_path, 1))


def test_a_folder_that_cannot_be_written_is_an_error_of_the_environment(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "hosts").touch()  # a file where the folder should be
    first = host(tmp_path / "hosts", 0)
    with pytest.raises(OSError):
        look_once(first)
    first.conclude(Ended(3, "so it ended"))
    assert "WARNING" in capfd.readouterr().err


def test_a_host_that_waits_says_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch.local.peers, "SAY_SECONDS", -1.0)
    look_once(host(tmp_path, 0))
    assert capfd.readouterr().out == "waits for host 1\n"


def test_a_job_of_one_host_waits_for_nobody_and_writes_nothing(tmp_path: Path) -> None:
    alone = Peers(tmp_path / "hosts", host=0, num_hosts=1)
    assert look_once(alone) is False and alone.lost() is None
    alone.conclude(Ended(0, "all ranks ended"))
    assert not (tmp_path / "hosts").exists()
