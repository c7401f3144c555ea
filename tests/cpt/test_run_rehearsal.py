"""Before the first step every source is tried; nothing of that is left behind, and memory that does not suffice is explained."""

import re
import sys
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
FIELDS = {"train.tokens": 4 * 256, "guard.spike_sigma": None}

# Leaves the process 48 MiB more than it has when the rehearsal begins, and trains.
WITH_A_LIMIT = """
import resource, sys
import cpt.run
from cpt.cli import main
from cpt.run import rehearse

def limited(*arguments):
    pages = int(open("/proc/self/statm").read().split()[0])
    room = pages * resource.getpagesize() + 48 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    rehearse(*arguments)

cpt.run.rehearse = limited
sys.argv[0] = "cpt"
main()
"""


@pytest.mark.parametrize(
    "fields", [{}, {"deepspeed.zero_stage": 2}, {"train.micro_batch_size": 2, "deepspeed.zero_stage": 3}]
)
def test_a_run_is_bit_identical_with_and_without_a_rehearsal(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    workshop.stores()
    done = workshop.cpt("train", workshop.run_file("tried", FIELDS | fields))
    assert done.code == 0, done.text
    monkeypatch.setattr("cpt.run.rehearse", lambda *arguments: None)
    assert workshop.cpt("train", workshop.run_file("untried", FIELDS | fields)).code == 0
    assert workshop.losses("tried") == workshop.losses("untried")
    norms = [[record["grad_norm"] for record in workshop.records(name)] for name in ("tried", "untried")]
    assert norms[0] == norms[1] and len(norms[0]) == 4


def test_loss_and_norm_of_every_source_are_printed_before_the_first_step(workshop: Workshop) -> None:
    workshop.stores()
    done = workshop.cpt("train", workshop.run_file("tried", FIELDS))
    number = r"\d+(\.\d+)?"
    assert re.search(
        rf"before the first step: prose {number} nats norm {number}; code {number} nats norm {number}", done.out
    )
    resumed = workshop.cpt("resume", workshop.run_dir("tried"))
    assert "before the first step" not in resumed.out


@pytest.mark.parametrize("stage", [0, 2])
def test_a_source_with_a_loss_that_is_not_finite_is_named_before_the_first_step(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    import torch

    import cpt.run

    workshop.stores()
    build = cpt.run._forward

    def nan_on_code(run: Any) -> Any:
        forward = build(run)

        def faulty(model: torch.nn.Module, batch: Any) -> Any:
            losses = forward(model, batch)
            factor = torch.nan if bool((batch.source_ids_B == 1).all()) else 1.0
            return type(losses)(losses.total * factor, losses.per_token_BT * factor)

        return faulty

    monkeypatch.setattr("cpt.run._forward", nan_on_code)
    done = workshop.cpt("train", workshop.run_file("bad", FIELDS | {"deepspeed.zero_stage": stage}))
    assert done.code == 3
    assert "before the first step: source code: loss nan nats per token, gradient not finite" in done.err
    assert workshop.records("bad") == []


def test_memory_that_does_not_suffice_shows_before_the_first_step_with_what_would_fit(workshop: Workshop) -> None:
    workshop.stores()
    fields = {"train.global_batch_tokens": 65536, "train.tokens": 65536, "train.micro_batch_size": 2048}
    fields |= {"data.max_epochs": 100.0}
    run_file = workshop.run_file("large", fields)
    process = workshop.start_command([sys.executable, "-c", WITH_A_LIMIT, "train", str(run_file)])
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 3, out
    for words in ("out of memory on rank 0", "by formula the run needs", "settings that need less"):
        assert words in out
    assert "train.micro_batch_size=1024" in out and "train.activation_checkpointing=full" in out
    assert "Traceback" not in out and workshop.records("large") == []
