"""What a look at a run folder finds: complete, half copied, evaluated, ended."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt.eval.results import record_file, write_suite_record
from cpt.eval.watched_run import LocalRun, finished_step
from cpt.rundir import DataError

TinyRun = Any  # of conftest.py


def look(run: TinyRun) -> Any:
    return LocalRun(run.rundir.root, "tiny").look()


def test_complete_and_half_copied_checkpoints_are_told_apart_whichever_file_came_first(tiny_run: TinyRun) -> None:
    for step in (5, 10, 15, 20):
        tiny_run.save(step)
    (tiny_run.rundir.checkpoint(10) / "COMPLETE").unlink()  # being written
    shard = tiny_run.rundir.checkpoint(15) / "shard_00000-of-00001.param.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])  # a copy that sorts COMPLETE first
    (tiny_run.rundir.checkpoint(20) / "meta.json").unlink()
    (tiny_run.rundir.checkpoints / "best").mkdir()
    sight = look(tiny_run)
    assert sight.complete == {5} and set(sight.partial) == {10, 15, 20}
    assert "no COMPLETE file" in sight.partial[10].reason and "promises" in sight.partial[15].reason
    before = sight.partial[10].bytes
    (tiny_run.rundir.checkpoint(10) / "more").write_bytes(b"12345")
    assert look(tiny_run).partial[10].bytes == before + 5


def test_a_run_folder_that_is_still_being_copied_has_no_complete_checkpoint_yet(tiny_run: TinyRun) -> None:
    tiny_run.save(5)
    tiny_run.rundir.config.rename(tiny_run.rundir.root / "later")
    sight = look(tiny_run)
    assert not sight.complete and "no config.yaml yet" in sight.partial[5].reason
    (tiny_run.rundir.root / "later").rename(tiny_run.rundir.config)
    assert look(tiny_run).complete == {5}


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, Path.touch])
def test_what_is_no_run_folder_is_refused_and_left_as_it_is(tmp_path: Path, make: Any) -> None:
    folder = tmp_path / "else"
    make(folder)
    with pytest.raises(DataError, match="not a run folder"):
        LocalRun(folder, "tiny")
    assert not folder.is_dir() or not list(folder.iterdir())


def test_results_count_for_the_weights_they_were_measured_on(tiny_run: TinyRun, make_record: Any) -> None:
    """After a rollback a step is trained and saved anew."""
    tiny_run.save(5)
    names = {"now": "first"}
    run = LocalRun(tiny_run.rundir.root, "tiny", weights_hash=lambda folder: names["now"])
    assert run.look().evaluated == frozenset() and not run.has_results(5)
    write_suite_record(record_file(run.results, 5), make_record(5, 0.5, weights_hash="first"))
    assert run.look().evaluated == {5} and run.has_results(5)
    names["now"] = "second"
    assert run.look().evaluated == frozenset() and not run.has_results(5)
    write_suite_record(record_file(run.results, 5), make_record(5, 0.5, weights_hash=None))  # measured while it trained
    assert run.has_results(5)


def test_results_of_a_pruned_checkpoint_stay_and_cause_no_work(tiny_run: TinyRun, make_record: Any) -> None:
    write_suite_record(record_file(tiny_run.results, 5), make_record(5, 0.5))
    sight = look(tiny_run)
    assert not sight.complete and not sight.evaluated


def test_results_that_cannot_be_read_count_for_nothing_and_are_written_anew(
    tiny_run: TinyRun, make_record: Any
) -> None:
    for step in (5, 10):
        tiny_run.save(step)
        write_suite_record(record_file(tiny_run.results, step), make_record(step, 0.5))
    assert look(tiny_run).evaluated == {5, 10}
    older, damaged = (record_file(tiny_run.results, step) for step in (5, 10))
    older.write_text(older.read_text().replace('"format_version": 1', '"format_version": 0'))
    damaged.write_text(damaged.read_text()[:40])
    assert look(tiny_run).evaluated == frozenset()


def test_a_run_has_ended_where_its_last_word_is_finish(tiny_run: TinyRun) -> None:
    rundir = tiny_run.rundir
    assert finished_step(rundir) is None  # a copy without events
    for name, step, expected in [("start", 0, None), ("finish", 20, 20), ("upload", 20, 20), ("extended", 20, None),
                                 ("resume", 20, None), ("checkpoint", 40, None), ("finish", 40, 40)]:  # fmt: skip
        tiny_run.event(name, step)
        assert finished_step(rundir) == expected
    with rundir.events.open("a") as file:
        file.write('{"event": "resu')  # half copied
    assert finished_step(rundir) == 40


def test_everything_has_arrived_where_the_last_step_is_complete_and_nothing_is_partial(tiny_run: TinyRun) -> None:
    tiny_run.save(5)
    tiny_run.event("finish", 10)
    assert not look(tiny_run).all_arrived
    tiny_run.save(10)
    assert look(tiny_run).all_arrived
    (tiny_run.rundir.checkpoint(5) / "COMPLETE").unlink()
    assert not look(tiny_run).all_arrived


def test_a_copy_is_a_run_folder(tiny_run: TinyRun, tmp_path: Path) -> None:
    tiny_run.save(5)
    shutil.copytree(tiny_run.rundir.root, tmp_path / "copy")
    assert LocalRun(tmp_path / "copy", "tiny").look().complete == {5}
