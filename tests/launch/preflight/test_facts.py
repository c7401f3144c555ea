"""What a host tells of itself: hashes that move with what they are of, faults in their place, and never a stack trace."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cpt.problems import ConfigError
from launch.preflight import facts
from launch.preflight.facts import (
    code_hash,
    container_limit,
    gpu_facts,
    job_facts,
    model_facts,
    port_facts,
    read_config,
    read_gpus,
    read_processes,
    sees,
    write_error,
)


def test_one_json_object_comes_out_with_the_clock(workshop: Any) -> None:
    workshop.stores()
    command = [
        sys.executable,
        "-m",
        "launch.preflight.facts",
        "--",
        str(workshop.run_file("r")),
        "train.peak_lr=1e-3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    assert told["host"] == socket.gethostname() and told["versions"]["torch"]
    assert told["addresses"]["lo"] == "127.0.0.1" and told["port"] is None and told["shared"] is None
    assert told["code"] == code_hash() and len(told["stores"]["prose"]["train"]) == 64
    assert told["clock"] > 1.7e9


def test_no_variable_of_the_environment_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    assert "very-secret" not in json.dumps(facts.collect([]))


def test_the_code_hash_follows_every_file_and_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tried_package"
    package.mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(facts, "CODE", ("tried_package",))
    (package / "a.py").write_text("x = 1\n")
    first = code_hash()
    (package / "a.pyc").write_text("compiled")
    assert code_hash() == first
    (package / "a.py").write_text("x = 2\n")
    changed = code_hash()
    (package / "a.py").rename(package / "b.py")
    assert len({first, changed, code_hash()}) == 3


def test_the_config_hash_is_of_what_every_rank_will_read(workshop: Any, tmp_path: Path) -> None:
    workshop.stores()
    run_file = str(workshop.run_file("r"))
    plain = job_facts([run_file])["config"]["hash"]
    stated = job_facts([run_file, "train.peak_lr=0.01", "--profile", "3"])["config"]["hash"]  # its value already
    changed = job_facts([run_file, "train.peak_lr=0.02"])["config"]["hash"]
    assert plain == stated != changed
    assert job_facts([]) == {}


def test_a_resumed_run_is_read_from_its_folder(workshop: Any) -> None:
    from cpt.config import load_config, to_yaml

    workshop.stores()
    config = load_config(workshop.run_file("r"))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    assert read_config(["--resume", str(config.run_dir)]) == config
    assert read_config(["--resume", str(config.run_dir), "log.every_steps=7"]).log.every_steps == 7


def test_a_config_that_is_wrong_there_is_an_answer_not_a_crash(tmp_path: Path) -> None:
    assert "no such file" in job_facts([str(tmp_path / "absent.yaml")])["config"]["error"]
    with pytest.raises(ConfigError):
        read_config([str(tmp_path / "absent.yaml")])


def test_a_store_that_is_not_there_or_cut_short_says_so_in_its_place(workshop: Any) -> None:
    stores = workshop.stores()
    shard = next((stores["code"] / "train").glob("tokens_*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    told = job_facts(
        [
            str(
                workshop.run_file(
                    "r", {"data.stores": {**{k: str(v) for k, v in stores.items()}, "law": str(workshop.root / "law")}}
                )
            )
        ]
    )
    assert set(told["stores"]["prose"]) == {"train", "heldout"}
    assert shard.name in told["stores"]["code"]["error"] and "law" in told["stores"]["law"]["error"]


def test_weights_are_compared_by_names_sizes_and_what_their_json_says(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    (tmp_path / "model.safetensors").write_bytes(b"12")
    first = model_facts(str(tmp_path))
    (tmp_path / "config.json").write_text('{"a": 2}')
    assert model_facts(str(tmp_path)) != first
    assert model_facts("organisation/name") is None and model_facts(None) is None
    assert "not there" in model_facts(str(tmp_path / "absent"))["error"]  # type: ignore[index]


def test_a_shared_folder_is_known_by_what_the_launching_host_left_in_it(tmp_path: Path) -> None:
    path = tmp_path / ".preflight-1"
    assert not sees(path)
    path.write_text("something else")
    assert not sees(path)
    path.write_text(path.name)
    assert sees(path)


def test_where_a_run_folder_cannot_be_made_the_reason_is_told(tmp_path: Path) -> None:
    assert write_error(tmp_path / "runs" / "r") is None
    assert "Error" in str(write_error(Path("/proc/nothing/can/be/made/here")))


def test_a_port_that_somebody_listens_at_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = listener.getsockname()[1]
        found = port_facts(number)
    assert found["number"] == number and "in use" in found["error"] and str(os.getpid()) in found["error"]
    assert port_facts(number) == {"number": number}


SMI = """0, NVIDIA H200, GPU-aa, 143771, 4, 33, 0, 570.86.15
1, NVIDIA H200, GPU-bb, 143771, 90000, 91, [N/A], 570.86.15
"""


def test_gpus_are_read_from_nvidia_smi_and_a_figure_that_one_lacks_is_none() -> None:
    first, second = read_gpus(SMI)
    assert (first["name"], first["memory.total"], first["ecc.errors.uncorrected.volatile.total"]) == (
        "NVIDIA H200",
        143771,
        0,
    )
    assert (second["temperature.gpu"], second["ecc.errors.uncorrected.volatile.total"]) == (91, None)
    assert read_processes("GPU-bb, 4711, 900\nGPU-bb, 4712, [N/A]\n") == {"GPU-bb": [4711, 4712]}


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18", "version mismatch"),
        ("echo garbage", "zip"),
    ],
)
def test_a_driver_that_fails_is_told_in_its_own_words(
    script: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert gpu_facts()["gpus"] == [] and told in gpu_facts()["gpu_error"]


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "max\n", None),
        ("memory.max", "1073741824\n", 1 << 30),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("memory/memory.limit_in_bytes", "4096\n", 4096),
    ],
)
def test_the_memory_of_a_container_is_read_from_either_kind_of_control_group(
    name: str, text: str, limit: int | None, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert container_limit(tmp_path) == limit


def test_without_a_control_group_there_is_no_limit(tmp_path: Path) -> None:
    assert container_limit(tmp_path) is None


def test_a_run_that_was_moved_is_looked_at_where_it_lies_now(workshop: Any) -> None:
    from cpt.config import load_config, to_yaml

    workshop.stores()
    config = load_config(workshop.run_file("r"))
    moved = workshop.root / "elsewhere" / "s"
    moved.mkdir(parents=True)
    (moved / "config.yaml").write_text(to_yaml(config))
    assert job_facts(["--resume", str(moved)])["run_dir"]["path"] == str(moved)


def test_a_folder_that_cannot_be_asked_for_its_room_leaves_the_other_facts(workshop: Any) -> None:
    workshop.stores()
    told = job_facts([str(workshop.run_file("r")), f"run.dir=/{'a' * 300}/runs"])
    assert "too long" in told["run_dir"]["error"] and told["run_dir"]["path"] not in told["free_bytes"]
    assert told["free_bytes"] and "hash" in told["config"]
    assert "error" in (model_facts(f"{'a' * 300}/b") or {})
