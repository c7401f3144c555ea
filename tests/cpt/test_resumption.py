"""A run that goes on says where it stands, and takes no other run's checkpoint for its own."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt.config import ConfigError, load_config
from cpt.prepare import prepare, prepare_job
from cpt.resumption import changes_since, positions
from cpt.train.schedules import learning_rates

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 8
FIELDS = {"train.tokens": STEPS * 256, "checkpoint.every_steps": 4, "checkpoint.keep_last": 10}


@pytest.fixture(scope="session")
def done_once(made_once: Callable[..., Workshop]) -> Workshop:
    """``half``: the run as it lay on disk after step 4 of 8; ``other``: one of a larger model on the same rows."""

    def make(shop: Workshop) -> None:
        shop.stores()
        larger = json.loads(shop.run_file("half", FIELDS).read_text())["model"]["fresh"] | {"num_hidden_layers": 3}
        for name, fields in (("half", FIELDS), ("other", {**FIELDS, "model.fresh": larger})):
            done = shop.cpt("train", shop.run_file(name, fields))
            assert done.code == 0, done.text
        for path in shop.run_dir("half").glob("*/step_00000008*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return made_once("resumption", make)


@pytest.fixture
def shop(done_once: Workshop, tmp_path: Path) -> Workshop:
    shutil.copytree(done_once.root, tmp_path / "shop")
    return type(done_once)(tmp_path / "shop")


def test_the_banner_and_the_first_step_agree_on_step_tokens_and_rate(shop: Workshop) -> None:
    run, uncut = shop.run_dir("half"), {record["step"]: record for record in shop.records("half")}
    before = len(shop.records("half"))
    done = shop.cpt("resume", run, "train.micro_batch_size=8", "checkpoint.keep_last=3")
    assert done.code == 0, done.text
    first = shop.records("half")[before]
    config = load_config(shop.run_file("half", FIELDS))
    rate = learning_rates(config.train, total_steps=STEPS)(5)
    assert (
        (first["step"], first["tokens_seen"], first["lr"])
        == (5, 5 * 256, rate)
        == tuple(uncut[5][name] for name in ("step", "tokens_seen", "lr"))
    )
    assert f"resumes after step 4 of 8: 1,024 of 2,048 tokens; the next step has learning rate {rate:.6g}" in done.out
    assert f"{run}/checkpoints/step_00000004, " in done.out and "written by 1 rank under ZeRO 0" in done.out
    assert "changed   train.micro_batch_size: 4 → 8; checkpoint.keep_last: 10 → 3" in done.out
    assert "data      prose: 256 of 16.4 k tokens, epoch 0.02" in done.out and "code: 768 of 16.4 k tokens" in done.out
    (event,) = [event for event in shop.events("half") if event["event"] == "resume"]
    assert event["since_checkpoint"] == ["train.micro_batch_size: 4 → 8", "checkpoint.keep_last: 10 → 3"]


def test_positions_are_told_in_human_units(shop: Workshop) -> None:
    prepared = prepare(load_config(shop.run_file("half", FIELDS)))
    assert positions(prepared, 4) == [
        "prose: 256 of 16.4 k tokens, epoch 0.02",
        "code: 768 of 16.4 k tokens, epoch 0.05",
    ]


def test_another_number_of_ranks_is_a_change(shop: Workshop) -> None:
    from cpt.checkpoint.portable import Checkpoint

    newest = Checkpoint.open(shop.run_dir("half") / "checkpoints" / "step_00000004")
    prepared = prepare(load_config(shop.run_file("half", FIELDS)))
    moved = [f"data.stores.{name}" for name in ("prose", "code")]  # this test works on a copy
    two, one = (changes_since(newest, prepared, ranks) for ranks in (2, 1))
    assert two[0] == "1 rank → 2" and [text.split(":")[0] for text in two[1:]] == moved
    assert [text.split(":")[0] for text in one] == moved


def test_a_checkpoint_of_another_model_or_of_other_rows_is_refused_by_name(shop: Workshop) -> None:
    own, foreign = (shop.run_dir(name) / "checkpoints" / "step_00000004" for name in ("half", "other"))
    shutil.move(own, shop.root / "kept")
    shutil.copytree(foreign, own)
    done = shop.cpt("resume", shop.run_dir("half"))
    assert done.code == 2 and "is a checkpoint of another model: model.fresh was" in done.err, done.text
    shutil.rmtree(own)
    other_rows = shop.run_file(
        "rows", {**FIELDS, "run.seed": 7, "run.name": "rows", "run.dir": str(shop.root / "runs")}
    )
    assert shop.cpt("train", other_rows).code == 0
    shutil.copytree(shop.run_dir("rows") / "checkpoints" / "step_00000004", own)
    done = shop.cpt("resume", shop.run_dir("half"))
    assert done.code == 2 and "was trained on the rows of plan" in done.err, done.text
    shutil.rmtree(own)
    shutil.move(shop.root / "kept", own)
    assert shop.cpt("resume", shop.run_dir("half")).code == 0


def test_weights_that_know_another_tokenizer_are_no_start_for_a_run(shop: Workshop) -> None:
    counted = [list(range(1, 41))] * 20
    shop.store("law", domain="law", train=counted, heldout=counted[:2], tokenizer="other")
    origin = shop.run_dir("half") / "checkpoints" / "step_00000004"
    stores = {"law": str(shop.root / "law")}
    file = shop.run_file("on", {"model.fresh": None, "model.init_from": str(origin), "data.stores": stores})
    done = shop.cpt("train", file)
    assert done.code == 2 and "was trained on tokens of another tokenizer (tiny)" in done.err, done.text
    assert not shop.run_dir("on").exists()


def test_clocks_that_were_set_back_change_nothing_but_the_age(shop: Workshop) -> None:
    run = shop.run_dir("half")
    before = shop.losses("half")
    lines = (run / "events.jsonl").read_text().splitlines()
    ahead = [json.dumps({**json.loads(line), "time": 4e9}) for line in lines]
    (run / "events.jsonl").write_text("\n".join(ahead) + "\n")
    for path in [run, *run.rglob("*")]:
        os.utime(path, (4e9, 4e9))
    older = run / "checkpoints" / "step_00000000"
    if older.exists():
        os.utime(older / "COMPLETE", (5e9, 5e9))  # "newer" by its time, and still not the newest
    done = shop.cpt("resume", run)
    assert done.code == 0 and "resumes after step 4 of 8" in done.out, done.text
    assert "its time lies in the future: a clock was set back" in done.out
    assert shop.losses("half") == before
    for verb in (("report", run), ("ckpt", "inspect", run), ("resume", run)):
        assert shop.cpt(*verb).code == 0
    assert shop.events("half")[-1]["event"] == "finish"


def test_what_ranks_cannot_divide_is_listed_with_all_else_before_anything_starts(shop: Workshop) -> None:
    fields = {"train.micro_batch_size": 3, "data.stores": {"prose": str(shop.root / "prose"), "code": "nowhere"}}
    done = shop.cpt("train", shop.run_file("bad", fields))
    assert done.code == 2 and "nowhere" in done.err and "8 rows do not divide into 1 ranks x 3 rows" in done.err
    assert not shop.run_dir("bad").exists()
    done = shop.cpt("train", shop.run_file("bad", {"train.micro_batch_size": 9}))
    assert done.code == 2 and "is more than the 8 rows of a step" in done.err


@pytest.mark.parametrize(
    ("fields", "ranks", "named"),
    [
        ({"deepspeed.sequence_parallel": 2}, 3, ["deepspeed.sequence_parallel"]),
        ({"deepspeed.zero_stage": 3, "deepspeed.hpz_size": 4}, 2, ["deepspeed.hpz_size"]),
        ({}, 3, ["train.global_batch_tokens"]),
        ({"deepspeed.zero_stage": 3, "deepspeed.hpz_size": 2}, 3, ["deepspeed.hpz_size", "train.global_batch_tokens"]),
    ],
)
def test_impossible_numbers_of_ranks_are_all_named(
    shop: Workshop, fields: dict[str, Any], ranks: int, named: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare_job(load_config(shop.run_file("ranks", fields)), ranks)
    assert [problem.field for problem in refused.value.problems] == named
