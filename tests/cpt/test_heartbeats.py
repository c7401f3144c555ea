"""The files of the heartbeats and who is silent by them."""

from pathlib import Path

from cpt.heartbeats import Beat, Observer, clear_beats, read_beats, write_beat


def test_a_beat_comes_back_whole_and_a_new_start_forgets_the_old_ones(tmp_path: Path) -> None:
    folder = tmp_path / "heartbeats"
    clear_beats(folder)
    beat = Beat(3, "node7", 4711, sequence=9, step=12, phase="backward", phase_seconds=1.5, entered=4, progress=80)
    write_beat(folder, beat)
    assert read_beats(folder) == {3: beat} and [path.name for path in folder.iterdir()] == ["rank_00003.json"]
    clear_beats(folder)
    assert read_beats(folder) == {} == read_beats(tmp_path / "nowhere")


def test_a_file_that_is_not_readable_now_is_left_out_and_does_not_make_its_rank_forgotten(tmp_path: Path) -> None:
    write_beat(tmp_path, Beat(0, "a", 1, sequence=1))
    observer = Observer(tmp_path)
    observer.look(0.0)
    (tmp_path / "rank_00000.json").write_text('{"rank": 0, "ho')
    observer.look(2.0)
    assert observer.beats[0].sequence == 1 and observer.silent[0] == 2.0


def test_silence_and_idleness_are_counted_in_the_readers_seconds_since_the_last_change(tmp_path: Path) -> None:
    write_beat(tmp_path, Beat(0, "a", 1))
    write_beat(tmp_path, Beat(1, "b", 1))
    observer = Observer(tmp_path)
    observer.look(5.0)
    assert observer.silent == {0: 0.0, 1: 0.0}  # seen for the first time
    for sequence in (1, 2):
        write_beat(tmp_path, Beat(0, "a", 1, sequence=sequence))  # lives, but does not get on
        observer.look(5.0)
    assert (observer.silent[0], observer.idle[0]) == (0.0, 10.0)
    assert (observer.silent[1], observer.idle[1]) == (10.0, 10.0)
    write_beat(tmp_path, Beat(0, "a", 1, sequence=3, progress=1))
    write_beat(tmp_path, Beat(1, "b", 2))  # another process: a new life
    observer.look(5.0)
    assert observer.idle == {0: 0.0, 1: 0.0} and observer.silent == {0: 0.0, 1: 0.0}


def test_the_place_of_a_rank_is_its_step_and_how_far_it_is_inside() -> None:
    assert Beat(0, "a", 1, step=3, entered=9).place < Beat(0, "a", 1, step=4).place
    assert Beat(0, "a", 1, step=4, entered=1).place < Beat(0, "a", 1, step=4, entered=2).place


def test_a_folder_that_gives_an_error_now_makes_no_rank_forgotten_and_ends_no_supervisor(tmp_path: Path) -> None:
    """As a network file system does that has lost its server for a moment."""
    write_beat(tmp_path, Beat(0, "a", 1))
    observer = Observer(tmp_path)
    observer.look(0.0)
    observer._folder = tmp_path / ("a" * 300)  # too long a name: no "not there", an error
    observer.look(2.0)
    assert observer.beats[0].pid == 1 and observer.silent[0] == 2.0
