"""A watcher, with an evaluation that reads a real checkpoint of a few bytes."""

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.marker import delete_checkpoint
from cpt.checkpoint.retention import read_pins
from cpt.eval import claims, results, watch
from cpt.eval.best import Rule
from cpt.eval.claims import claim, holder_of
from cpt.eval.results import read_suite_record, record_file
from cpt.eval.tries import Failure, failure_file, read_failures
from cpt.eval.watch import Outcome, Pace, Work
from cpt.eval.watched_run import LocalRun
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError, write_atomic

TinyRun = Any  # of conftest.py
QUICK = Pace(poll_seconds=0.01, retry_seconds=(0.01, 0.01), still_seconds=0.05)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "CONFIRM_SECONDS", 0.0)


def run_watch(run: TinyRun, *, once: bool = True, **work: Any) -> Outcome:
    evaluate = work.pop("evaluate", run.evaluate)
    return watch.watch(LocalRun(run.rundir.root, "tiny"), Work(evaluate, **work), once=once, pace=QUICK)


def failing(run: TinyRun, error: Exception, *, times: int, step: int | None = None) -> Callable[[Path], None]:
    """An evaluation that raises so many times first, for one step or for all."""
    left = [times]

    def evaluate(folder: Path) -> None:
        if left[0] and step in (None, int(folder.name[5:])):
            left[0] -= 1
            raise error
        run.evaluate(folder)

    return evaluate


def test_the_newest_comes_first_and_what_has_results_is_left_alone(tiny_run: TinyRun) -> None:
    for step in (5, 10, 15):
        tiny_run.save(step, step / 100)
    run_watch(tiny_run)
    assert tiny_run.evaluated == [15, 10, 5]
    tiny_run.save(20)
    assert run_watch(tiny_run).evaluated == [20]
    assert tiny_run.evaluated == [15, 10, 5, 20]
    assert all(read_suite_record(record_file(tiny_run.results, step)).step == step for step in (5, 10, 15, 20))
    assert all(holder_of(tiny_run.results, step) is None for step in (5, 10, 15, 20))


def test_one_that_is_saved_meanwhile_goes_before_older_ones(tiny_run: TinyRun) -> None:
    tiny_run.save(5)
    tiny_run.save(10)

    def evaluate(folder: Path) -> None:
        if not tiny_run.evaluated:
            tiny_run.save(15)
        tiny_run.evaluate(folder)

    run_watch(tiny_run, evaluate=evaluate)
    assert tiny_run.evaluated == [10, 15, 5]


def test_the_base_model_comes_first_and_once(tiny_run: TinyRun, tmp_path: Path, make_record: Any) -> None:
    tiny_run.save(5)
    base, seen = tmp_path / "base", []

    def evaluate(folder: Path) -> None:
        seen.append(folder)
        step = 0 if folder == base else 5
        results.write_suite_record(record_file(tiny_run.results, step), make_record(step, 0.5))

    for _ in range(2):
        run_watch(tiny_run, evaluate=evaluate, base=base)
    assert seen == [base, tiny_run.rundir.checkpoint(5)]


def test_it_waits_for_the_training_and_ends_with_it(tiny_run: TinyRun) -> None:
    tiny_run.event("start", 0)

    def train() -> None:
        for step in (5, 10):
            time.sleep(0.05)
            tiny_run.save(step)
        tiny_run.event("finish", 10)

    thread = threading.Thread(target=train)
    thread.start()
    outcome = run_watch(tiny_run, once=False)
    thread.join()
    assert sorted(outcome.evaluated) == [5, 10] and outcome.partial == {}


def test_a_finished_run_that_is_half_copied_is_waited_for_and_then_reported(tiny_run: TinyRun) -> None:
    tiny_run.save(5)
    tiny_run.save(10)
    tiny_run.event("finish", 10)
    shard = tiny_run.rundir.checkpoint(5) / "shard_00000-of-00001.param.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])

    timer = threading.Timer(0.1, lambda: shard.write_bytes(content))  # the copy goes on
    timer.start()
    outcome = watch.watch(
        LocalRun(tiny_run.rundir.root, "tiny"), Work(tiny_run.evaluate), pace=Pace(0.01, (0.01,), still_seconds=30.0)
    )
    timer.join()
    assert outcome.evaluated == [10, 5] and outcome.partial == {}
    (tiny_run.rundir.checkpoint(5) / "COMPLETE").unlink()  # nothing more arrives
    assert list(run_watch(tiny_run, once=False).partial) == [5]


def test_a_failing_one_is_tried_again_and_then_given_up_with_its_reason(
    tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (5, 10):
        tiny_run.save(step)
    outcome = run_watch(tiny_run, evaluate=failing(tiny_run, RuntimeError("out of memory"), times=99, step=10))
    reason = "RuntimeError: out of memory"
    assert outcome.failed == {10: Failure(3, reason)} == read_failures(tiny_run.results)
    assert outcome.evaluated == [5] and "step 10 could not be evaluated in 3 tries" in outcome.problem
    assert "given up after 3 tries" in capsys.readouterr().err
    assert run_watch(tiny_run).evaluated == []  # and stays so, for the next watcher too


@pytest.mark.parametrize("error", [RuntimeError("no"), OSError("no"), DataError("no")])
def test_what_works_at_the_last_try_leaves_no_failure(tiny_run: TinyRun, error: Exception) -> None:
    tiny_run.save(5)
    outcome = run_watch(tiny_run, evaluate=failing(tiny_run, error, times=2))
    assert outcome.evaluated == [5] and not outcome.problem and read_failures(tiny_run.results) == {}


def test_what_the_user_must_mend_ends_it_at_once_and_the_claim_is_given_back(tiny_run: TinyRun) -> None:
    tiny_run.save(5)
    with pytest.raises(ConfigError, match="unknown task"):
        run_watch(tiny_run, evaluate=failing(tiny_run, ConfigError(Problem("groups", "x", "unknown task")), times=1))
    assert holder_of(tiny_run.results, 5) is None and read_failures(tiny_run.results) == {}


def test_a_checkpoint_that_is_pruned_while_it_is_read_is_no_failure(tiny_run: TinyRun) -> None:
    for step in (5, 10):
        tiny_run.save(step)

    def evaluate(folder: Path) -> None:
        if folder.name.endswith("10"):
            delete_checkpoint(folder)
        tiny_run.evaluate(folder)

    outcome = run_watch(tiny_run, evaluate=evaluate)
    assert outcome.gone == [10] and outcome.evaluated == [5] and not outcome.failed
    assert read_failures(tiny_run.results) == {}


def test_a_full_disk_is_waited_out_and_counts_for_no_failure(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)
    tiny_run.event("finish", 5)
    full = [9]

    def write(path: Path, content: bytes | str) -> None:
        if full[0]:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomic(path, content)

    monkeypatch.setattr(results, "write_atomic", write)
    outcome = run_watch(tiny_run, once=False)
    assert outcome.evaluated == [5] and not outcome.failed
    assert read_suite_record(record_file(tiny_run.results, 5)).step == 5 and read_failures(tiny_run.results) == {}


def test_a_disk_too_full_for_a_claim_is_waited_out_and_asked_once_it_ends(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)
    tiny_run.event("finish", 5)
    full = [4]

    def take(self: LocalRun, step: int) -> Any:
        if full[0]:
            full[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return claim(self.results, step)

    monkeypatch.setattr(LocalRun, "claim", take)
    with pytest.raises(OSError, match="No space left"):
        run_watch(tiny_run, once=True)
    full[0] = 4
    assert run_watch(tiny_run, once=False).evaluated == [5]


def test_a_run_folder_that_may_not_be_written_ends_it_at_once(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)
    asked = []

    def refuse(self: LocalRun, step: int) -> Any:
        asked.append(step)
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(LocalRun, "claim", refuse)
    with pytest.raises(OSError, match="Read-only"):
        run_watch(tiny_run, once=False)
    assert asked == [5]


def test_what_another_watcher_holds_is_waited_for_not_evaluated(tiny_run: TinyRun, make_record: Any) -> None:
    tiny_run.save(5)
    held = claim(tiny_run.results, 5)
    assert held is not None

    def finish() -> None:
        results.write_suite_record(record_file(tiny_run.results, 5), make_record(5, 0.5))
        held.close()

    timer = threading.Timer(0.1, finish)
    timer.start()
    outcome = run_watch(tiny_run)
    timer.join()
    assert outcome.evaluated == [] and tiny_run.evaluated == []


def test_results_that_appear_between_look_and_claim_are_kept(
    tiny_run: TinyRun, make_record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)

    def late(self: LocalRun, step: int) -> Any:
        results.write_suite_record(record_file(self.results, step), make_record(step, 0.125))
        return claim(self.results, step)

    monkeypatch.setattr(LocalRun, "claim", late)
    assert run_watch(tiny_run).evaluated == []
    assert read_suite_record(record_file(tiny_run.results, 5)).groups["general"].accuracy == 0.125


def test_what_another_watcher_tried_between_look_and_claim_waits_for_its_turn(
    tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_run.save(5)
    evaluated_by_then: list[list[int]] = []

    def late(self: LocalRun, step: int) -> Any:
        evaluated_by_then.append(list(tiny_run.evaluated))
        if len(evaluated_by_then) == 1:
            path = failure_file(self.results, step)
            path.parent.mkdir()
            write_atomic(path, '{"tries": 1, "reason": "its own"}')
        return claim(self.results, step)

    monkeypatch.setattr(LocalRun, "claim", late)
    assert run_watch(tiny_run).evaluated == [5]
    assert evaluated_by_then == [[], []]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_143_and_gives_the_claim_back(tiny_run: TinyRun, number: int) -> None:
    tiny_run.save(5)
    before = signal.getsignal(number)

    def evaluate(folder: Path) -> None:
        assert holder_of(tiny_run.results, 5) is not None
        try:
            os.kill(os.getpid(), number)
            time.sleep(30.0)
        finally:
            os.kill(os.getpid(), number)  # a launcher's second one, milliseconds later

    with pytest.raises(SystemExit) as ended:
        run_watch(tiny_run, evaluate=evaluate)
    assert ended.value.code == 143 and signal.getsignal(number) is before
    assert holder_of(tiny_run.results, 5) is None and read_failures(tiny_run.results) == {}
    assert run_watch(tiny_run).evaluated == [5]


def test_a_signal_while_there_is_nothing_to_do_ends_it_too(tiny_run: TinyRun) -> None:
    tiny_run.event("start", 0)
    timer = threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.start()
    with pytest.raises(SystemExit):
        watch.watch(LocalRun(tiny_run.rundir.root, "tiny"), Work(tiny_run.evaluate), pace=Pace(poll_seconds=30.0))
    timer.join()


def test_the_best_is_pinned_while_it_is_claimed_and_results_of_before_count(tiny_run: TinyRun) -> None:
    for step, accuracy in ((5, 0.75), (10, 0.25)):
        tiny_run.save(step, accuracy)
    run_watch(tiny_run)
    assert read_pins(tiny_run.rundir.checkpoints) == {}
    tiny_run.save(15, 0.5)
    run_watch(tiny_run, keep_best=Rule("general", "accuracy"))
    assert read_pins(tiny_run.rundir.checkpoints)["tiny"].step == 5
    tiny_run.save(20, 0.875)
    pinned = []

    def tell(record: Any) -> None:
        pinned.append((read_pins(tiny_run.rundir.checkpoints)["tiny"].step, holder_of(tiny_run.results, 20)))

    run_watch(tiny_run, keep_best=Rule("general", "accuracy"), tell=tell)
    ((step, holder),) = pinned
    assert step == 20 and holder is not None and holder.pid == os.getpid()


def test_it_says_where_it_stands(tiny_run: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_run.save(5, 0.5)
    tiny_run.save(10)
    tiny_run.event("start", 0)
    (tiny_run.rundir.checkpoint(10) / "COMPLETE").unlink()
    timer = threading.Timer(0.1, lambda: shutil.rmtree(tiny_run.rundir.checkpoint(10)))
    timer.start()
    ended = threading.Timer(0.2, lambda: tiny_run.event("finish", 5))
    ended.start()
    run_watch(tiny_run, once=False)
    timer.join()
    ended.join()
    told = capsys.readouterr().out
    assert "step 5 with suite tiny" in told and "general 0.5000" in told
    assert "1 of 1 checkpoints have results, step 10 is not complete: " in told
    assert told.count("step 10 is not complete") == 1  # once, not at every look
