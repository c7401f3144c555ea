"""Units of work are done once each, by whoever comes, and a job that was killed goes on with what is left."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpt.rundir import DataError
from data_tools.corpus.units import advance, parse_task, read_markers, run_units


def square(folder: Path, unit: int) -> dict[str, int]:
    (folder / f"ran_{unit}_{time.monotonic_ns()}").touch()
    advance(10)
    return {"unit": unit, "square": unit * unit}


def fail_at_three(unit: int) -> dict[str, int]:
    if unit == 3:
        raise DataError("unit 3 is bad; fix: mend it")
    return {"unit": unit}


def die_at_one(unit: int) -> dict[str, int]:
    if unit == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"unit": unit}


def an_hour_or_an_error(folder: Path, unit: int) -> dict[str, int]:
    if unit == 0:
        (folder / "at_work").touch()
        time.sleep(3600)
    time.sleep(3)
    raise DataError("unit 1 is bad")


def slow(unit: int) -> dict[str, int]:
    time.sleep(0.2)
    return {"unit": unit}


def runs(folder: Path) -> list[int]:
    return sorted(int(file.name.split("_")[1]) for file in folder.glob("ran_*"))


@pytest.mark.parametrize("workers", [1, 2])
def test_every_unit_is_done_once_and_its_result_is_kept(tmp_path: Path, workers: int) -> None:
    run_units(tmp_path, 5, functools.partial(square, tmp_path), workers=workers)
    assert [marker["square"] for marker in read_markers(tmp_path, 5)] == [0, 1, 4, 9, 16]
    run_units(tmp_path, 5, functools.partial(square, tmp_path), workers=workers)
    assert runs(tmp_path) == [0, 1, 2, 3, 4]


def test_tasks_share_the_units_without_overlap(tmp_path: Path) -> None:
    work = functools.partial(square, tmp_path)
    run_units(tmp_path, 7, work, task=(1, 3))
    assert runs(tmp_path) == [1, 4]
    with pytest.raises(DataError, match=r"5 of 7 units are not done \(0, 2, 3, 5, 6\)"):
        read_markers(tmp_path, 7)
    run_units(tmp_path, 7, work, task=(0, 3))
    run_units(tmp_path, 7, work, task=(2, 3))
    assert runs(tmp_path) == list(range(7)) and len(read_markers(tmp_path, 7)) == 7


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_unit_is_the_jobs_error_and_done_units_stay_done(tmp_path: Path, workers: int) -> None:
    with pytest.raises(DataError, match="unit 3 is bad"):
        run_units(tmp_path, 5, fail_at_three, workers=workers)
    assert (tmp_path / "done" / "00000.json").is_file() and not (tmp_path / "done" / "00003.json").exists()


def test_a_killed_worker_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"a worker process died.*same command again"):
        run_units(tmp_path, 4, die_at_one, workers=2)


@pytest.mark.parametrize("workers", [1, 2])
def test_progress_adds_up_over_processes(tmp_path: Path, workers: int) -> None:
    seen: list[int] = []
    run_units(tmp_path, 4, functools.partial(square, tmp_path), workers=workers, progress=seen.append)
    assert seen == sorted(seen) and seen[-1] == 40


@pytest.mark.parametrize("first", ["fails", "is interrupted"])
def test_nobody_waits_for_the_units_at_work_when_one_fails_or_a_user_interrupts(tmp_path: Path, first: str) -> None:
    def interrupt(_: int) -> None:
        if first == "is interrupted" and (tmp_path / "at_work").exists():
            raise KeyboardInterrupt

    begun = time.monotonic()
    with pytest.raises((DataError, KeyboardInterrupt)):
        run_units(tmp_path, 2, functools.partial(an_hour_or_an_error, tmp_path), workers=2, progress=interrupt)
    assert time.monotonic() - begun < 60


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import pathlib, test_units\n"
        "from data_tools.corpus.units import run_units\n"
        "if __name__ == '__main__':\n"
        f"    run_units(pathlib.Path({str(tmp_path)!r}), 400, test_units.slow, workers=2)\n"
    )
    (tmp_path / "job.py").write_text(script)
    with subprocess.Popen([sys.executable, str(tmp_path / "job.py")]) as job:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("done/*.json")):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        job.kill()
    time.sleep(0.6)
    before = len(list(tmp_path.glob("done/*.json")))
    time.sleep(0.8)
    assert len(list(tmp_path.glob("done/*.json"))) == before


def test_a_damaged_marker_is_named(tmp_path: Path) -> None:
    run_units(tmp_path, 1, functools.partial(square, tmp_path))
    (tmp_path / "done" / "00000.json").write_text('{"unit": 0')
    with pytest.raises(DataError, match=r"00000\.json: not JSON"):
        read_markers(tmp_path, 1)


@pytest.mark.parametrize("text", ["3", "3/3", "-1/4", "a/b", "1/0", "/4", "1/2/3"])
def test_a_task_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="--task"):
        parse_task(text)
    assert parse_task("3/16") == (3, 16)
