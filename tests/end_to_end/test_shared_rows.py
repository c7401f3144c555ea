"""Ranks that share rows (Ulysses) train as one rank does: the same losses, gradients, evaluations and checkpoints."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import tiny_llama

Workshop = Any  # the fixtures of tests/conftest.py
STEPS = 6
FIELDS = {
    "model.fresh": {**tiny_llama(), "num_attention_heads": 4, "num_key_value_heads": 2},
    "train.tokens": STEPS * 512,
    "train.global_batch_tokens": 512,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 5,
}


@pytest.fixture(scope="module")
def shop(made_once: Callable[..., Workshop]) -> Workshop:
    """Stores of packed documents, and ``whole``: the run of one rank."""

    def make(shop: Workshop) -> None:
        shop.stores()
        done = shop.cpt("train", shop.run_file("whole", FIELDS))
        assert done.code == 0, done.text

    return made_once("shared_rows", make)


def launched(shop: Workshop, *arguments: object, ranks: int) -> str:
    process = shop.start(*arguments, "--nproc", ranks)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return str(out)


def same_run(shop: Workshop, name: str, *, rel: float = 2e-6) -> None:
    assert shop.losses(name) == pytest.approx(shop.losses("whole"), rel=rel)
    records, whole = ({each["step"]: each for each in shop.records(run)} for run in (name, "whole"))
    for key in ("tokens_seen", "grad_norm"):
        found, expected = ([each[step][key] for step in range(1, STEPS + 1)] for each in (records, whole))
        assert found == pytest.approx(expected, rel=1e-5), key
    for step in (0, STEPS):
        found, expected = (shop.evaluation(each, step)["sources"] for each in (name, "whole"))
        assert found.keys() == expected.keys()
        for source in expected:
            assert found[source]["loss"] == pytest.approx(expected[source]["loss"], rel=1e-6)
            assert found[source]["tokens"] == expected[source]["tokens"]


@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_that_share_every_row_train_as_one(shop: Workshop, stage: int) -> None:
    changes = {"deepspeed.zero_stage": stage, "deepspeed.sequence_parallel": 2}
    out = launched(shop, "train", shop.run_file(f"two_{stage}", {**FIELDS, **changes}), ranks=2)
    assert "shared by 2 ranks each" in out
    same_run(shop, f"two_{stage}")


def test_four_ranks_in_two_groups_train_as_one(shop: Workshop) -> None:
    changes = {"deepspeed.zero_stage": 2, "deepspeed.sequence_parallel": 2, "train.activation_checkpointing": "full"}
    launched(shop, "train", shop.run_file("four", {**FIELDS, **changes}), ranks=4)
    same_run(shop, "four")


def test_a_run_that_shared_rows_goes_on_alone_under_another_zero_stage(shop: Workshop) -> None:
    changes = {"deepspeed.zero_stage": 1, "deepspeed.sequence_parallel": 2}
    launched(shop, "train", shop.run_file("back", {**FIELDS, **changes}), ranks=2)
    folder = shop.run_dir("back")
    for path in [*(folder / "checkpoints").iterdir(), *(folder / "evals").iterdir()]:
        if int(path.name.split(".")[0].removeprefix("step_")) > 3:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    done = shop.cpt("resume", folder, "deepspeed.sequence_parallel=1", "deepspeed.zero_stage=3")
    assert done.code == 0 and "resumes after step 3" in done.out, done.text
    same_run(shop, "back")
