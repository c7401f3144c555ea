"""The module that every rank runs: its arguments, and how it ends on bad ones."""

from pathlib import Path

import pytest

from cpt.train.main import main, parse


def test_a_run_file_and_overrides_are_taken_in_order() -> None:
    options = parse(["run.yaml", "train.peak_lr=1e-3", "run.seed=2", "--local_rank=1"])
    assert (options.config, options.overrides) == (Path("run.yaml"), ["train.peak_lr=1e-3", "run.seed=2"])


def test_with_resume_all_positionals_are_overrides() -> None:
    options = parse(["--resume", "runs/demo", "deepspeed.zero_stage=2", "log.every_steps=1"])
    assert (options.config, options.resume) == (None, Path("runs/demo"))
    assert options.overrides == ["deepspeed.zero_stage=2", "log.every_steps=1"]


def test_the_launchers_local_rank_may_come_first() -> None:
    assert parse(["--local_rank=0", "run.yaml"]).config == Path("run.yaml")


def test_neither_a_run_file_nor_resume_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2 and "give a run YAML, or --resume RUN_DIR" in capsys.readouterr().err


def test_a_missing_run_file_ends_with_2_and_names_the_near_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "medical.yaml").write_text("run: {}")
    assert main([str(tmp_path / "medcal.yaml")]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'medcal.yaml'}: no such file; did you mean {tmp_path / 'medical.yaml'}?" in error
    assert "Traceback" not in error


def test_resuming_a_folder_that_is_no_run_ends_with_2_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--resume", str(tmp_path)]) == 2
    assert f"{tmp_path}: not a run folder" in capsys.readouterr().err


def test_only_the_first_rank_repeats_what_the_user_can_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err == ""


def test_every_problem_of_a_run_file_is_printed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text("run: {name: a/b}\nmodel: {}\ndata: {stores: {}, seq_len: 8}\n")
    assert main([str(tmp_path / "run.yaml"), "train.peak_lr=3"]) == 2
    error = capsys.readouterr().err
    for field in ("run.name", "data.stores", "train.tokens", "train.peak_lr"):
        assert field in error


def test_a_trace_can_be_asked_for_at_a_start_and_at_a_resume() -> None:
    assert parse(["run.yaml", "--profile", "3"]).profile == 3
    resumed = parse(["--resume", "runs/a", "train.peak_lr=1e-3", "--profile", "2"])
    assert (resumed.profile, resumed.overrides) == (2, ["train.peak_lr=1e-3"])
    assert parse(["run.yaml"]).profile == 0
