"""Checkpoints of a whole run: what is kept, copied and reported, and that no failure on the way costs an older one."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt import run_evaluation, run_saving
from cpt.checkpoint import background, upload
from cpt.checkpoint.portable import Checkpoint
from cpt.checkpoint.retention import Pin, survey, write_pin
from cpt.checkpoint.upload import Uploader
from cpt.config import ConfigError, load_config
from cpt.eval.claims import claim
from cpt.prepare import prepare
from cpt.rundir import step_name

Workshop = Any  # the fixtures of tests/conftest.py
FIELDS = {
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_weights_every": 4,
    "checkpoint.keep_best": "general",
    "eval.every_steps": 2,
}


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``kept``: a run of 8 steps under every kind of retention, copied to ``far``."""

    def make(shop: Workshop) -> None:
        shop.stores()
        far = {"checkpoint.upload_to": f"file://{shop.root}/far"}
        done = shop.cpt("train", shop.run_file("kept", FIELDS | far))
        assert done.code == 0, done.text
        (shop.root / "printed").write_text(done.text)

    return made_once("run_saving", make)


def events(shop: Workshop, name: str, kind: str) -> list[dict[str, Any]]:
    return [event for event in shop.events(name) if event["event"] == kind]


def test_a_run_keeps_the_last_full_some_weights_and_the_best(shop: Workshop) -> None:
    losses = {step: shop.evaluation("kept", step)["groups"]["general"]["loss"] for step in (2, 4, 6, 8)}
    expected = {4: "weights", 8: "full", min(losses, key=losses.__getitem__): "full"}
    assert survey(shop.run_dir("kept") / "checkpoints") == expected
    for event in events(shop, "kept", "checkpoint"):
        assert event["bytes"] > 0 and event["write_seconds"] > 0 and event["copy_seconds"] >= 0
        assert event["stall_seconds"] >= event["waited_seconds"] >= 0
    changed = [name for event in events(shop, "kept", "checkpoint") for name in event["pruned"] + event["reduced"]]
    assert len(changed) == len(set(changed)) > 0 and step_name(8) not in changed


def test_every_checkpoint_was_copied_and_a_resumed_run_copies_none_again(shop: Workshop) -> None:
    uploads = events(shop, "kept", "upload")
    assert {event["step"] for event in uploads} >= {8} and all(event["bytes"] > 0 for event in uploads)
    assert Checkpoint.open(shop.root / "far/kept" / step_name(8)).verify() == []
    assert f"waiting for copies at file://{shop.root}/far/kept" in (shop.root / "printed").read_text()
    for step in sorted(survey(shop.run_dir("kept") / "checkpoints")):
        uploader = Uploader(f"file://{shop.root}/far", "kept")
        uploader.add(shop.run_dir("kept") / "checkpoints" / step_name(step))
        assert uploader.finish(timeout=10.0) and uploader.poll()[0].bytes == 0


def test_a_run_may_start_from_weights_alone_but_not_go_on_from_them(shop: Workshop) -> None:
    weights = shop.run_dir("kept") / "checkpoints" / step_name(4)
    file = shop.run_file("started", {"model.init_from": str(weights), "model.fresh": None, "train.tokens": 512})
    assert shop.cpt("train", file).code == 0
    folder = Path(shop.run_dir("started"))
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(weights, folder / "checkpoints" / step_name(1))
    done = shop.cpt("resume", folder)
    assert done.code == 2 and "holds weights alone; a run cannot go on from it" in done.err


def test_what_a_watcher_pinned_or_evaluates_stays_and_the_rest_goes_as_ever(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 is pinned when it is saved, step 4 claimed; both would go when 8 is complete, for one is kept."""
    real, held = run_saving.survey, []

    def survey_of(checkpoints: Path) -> Any:
        if not held:
            write_pin(checkpoints, "law", Pin(2, "best general.accuracy"))
            held.append(claim(checkpoints.parent / "evals" / "law", 4))
        return real(checkpoints)

    monkeypatch.setattr(run_saving, "survey", survey_of)
    changes = {"checkpoint.every_steps": 2, "checkpoint.keep_last": 1}
    assert shop.cpt("train", shop.run_file("watched", changes)).code == 0
    checkpoints = shop.run_dir("watched") / "checkpoints"
    assert set(survey(checkpoints)) == {2, 4, 8}
    held[0].close()
    assert shop.cpt("train", shop.run_file("unwatched", changes)).code == 0
    assert set(survey(shop.run_dir("unwatched") / "checkpoints")) == {8}


def test_a_pin_that_cannot_be_read_deletes_nothing_and_is_told(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    real = run_saving.survey

    def survey_of(checkpoints: Path) -> Any:
        (checkpoints / "pins").mkdir(exist_ok=True)
        (checkpoints / "pins" / "law.json").write_text("{")
        return real(checkpoints)

    monkeypatch.setattr(run_saving, "survey", survey_of)
    changes = {"checkpoint.every_steps": 4, "checkpoint.keep_last": 1}
    assert shop.cpt("train", shop.run_file("mispinned", changes)).code == 0
    assert set(survey(shop.run_dir("mispinned") / "checkpoints")) == {4, 8}
    assert "law.json" in events(shop, "mispinned", "retention_failed")[0]["reason"]


def failing_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk be full for every checkpoint after ``step``."""
    real = background.write_shard

    def write_shard(folder: Path, *arguments: Any, **options: Any) -> Any:
        if folder.name > step_name(step):
            raise OSError(28, "No space left on device")
        return real(folder, *arguments, **options)

    monkeypatch.setattr(background, "write_shard", write_shard)


def test_a_periodic_save_that_fails_is_reported_and_the_last_one_must_succeed(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_after(2, monkeypatch)
    done = shop.cpt("train", shop.run_file("full", {"checkpoint.every_steps": 2}))
    assert done.code == 3 and "rank 0: OSError: [Errno 28] No space left on device" in done.err
    assert "WARNING: no checkpoint after step 4" in done.err
    failed = events(shop, "full", "checkpoint_failed")
    assert [event["step"] for event in failed] == [4, 6, 8] and "No space left" in failed[0]["reason"]
    assert survey(shop.run_dir("full") / "checkpoints") == {2: "full"}  # nothing was lost, nothing half is left
    monkeypatch.undo()
    assert shop.cpt("resume", shop.run_dir("full")).code == 0
    assert shop.losses("full") == shop.losses("kept")  # bit for bit


def test_a_stop_while_a_finished_run_waits_for_its_copies_is_obeyed_and_the_next_start_copies_on(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(folder: Path, url: str) -> int:
        if folder.name == step_name(8):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20.0)
        raise OSError("the network is down")

    monkeypatch.setattr(upload, "copy_checkpoint", stuck)
    file = shop.run_file("uploading", {"checkpoint.upload_to": f"file://{shop.root}/far", "checkpoint.every_steps": 8})
    started = time.monotonic()
    done = shop.cpt("train", file)
    assert done.code == 143 and time.monotonic() - started < 20.0, done.text
    assert events(shop, "uploading", "sigterm")[0]["step"] == 8 and not events(shop, "uploading", "finish")
    monkeypatch.undo()
    assert shop.cpt("resume", shop.run_dir("uploading")).code == 0
    assert Checkpoint.open(shop.root / "far/uploading" / step_name(8)).verify() == []
    assert len(events(shop, "uploading", "finish")) == 1


def test_an_evaluation_that_cannot_be_written_costs_no_checkpoint_and_the_last_one_is_made_up_for(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_evaluation, "keep_evaluation", full_disk)
    done = shop.cpt("train", shop.run_file("unwritten", {"checkpoint.every_steps": 4, "eval.every_steps": 4}))
    assert done.code == 3 and "all steps are done and saved, but" in done.err and "Traceback" not in done.err
    assert [event["step"] for event in events(shop, "unwritten", "eval_failed")] == [0, 4, 8]
    assert survey(shop.run_dir("unwritten") / "checkpoints") == {4: "full", 8: "full"}
    monkeypatch.undo()
    again = shop.cpt("resume", shop.run_dir("unwritten"))
    assert again.code == 0 and shop.evaluation("unwritten", 8) == shop.evaluation("kept", 8), again.text


def test_a_stop_file_that_comes_after_the_last_step_is_not_left_for_the_extension(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run_saving.finish_uploads

    def late(run: Any, step: int) -> bool:
        run.rundir.stop_file.touch()
        return real(run, step)

    monkeypatch.setattr("cpt.run.finish_uploads", late)
    assert shop.cpt("train", shop.run_file("late", {"train.tokens": 512})).code == 0
    assert not (shop.run_dir("late") / "STOP").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"checkpoint.keep_best": "law"}, "checkpoint.keep_best = 'law': is no group or source"),
        ({"checkpoint.every_steps": 4, "checkpoint.keep_weights_every": 6}, "must be a multiple of .*the nearest is 8"),
        ({"checkpoint.keep_weights_every": 6}, "only the last step is saved"),
        ({"checkpoint.upload_to": "nowhere://bucket"}, "cannot be written to: Protocol not known: nowhere"),
    ],
)
def test_settings_that_cannot_be_met_are_refused_before_anything_starts(
    shop: Workshop, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        prepare(load_config(shop.run_file("refused", changes)))
