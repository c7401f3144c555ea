"""A run gets more tokens: what was trained stays as it was, and the rate goes on where it stood, in sight."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt.config import ConfigError, RunConfig, validate
from cpt.data.sampler import rows_seen
from cpt.extend import continuation, parse_tokens, past_rates, split_extension
from cpt.plan import read_plan
from cpt.rundir import RunDir
from cpt.runfolder import finished_words, is_finished, lock_folder, read_run_config
from cpt.train.schedules import learning_rates

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 12
FIELDS = {"train.tokens": STEPS * 256, "checkpoint.every_steps": 4, "checkpoint.keep_last": 10}


@pytest.fixture(scope="session")
def done_once(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and the finished run ``whole`` of 12 steps."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text

    return made_once("extend", make)


@pytest.fixture
def shop(done_once: Workshop, tmp_path: Path) -> Workshop:
    """A copy to change, with the stores where they were."""
    shutil.copytree(done_once.root, tmp_path / "shop")
    return type(done_once)(tmp_path / "shop")


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_finished_run_goes_on_and_nothing_that_was_trained_has_changed(shop: Workshop) -> None:
    run, before = shop.run_dir("whole"), read_plan(shop.run_dir("whole") / "plan.json")
    trained = shop.records("whole")
    done = shop.cpt("extend", run, "--tokens", "+1024")
    assert done.code == 0, done.text
    assert "12 steps → 16" in done.out and "first update after the extension" in done.out and "to come" in done.out
    records = shop.records("whole")
    assert records[:STEPS] == trained and [record["step"] for record in records[STEPS:]] == [13, 14, 15, 16]
    config, plan = read_run_config(run), read_plan(run / "plan.json")
    (past,) = config.train.past
    assert (past.until_step, past.tokens, config.train.tokens) == (STEPS, STEPS * 256, 16 * 256)
    rate = learning_rates(config.train, total_steps=16)
    assert [record["lr"] for record in records] == pytest.approx([rate(n) for n in range(1, 17)], rel=1e-6)
    assert rows_seen(plan, STEPS) == rows_seen(before, STEPS) and plan.num_steps == 16
    assert records[-1]["tokens_by_source"] == {name: rows * 32 for name, rows in rows_seen(plan, 16).items()}
    (event,) = [event for event in shop.events("whole") if event["event"] == "extended"]
    assert (event["step"], event["steps_before"], event["steps_after"]) == (12, 12, 16)
    assert is_finished(run) and shop.evaluation("whole", 16)["step"] == 16
    report = shop.cpt("report", run)
    assert report.code == 0 and "extended" in (run / "report" / "report.md").read_text(), report.text


def test_a_dry_run_shows_the_curve_and_writes_nothing(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    before = files_of(run)
    done = shop.cpt("extend", run, "--tokens", "20K", "train.peak_lr=2e-3", "--dry-run", "--json")
    assert done.code == 0, done.text
    facts = json.loads(done.out)
    assert (facts["steps_before"], facts["steps_after"]) == (12, 20_000 // 256)
    assert facts["extended_at"] == [12] and facts["peak_lr"] == 2e-3
    rates = {point["step"]: point["lr"] for point in facts["curve"] + facts["corners"]}
    assert rates[12] == pytest.approx(1e-3) and max(rate for step, rate in rates.items() if step > 12) <= 2e-3
    assert facts["warnings"] == [] and facts["shares"] == {"prose": 0.25, "code": 0.75}
    assert files_of(run) == before


def test_a_schedule_that_leaps_says_so(shop: Workshop) -> None:
    leap = ("train.schedule.name=constant", "--dry-run", "--json")
    done = shop.cpt("extend", shop.run_dir("whole"), "--tokens", "+2K", *leap)
    assert done.code == 0, done.text
    (warning,) = json.loads(done.out)["warnings"]
    assert warning == "the learning rate goes from 0.001 to 0.01 in one step, at the extension"


def test_a_finished_run_is_not_resumed_but_told_to_be_extended(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    before = files_of(run)
    for arguments in (("resume", run), ("resume", run, "--nproc", "2"), ("resume", run, "deepspeed.zero_stage=2")):
        done = shop.cpt(*arguments)
        assert done.code == 0 and "this run is finished: all 12 steps are done" in done.out
        assert f"cpt extend {run} --tokens" in done.out
    assert files_of(run) == before
    assert done.out.strip() == finished_words(run)


def test_a_run_whose_last_evaluation_or_end_is_missing_is_not_finished(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    (run / "evals" / "step_00000012.json").unlink()
    assert not is_finished(run)
    assert shop.cpt("resume", run).code == 0
    assert is_finished(run) and len(shop.records("whole")) == STEPS


@pytest.mark.parametrize("kept", [("config.yaml",), ("config.yaml", "plan.json"), ()])
def test_an_extension_cut_short_is_not_made_or_finished_by_the_next_resume(
    shop: Workshop, kept: tuple[str, ...]
) -> None:
    run = shop.run_dir("whole")
    old = files_of(run)
    assert shop.cpt("extend", run, "--tokens", "+512", "--no-train").code == 0
    new = (run / "plan.json").read_bytes()
    for name in {"config.yaml", "plan.json"} - set(kept):
        (run / name).write_bytes(old[name])
    done = shop.cpt("resume", run)
    assert done.code == 0, done.text
    assert (run / "plan.json").read_bytes() == (new if kept else old["plan.json"])
    assert len(shop.records("whole")) == (14 if kept else 12)


def test_an_extended_run_resumes_bit_for_bit_and_can_be_extended_again(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    assert shop.cpt("extend", run, "--tokens", "+1024").code == 0
    once = shop.losses("whole")
    for folder in (run / "checkpoints" / "step_00000016", run / "evals" / "step_00000016.json"):
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    assert shop.cpt("resume", run).code == 0
    assert shop.losses("whole") == once
    assert shop.cpt("extend", run, "--tokens", "+512", "--no-train").code == 0
    assert [past["until_step"] for past in yaml.safe_load((run / "config.yaml").read_text())["train"]["past"]] == [
        12,
        16,
    ]


def test_rate_and_mixture_of_the_new_steps_may_be_stated(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    stated = ("train.schedule={name: linear_to_zero, warmup_steps: 2}", "replay.share_general=0.75")
    done = shop.cpt("extend", run, "--tokens", "+1K", *stated, "--no-train")
    assert done.code == 0 and "stated: train.schedule=" in done.out, done.text
    config, plan = read_run_config(run), read_plan(run / "plan.json")
    assert config.train.schedule.name == "linear_to_zero" and config.train.past[0].schedule.name == "rewarm_cosine"
    seen, end = rows_seen(plan, STEPS), rows_seen(plan, plan.num_steps)
    assert (end["prose"] - seen["prose"]) / (sum(end.values()) - sum(seen.values())) == pytest.approx(0.75, abs=0.03)


def test_of_stages_the_last_one_goes_on(shop: Workshop) -> None:
    stages = [{"tokens": 1024, "share_general": 0.5}, {"tokens": 1024, "share_general": 0.25}]
    file = shop.run_file("staged", {**FIELDS, "train.tokens": 2048, "data.stages": stages})
    assert shop.cpt("train", file).code == 0
    done = shop.cpt("extend", shop.run_dir("staged"), "--tokens", "+1024", "--no-train")
    assert done.code == 0, done.text
    config = read_run_config(shop.run_dir("staged"))
    assert [stage.tokens for stage in config.data.stages] == [1024, 2048]
    plan = read_plan(shop.run_dir("staged") / "plan.json")
    assert rows_seen(plan, 12) == {"prose": 16 + 8 + 8, "code": 16 + 24 + 24}


def test_caps_count_from_the_start_of_the_run_and_what_cannot_be_had_changes_nothing(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    before = files_of(run)
    for arguments, reason in (
        (("--tokens", "+2M"), "within max_epochs"),
        (("--tokens", "3072"), "is no more than the run's 3,072 tokens; write +3072"),
        (("--tokens", "+10"), "adds no whole step of 256 tokens"),
        (("--tokens", "many"), "is no number of tokens"),
        (("--tokens", "+1K", "train.tokens=9"), "cpt extend RUN_DIR --tokens"),
        (("--tokens", "+1K", "train.max_grad_norm=9"), "a resumed run keeps it"),
        (("--tokens", "+1K", "train.schedule={name: wsd, decay_steps: 99}"), "steps but the run has 3 after its ext"),
        ((), "is required"),
    ):
        done = shop.cpt("extend", run, *arguments)
        assert done.code == 2 and reason in done.err, done.text
    assert {name: content for name, content in files_of(run).items() if name != ".lock"} == {
        name: content for name, content in before.items() if name != ".lock"
    }


def test_a_run_at_work_is_not_extended_under_its_feet(shop: Workshop) -> None:
    run = shop.run_dir("whole")
    with lock_folder(RunDir(run)) as lock:
        done = shop.cpt("extend", run, "--tokens", "+1K")
    assert done.code == 3 and "another process is training in this run folder" in done.err
    assert str(lock.holder.pid) in done.err and lock.holder.host in done.err


def test_resume_points_to_extend_where_somebody_asks_it_for_more_tokens(shop: Workshop) -> None:
    done = shop.cpt("resume", shop.run_dir("whole"), "train.tokens=9999999")
    assert done.code == 2 and "cpt extend RUN_DIR --tokens" in done.err


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("+20M", 20_001_000), ("+1.5B", 1_500_001_000), ("2e9", 2 * 10**9), ("+1_000", 2000), ("3k", 3000)],
)
def test_tokens_are_stated_as_people_say_them(text: str, tokens: int) -> None:
    assert parse_tokens(text, 1000) == tokens


@pytest.mark.parametrize("text", ["", "+", "-5", "1e", "20MB", "1000", "+0"])
def test_other_words_are_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_tokens(text, 1000)


def test_overrides_of_the_new_steps_are_kept_apart_from_those_of_the_process() -> None:
    kept, others = split_extension(["train.peak_lr=1e-4", "deepspeed.zero_stage=1", "replay.share_general=0.5"])
    assert kept == ["train.peak_lr=1e-4", "replay.share_general=0.5"] and others == ["deepspeed.zero_stage=1"]


def config_of(schedule: dict[str, Any], steps: int, past: list[dict[str, Any]], peak: float = 0.01) -> RunConfig:
    train = {"tokens": steps * 10, "global_batch_tokens": 10, "micro_batch_size": 1, "peak_lr": peak}
    return validate(
        {
            "run": {"name": "x"},
            "model": {"init_from": "x"},
            "data": {"stores": {"a": "a"}, "seq_len": 10},
            "train": {**train, "schedule": schedule, "past": past},
        }
    )


SCHEDULES = [
    {"name": "rewarm_cosine", "warmup_steps": 20},
    {"name": "rewarm_cosine"},
    {"name": "linear_to_zero", "warmup_steps": 10},
    {"name": "constant", "warmup_steps": 30},
    {"name": "wsd", "warmup_steps": 10, "decay_steps": 40, "min_lr_ratio": 0.05},
    {"name": "infinite_cosine", "warmup_steps": 10, "cooldown_steps": 60, "constant_steps": 80},
    {"name": "infinite_inv_sqrt", "warmup_steps": 10, "cooldown_steps": 60, "constant_steps": 80},
]


@settings(max_examples=60, deadline=None)
@given(schedule=st.sampled_from(SCHEDULES), step=st.integers(1, 200), more=st.integers(100, 2000))
def test_wherever_a_run_is_extended_its_rate_goes_on_without_a_leap(
    schedule: dict[str, Any], step: int, more: int
) -> None:
    old = config_of(schedule, 200, [])
    goes_on = continuation(old, step, 200 + more)
    new = config_of(goes_on.schedule.model_dump(), 200 + more, past_rates(old, step), goes_on.peak_lr)
    before, after = (learning_rates(each.train, total_steps=each.train.tokens // 10) for each in (old, new))
    assert all(after(n) == before(n) for n in range(1, step + 1))
    rates = [after(n) for n in range(step, 201 + more)]
    assert max(abs(b - a) for a, b in pairwise(rates)) <= 0.01 + 1e-12
    # a warm-up of one step is the only rise that fast
    fall = max(a - b for a, b in pairwise(rates))
    assert fall <= 0.25 * 0.01 and min(rates) >= 0 and max(rates) <= 0.01 * (1 + 1e-9)
    if schedule["name"] != "constant":
        assert rates[-1] == pytest.approx(before(200), abs=1e-9)  # the same floor as before


def test_a_plateau_goes_on_and_its_decay_moves_to_the_new_end() -> None:
    wsd = {"name": "wsd", "warmup_steps": 10, "decay_steps": 40, "min_lr_ratio": 0.0}
    old = config_of(wsd, 200, [])
    goes_on = continuation(old, 100, 500)
    new = config_of(goes_on.schedule.model_dump(), 500, past_rates(old, 100), goes_on.peak_lr)
    rate = learning_rates(new.train, total_steps=500)
    assert all(rate(n) == 0.01 for n in range(10, 461)) and rate(461) < 0.01 and rate(500) == 0


def test_a_run_without_a_step_only_becomes_longer() -> None:
    old = config_of(SCHEDULES[0], 200, [])
    assert past_rates(old, 0) == [] and continuation(old, 0, 300).schedule == old.train.schedule
