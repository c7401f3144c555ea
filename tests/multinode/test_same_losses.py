"""`cpt launch` over two and four hosts trains what one host trains, with every launcher."""

import sys
from collections.abc import Callable
from typing import Any

import pytest

SiteOf = Callable[[int], Any]


@pytest.mark.parametrize(
    ("launcher", "slots"),
    [
        ("pdsh", (1, 1)),
        ("ssh", (2, 2)),
        pytest.param("pdsh", (1, 1, 1, 1), marks=pytest.mark.long),
        pytest.param("ssh", (2, 2, 2, 2), marks=pytest.mark.long),
    ],
)
def test_the_losses_are_those_of_one_host(
    site_of: SiteOf, on_one_host: dict[int, float], launcher: str, slots: tuple[int, ...]
) -> None:
    site = site_of(len(slots))
    code, out = site.cpt("launch", site.run_file("wide"), "--cluster", site.cluster_file(*slots, launcher=launcher))
    assert code == 0, out
    expect_the_same(site, slots, on_one_host, out)


def test_without_ssh_the_same_command_on_each_of_four_hosts_makes_one_job(
    site_of: SiteOf, on_one_host: dict[int, float]
) -> None:
    site = site_of(4)
    slots = (1, 1, 1, 1)
    arguments = ["launch", site.run_file("wide"), "--cluster", site.cluster_file(*slots, launcher="no_ssh")]
    started = [site.start(*arguments, "--node-rank", n, host=host) for n, host in enumerate(site.cluster.hosts)]
    ends = [site.end_of(process) for process in started]
    assert [code for code, _ in ends] == [0, 0, 0, 0], ends
    expect_the_same(site, slots, on_one_host, "\n".join(out for _, out in ends))


def expect_the_same(site: Any, slots: tuple[int, ...], on_one_host: dict[int, float], out: str) -> None:
    names = [host.name for host in site.cluster.hosts]
    assert site.hosts_of_ranks("wide") == [name for name, count in zip(names, slots, strict=True) for _ in range(count)]
    if sum(slots) == 2:
        assert site.shop.losses("wide") == on_one_host, out
    else:  # sums over more ranks are rounded in another order
        assert site.shop.losses("wide") == pytest.approx(on_one_host, rel=1e-6)
    assert not site.cluster.wait_until_idle(5)


def test_a_dry_run_shows_the_command_and_starts_nothing(site_of: SiteOf) -> None:
    site = site_of(2)
    code, out = site.cpt("launch", site.run_file("dry"), "--cluster", site.cluster_file(1, 1), "--dry-run")
    assert code == 0, out
    for said in ("n1:29500", "n2", "GLOO_SOCKET_IFNAME", "cpt.train.main", sys.executable):
        assert said in out, out
    assert not site.shop.run_dir("dry").exists() and not site.cluster.left_over()
