"""A job that runs is stopped by a signal and goes on with another mixture, on other hardware: one command each."""

import json
import signal
from collections.abc import Callable
from typing import Any

import pytest

from cpt.data.sampler import tokens_seen
from cpt.plan import read_plan

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 24
FIELDS = {"train.tokens": STEPS * 2048, "train.global_batch_tokens": 2048, "train.micro_batch_size": 8}


@pytest.fixture(scope="session")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    return made_once("change_mixture", lambda shop: shop.stores() and None)


def test_a_running_job_is_stopped_and_two_ranks_go_on_with_another_mixture(shop: Workshop) -> None:
    process, run = shop.start("train", shop.run_file("job", FIELDS)), shop.run_dir("job")
    shop.wait_for_step("job", 4, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    stopped = shop.records("job")[-1]["step"]
    assert process.returncode == 143 and 4 <= stopped < STEPS
    before = read_plan(run / "plan.json")
    goes_on = shop.start("resume", run, "replay.share_general=0.75", "--nproc", "2")
    out, _ = goes_on.communicate(timeout=240)
    assert goes_on.returncode == 0, out
    assert f"mixture changed after step {stopped}: prose 25.0% → 75.0%" in out
    plan = read_plan(run / "plan.json")
    assert tokens_seen(plan, stopped) == tokens_seen(before, stopped)
    for record in shop.records("job"):
        assert record["tokens_by_source"] == tokens_seen(plan, record["step"])
    meta = json.loads((run / "checkpoints" / f"step_{STEPS:08d}" / "meta.json").read_text())
    assert meta["plan_fingerprint"] == plan.fingerprint and meta["written_by"]["world_size"] == 2
