"""The hosts that the other tests run on are what they claim to be, and nothing of them is left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_of_namespaces import is_gone, namespaces

SiteOf = Callable[[int], Any]


def test_hosts_have_their_own_name_network_and_processes_and_are_reached_by_ssh_and_pdsh(site_of: SiteOf) -> None:
    cluster = site_of(4).cluster
    asked = "hostname; hostname -I; ls -d /proc/[0-9]* | wc -l"
    command = ["pdsh", "-R", "ssh", "-S", "-w", "n1,n2,n3,n4", asked]
    code, out = cluster.login.run(command, env={"PDSH_SSH_ARGS_APPEND": f"-F {cluster.ssh_config}"})
    assert code == 0, out
    for number in (1, 2, 3, 4):
        said = [line.split()[1] for line in out.splitlines() if line.startswith(f"n{number}:")]
        assert said[:2] == [f"n{number}", f"10.99.0.{number}"] and int(said[2]) < 12, out
    code, out = cluster.login.run(["ssh", "-F", cluster.ssh_config, "n3", "env"], env={"CPT_SECRET": "not sent"})
    assert code == 0 and "CPT_SECRET" not in out


def test_a_cut_host_is_not_reached_and_a_mended_one_is(site_of: SiteOf) -> None:
    cluster = site_of(2).cluster
    reach = ["ssh", "-F", cluster.ssh_config, "-o", "ConnectTimeout=1", "n2", "hostname"]
    assert cluster.login.run(reach)[0] == 0
    cluster.hosts[1].cut()
    assert cluster.login.run(reach)[0] == 255
    cluster.hosts[1].mend()
    assert cluster.login.run(reach) == (0, "n2\n")


def test_a_slow_host_answers_later(site_of: SiteOf) -> None:
    cluster = site_of(2).cluster
    connect = (
        "import socket, time\n"
        "began = time.monotonic()\n"
        "for _ in range(10): socket.create_connection(('n2', 22)).close()\n"
        "print(time.monotonic() - began)"
    )
    fast = float(cluster.login.do("python3", "-c", connect))
    cluster.hosts[1].slow_down(milliseconds=20, loss_percent=0)
    assert fast < 0.2 <= float(cluster.login.do("python3", "-c", connect))


def test_other_content_of_a_file_is_seen_on_one_host_alone(site_of: SiteOf, tmp_path: Path) -> None:
    first, second = site_of(2).cluster.hosts
    file = tmp_path / "file"
    file.write_text("same")
    second.replace_file(file, "other")
    assert (first.do("cat", file), second.do("cat", file), file.read_text()) == ("same", "other", "same")


def test_nothing_is_left_of_a_cluster_also_where_the_work_on_it_failed(site_of: SiteOf, tmp_path: Path) -> None:
    site_of(1)  # skips where there can be none
    with pytest.raises(ZeroDivisionError), namespaces(tmp_path / "failing", num_hosts=2) as cluster:
        inits = [host.init for host in cluster.everyone] + [cluster.bridge]
        cluster.hosts[0].start(["sleep", "60"])
        1 / 0  # noqa: B018
    assert all(map(is_gone, inits))
    assert "to-n1" not in Path("/proc/net/dev").read_text()
