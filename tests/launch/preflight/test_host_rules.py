"""What must hold of hosts: each rule passes on healthy ones, and names the host, the value and the fix where one is not."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.preflight.checks import Check
from launch.preflight.rules import RULES, Asked, judge

Describe = Callable[..., dict[str, Any]]
NAMES = ("n1", "n2", "n3")


def check_of(name: str, facts: dict[str, dict[str, Any]], *, slots: int = 1, **fields: Any) -> Check:
    """The check of that name, for hosts with so many slots and a cluster file with these fields."""
    return next(check for check in judge(asked(facts, slots=slots, **fields), facts) if check.name == name)


def asked(facts: dict[str, dict[str, Any]], *, slots: int = 1, **fields: Any) -> Asked:
    hosts = tuple(Host(host, tuple(range(slots))) for host in facts)
    programs = fields.pop("programs", frozenset({"ssh", "pdsh"}))
    return Asked(HostsCluster(**fields), hosts, "c0de" * 16, "c0f1" * 16, programs, fields.get("interface"))


def three(describe: Describe, *, gpus: int = 0, **changes: Any) -> dict[str, dict[str, Any]]:
    """Three hosts, the second of which differs by ``changes``; the first is asked about the port."""
    hosts = {name: describe(gpus=gpus, **(changes if name == "n2" else {})) for name in NAMES}
    hosts["n1"]["port"] = {"number": 29500}
    return hosts


@pytest.mark.parametrize("gpus", [0, 8])
def test_healthy_hosts_pass_every_rule(gpus: int, describe: Describe) -> None:
    facts = three(describe, gpus=gpus)
    checks = judge(asked(facts, slots=max(gpus, 1)), facts)
    assert len(checks) == len(RULES) and [check.name for check in checks if check.status != "pass"] == []
    assert not [check.name for check in checks if check.fix or check.hosts]


def test_where_no_host_answered_there_is_nothing_to_judge() -> None:
    assert judge(asked({}), {}) == []


FEW = {"total": 1 << 30, "available": 1 << 30, "limit": None}
CAPPED = {"total": 1 << 40, "available": 1 << 39, "limit": 1 << 30}
LOW_LIMITS = {"open_files": 1024, "locked_bytes": None}


@pytest.mark.parametrize(
    ("name", "changes", "status", "fault", "told"),
    [
        ("code", {"code": "beef" * 16}, "fail", "user", "beefbeef"),
        ("config", {"config": {"hash": "d1ff" * 16}}, "fail", "user", "d1ffd1ff"),
        ("config", {"config": {"error": "r.yaml: no such file"}}, "fail", "user", "no such file"),
        ("versions", {"python": "3.12.1"}, "fail", "user", "python 3.12.1"),
        ("versions", {"python": "3.11.9"}, "warn", "user", "python 3.11.9"),
        ("run folder", {"run_dir": {"path": "/data/runs/r", "error": "read-only"}}, "fail", "user", "read-only"),
        ("run folder", {"shared": False}, "fail", "user", "another folder"),
        ("disk", {"free_bytes": {"/data/runs/r": 5e8, "/data/prose": 1e12}}, "fail", "environment", "0.5 GB"),
        ("disk", {"free_bytes": {"/data/runs/r": 1e10, "/data/prose": 1e12}}, "warn", "environment", "10 GB"),
        ("disk", {"free_bytes": {"/data/runs/r": 1e12, "/data/prose": 1e8}}, "warn", "environment", "at a store"),
        ("stores", {"stores": {"prose": {"error": "no manifest.json"}}}, "fail", "user", "prose: no manifest"),
        ("stores", {"stores": {"prose": {"train": "ee" * 32, "heldout": "bb" * 32}}}, "fail", "user", "eeee"),
        ("clock", {"skew_seconds": -30.0}, "warn", "environment", "-30.0 s"),
        ("clock", {"skew_seconds": 3600.0}, "fail", "environment", "+3600.0 s"),
        ("interface", {"own_address": "127.0.1.1"}, "warn", "user", "127.0.1.1"),
        ("memory", {"memory": FEW}, "warn", "environment", "1.0 GiB"),
        ("memory", {"memory": CAPPED}, "warn", "environment", "1.0 GiB"),
        ("limits", {"limits": LOW_LIMITS}, "warn", "environment", "1024 open files"),
        ("GPUs", {"gpu_error": "Driver/library version mismatch"}, "fail", "environment", "mismatch"),
    ],
)
def test_the_host_that_differs_is_named_with_its_value_and_a_fix(
    name: str, changes: dict[str, Any], status: str, fault: str, told: str, describe: Describe
) -> None:
    found = check_of(name, three(describe, **changes))
    assert (found.status, found.fault, list(found.hosts)) == (status, fault, ["n2"])
    assert told in found.hosts["n2"] and found.fix


@pytest.mark.parametrize(
    ("package", "version", "status"),
    [("torch", "2.8.0", "fail"), ("deepspeed", "0.18.0", "fail"), ("nccl", "2.20", "fail"), ("numpy", "2.0.0", "warn")],
)
def test_packages_that_ranks_talk_through_must_be_the_same(
    package: str, version: str, status: str, describe: Describe
) -> None:
    facts = three(describe)
    facts["n2"]["versions"][package] = version
    found = check_of("versions", facts)
    assert (found.status, found.hosts) == (status, {"n2": f"{package} {version}"})


def test_a_package_that_no_host_has_is_missing_rather_than_equal(describe: Describe) -> None:
    facts = three(describe)
    for its in facts.values():
        its["versions"]["deepspeed"] = None
    assert "deepspeed" in check_of("versions", facts).found and check_of("versions", facts).status != "pass"


def test_weights_that_are_not_the_same_files_are_found(describe: Describe) -> None:
    facts = three(describe, model={"hash": "1" * 64})
    facts["n1"]["model"] = facts["n3"]["model"] = {"hash": "2" * 64}
    found = check_of("weights", facts)
    assert (found.status, list(found.hosts)) == ("fail", ["n2"])


def test_a_host_with_fewer_gpus_than_slots_is_named(describe: Describe) -> None:
    facts = three(describe, gpus=8)
    facts["n2"]["gpus"].pop()
    found = check_of("GPUs", facts, slots=8)
    assert (found.status, found.hosts) == ("fail", {"n2": "7 x NVIDIA H200 140 GiB, slots need 8"})
    assert check_of("GPUs", facts, slots=4).status == "warn", "one host is of another kind, yet there are enough"


def test_torch_without_cuda_or_a_gpu_of_another_kind_is_told(describe: Describe) -> None:
    facts = three(describe, gpus=2)
    facts["n3"]["gpus"][1]["name"] = "NVIDIA A100"
    assert "1 x NVIDIA A100" in check_of("GPUs", facts, slots=2).hosts["n3"]
    facts["n2"]["versions"]["cuda"] = None
    found = check_of("GPUs", facts, slots=2)
    assert (found.status, list(found.hosts)) == ("fail", ["n2"])


def test_torch_for_gpus_without_any_is_doubtful(describe: Describe) -> None:
    facts = three(describe)
    facts["n1"]["versions"]["cuda"] = "12.8"
    assert check_of("GPUs", facts).status == "warn"


def test_memory_errors_fail_and_heat_and_processes_in_the_way_are_doubtful(describe: Describe) -> None:
    facts = three(describe, gpus=2)
    facts["n2"]["gpus"][1] |= {"temperature.gpu": 95, "processes": [4711]}
    found = check_of("GPU health", facts, slots=2)
    assert (found.status, found.hosts) == ("warn", {"n2": "GPU 1 95 C, GPU 1 process 4711"})
    facts["n3"]["gpus"][0]["ecc.errors.uncorrected.volatile.total"] = 2
    found = check_of("GPU health", facts, slots=2)
    assert (found.status, found.fault, list(found.hosts)) == ("fail", "environment", ["n3"])


def test_another_driver_is_doubtful_and_small_shared_memory_only_where_ranks_share_it(describe: Describe) -> None:
    facts = three(describe, gpus=2, shm_bytes=64 << 20)
    facts["n2"]["gpus"][0]["driver_version"] = "535.2"
    assert check_of("driver", facts, slots=2).hosts == {"n2": "535.2"}
    assert check_of("memory", facts, slots=2).hosts == {"n2": "/dev/shm of 64 MiB"}
    assert check_of("memory", facts, slots=1).status == "pass"


def test_memory_that_cannot_be_locked_matters_where_there_are_gpus(describe: Describe) -> None:
    limits = {"open_files": None, "locked_bytes": 64 << 10}
    assert check_of("limits", three(describe, limits=limits)).status == "pass"
    assert check_of("limits", three(describe, gpus=1, limits=limits)).hosts == {"n2": "0 MiB of locked memory"}


def test_a_port_in_use_is_the_users_to_change(describe: Describe) -> None:
    facts = three(describe)
    facts["n1"]["port"] = {"number": 29500, "error": "Address already in use by process 7"}
    found = check_of("port", facts)
    assert (found.status, found.fault) == ("fail", "user") and "process 7" in found.found
    facts["n1"]["port"] = None
    assert check_of("port", facts).status == "warn"


def test_an_interface_must_be_there_on_every_host(describe: Describe) -> None:
    facts = three(describe)
    assert check_of("interface", facts, interface="eth0").found == "eth0; first host 10.0.0.1"
    facts["n3"]["addresses"] = {"lo": "127.0.0.1", "ens3": "10.0.0.3"}
    found = check_of("interface", facts, interface="eth0")
    assert (found.status, found.fault, found.hosts) == ("fail", "user", {"n3": "has lo, ens3"})


def test_an_interface_that_the_names_lead_to_is_shown(describe: Describe) -> None:
    facts = three(describe, own_address="127.0.1.1")
    found = next(check for check in judge(replace(asked(facts), interface="eth0"), facts) if check.name == "interface")
    assert found.status == "pass" and found.found.startswith("eth0, to which the hosts' names lead")


def test_one_host_may_be_loopback_to_itself(describe: Describe) -> None:
    facts = {"n1": describe(own_address="127.0.0.1", port={"number": 29500})}
    assert check_of("interface", facts).status == "pass"


def test_a_launcher_that_is_not_installed_is_found_here_not_on_the_hosts(describe: Describe) -> None:
    facts = three(describe)
    found = check_of("launcher", facts, programs=frozenset({"ssh"}))
    assert found.status == "fail" and "pdsh" in found.fix and "launcher: ssh" in found.fix
    assert check_of("launcher", facts, programs=frozenset({"ssh"}), launcher="ssh").status == "pass"
    assert check_of("launcher", facts, programs=frozenset(), launcher="no_ssh").status == "pass"
