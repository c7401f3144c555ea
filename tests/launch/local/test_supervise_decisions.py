"""What the supervisor does after which failures, and with how many processes; jobs are stand-ins for the trainer."""

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import run_folder
from launch.local import ranks, supervise
from launch.local.devices import Usable
from launch.local.supervise import Failure, Job, decide, processes_for

ROOT = Path(__file__).resolve().parents[3]


def killed(step: int | None = 5, *, newer: bool = False) -> Failure:
    return Failure(137, "rank 0 was killed by SIGKILL", step, newer)


def raised(step: int | None, code: int = 3, *, newer: bool = False, reason: str = "rank 0: OSError") -> Failure:
    return Failure(code, reason, step, newer)


def test_the_wait_doubles_up_to_a_cap_and_starts_anew_after_a_new_checkpoint() -> None:
    waits = [decide([killed()] * number, max_restarts=20).wait for number in range(1, 11)]
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert decide([killed()] * 5 + [killed(newer=True)], max_restarts=20).wait == 2
    assert decide([killed()] * 5 + [killed(newer=True), killed()], max_restarts=20).wait == 4


def test_starts_without_a_new_checkpoint_are_bounded_and_those_with_one_are_not() -> None:
    assert decide([killed()] * 3, max_restarts=3).wait is not None
    given_up = decide([killed()] * 4, max_restarts=3)
    assert given_up.wait is None and "4 starts in a row failed without a new complete checkpoint" in given_up.words
    assert decide([killed(newer=True)] * 50, max_restarts=3).wait == 2
    assert decide([killed()], max_restarts=0).wait is None


def test_the_same_error_at_the_same_step_is_not_tried_a_third_time() -> None:
    twice = decide([raised(40, newer=True), raised(40)], max_restarts=10)
    assert twice.wait is None and twice.words.startswith("it failed the same way twice after step 40")
    assert decide([raised(40), raised(41)], max_restarts=10).wait is not None
    assert decide([raised(40, 1), raised(40, 3)], max_restarts=10).wait is not None
    assert decide([killed(40), killed(40)], max_restarts=10).wait is not None  # memory, a person: it may pass
    assert decide([raised(40, reason="hang: rank 1"), raised(40, reason="hang: rank 1")], max_restarts=10).wait
    assert decide([raised(40), raised(50, newer=True), raised(40)], max_restarts=10).wait is not None


def test_at_the_start_an_error_of_the_environment_may_pass_but_a_bug_does_not() -> None:
    assert decide([raised(None), raised(None)], max_restarts=10).wait == 4
    assert decide([raised(None, 1), raised(None, 1)], max_restarts=10).wait is None


def test_where_the_guard_has_given_up_so_does_the_supervisor() -> None:
    stopped = Failure(3, "rank 0: GuardStop", 40, newer=True, guard_stop=True)
    assert decide([killed(), stopped], max_restarts=10) == supervise.Decision(
        None, "the guard has rolled back as often as it may: a restart would do the same again"
    )


def job(tmp_path: Path, **changes: Any) -> Job:
    facts: dict[str, Any] = {"run_dir": tmp_path, "arguments": [], "again": [], "num_processes": 8}
    return Job(**{**facts, "fits": lambda count: 24 % count == 0, "hang_seconds": 60.0, **changes})


@pytest.mark.parametrize(("usable", "processes"), [(16, 8), (8, 8), (7, 6), (5, 4), (1, 1), (0, 0)])
def test_the_largest_number_of_processes_that_is_usable_and_divides_the_batch(
    tmp_path: Path, usable: int, processes: int
) -> None:
    assert processes_for(usable, job(tmp_path)) == processes


# A trainer that keeps a diary of its starts and ends as the n-th word of its second argument says.
TRAINER = """
import json, os, sys, time
from pathlib import Path
folder, plan = Path(sys.argv[1]), sys.argv[2].split(",")
(folder / "config.yaml").touch()
number = len(list(folder.glob("start*")))
(folder / f"start{number}").write_text(json.dumps([sys.argv[3:], os.environ["WORLD_SIZE"]]))
from launch.local.ranks import seconds_before
(folder / f"age{number}").write_text(str(seconds_before()))
word = plan[min(number, len(plan) - 1)]
events = (folder / "events.jsonl").open("a")
print(json.dumps({"event": "start", "step": 0}), file=events, flush=True)
if word == "sleep":
    time.sleep(30)
if word == "finish":
    print(json.dumps({"event": "finish", "step": 9}), file=events, flush=True)
if word == "save":
    (folder / f"checkpoints/step_{number:08d}").mkdir(parents=True)
    (folder / f"checkpoints/step_{number:08d}/COMPLETE").touch()
sys.exit({"finish": 0, "nothing": 0, "user": 2, "stopped": 143}.get(word, 4))
"""
Ran = tuple[int, list[Any], list[dict[str, Any]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Supervises the trainer above; returns the exit code, the arguments of its starts, and the events."""
    (tmp_path / "standin.py").write_text(TRAINER)
    monkeypatch.setattr(ranks, "TRAIN_MODULE", "standin")
    monkeypatch.setattr(supervise, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    folder = tmp_path / "run"
    folder.mkdir()

    def run(plan: str, *, usable: Callable[[int], Usable] = Usable, **changes: Any) -> Ran:
        facts: dict[str, Any] = {"arguments": [str(folder), plan, "first"], "again": [str(folder), plan, "again"]}
        code = supervise.supervise(job(folder, **{"num_processes": 1, **facts, **changes}), available=usable)
        starts = [json.loads(path.read_text()) for path in sorted(folder.glob("start*"))]
        return code, starts, [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]

    return run


def test_a_crashed_job_is_started_again_by_the_arguments_of_a_resume_until_it_finishes(run: Callable[..., Ran]) -> None:
    code, starts, events = run("crash,save,finish")
    assert code == 0 and [arguments for arguments, _ in starts] == [["first"], ["again"], ["again"]]
    restarts = [event for event in events if event["event"] == "restart"]
    assert [(r["attempt"], r["exit_code"], r["checkpoint"]) for r in restarts] == [(2, 4, None), (3, 4, 1)]


def test_every_start_is_told_how_long_the_job_has_been_at_work(run: Callable[..., Ran], tmp_path: Path) -> None:
    run("crash,crash,finish")
    first, second, third = (float((tmp_path / f"run/age{number}").read_text()) for number in range(3))
    assert first < 0.5 * second and second < third < 60.0


def test_a_folder_that_was_there_before_is_left_to_the_trainer_to_refuse(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "run/config.yaml").touch()
    _, starts, _ = run("user")
    assert [arguments for arguments, _ in starts] == [["first"]]


@pytest.mark.parametrize(("word", "code"), [("user", 2), ("stopped", 143), ("finish", 0)])
def test_what_a_user_must_mend_or_asked_for_is_never_started_again(
    run: Callable[..., Ran], word: str, code: int
) -> None:
    found, starts, _ = run(word)
    assert (found, len(starts)) == (code, 1)


def test_an_exit_with_0_that_finished_nothing_is_a_failure(
    run: Callable[..., Ran], capfd: pytest.CaptureFixture[str]
) -> None:
    code, starts, events = run("nothing", max_restarts=1)
    assert code == 1 and len(starts) == 2 and events[-1]["event"] == "gave_up"
    assert "it ended with 0 but did not finish" in capfd.readouterr().err


def test_it_gives_up_with_the_code_and_the_words_of_the_last_failure(
    run: Callable[..., Ran], capfd: pytest.CaptureFixture[str]
) -> None:
    code, starts, events = run("crash", max_restarts=2)
    assert code == 4 and len(starts) == 3
    assert events[-1]["event"] == "gave_up" and events[-1]["attempts"] == 3
    told = capfd.readouterr().err
    assert "gives up: 3 starts in a row failed" in told and "cpt resume" in told


def test_the_number_of_processes_is_asked_anew_before_every_start(run: Callable[..., Ran]) -> None:
    usable = iter([2, 1])
    _, starts, events = run("crash,finish", num_processes=2, usable=lambda wanted: Usable(next(usable)))
    assert [world_size for _, world_size in starts][-1] == "1"
    assert next(event for event in events if event["event"] == "restart")["processes"] == 1


def test_where_nothing_is_usable_it_says_so(run: Callable[..., Ran], capfd: pytest.CaptureFixture[str]) -> None:
    usable = iter([1, 0])
    code, starts, _ = run("crash", usable=lambda wanted: Usable(next(usable)))
    assert code == 4 and len(starts) == 1
    assert "of 0 usable devices no number divides the batch" in capfd.readouterr().err


def test_a_job_without_any_sign_of_life_is_killed(run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "SILENCE_SECONDS", 0.5)
    code, starts, events = run("sleep,finish", hang_seconds=0.4)
    assert code == 0 and len(starts) == 2
    assert "no rank has shown a sign of life" in next(e for e in events if e["event"] == "restart")["reason"]


class Flaky:
    """Shared storage that has no answer at every other time that it is asked."""

    def __init__(self, work: Callable[..., Any], *, always: bool = False) -> None:
        self._work, self._always, self.failed, self._turn = work, always, 0, False

    def __call__(self, *arguments: Any, **details: Any) -> Any:
        self._turn = not self._turn
        if self._turn or self._always:
            self.failed += 1
            raise OSError(errno.ESTALE, "Stale file handle")
        return self._work(*arguments, **details)


def test_storage_that_has_no_answer_for_a_moment_does_not_end_the_supervision(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "WAITS", (0.0, 0.0))
    flaky = {name: Flaky(getattr(supervise, name)) for name in ("read_events", "newest_step", "note_event")}
    for name, work in flaky.items():
        monkeypatch.setattr(supervise, name, work)
    code, starts, events = run("crash,save,finish")
    assert code == 0 and [arguments for arguments, _ in starts] == [["first"], ["again"], ["again"]]
    assert [event["checkpoint"] for event in events if event["event"] == "restart"] == [None, 1]
    assert all(work.failed for work in flaky.values())
    assert "Stale file handle; trying again in 0 s" in capfd.readouterr().err


def test_storage_that_stays_away_is_an_error_of_the_environment(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "WAITS", (0.0, 0.0))
    away = Flaky(supervise.newest_step, always=True)
    monkeypatch.setattr(supervise, "newest_step", away)
    with pytest.raises(OSError, match="Stale file handle"):
        run("finish")
    assert away.failed == 3


def test_an_event_that_cannot_be_noted_is_told_and_the_job_started_again(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "WAITS", (0.0,))
    monkeypatch.setattr(supervise, "note_event", Flaky(supervise.note_event, always=True))
    code, starts, _ = run("crash,finish")
    assert code == 0 and len(starts) == 2 and "WARNING: could not note restart" in capfd.readouterr().err


def test_sigterm_between_two_starts_ends_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "standin.py").write_text(TRAINER)
    program = (
        "import sys; from pathlib import Path; from launch.local import ranks, supervise\n"
        "from launch.local.devices import Usable\n"
        "ranks.TRAIN_MODULE, supervise.FIRST_WAIT = 'standin', 60.0\n"
        "run = sys.argv[1]; again = [run, 'crash']\n"
        "job = supervise.Job(Path(run), again, again, 1, lambda count: True, 60.0)\n"
        "sys.exit(supervise.supervise(job, available=Usable))\n"
    )
    folder = tmp_path / "run"
    folder.mkdir()
    environment = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "PATH": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], env=environment, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    deadline = time.monotonic() + 20
    while "in 60 s" not in process.stderr.readline():
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 3  # no complete checkpoint: nothing was saved
