"""A host described in facts, as ``python -m launch.preflight.facts`` would tell them, for rules and for preflight."""

from collections.abc import Callable
from typing import Any

import pytest

GIBI = 1 << 30


@pytest.fixture
def describe() -> Callable[..., dict[str, Any]]:
    """Facts of a healthy host of a run; ``changes`` replace them. ``gpus``: how many it has."""

    def make(gpus: int = 0, **changes: Any) -> dict[str, Any]:
        cuda = "12.8" if gpus else None
        facts: dict[str, Any] = {
            "host": "n",
            "python": "3.11.7",
            "versions": {"cpt": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
            | {"numpy": "2.4.6", "cuda": cuda, "nccl": None},
            "code": "c0de" * 16,
            "config": {"hash": "c0f1" * 16},
            "stores": {"prose": {"train": "aa" * 32, "heldout": "bb" * 32}},
            "model": None,
            "run_dir": {"path": "/data/runs/r", "error": None},
            "free_bytes": {"/data/runs/r": 10**12, "/data/prose": 10**12},
            "shared": True,
            "gpus": [gpu(index) for index in range(gpus)],
            "gpu_error": None,
            "memory": {"total": 64 * GIBI, "available": 60 * GIBI, "limit": None},
            "shm_bytes": 32 * GIBI,
            "cpus": 16,
            "limits": {"open_files": 65536, "locked_bytes": None},
            "programs": {"ssh": "/usr/bin/ssh", "pdsh": None, "nvidia-smi": None},
            "addresses": {"lo": "127.0.0.1", "eth0": "10.0.0.1"},
            "own_address": "10.0.0.1",
            "port": None,
            "skew_seconds": 0.01,
        }
        return {**facts, **changes}

    return make


def gpu(index: int) -> dict[str, Any]:
    memory = {"memory.total": 143771, "memory.used": 4, "temperature.gpu": 30}
    whole = {"index": index, "name": "NVIDIA H200", "uuid": f"GPU-{index}", "driver_version": "570.1"}
    return {**whole, **memory, "ecc.errors.uncorrected.volatile.total": 0, "processes": []}
