"""`cpt eval watch` before anything is evaluated: what is refused, and how a run is found."""

from pathlib import Path

import pytest

from cpt import eval_watching
from cpt.eval.suite import load_suite
from cpt.eval_checkpoints import SuiteRun
from cpt.eval_watching import Watching, watch_run
from cpt.problems import ConfigError
from cpt.rundir import DataError


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "items.jsonl").write_text('{"sentence_good": "a b", "sentence_bad": "b a"}\n')
    file = tmp_path / "suite.yaml"
    file.write_text("{name: tiny, groups: {general: [{name: pairs, file: items.jsonl, kind: minimal_pairs}]}}")
    return file


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, suite: Path, scheme: str) -> None:
    with pytest.raises(DataError, match="not a run folder"):
        watch_run(Watching(f"{scheme}{tmp_path}/absent", suite, once=True))


def test_a_suite_that_is_not_there_is_refused_before_the_run_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        watch_run(Watching(str(tmp_path / "run"), tmp_path / "absent.yaml", once=True))


@pytest.mark.parametrize("rule", ["pears", "genral.accuracy"])
def test_a_rule_that_names_nothing_of_the_suite_is_refused(tmp_path: Path, suite: Path, rule: str) -> None:
    with pytest.raises(ConfigError, match="keep-best"):
        watch_run(Watching(str(tmp_path / "run"), suite, once=True, keep_best=rule))


def test_nothing_is_pinned_at_a_url(tmp_path: Path, suite: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is pruned at a URL"):
        watch_run(Watching(f"file://{tmp_path}", suite, once=True, keep_best="general.accuracy"))


def test_a_run_without_checkpoints_is_done_at_once(tmp_path: Path, suite: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert watch_run(Watching(str(tmp_path / "run"), suite, once=True)).evaluated == []


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), FileNotFoundError("pruned")])
def test_held_out_losses_that_fail_are_told_and_undo_no_benchmark(
    tmp_path: Path, suite: Path, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path, *, device: str | None) -> str:
        raise error

    scored: list[Path] = []
    monkeypatch.setattr(eval_watching, "evaluate_on_suite", lambda folder, run: scored.append(folder))
    monkeypatch.setattr(eval_watching, "held_out_if_missing", fail)
    checkpoint = tmp_path / "checkpoints" / "step_00000005"
    eval_watching._evaluate(checkpoint, tmp_path, SuiteRun(load_suite(suite)), held_out=True)
    assert scored == [checkpoint] and str(error) in capsys.readouterr().err
