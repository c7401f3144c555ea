"""Preflight as a whole: hosts that are processes of this machine, or described by a file that stands for their answer."""

import json
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.cluster import HostsCluster
from launch.hostfile import Host
from launch.hosts.remote import Answer, Transport
from launch.preflight import run as preflight
from launch.preflight.checks import Check, Report
from launch.preflight.facts import code_hash, job_facts
from launch.preflight.run import interface_of, master_address, network_check, read_facts, run_preflight
from launch.record import LaunchJob

Describe = Callable[..., dict[str, Any]]
DONE = {"stage": "done", "backend": "gloo", "all_reduce_bytes_per_second": 5e8}


@pytest.fixture
def job(workshop: Any) -> LaunchJob:
    workshop.stores()
    run_dir = workshop.run_dir("r")
    return LaunchJob("r", run_dir, (str(workshop.run_file("r")),), ("--resume", str(run_dir)), workshop.root)


def hosts(*names: str) -> list[Host]:
    return [Host(name, (0,)) for name in names]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_of(report: Report, name: str) -> Check:
    return next(check for check in report.checks if check.name == name)


def as_processes(host: str, command: Sequence[str]) -> list[str]:
    return list(command)


def test_three_hosts_that_are_processes_of_this_machine_pass_and_nothing_is_left_behind(job: LaunchJob) -> None:
    pytest.importorskip("torch")
    cluster = HostsCluster(launcher="ssh", interface="lo", master_port=free_port())
    report = run_preflight(cluster, job, hosts("a", "b", "c"), transport=as_processes)
    assert report.ok, report.failed
    assert report.details["master_address"] == "127.0.0.1"
    links = report.details["network"]["links"]
    assert {host: sorted(measured) for host, measured in links.items()} == {
        "a": ["1", "2"],
        "b": ["0", "2"],
        "c": ["0", "1"],
    }
    assert set(check_of(report, "network").hosts) == {"a", "b", "c"}
    assert not list(job.run_dir.parent.iterdir())
    json.dumps(report.to_json(), allow_nan=False)


def described(folder: Path, facts: dict[str, dict[str, Any]], links: dict[str, Any] | None = None) -> Transport:
    """Hosts whose answers lie in files: facts, and what they measured."""
    folder.mkdir(exist_ok=True)
    for host, its in facts.items():
        (folder / host).write_text(json.dumps({**its, "clock": time.time()}))
        (folder / f"{host}.network").write_text(json.dumps((links or {}).get(host, {})))

    def run(host: str, command: Sequence[str]) -> list[str]:
        if host not in facts:
            return ["sh", "-c", f"echo 'ssh: connect to host {host} port 22: No route to host' >&2; exit 255"]
        return ["cat", str(folder / (f"{host}.network" if "launch.preflight.bandwidth" in command else host))]

    return run


def like_this(job: LaunchJob, describe: Describe, **changes: Any) -> dict[str, Any]:
    """Facts of a host that has the code and config of this machine."""
    own = {"code": code_hash(), "config": job_facts(job.arguments)["config"], "port": {"number": 29500}}
    return describe(**{**own, **changes})


def test_a_host_that_is_not_reached_is_named_with_the_reason_and_nothing_else_is_tried(
    job: LaunchJob, describe: Describe, tmp_path: Path
) -> None:
    facts = {"n1": like_this(job, describe)}
    report = run_preflight(
        HostsCluster(launcher="ssh"), job, hosts("n1", "n2"), transport=described(tmp_path / "d", facts)
    )
    answered = check_of(report, "hosts answer")
    assert report.exit_code == 3 and answered.hosts == {"n2": "ssh: connect to host n2 port 22: No route to host"}
    assert "BatchMode" in answered.fix and "-- n2 true" in answered.fix
    assert "network" not in [check.name for check in report.checks]


def test_other_code_on_one_host_is_refused_before_anything_is_started(
    job: LaunchJob, describe: Describe, tmp_path: Path
) -> None:
    facts = {"n1": like_this(job, describe), "n2": like_this(job, describe, code="beef" * 16)}
    report = run_preflight(
        HostsCluster(launcher="ssh"), job, hosts("n1", "n2"), transport=described(tmp_path / "d", facts)
    )
    assert report.exit_code == 2 and [check.name for check in report.failed] == ["code"]
    assert list(check_of(report, "code").hosts) == ["n2"]


def test_facts_of_another_version_are_compared_by_their_code_alone_and_no_facts_are_none(
    job: LaunchJob, describe: Describe, tmp_path: Path
) -> None:
    facts = {"n1": like_this(job, describe), "n2": {"code": "beef" * 16, "memory": 5}, "n3": {"greeting": "hello"}}
    report = run_preflight(
        HostsCluster(launcher="ssh"), job, hosts("n1", "n2", "n3"), transport=described(tmp_path / "d", facts)
    )
    assert [(check.name, list(check.hosts)) for check in report.failed] == [("hosts answer", ["n3"]), ("code", ["n2"])]


def test_a_host_without_this_python_is_the_users_to_set_up(job: LaunchJob) -> None:
    def run(host: str, command: Sequence[str]) -> list[str]:
        return [*command[: command.index("-m") - 1], "/no/python", *command[command.index("-m") :]]

    report = run_preflight(HostsCluster(launcher="ssh"), job, hosts("n1"), transport=run)
    assert report.exit_code == 2 and "/no/python" in check_of(report, "hosts answer").hosts["n1"]


def test_the_slow_host_is_named_and_rates_are_told_by_host(job: LaunchJob, describe: Describe, tmp_path: Path) -> None:
    facts = {name: like_this(job, describe) for name in ("n0", "n1", "n2", "n3")}
    fast, slow = ({"bytes_per_second": rate, "round_trip_seconds": 2e-4} for rate in (1e9, 2e7))
    links = {
        f"n{rank}": {
            **DONE,
            "links": {str(to): slow if 2 in (rank, to) else fast for to in ((rank + 1) % 4, (rank - 1) % 4)},
        }
        for rank in range(4)
    }
    report = run_preflight(
        HostsCluster(launcher="ssh"), job, hosts(*facts), transport=described(tmp_path / "d", facts, links)
    )
    network = check_of(report, "network")
    assert report.exit_code == 0 and network.status == "warn" and network.found.endswith("slow: n2")
    assert "20 MB/s on its best link" in network.hosts["n2"] and network.hosts["n0"] == "1,000 MB/s"
    assert report.details["network"]["all_reduce_bytes_per_second"] == 5e8


def test_a_firewall_is_told_with_the_port() -> None:
    reached = Answer("n1", 3, json.dumps({"stage": "join", "error": "hosts 1 did not come"}), "", 1.0)
    blocked = Answer(
        "n2", 3, json.dumps({"stage": "join", "error": "cannot reach 10.0.0.1:29500: packets are dropped"}), "", 1.0
    )
    check, _ = network_check({"n1": reached, "n2": blocked}, "10.0.0.1", 29500)
    assert check.status == "fail" and "packets are dropped" in check.hosts["n2"] and "port 29500 on n1" in check.fix


def test_ports_that_are_closed_between_hosts_are_told_from_a_closed_port_of_rank_0() -> None:
    group = Answer("n1", 3, json.dumps({"stage": "group", "error": "timed out"}), "", 1.0)
    check, _ = network_check({"n1": group, "n2": Answer("n2", None, "", "", 70.0)}, "10.0.0.1", 29500)
    assert "not each other" in check.found and "no answer" in check.hosts["n2"]


def test_one_host_has_nothing_to_cross(job: LaunchJob, describe: Describe, tmp_path: Path) -> None:
    facts = {"localhost": like_this(job, describe)}
    report = run_preflight(
        HostsCluster(launcher="ssh"), job, hosts("localhost"), transport=described(tmp_path / "d", facts)
    )
    assert report.ok and check_of(report, "network").found.startswith("one host")
    assert report.details["master_address"] == "127.0.0.1"


def test_a_run_file_that_is_wrong_here_is_a_failed_check(job: LaunchJob, describe: Describe, tmp_path: Path) -> None:
    facts = {"n1": like_this(job, describe)}
    wrong = LaunchJob("r", job.run_dir, (str(tmp_path / "absent.yaml"),), (), tmp_path)
    report = run_preflight(HostsCluster(launcher="ssh"), wrong, hosts("n1"), transport=described(tmp_path / "d", facts))
    assert report.exit_code == 2 and "config" in [check.name for check in report.failed]


def test_the_master_address_is_stated_or_of_the_interface_or_the_name() -> None:
    facts = {"n1": {"addresses": {"eth0": "10.0.0.7"}}}
    assert master_address(HostsCluster(master_address="1.2.3.4"), "n1", "eth0", facts) == "1.2.3.4"
    assert master_address(HostsCluster(), "n1", "eth0", facts) == "10.0.0.7"
    assert master_address(HostsCluster(), "n1", None, facts) == "n1" == master_address(HostsCluster(), "n1", None, {})
    assert master_address(HostsCluster(), "localhost", None, {}) == "127.0.0.1"


def test_without_a_stated_interface_the_one_is_taken_that_all_names_lead_to(describe: Describe) -> None:
    facts = {"localhost": describe(), "127.0.0.1": describe()}
    assert interface_of(HostsCluster(), hosts(*facts), facts) == "lo"
    assert interface_of(HostsCluster(interface="eth0"), hosts(*facts), facts) == "eth0"
    assert interface_of(HostsCluster(), hosts(*facts, "n3"), facts) is None, "one did not answer"
    facts["127.0.0.1"]["addresses"] = {"loop": "127.0.0.1"}
    assert interface_of(HostsCluster(), hosts(*facts), facts) is None


def test_greetings_of_a_shell_are_not_taken_for_facts_and_clocks_are_compared_on_arrival() -> None:
    output = 'Welcome to n1!\n{not json}\n{"clock": 1000.0, "code": "c0de"}\nbye\n'
    facts, failures = read_facts(
        {"n1": Answer("n1", 0, output, "", 1.0, 990.0), "n2": Answer("n2", 0, "hello", "", 1.0)}
    )
    assert facts["n1"]["skew_seconds"] == 10.0 and "something else than facts" in failures["n2"]


def test_variables_of_the_ranks_and_the_interface_reach_the_measurement() -> None:
    cluster = HostsCluster(launcher="ssh", master_port=29511)
    job = LaunchJob("r", Path("runs/r"), ("r.yaml",), (), Path("/data"))
    run = preflight._Run(cluster, job, (Host("n1", (0, 1)), Host("n2", (2, 3))), {"NCCL_IB_HCA": "mlx5"}, as_processes)
    words = run.network_command("10.0.0.1", "eth0", 1)
    assert {"GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0", "NCCL_IB_HCA=mlx5"} <= set(words)
    assert "CUDA_VISIBLE_DEVICES=2,3" in words, "the GPUs that the ranks will have"
    assert words[words.index("--rank") + 1] == "1" and words[words.index("--port") + 1] == "29511"
    assert "--port" in run.facts_command(Path("t"), 0) and "--port" not in run.facts_command(Path("t"), 1)
