"""The copy of training state on a GPU: on a stream of its own, after what computed the state and before what changes it."""

from pathlib import Path

import pytest
import torch

from cpt.checkpoint.background import Saver
from cpt.checkpoint.portable import Checkpoint, CheckpointMeta, Fragment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NUMEL = 2**26  # 256 MiB each: long enough that a missing wait shows


def test_what_is_queued_before_a_save_is_in_it_and_what_is_queued_after_the_copy_is_not(tmp_path: Path) -> None:
    saver, busy = Saver(), torch.randn(8192, 8192, device="cuda")
    state = {kind: torch.zeros(NUMEL, device="cuda") for kind in ("param", "exp_avg")}
    state["on_host"] = torch.zeros(1000)  # as under offload
    shapes = {"w": [NUMEL]}
    fragments = [
        Fragment("w", 0, {kind: state[kind] for kind in ("param", "exp_avg")}),
        Fragment("host", 0, {"param": state["on_host"]}),
    ]
    for save in (1, 2):
        for _ in range(20):
            busy = (busy @ busy).clamp(-1, 1)
        for number, tensor in enumerate(state.values()):
            tensor.fill_(save + number)
        meta = CheckpointMeta(save, 0, {}, save, 0, "f", {**shapes, "host": [1000]}, {}, {}, {})
        saver.begin(tmp_path / f"step_{save:08d}", fragments, meta)
        saver.wait_copied()
        for tensor in state.values():
            tensor.fill_(-1.0)
        assert saver.wait() is None
        checkpoint = Checkpoint.open(tmp_path / f"step_{save:08d}")
        assert checkpoint.verify() == []
        for number, (name, kind) in enumerate((("w", "param"), ("w", "exp_avg"), ("host", "param"))):
            assert bool((checkpoint.read(name, kind) == save + number).all()), (save, name, kind)
