"""A run whose rows grow from 64 to 256 tokens: same tokens per step, the same rows after a stop on any topology."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import tiny_llama

Workshop = Any  # the fixtures of tests/conftest.py
SHORT, LONG, STEP = 64, 256, 2048
STAGES = [
    {"tokens": 6 * STEP, "share_general": 0.5},
    {"tokens": 6 * STEP, "share_general": 0.25, "seq_len": LONG},
]
FIELDS = {
    "model.fresh": tiny_llama(positions=LONG),
    "data.seq_len": SHORT,
    "data.stages": STAGES,
    "train.tokens": 12 * STEP,
    "train.global_batch_tokens": STEP,
    "train.micro_batch_size": 8,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 10,
}


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores, and ``whole``: the run that nothing happened to."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text
        (shop.root / "said").write_text(done.out)

    return made_once("staged_rows", make)


def cut_back(shop: Workshop, name: str, step: int) -> Path:
    """The run as it lay on disk after ``step``."""
    folder = Path(shop.run_dir(name))
    shutil.copytree(shop.run_dir("whole"), folder)
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").iterdir()]:
        if int(path.name.split(".")[0].removeprefix("step_")) > step:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:step]))
    return folder


def test_tokens_grow_evenly_while_rows_do_not(shop: Workshop) -> None:
    records = shop.records("whole")
    assert [record["tokens_seen"] for record in records] == [STEP * (n + 1) for n in range(12)]
    said = (shop.root / "said").read_text()
    assert "row length" in said and "micro-batch" in said
    assert "stage 1 has rows of 256 tokens: its sources are packed anew" in " ".join(said.split())
    plan = json.loads((shop.run_dir("whole") / "plan.json").read_text())
    assert [stage["end_row"] for stage in plan["stages"]] == [6 * 32, 6 * 32 + 6 * 8]
    assert [stage.get("seq_len") for stage in plan["stages"]] == [None, LONG]


@pytest.mark.parametrize("step", [6, 9])
def test_a_run_that_is_resumed_at_or_behind_the_border_is_bit_identical(shop: Workshop, step: int) -> None:
    folder = cut_back(shop, f"from_{step}", step)
    done = shop.cpt("resume", folder)
    assert done.code == 0, done.text
    assert "rows of 256 tokens now" in done.out
    assert shop.losses(f"from_{step}") == shop.losses("whole")
    assert shop.evaluation(f"from_{step}", 12) == shop.evaluation("whole", 12)


def test_two_ranks_with_other_micro_batches_and_zero_2_go_on_with_the_same_rows(shop: Workshop) -> None:
    folder = cut_back(shop, "two", 3)
    process = shop.start(
        "resume", folder, "deepspeed.zero_stage=2", "train.micro_batch_size=4", "data.loader_threads=2", "--nproc", "2"
    )
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert shop.losses("two") == pytest.approx(shop.losses("whole"), rel=1e-5)


def test_the_mixture_of_a_run_with_two_lengths_can_be_changed_on_resume(shop: Workshop) -> None:
    folder = cut_back(shop, "changed", 9)
    stages = json.dumps([STAGES[0], {**STAGES[1], "tokens": 6 * STEP, "share_general": 0.75}])
    done = shop.cpt("resume", folder, f"data.stages={stages}")
    assert done.code == 0, done.text
    whole, changed = shop.losses("whole"), shop.losses("changed")
    assert [changed[step] for step in range(1, 10)] == [whole[step] for step in range(1, 10)]
    assert changed[12] != whole[12]
    plan = json.loads((folder / "plan.json").read_text())
    assert [stage.get("seq_len") for stage in plan["stages"]] == [None, LONG, LONG]


def test_a_dry_run_shows_rows_and_micro_batches_of_each_stage(shop: Workshop) -> None:
    done = shop.cpt("train", shop.run_file("dry", FIELDS), "--dry-run", "--json")
    assert done.code == 0, done.text
    stages = json.loads(done.out)["steps_by_stage"]
    assert [(s["seq_len"], s["rows_per_step"], s["micro_batch_size"], s["micro_batches"]) for s in stages] == [
        (64, 32, 8, 4),
        (256, 8, 2, 4),
    ]


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"data.stages": [{**STAGES[0], "seq_len": 100}, STAGES[1]]}, "seq_len 100"),
        ({"model.fresh": tiny_llama(positions=128)}, "256"),
        ({"deepspeed.sequence_parallel": 3}, "must divide the rows that ranks share (64, 256 tokens)"),
        ({"deepspeed.sequence_parallel": 4}, "must divide the model's 2 attention heads"),
        ({"deepspeed.sequence_parallel": 2}, "must divide the 1 ranks of this job"),
        ({"train.micro_batch_size": 24}, "32 rows do not divide into 1 ranks x 24 rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(shop: Workshop, fields: dict[str, Any], told: str) -> None:
    done = shop.cpt("train", shop.run_file("bad", {**FIELDS, **fields}))
    assert done.code == 2, done.text
    assert told in " ".join(done.err.split())
    assert not (shop.run_dir("bad") / "config.yaml").exists()
