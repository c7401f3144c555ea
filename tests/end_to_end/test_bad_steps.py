"""A run whose step goes wrong goes back, leaves out what broke it, and goes on; or ends cleanly and says why."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from faulty_training import command, faults

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 12
FIELDS = {
    "train.tokens": STEPS * 256,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 10,
    "eval.every_steps": 5,
    "guard.spike_sigma": None,
}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``whole``: the run that nothing happened to."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text

    return made_once("bad_steps", make)


def only(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [event for event in events if event["event"] == name]
    return found


def skipped(shop: Workshop, name: str) -> list[dict[str, Any]]:
    return list(json.loads((shop.run_dir(name) / "skipped_rows.json").read_text())["rows"])


def test_rows_with_a_nan_loss_are_left_out_and_nothing_else(shop: Workshop) -> None:
    with faults({"kind": "nan_rows", "step": 8, "rows": [1, 6]}):
        done = shop.cpt("train", shop.run_file("two_rows", FIELDS))
    assert done.code == 0, done.text
    rollback = only(shop.events("two_rows"), "rollback")
    assert (rollback["step"], rollback["to"], rollback["num_rows"]) == (8, 5, 2)
    rows = skipped(shop, "two_rows")
    assert [row["step"] for row in rows] == [8, 8] and all(row["loss"] is None for row in rows)
    assert "is not finite" in rows[0]["reason"] and "back to step 5, 2 rows are left out" in done.err
    assert [record["step"] for record in shop.records("two_rows")] == [*range(1, 8), *range(6, STEPS + 1)]
    losses, whole = shop.losses("two_rows"), shop.losses("whole")
    assert [losses[step] for step in range(1, 8)] == [whole[step] for step in range(1, 8)]
    assert losses[8] != whole[8] and losses[9] == pytest.approx(whole[9], rel=0.1)
    tokens, of_whole = (shop.records(name)[-1]["tokens_by_source"] for name in ("two_rows", "whole"))
    assert sum(of_whole.values()) - sum(tokens.values()) == 2 * 32


def test_a_resumed_run_leaves_out_the_same_rows_on_another_topology(shop: Workshop) -> None:
    with faults({"kind": "nan_rows", "step": 8, "rows": [1, 6]}):
        assert shop.cpt("train", shop.run_file("resumed", FIELDS)).code == 0
    expected = shop.losses("resumed")
    for step in (10, 12):
        shutil.rmtree(shop.run_dir("resumed") / f"checkpoints/step_{step:08d}")
    (shop.run_dir("resumed") / "metrics.jsonl").unlink()
    done = shop.cpt("resume", shop.run_dir("resumed"), "deepspeed.zero_stage=2", "train.micro_batch_size=2")
    assert done.code == 0, done.text
    assert shop.losses("resumed") == pytest.approx({step: expected[step] for step in range(6, 13)}, rel=1e-6)


def test_before_the_first_checkpoint_a_run_goes_back_to_the_weights_it_began_with(shop: Workshop) -> None:
    with faults({"kind": "nan_rows", "step": 3, "rows": [0]}):
        done = shop.cpt("train", shop.run_file("early", FIELDS))
    assert done.code == 0, done.text
    assert only(shop.events("early"), "rollback")["to"] == 0
    repeated = shop.records("early")[2:4]
    assert [record["loss"] for record in repeated] == [shop.losses("whole")[step] for step in (1, 2)]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_whose_rows_are_all_left_out_makes_no_update_under_any_zero_stage(shop: Workshop, stage: int) -> None:
    name = f"all_rows_{stage}"
    with faults({"kind": "nan_rows", "step": 7}):
        done = shop.cpt("train", shop.run_file(name, FIELDS | {"deepspeed.zero_stage": stage}))
    assert done.code == 0, done.text
    assert len(skipped(shop, name)) == 8
    record = {record["step"]: record for record in shop.records(name)}
    assert record[7]["loss"] is None and record[7]["grad_norm"] == 0.0
    assert record[6]["loss"] == pytest.approx(shop.losses("whole")[6], rel=1e-6)
    assert record[8]["loss"] == pytest.approx(shop.losses("whole")[8], rel=0.2)


def test_after_too_many_rollbacks_without_progress_the_run_ends_with_a_diagnosis(shop: Workshop) -> None:
    bad = [{"kind": "nan_rows", "step": step} for step in range(7, 13)]
    with faults(*bad):
        done = shop.cpt("train", shop.run_file("hopeless", FIELDS | {"guard.max_rollbacks": 2}))
    assert done.code == 3
    assert "step 9: the loss of prose, code is not finite" in done.err or "step 9: the loss of code" in done.err
    for words in ("after 2 rollbacks", "cpt data inspect", "train.peak_lr", "step_00000005 is complete", "(document "):
        assert words in done.err
    events = shop.events("hopeless")
    assert [event["to"] for event in events if event["event"] == "rollback"] == [5, 5]
    assert only(events, "guard_stop")["rollbacks"] == 2
    steps = {row["step"] for row in skipped(shop, "hopeless")}
    assert steps == {6, 7, 8}  # the second attempt leaves out one step before the first bad one
    resumed = shop.cpt("resume", shop.run_dir("hopeless"))
    assert resumed.code == 0, resumed.text


def test_without_rollbacks_the_first_bad_step_ends_the_run(shop: Workshop) -> None:
    with faults({"kind": "nan_rows", "step": 7, "rows": [2]}):
        done = shop.cpt("train", shop.run_file("strict", FIELDS | {"guard.max_rollbacks": 0}))
    assert done.code == 3 and "step 7" in done.err and "Traceback" not in done.err
    assert not (shop.run_dir("strict") / "skipped_rows.json").exists()
    assert (shop.run_dir("strict") / "checkpoints/step_00000005/COMPLETE").exists()


SPIKY = FIELDS | {
    "train.tokens": 40 * 256,
    "guard.spike_sigma": 8.0,
    "checkpoint.every_steps": 10,
}


@pytest.mark.parametrize("stage", [0, 2])
def test_a_spike_sends_the_run_back_and_its_rows_are_left_out(shop: Workshop, stage: int) -> None:
    name = f"spike_{stage}"
    with faults({"kind": "spike", "step": 36}):
        done = shop.cpt("train", shop.run_file(name, SPIKY | {"deepspeed.zero_stage": stage}))
    assert done.code == 0, done.text
    rollback = only(shop.events(name), "rollback")
    assert (rollback["step"], rollback["to"], rollback["num_rows"]) == (36, 30, 8)
    losses = shop.losses(name)
    assert losses[40] < losses[25] < losses[10]  # as if nothing had happened


def test_a_run_that_goes_on_knows_a_spike_from_the_first_step(shop: Workshop) -> None:
    assert shop.cpt("train", shop.run_file("went_on", SPIKY)).code == 0
    run_dir = shop.run_dir("went_on")
    shutil.rmtree(run_dir / "checkpoints/step_00000040")
    with faults({"kind": "spike", "step": 32}):
        done = shop.cpt("resume", run_dir)
    assert done.code == 0, done.text
    rollback = only(shop.events("went_on"), "rollback")
    assert (rollback["step"], rollback["to"], rollback["num_rows"]) == (32, 30, 8)


def test_an_update_that_broke_the_weights_is_left_out_at_the_second_attempt(shop: Workshop) -> None:
    with faults({"kind": "high_rate", "step": 33, "factor": 1000.0}):
        done = shop.cpt("train", shop.run_file("broken_weights", SPIKY))
    assert done.code == 0, done.text
    rollbacks = [event for event in shop.events("broken_weights") if event["event"] == "rollback"]
    assert rollbacks[0]["step"] == 34  # where it shows; its own rows are innocent
    assert 33 in {row["step"] for row in skipped(shop, "broken_weights")}
    losses = shop.losses("broken_weights")
    assert losses[40] < losses[25]


def test_two_ranks_agree_on_the_rows_of_one(shop: Workshop) -> None:
    fault = {"kind": "nan_rows", "step": 8, "rows": [1, 6]}
    run_file = shop.run_file("pair", FIELDS | {"deepspeed.zero_stage": 2})
    process = shop.start_command(command([fault], "train", run_file, "--nproc", "2"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    with faults(fault):
        assert shop.cpt("train", shop.run_file("alone", FIELDS)).code == 0
    assert [(row["step"], row["row"]) for row in skipped(shop, "pair")] == [
        (row["step"], row["row"]) for row in skipped(shop, "alone")
    ]
    assert shop.losses("pair") == pytest.approx(shop.losses("alone"), rel=1e-6)


def test_where_the_skipped_rows_cannot_be_written_all_ranks_end_with_the_reason(shop: Workshop) -> None:
    (shop.run_dir("unwritable") / "skipped_rows.json").mkdir(parents=True)  # no file can take its place
    file = shop.run_file("unwritable", FIELDS | {"train.micro_batch_size": 2})
    process = shop.start_command(command([{"kind": "nan_rows", "step": 7, "rows": [1]}], "train", file, "--nproc", 2))
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 3, text
    for start in ("environment error: rank 0", "rank 1: environment error: rank 0"):
        assert any(line.startswith(start) and "skipped_rows.json" in line for line in text.splitlines()), text
    assert "Traceback" not in text
