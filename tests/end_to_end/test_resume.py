"""A run that is stopped, killed or damaged goes on as if nothing had happened: same data, same losses, bit for bit."""

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 24
# A step takes some tens of milliseconds, so that a signal sent when step 6 is logged arrives long before the end.
FIELDS = {
    "train.tokens": STEPS * 2048,
    "train.global_batch_tokens": 2048,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 8,
    "checkpoint.keep_last": 10,
}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``whole``: the run that nothing happened to, with checkpoints after 8, 16 and 24."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text

    return made_once("resume", make)


def copy_of_whole(shop: Workshop, name: str, *, until: int) -> Path:
    """The run as it lay on disk after step ``until``."""
    folder = Path(shop.run_dir(name))
    shutil.copytree(shop.run_dir("whole"), folder)
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").iterdir()]:
        if int(path.name.split(".")[0].removeprefix("step_")) > until:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:until]))
    return folder


def newest_complete(run_dir: Path) -> int:
    return max(int(path.parent.name.removeprefix("step_")) for path in run_dir.glob("checkpoints/*/COMPLETE"))


def end_of(process: Any) -> tuple[int, str]:
    out, _ = process.communicate(timeout=120)
    return process.returncode, out


def test_sigterm_saves_and_ends_with_143_and_the_resumed_run_is_bit_identical(shop: Workshop) -> None:
    process = shop.start("train", shop.run_file("stopped", FIELDS))
    shop.wait_for_step("stopped", 6, process)
    process.send_signal(signal.SIGTERM)
    code, out = end_of(process)
    assert code == 143, out
    last = shop.records("stopped")[-1]["step"]
    assert last < STEPS - 5 and newest_complete(shop.run_dir("stopped")) == last
    assert f"cpt resume {shop.run_dir('stopped')}" in out
    assert shop.events("stopped")[-1].items() >= {"step": last, "event": "sigterm", "signal": "SIGTERM"}.items()
    done = shop.cpt("resume", shop.run_dir("stopped"))
    assert done.code == 0 and f"resumes after step {last} of {STEPS}" in done.out
    assert [record["step"] for record in shop.records("stopped")] == list(range(1, STEPS + 1))
    assert shop.losses("stopped") == shop.losses("whole")
    assert shop.evaluation("stopped", STEPS) == shop.evaluation("whole", STEPS)


def test_after_sigkill_the_run_goes_on_from_the_last_checkpoint_bit_identical(shop: Workshop) -> None:
    process = shop.start("train", shop.run_file("killed", FIELDS))
    shop.wait_for_step("killed", 12, process)
    process.kill()
    assert end_of(process)[0] == -signal.SIGKILL
    last = newest_complete(shop.run_dir("killed"))
    assert 8 <= last < STEPS - 5
    done = shop.cpt("resume", shop.run_dir("killed"))
    assert done.code == 0 and f"resumes after step {last} of {STEPS}" in done.out
    whole = shop.losses("whole")
    assert shop.losses("killed") == whole
    assert all(record["loss"] == whole[record["step"]] for record in shop.records("killed"))  # repeated steps too


def test_two_ranks_stop_together_at_sigterm_to_the_parent_and_one_rank_goes_on_with_their_losses(
    shop: Workshop,
) -> None:
    process = shop.start("train", shop.run_file("two", FIELDS), "--nproc", "2")
    shop.wait_for_step("two", 6, process)
    process.send_signal(signal.SIGTERM)
    code, out = end_of(process)
    assert code == 143, out
    last = shop.records("two")[-1]["step"]
    assert last < STEPS - 5 and newest_complete(shop.run_dir("two")) == last
    done = shop.cpt("resume", shop.run_dir("two"))
    assert done.code == 0, done.text
    assert [record["step"] for record in shop.records("two")] == list(range(1, STEPS + 1))
    assert shop.losses("two") == pytest.approx(shop.losses("whole"), rel=1e-6)


def test_a_run_of_one_rank_goes_on_with_two_and_zero_2_on_the_same_data(shop: Workshop) -> None:
    folder = copy_of_whole(shop, "wider", until=8)
    code, out = end_of(shop.start("resume", folder, "deepspeed.zero_stage=2", "--nproc", "2"))
    assert code == 0, out
    whole, wider = shop.records("whole")[8:], shop.records("wider")[8:]
    assert [record["step"] for record in wider] == list(range(9, STEPS + 1))
    assert wider[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-6)
    for mine, theirs in zip(wider, whole, strict=True):
        assert mine["tokens_by_source"] == theirs["tokens_by_source"]
        assert mine["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=1e-5)  # other rows: per cents off
        assert mine["lr"] == theirs["lr"]


def test_a_run_that_went_on_under_zero_3_goes_back_to_one_rank_without_zero(shop: Workshop) -> None:
    folder = copy_of_whole(shop, "stages", until=8)
    assert shop.cpt("resume", folder, "deepspeed.zero_stage=3").code == 0
    shutil.rmtree(folder / "checkpoints/step_00000024")
    done = shop.cpt("resume", folder)
    assert done.code == 0 and "resumes after step 16" in done.out
    assert shop.losses("stages") == pytest.approx(shop.losses("whole"), rel=1e-6)


OTHER = ("deepspeed.zero_stage=3", "train.micro_batch_size=2", "data.loader_threads=3", "checkpoint.keep_last=9")


@pytest.fixture(scope="session")
def sharded(shop: Workshop, made_once: Callable[..., Workshop]) -> Workshop:
    """``pair``: two ranks under ZeRO 2 with a row each, from the first step to the last."""

    def make(own: Workshop) -> None:
        own.stores()
        fields = {**FIELDS, "train.micro_batch_size": 1, "deepspeed.zero_stage": 2}
        code, out = end_of(own.start("train", own.run_file("pair", fields), "--nproc", "2"))
        assert code == 0, out

    return made_once("resume_sharded", make)


def cut_pair(shop: Workshop, name: str) -> Path:
    folder = Path(shop.run_dir(name))
    shutil.copytree(shop.run_dir("pair"), folder)
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").iterdir()]:
        if int(path.name.split(".")[0].removeprefix("step_")) > 8:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:8]))
    return folder


def test_ranks_stage_micro_batch_and_loader_change_at_once_and_the_losses_go_on(sharded: Workshop) -> None:
    done = sharded.cpt("resume", cut_pair(sharded, "alone"), *OTHER)
    assert done.code == 0, done.text
    told = (
        "changed   2 ranks → 1; data.loader_threads: 1 → 3; train.micro_batch_size: 1 → 2; deepspeed.zero_stage: 2 → 3"
    )
    assert "written by 2 ranks under ZeRO 2" in done.out and told in done.out
    whole, alone = sharded.records("pair"), sharded.records("alone")
    assert [record["step"] for record in alone] == list(range(1, STEPS + 1))
    assert alone[8]["loss"] == pytest.approx(whole[8]["loss"], rel=1e-6)
    for mine, theirs in zip(alone[8:], whole[8:], strict=True):
        same = ("step", "tokens_seen", "lr", "tokens_by_source")
        assert [mine[name] for name in same] == [theirs[name] for name in same]
        assert mine["loss_by_source"] == pytest.approx(theirs["loss_by_source"], rel=1e-5)  # other rows: per cents off


def test_with_all_of_that_the_mixture_may_change_too_and_every_source_goes_on_where_it_stood(
    sharded: Workshop,
) -> None:
    from cpt.data.sampler import tokens_seen
    from cpt.plan import read_plan

    folder = cut_pair(sharded, "remixed")
    before = read_plan(folder / "plan.json")
    done = sharded.cpt("resume", folder, *OTHER, "replay.share_general=0.75")
    assert done.code == 0, done.text
    plan, records = read_plan(folder / "plan.json"), sharded.records("remixed")
    assert tokens_seen(plan, 8) == tokens_seen(before, 8) and plan != before
    assert [record["loss"] for record in records[:8]] == [record["loss"] for record in sharded.records("pair")[:8]]
    for record in records:
        assert record["tokens_by_source"] == tokens_seen(plan, record["step"])
    new = [records[-1]["tokens_by_source"][name] - records[7]["tokens_by_source"][name] for name in ("prose", "code")]
    assert new[0] / sum(new) == pytest.approx(0.75, abs=0.02)


def test_sigterm_in_the_first_evaluation_is_obeyed_within_seconds_and_saves(shop: Workshop) -> None:
    document = [(3 * i) % 60 + 1 for i in range(1000)]
    store = shop.store("long", domain="law", train=[document] * 5, heldout=[document] * 1000)  # minutes to evaluate
    fields = {"data.stores": {"long": str(store)}, "eval.tokens_per_source": 10**7, "train.micro_batch_size": 1}
    process = shop.start("train", shop.run_file("impatient", fields))
    events = shop.run_dir("impatient") / "events.jsonl"
    while not events.exists():  # written just before the first evaluation
        assert process.poll() is None, end_of(process)[1]
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    code, out = end_of(process)
    assert code == 143 and time.monotonic() - started < 15, out
    assert newest_complete(shop.run_dir("impatient")) == 0
    assert not list((shop.run_dir("impatient") / "evals").iterdir())
    assert shop.records("impatient") == []


@pytest.mark.parametrize("damage", ["truncated shard", "no marker", "missing shard", "garbled meta"])
def test_a_checkpoint_cut_short_is_skipped_with_a_word_and_the_one_before_is_used(shop: Workshop, damage: str) -> None:
    folder = copy_of_whole(shop, damage.replace(" ", "_"), until=STEPS)
    checkpoint = folder / "checkpoints/step_00000024"
    shard = next(checkpoint.glob("shard_*"))
    if damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing shard":
        shard.unlink()
    elif damage == "garbled meta":
        size = (checkpoint / "meta.json").stat().st_size
        (checkpoint / "meta.json").write_bytes(b"\0" * size)  # what a crash of the machine can leave
    else:
        (checkpoint / "COMPLETE").unlink()
    done = shop.cpt("resume", folder)
    assert done.code == 0, done.text
    assert (
        "checkpoint skipped" in done.out and "step_00000024" in done.out and "resumes after step 16 of 24" in done.out
    )
    repeated = [record for record in shop.records(folder.name)][STEPS:]
    assert [record["step"] for record in repeated] == list(range(17, 25))
    assert all(record["loss"] == shop.losses("whole")[record["step"]] for record in repeated)
    (resumed,) = [event for event in shop.events(folder.name) if event["event"] == "resume"]
    assert len(resumed["skipped_checkpoints"]) == 1
    assert newest_complete(folder) == 24 and json.loads((checkpoint / "COMPLETE").read_text())


def test_where_no_checkpoint_is_left_the_run_starts_again_from_step_0(shop: Workshop) -> None:
    folder = copy_of_whole(shop, "bare", until=8)
    (folder / "checkpoints/step_00000008/COMPLETE").unlink()
    done = shop.cpt("resume", folder)
    assert done.code == 0 and "checkpoint skipped" in done.out and "resumes after step 0 of 24" in done.out
    assert shop.losses("bare") == shop.losses("whole")
