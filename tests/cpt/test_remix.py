"""A run whose mixture is changed on the way: nothing is repeated or skipped, and it goes on as any other run does."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cpt.data.sampler import locate, rows_seen
from cpt.plan import Plan, read_plan
from cpt.remix import newest_step, past_of, remix
from cpt.rundir import RunDir
from cpt.runfolder import lock_folder, read_run_config

Workshop = Any  # the fixtures of tests/conftest.py
STEPS, CHANGE = 12, 4
FIELDS = {"train.tokens": STEPS * 256, "checkpoint.every_steps": 4, "checkpoint.keep_last": 10}


@pytest.fixture(scope="session")
def half_done(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, a third one to add, and the run ``half`` as it lay on disk after step 4 of 12."""

    def make(shop: Workshop) -> None:
        shop.stores()
        shop.store("law", domain="law", train=[list(range(1, 41))] * 20, heldout=[list(range(1, 41))])
        done = shop.cpt("train", shop.run_file("half", FIELDS))
        assert done.code == 0, done.text
        cut(shop.run_dir("half"), until=CHANGE)

    return made_once("remix", make)


@pytest.fixture
def shop(half_done: Workshop, tmp_path: Path) -> Workshop:
    """A copy of ``half`` to change, with the stores where they were."""
    shutil.copytree(half_done.root, tmp_path / "shop")
    return type(half_done)(tmp_path / "shop")


def cut(folder: Path, *, until: int) -> None:
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").iterdir()]:
        if int(path.name.split(".")[0].removeprefix("step_")) > until:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("metrics.jsonl", "events.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= until))


def read_in_order(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """(epoch, row) of every source, in the order of the run."""
    at = locate(plan, np.arange(plan.num_rows))
    found: dict[str, list[tuple[int, int]]] = {source.name: [] for source in plan.sources}
    for index, epoch, row in zip(at.source_index, at.epoch, at.row_in_source, strict=True):
        found[plan.sources[index].name].append((int(epoch), int(row)))
    return found


def test_the_rest_of_a_run_gets_another_mixture_and_every_source_goes_on_where_it_stood(shop: Workshop) -> None:
    run, before = shop.run_dir("half"), read_plan(shop.run_dir("half") / "plan.json")
    done = shop.cpt("resume", run, "replay.share_general=0.75", "checkpoint.every_steps=8")
    assert done.code == 0, done.text
    assert "mixture changed after step 4: prose 25.0% → 75.0%, code 75.0% → 25.0%" in done.out
    assert "resumes after step 4 of 12: 1,024 of 3,072 tokens; the next step has learning rate " in done.out
    assert "prose: 256 of " in done.out and "changed   replay.share_general: None → 0.75" in done.out
    plan = read_plan(run / "plan.json")
    assert plan.num_steps == STEPS and plan.fingerprint != before.fingerprint
    assert rows_seen(plan, CHANGE) == rows_seen(before, CHANGE) == {"prose": 8, "code": 24}
    assert rows_seen(plan, STEPS) == {"prose": 8 + 48, "code": 24 + 16}
    whole, new = read_in_order(before), read_in_order(plan)
    assert all(
        new[name][: len(rows)] == rows[: len(new[name])] for name, rows in whole.items()
    )  # none twice, none lost
    meta = json.loads((run / "checkpoints" / "step_00000012" / "meta.json").read_text())
    assert (meta["plan_fingerprint"], meta["tokens_by_source"]) == (
        plan.fingerprint,
        {"prose": 56 * 32, "code": 40 * 32},
    )
    record = shop.records("half")[-1]
    assert record["step"] == STEPS and record["tokens_by_source"] == {"prose": 56 * 32, "code": 40 * 32}


def test_a_change_is_kept_with_what_was_before(shop: Workshop) -> None:
    run, before = shop.run_dir("half"), read_plan(shop.run_dir("half") / "plan.json")
    assert shop.cpt("resume", run, "replay.share_general=0.5", "data.max_epochs_of.code=2").code == 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["replay"]["share_general"] == 0.5 and config["data"]["max_epochs_of"] == {"code": 2.0}
    past = config["data"]["past"]
    assert [(one["until_step"], one["sources"], one["share_general"]) for one in past] == [(4, ["prose", "code"], None)]
    assert read_plan(run / "plans" / "step_00000000.json") == before
    assert read_plan(run / "plans" / "step_00000004.json") == read_plan(run / "plan.json")
    (event,) = [event for event in shop.events("half") if event["event"] == "mix_changed"]
    assert event["step"] == 4 and event["changes"] == ["replay.share_general=0.5", "data.max_epochs_of.code=2"]
    assert event["shares_before"] == {"prose": 0.25, "code": 0.75} and event["shares_after"]["prose"] == 0.5
    assert (event["plan_before"], event["plan_after"]) == (before.fingerprint, read_plan(run / "plan.json").fingerprint)


def test_a_source_may_join_and_the_report_evaluation_and_export_know_it(shop: Workshop) -> None:
    run = shop.run_dir("half")
    done = shop.cpt("resume", run, f"data.stores.law={shop.root / 'law'}", "data.max_epochs_of.law=0.5")
    assert done.code == 0, done.text
    plan = read_plan(run / "plan.json")
    seen = rows_seen(plan, STEPS)
    assert 0 < seen["law"] <= 0.5 * plan.sources[2].num_rows + 1 and rows_seen(plan, CHANGE)["law"] == 0
    assert set(shop.evaluation("half", STEPS)["sources"]) == {"prose", "code", "law"}
    assert set(shop.evaluation("half", 0)["sources"]) == {"prose", "code"}
    shown = shop.cpt("eval", run / "checkpoints" / "step_00000012")
    assert shown.code == 0 and "law" in shown.out
    report = shop.cpt("report", run)
    assert report.code == 0, report.text
    text = (run / "report" / "report.md").read_text()
    assert "mix_changed" in text and "law" in text


def test_a_changed_run_resumes_bit_for_bit_and_can_be_changed_again(shop: Workshop) -> None:
    run = shop.run_dir("half")
    assert shop.cpt("resume", run, "replay.share_general=0.75").code == 0
    once = shop.losses("half")
    cut(run, until=8)
    assert shop.cpt("resume", run).code == 0
    assert shop.losses("half") == once
    cut(run, until=8)
    done = shop.cpt("resume", run, "data.mix={name: temperature, tau: 5}", "replay.share_general=null")
    assert done.code == 0, done.text
    assert [past["until_step"] for past in yaml.safe_load((run / "config.yaml").read_text())["data"]["past"]] == [4, 8]
    again = shop.losses("half")
    assert [again[step] == once[step] for step in (7, 8, 10)] == [True, True, False]


def test_from_a_checkpoint_before_the_change_the_run_comes_to_the_change_again(shop: Workshop) -> None:
    run = shop.run_dir("half")
    assert shop.cpt("resume", run).code == 0
    cut(run, until=8)
    assert shop.cpt("resume", run, "replay.share_general=0.75").code == 0
    once = shop.losses("half")
    cut(run, until=4)
    assert shop.cpt("resume", run).code == 0
    assert shop.losses("half") == once
    cut(run, until=4)
    assert shop.cpt("resume", run, "replay.share_general=0.5").code == 0  # from 4 on: the change at 8 never happens
    past = read_run_config(run).data.past
    assert [(one.until_step, one.share_general) for one in past] == [(4, None)]
    assert rows_seen(read_plan(run / "plan.json"), STEPS) == {"prose": 8 + 32, "code": 24 + 32}


def test_a_change_cut_short_between_its_files_is_finished_by_the_next_resume(shop: Workshop) -> None:
    run = shop.run_dir("half")
    old = (run / "plan.json").read_bytes()
    assert shop.cpt("resume", run, "replay.share_general=0.75").code == 0
    cut(run, until=4)
    new = (run / "plan.json").read_bytes()
    (run / "plan.json").write_bytes(old)
    done = shop.cpt("resume", run)
    assert done.code == 0 and (run / "plan.json").read_bytes() == new


def test_what_no_mixture_is_and_a_mixture_that_cannot_be_had_change_nothing(shop: Workshop) -> None:
    run = shop.run_dir("half")
    kept = {path: path.read_bytes() for path in (run / "plan.json", run / "config.yaml")}
    for overrides, reason in (
        (["replay.share_general=0.5", "train.peak_lr=1"], "train.peak_lr"),
        (["replay.share_general=2"], "replay.share_general"),
        (["data.stages=[{tokens: 256, share_general: 1}]"], "must add up to train.tokens"),
        (["data.weights.law=1"], "names no source of data.stores"),
        (["data.stores.law=nowhere"], "nowhere"),
        ([f"data.stores.code={shop.root / 'law'}"], "the stores are not those that the run has read"),
        (["data.mix={name: linear, points: [{tokens: 9, share_general: 1}]}"], "data.mix.points"),
    ):
        done = shop.cpt("resume", run, *overrides)
        assert done.code == 2 and reason in done.err, done.text
    assert {path: path.read_bytes() for path in kept} == kept


def test_spelling_out_what_holds_already_is_no_change(shop: Workshop) -> None:
    run = shop.run_dir("half")
    before = (run / "plan.json").read_bytes()
    done = shop.cpt("resume", run, "replay.share_general=0.25")
    assert done.code == 0 and (run / "plan.json").read_bytes() == before
    assert read_run_config(run).data.past == ()
    assert "mix_changed" not in Counter(event["event"] for event in shop.events("half"))


def test_a_run_that_has_not_saved_yet_begins_with_the_other_mixture(shop: Workshop) -> None:
    run = shop.run_dir("half")
    shutil.rmtree(run / "checkpoints")
    done = shop.cpt("resume", run, "replay.share_general=0.5")
    assert done.code == 0 and "mixture changed after step 0" in done.out, done.text
    assert read_run_config(run).data.past == ()
    assert rows_seen(read_plan(run / "plan.json"), STEPS) == {"prose": 48, "code": 48}


def test_a_finished_run_and_what_is_no_run_have_no_mixture_to_change(shop: Workshop) -> None:
    run = shop.run_dir("half")
    assert shop.cpt("resume", run).code == 0
    for verb in (("resume", run), ("data", "preview-mix", run)):
        done = shop.cpt(*verb, "replay.share_general=0.5")
        assert done.code == 2 and "has done all of its 12 steps" in done.err and "model.init_from" in done.err
    assert "no other mixture is given" in shop.cpt("data", "preview-mix", run, "--apply").err
    file = shop.run_file("file", FIELDS)
    refused = shop.cpt("data", "preview-mix", file, "replay.share_general=0.5", "--apply")
    assert refused.code == 2 and "not a run folder" in refused.err


def test_a_run_at_work_keeps_its_mixture_until_it_is_stopped(shop: Workshop) -> None:
    run = shop.run_dir("half")
    with lock_folder(RunDir(run)):
        done = shop.cpt("resume", run, "replay.share_general=0.5")
    assert done.code == 3 and "another process is training in this run folder" in done.err
    assert not (run / "plans").exists()


def test_ranks_do_not_change_a_mixture_each_for_itself(shop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    from cpt.train.main import main

    assert main(["--resume", str(shop.run_dir("half")), "replay.share_general=0.5"]) == 2
    assert "before the ranks start: cpt resume RUN_DIR" in capsys.readouterr().err


def test_the_step_of_a_change_decides_which_mixtures_led_to_it(shop: Workshop) -> None:
    run = shop.run_dir("half")
    assert newest_step(run) == CHANGE and newest_step(shop.root) == 0
    config = remix(run, ["replay.share_general=0.5"], CHANGE).config
    assert [past.until_step for past in past_of(config, 9)] == [4, 9]
    assert [past.until_step for past in past_of(config, 4)] == [4]
    assert [past.until_step for past in past_of(config, 2)] == [2]
    assert past_of(config, 0) == []
