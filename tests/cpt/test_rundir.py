"""Paths of a run folder, and small files that appear whole or not at all."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt import rundir
from cpt.rundir import RunDir, note_event, parse_lines, read_events, step_name, step_of, write_atomic


def test_every_part_of_a_run_folder_has_its_documented_name(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    files = (run.config, run.plan, run.environment, run.metrics, run.events)
    folders = (run.checkpoints, run.evals, run.report)
    names = ["config.yaml", "plan.json", "environment.json", "metrics.jsonl", "events.jsonl"]
    assert [path.name for path in files] == names
    assert [path.name for path in folders] == ["checkpoints", "evals", "report"]
    assert run.checkpoint(500) == tmp_path / "checkpoints" / "step_00000500"
    assert run.eval_file(500) == tmp_path / "evals" / "step_00000500.json"
    assert list(tmp_path.iterdir()) == []


@given(st.integers(0, 10**8 - 1))
def test_a_step_is_read_back_from_its_name(step: int) -> None:
    assert step_of(Path("a") / step_name(step)) == step == step_of(Path(f"{step_name(step)}.json"))


@given(st.sets(st.integers(0, 10**8 - 1), max_size=5))
def test_names_sort_as_steps_do(steps: set[int]) -> None:
    assert sorted(map(step_name, steps)) == [step_name(step) for step in sorted(steps)]


@pytest.mark.parametrize(
    "name", ["step_500", "step_00000500.bak", "step_00000500.json.tmp", "last", "xstep_00000500", "step_0000050x"]
)
def test_any_other_name_is_no_step(name: str) -> None:
    assert step_of(Path(name)) is None


@pytest.mark.parametrize("content", ["grün\n", b"\x00\xff", ""])
def test_a_file_is_written_whole_and_readable_by_others(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def crash(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(rundir.os, call, crash)
            with pytest.raises(OSError, match="No space left"):
                write_atomic(path, "new")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_a_missing_folder_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_atomic(tmp_path / "nowhere" / "file", "text")


def test_events_are_read_as_they_were_noted(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert read_events(run) == []
    note_event("start", 0, run, warnings=[])
    note_event("finish", 9, run)
    found = [{name: value for name, value in event.items() if name != "time"} for event in read_events(run)]
    assert found == [{"step": 0, "event": "start", "warnings": []}, {"step": 9, "event": "finish"}]


def test_what_a_crash_has_cut_is_an_event_without_a_name_and_keeps_the_place_of_later_ones(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.events.write_bytes(b'{"event": "start", "step": 0}\n{"event": "fin')
    assert len(read_events(run)) == 2 and read_events(run)[1] == {}
    note_event("resume", 3, run)  # on the line that was cut
    note_event("finish", 9, run)
    assert [event.get("event") for event in read_events(run)] == ["start", None, "finish"]


def test_events_are_neither_noted_in_nor_read_from_what_a_link_leads_to(tmp_path: Path) -> None:
    run, other = RunDir(tmp_path), tmp_path / "other"
    other.write_text('{"event": "finish"}\n')
    run.events.symlink_to(other)
    with pytest.raises(OSError, match="symbolic links"):
        note_event("start", 0, run)
    with pytest.raises(OSError, match="symbolic links"):
        read_events(run)
    assert other.read_text() == '{"event": "finish"}\n'


@given(
    st.lists(
        st.one_of(
            st.just(b'{"a": 1}'),
            st.just(b"[1]"),
            st.binary(max_size=8).filter(lambda b: b.split() == [b] and b"{" not in b),
        )
    )
)
def test_every_line_has_its_place_whatever_it_holds(lines: list[bytes]) -> None:
    lines = [line for line in lines if len(line.splitlines()) == 1]
    found = parse_lines(b"\n".join(lines))
    assert len(found) == len(lines)
    assert all(record == ({"a": 1} if line == b'{"a": 1}' else {}) for record, line in zip(found, lines, strict=True))
