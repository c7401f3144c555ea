"""Two processes never train in one run folder: on one machine the kernel decides, between machines a sign of life."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpt import folder_lock
from cpt.folder_lock import LINE_BYTES, Holder, acquire, living, read_holder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.4)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / ".lock"


def write(path: Path, holder: dict[str, object]) -> None:
    """As another machine writes it, which this kernel knows nothing of."""
    path.write_text(f"{json.dumps(holder):<{LINE_BYTES - 1}}\n")


def elsewhere(beat: int = 0, since: str = "2031-01-01 00:00:00Z") -> dict[str, object]:
    return {"host": "far-away", "pid": 4711, "since": since, "machine": "another kernel", "beat": beat}


def test_the_file_says_who_holds_it_and_nothing_once_it_is_let_go(lock: Path) -> None:
    with acquire(lock):
        holder = read_holder(lock)
        assert holder is not None and holder.pid == os.getpid() and str(holder.pid) in str(holder)
    assert lock.stat().st_size == 0 and read_holder(lock) is None


def test_a_second_process_is_refused_with_host_and_pid(lock: Path) -> None:
    with acquire(lock) as held:
        with pytest.raises(RuntimeError, match="another process is training") as refused:
            acquire(lock)
        assert f"process {os.getpid()} on {held.holder.host}" in str(refused.value)


def test_a_holder_that_was_killed_is_no_holder(lock: Path) -> None:
    program = f"from pathlib import Path; from cpt.folder_lock import acquire; import os; acquire(Path({str(lock)!r})); os._exit(9)"
    root = Path(folder_lock.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False).returncode == 9
    left = read_holder(lock)
    assert left is not None and left.pid != os.getpid()
    started = time.monotonic()
    with acquire(lock) as held:
        assert held.holder.pid == os.getpid() and time.monotonic() - started < folder_lock.PATIENCE_SECONDS


def test_the_holder_gives_signs_of_life(lock: Path) -> None:
    with acquire(lock):
        deadline = time.monotonic() + 10
        while (holder := read_holder(lock)) is None or holder.beat < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def living_elsewhere(lock: Path) -> Iterator[None]:
    """A process on another machine that works in the folder and says so."""
    end = threading.Event()
    write(lock, elsewhere())

    def beat() -> None:
        number = 0
        while not end.wait(0.05):
            number += 1
            write(lock, elsewhere(number))

    thread = threading.Thread(target=beat)
    thread.start()
    yield
    end.set()
    thread.join()


@pytest.mark.usefixtures("living_elsewhere")
def test_a_living_process_of_another_machine_is_refused_though_this_kernel_gives_its_lock(lock: Path) -> None:
    with pytest.raises(RuntimeError, match="process 4711 on far-away"):
        acquire(lock)


@pytest.mark.parametrize("since", ["2031-01-01 00:00:00Z", "1970-01-01 00:00:00Z"])
def test_a_silent_one_is_taken_over_with_a_warning_whatever_the_clocks_say(
    lock: Path, since: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(lock, elsewhere(since=since))
    os.utime(lock, (4e9, 4e9))  # a file of the future
    with acquire(lock):
        shown = capsys.readouterr()
        assert "process 4711 on far-away" in shown.out and "this process takes over" in shown.err
        holder = read_holder(lock)
        assert holder is not None and holder.pid == os.getpid()


def test_one_that_lets_go_while_it_is_watched_is_waited_for_no_longer(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 30.0)
    write(lock, elsewhere())
    timer = threading.Timer(0.1, lambda: os.truncate(lock, 0))
    timer.start()
    with acquire(lock):
        pass
    timer.join()


def test_who_was_taken_over_says_so_and_leaves_the_file_to_the_other(
    lock: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = acquire(lock)
    write(lock, elsewhere())
    deadline, told = time.monotonic() + 10, ""
    while "now process 4711 on far-away" not in told:
        told += capsys.readouterr().err
        assert time.monotonic() < deadline
        time.sleep(0.01)
    held.close()
    assert read_holder(lock) == Holder(**elsewhere())  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}', "\0" * 40])
def test_a_lock_file_that_names_nobody_holds_nobody_off(lock: Path, content: str) -> None:
    lock.write_text(content)
    with acquire(lock) as held:
        assert read_holder(lock) is not None and held.holder.pid == os.getpid()


def test_without_locks_of_the_kernel_the_content_decides(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with acquire(lock), pytest.raises(RuntimeError, match=f"process {os.getpid()}"):
        acquire(lock)


def test_who_lives_is_known_without_taking_anything(tmp_path: Path) -> None:
    here, free, absent = (tmp_path / name for name in ("here", "free", "absent"))
    acquire(free).close()
    with acquire(here) as held:
        started = time.monotonic()
        assert living([here, free, absent]) == {here}
        assert time.monotonic() - started < folder_lock.PATIENCE_SECONDS and held.is_held
        write(here, elsewhere())
        assert not held.is_held  # taken over by another machine
    assert not absent.exists()


def test_of_a_holder_on_another_machine_a_sign_of_life_is_awaited_once_for_all(tmp_path: Path) -> None:
    dead = [tmp_path / f"dead{number}" for number in range(5)]
    for path in dead:
        write(path, elsewhere())
    started = time.monotonic()
    assert living(dead) == set()
    assert time.monotonic() - started < 2.5 * folder_lock.PATIENCE_SECONDS


@pytest.mark.usefixtures("living_elsewhere")
def test_a_holder_on_another_machine_that_says_something_lives(lock: Path) -> None:
    assert living([lock]) == {lock}


def test_a_killed_holder_does_not_live(lock: Path) -> None:
    program = f"from pathlib import Path; from cpt.folder_lock import acquire; import os; acquire(Path({str(lock)!r})); os._exit(9)"
    root = Path(folder_lock.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=root, timeout=60, check=False).returncode == 9
    assert read_holder(lock) is not None and living([lock]) == set()


def test_without_locks_of_the_kernel_life_shows_in_the_content(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    with acquire(lock):
        assert living([lock]) == {lock}


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, timeout=20, check=False).returncode:
        pytest.skip("no right to mount a disk here")
    try:
        with pytest.raises(OSError, match="the run folder cannot be written") as refused:
            acquire(folder / ".lock")
        assert str(folder) in str(refused.value)
    finally:
        subprocess.run(["umount", str(folder)], timeout=20, check=True)
