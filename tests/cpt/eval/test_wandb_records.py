"""Results on their way to Weights & Biases: which numbers, into which run, and never at the cost of the watcher."""

from pathlib import Path
from typing import Any

import pytest

from cpt.eval import wandb_records
from cpt.eval.wandb_records import WandbRecords, as_metrics, wandb_id, wandb_mode

TinyRun = Any  # of conftest.py


class Recorder:
    """Takes the place of wandb's own process."""

    made: list[dict[str, Any]] = []  # noqa: RUF012
    written: list[dict[str, Any]] = []  # noqa: RUF012

    def __init__(self, **settings: Any) -> None:
        self.made.append(settings)

    def write(self, record: dict[str, Any]) -> None:
        self.written.append(record)

    def close(self) -> None:
        self.written.append({"closed": True})


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    kind = type("Sink", (Recorder,), {"made": [], "written": []})
    monkeypatch.setattr(wandb_records, "WandbSink", kind)
    return kind


def test_numbers_are_named_by_suite_and_what_is_unknown_is_left_out(make_record: Any) -> None:
    assert as_metrics(make_record(5, 0.5)) == {
        "step": 5,
        "tokens_seen": 40,
        "eval/tiny": {"general.accuracy": 0.5, "one.acc": 0.5},
    }
    assert as_metrics(make_record(5, None))["eval/tiny"] == {}


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ("log: {wandb: online}", "online"),
        ("log: {every_steps: 1}", "offline"),
        ("train: {}", "offline"),
        ("log: {wandb: disabled}", "disabled"),
        ("log: [", "disabled"),
        ("- 1", "disabled"),
    ],
)
def test_the_run_says_whether_they_are_sent(tmp_path: Path, config: str, mode: str) -> None:
    (tmp_path / "config.yaml").write_text(config)
    assert wandb_mode(tmp_path / "config.yaml") == mode
    assert wandb_mode(tmp_path / "absent.yaml") == "disabled"


def test_the_runs_own_is_the_newest_that_was_online(tmp_path: Path) -> None:
    assert wandb_id(tmp_path) is None
    for name in ("run-20260101_120000-first1", "run-20260201_120000-second", "offline-run-20260301_120000-third", "x"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    assert wandb_id(tmp_path) == "second"


@pytest.mark.parametrize(
    ("mode", "ended", "own"), [("online", True, True), ("online", False, False), ("offline", True, False)]
)
def test_they_go_into_the_runs_own_only_once_it_has_ended_and_can_be_gone_on_with(
    tiny_run: TinyRun, make_record: Any, sink: Any, mode: Any, ended: bool, own: bool
) -> None:
    (tiny_run.rundir.root / "wandb" / "run-20260101_120000-abc123").mkdir(parents=True)
    tiny_run.event("finish" if ended else "start", 5)
    records = WandbRecords(tiny_run.rundir, "tiny", mode)
    assert sink.made == []  # nothing starts before there is something to send
    for step in (5, 10):
        records.tell(make_record(step, 0.5))
    records.close()
    ((made),) = sink.made
    assert made["mode"] == mode and made["group"] == "run" and made["folder"] == tiny_run.rundir.root
    assert made["run_id"] == ("abc123" if own else None)
    assert [each.get("step") for each in sink.written] == [5, 10, None]


def test_wandb_that_does_not_start_is_told_once_and_ends_nothing(
    tiny_run: TinyRun, make_record: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**settings: Any) -> None:
        raise RuntimeError("no login")

    monkeypatch.setattr(wandb_records, "WandbSink", refuse)
    records = WandbRecords(tiny_run.rundir, "tiny", "online")
    for step in (5, 10):
        records.tell(make_record(step, 0.5))
    records.close()
    assert capsys.readouterr().err.count("no login") == 1


def test_wandb_that_does_not_end_is_told_and_ends_nothing(
    tiny_run: TinyRun, make_record: Any, sink: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: object) -> None:
        raise TimeoutError("no network")

    monkeypatch.setattr(sink, "close", refuse)
    records = WandbRecords(tiny_run.rundir, "tiny", "online")
    records.tell(make_record(5, 0.5))
    records.close()
    assert "no network" in capsys.readouterr().err
