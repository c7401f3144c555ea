"""How a run takes its folder: refused alike on all ranks, and claimed only when the start is sure."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt import run
from cpt.config import ConfigError, load_config
from cpt.prepare import Prepared, prepare
from cpt.train.engine import Topology

Workshop = Any  # the fixtures of tests/conftest.py


@pytest.fixture
def prepared(workshop: Workshop) -> Prepared:
    workshop.stores()
    return prepare(load_config(workshop.run_file("run")))


def rank(number: int) -> Topology:
    return Topology(number, 2, torch.device("cpu"))


def test_a_refusal_at_rank_0_is_raised_by_all_ranks_with_its_reason(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[Any]] = []

    def broadcast(objects: list[Any]) -> None:
        if sent:
            objects[:] = sent[0]
        sent.append(list(objects))

    monkeypatch.setattr(run.dist, "broadcast_object_list", broadcast)
    folder = prepared.config.run_dir
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"run": {"name": "other"}}))
    for number in (0, 1):
        with pytest.raises(ConfigError, match="holds another config"):
            run._claim(prepared, rank(number), resume=False)


def test_a_claim_writes_nothing_but_signs_of_life(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.dist, "broadcast_object_list", lambda objects: None)
    with run._claim(prepared, rank(0), resume=False):
        assert {path.name for path in Path(prepared.config.run_dir).iterdir()} == {".lock", "heartbeats"}
    with run._claim(prepared, rank(1), resume=False):
        pass


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["/opt/bin/cpt", "train", "my run.yaml", "--nproc", "2"], "cpt train 'my run.yaml' --nproc 2"),
        (["/opt/cpt/train/main.py", "--local_rank=1", "run.yaml"], "python -m cpt.train.main run.yaml"),
    ],
)
def test_the_environment_file_names_the_command_as_it_can_be_typed_again(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], told: str
) -> None:
    from cpt.announce import environment

    monkeypatch.setattr("sys.argv", argv)
    assert environment(rank(0))["command"] == told
