"""What cannot work is refused before anything is started, and the host at fault is named."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SiteOf = Callable[[int], Any]
ROOT = Path(__file__).resolve().parents[2]
LISTEN = (
    "import socket, time; held = socket.create_server(('0.0.0.0', 29500)); print('held', flush=True); time.sleep(99)"
)


def refused(site: Any, cluster_file: Path, *said: str) -> int:
    """The exit code of a launch that must leave no trace."""
    code, out = site.cpt("launch", site.run_file("refused"), "--cluster", cluster_file)
    for words in said:
        assert words in out, out
    assert "Traceback" not in out
    assert not list(site.shop.run_dir("refused").glob("checkpoints/*")), "it trained"
    assert not (site.shop.run_dir("refused") / "metrics.jsonl").exists()
    assert not site.cluster.wait_until_idle(5)
    return int(code)


def test_other_code_on_one_host_is_refused(site_of: SiteOf) -> None:
    site = site_of(2)
    changed = ROOT / "cpt/train/losses.py"
    site.cluster.hosts[1].replace_file(changed, changed.read_text() + "\n# changed on this host alone\n")
    assert refused(site, site.cluster_file(1, 1), "code", "n2") == 2


def test_a_host_that_resolves_but_has_no_sshd_is_named(site_of: SiteOf) -> None:
    site = site_of(1)
    hostfile = site.cluster.folder / "with_login"
    hostfile.write_text("n1 slots=1\nlogin slots=1\n")
    assert refused(site, site.cluster_file(1, hostfile=str(hostfile)), "login") == 3


def test_a_host_whose_cable_is_out_is_named_in_a_bounded_time(site_of: SiteOf) -> None:
    site = site_of(2)
    site.cluster.hosts[1].cut()
    began = time.monotonic()
    assert refused(site, site.cluster_file(1, 1), "n2") == 3
    assert time.monotonic() - began < 30


def test_a_port_in_use_on_the_first_host_is_told(site_of: SiteOf) -> None:
    site = site_of(2)
    first = site.cluster.hosts[0]
    holder = first.start([sys.executable, "-c", LISTEN])
    assert holder.stdout.readline() == "held\n"
    code, out = site.cpt("launch", site.run_file("refused"), "--cluster", site.cluster_file(1, 1))
    assert code == 2 and "29500 on n1" in out, out
    assert not (site.shop.run_dir("refused") / "metrics.jsonl").exists()
    assert not [each for lines in site.cluster.left_over("cpt").values() for each in lines]


def test_a_hostfile_that_is_not_there_is_an_error_and_not_a_run_on_one_host(site_of: SiteOf) -> None:
    site = site_of(1)
    assert refused(site, site.cluster_file(1, hostfile="nowhere/hostfile"), "nowhere/hostfile") == 2
