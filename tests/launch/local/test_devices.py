"""Which devices work: lists and probes, with commands that stand in for a GPU."""

import sys

import pytest

from launch.local import devices
from launch.local.devices import Usable, probe, usable_devices, visible_gpus

LISTING = "GPU 0: NVIDIA H200 (UUID: GPU-aa)\nGPU 1: NVIDIA H200 (UUID: GPU-bb)\n"


def test_devices_are_those_that_the_environment_names_else_those_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(lambda: LISTING) == ["0", "1"]
    assert visible_gpus(lambda: "No devices were found\n") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus(lambda: LISTING) == ["3", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert visible_gpus(lambda: LISTING) == []


def test_a_device_counts_only_if_it_computes() -> None:
    program = "import os, sys; sys.exit(os.environ['CUDA_VISIBLE_DEVICES'] == '1')"
    assert probe(["0", "1", "2"], [sys.executable, "-c", program]) == [True, False, True]


def test_a_device_that_does_not_answer_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "PROBE_SECONDS", 0.3)
    assert probe(["0"], [sys.executable, "-c", "import time; time.sleep(20)"]) == [False]


def test_without_gpus_there_are_as_many_places_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert usable_devices(3) == Usable(3, None)
