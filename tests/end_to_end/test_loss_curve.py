"""The numerics gate: a tiny Llama's loss curve must be the stored one.

On the machine and torch the curve was stored with, to the last bit; elsewhere, where kernels round differently, to 1e-5
of the loss. A change that is meant to change numerics rewrites the curve in the same commit and says why:

    CPT_WRITE_LOSSES=1 python -m pytest tests/end_to_end/test_loss_curve.py

Last rewritten when norms and rotary positions on a CPU came to be computed in fewer passes (``cpt.model.lean``): the
same sums, rounded and added in another order, which the last digits show.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

Workshop = Any  # the fixtures of tests/conftest.py
STORED = Path(__file__).parent / "losses" / "tiny_llama_fp32.json"
FIELDS = {
    "replay.share_general": 0.25,
    "train.tokens": 30 * 256,
    "train.schedule": {"name": "rewarm_cosine", "warmup_steps": 5},
    "eval.at_steps": [15],
}


def signature() -> str:
    """What decides how sums round: the build of torch, the instructions it uses, the family of the processor."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = dict(line.replace("\t", "").split(":", 1) for line in lines if ":" in line)
    family = "/".join(cpu.get(key, "").strip() for key in ("vendor_id", "cpu family", "model"))
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {family}"


def measured(shop: Workshop) -> dict[str, Any]:
    shop.stores()
    done = shop.cpt("train", shop.run_file("curve", FIELDS))
    assert done.code == 0, done.text
    records = shop.records("curve")
    held_out = {
        str(step): {name: source["loss"] for name, source in shop.evaluation("curve", step)["sources"].items()}
        for step in (0, 15, 30)
    }
    columns = {key: [record[key] for record in records] for key in ("loss", "grad_norm", "lr")}
    return {"made_with": signature(), **columns, "held_out": held_out}


def test_the_tiny_loss_curve_is_the_stored_one(workshop: Workshop) -> None:
    found = measured(workshop)
    if os.environ.get("CPT_WRITE_LOSSES"):
        STORED.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(STORED.read_text())
    assert len(found["loss"]) == 30 and found["loss"][-1] < found["loss"][0] - 1.0  # it learns
    if found["made_with"] == stored["made_with"]:
        assert found == stored
    assert found["lr"] == pytest.approx(stored["lr"], rel=1e-12)
    assert found["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    assert found["grad_norm"] == pytest.approx(stored["grad_norm"], rel=1e-3)
    for step, losses in stored["held_out"].items():
        assert found["held_out"][step] == pytest.approx(losses, rel=1e-5)
