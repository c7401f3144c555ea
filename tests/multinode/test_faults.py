"""A cable that is pulled while a run trains, and a slow one."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from launching import FIELDS, STEPS

SiteOf = Callable[[int], Any]
HANG = float(FIELDS["guard.hang_seconds"])
BUDGET = 4 * HANG + 15  # to a diagnosis and the end of all ranks: the watchdog looks, waits, and lets the others leave


def cut_at(site: Any, process: Any, step: int) -> float:
    """Pull n2's cable as soon as that step is done; when that was."""
    site.shop.wait_for_step("cut", step, process)
    site.cluster.hosts[1].cut()
    return time.monotonic()


def test_a_cut_host_ends_the_run_with_a_diagnosis_and_its_own_ranks_end_by_themselves(
    site_of: SiteOf, on_one_host: dict[int, float]
) -> None:
    site = site_of(2)
    process = site.start("launch", site.run_file("cut"), "--cluster", site.cluster_file(1, 1))
    cut = cut_at(site, process, 12)
    code, out = site.end_of(process)
    assert code == 3 and time.monotonic() - cut < BUDGET, (time.monotonic() - cut, out)
    assert "n2" in out
    (hang,) = site.events("cut", "hang")
    assert {each["host"] for each in [*hang.get("silent", []), *hang.get("behind", [])]} <= {"n1", "n2"}
    assert not site.cluster.wait_until_idle(max(0.0, BUDGET - (time.monotonic() - cut)))
    assert site.newest_complete("cut") >= 10
    site.cluster.hosts[1].mend()
    code, out = site.cpt("ckpt", "verify", site.shop.run_dir("cut"))
    assert code == 0, out
    losses = site.shop.losses("cut")
    assert losses == {step: on_one_host[step] for step in losses}


def test_with_supervise_the_run_goes_on_with_the_other_host_and_loses_nothing(
    site_of: SiteOf, on_one_host: dict[int, float]
) -> None:
    site = site_of(2)
    process = site.start("launch", site.run_file("cut"), "--cluster", site.cluster_file(1, 1), "--supervise")
    cut_at(site, process, 12)
    code, out = site.end_of(process)
    assert code == 0, out
    (restart,) = site.events("cut", "restart")
    assert restart["checkpoint"] >= 10 and "n2" in out, (restart, out)
    assert site.hosts_of_ranks("cut")[0] == "n1" and site.events("cut", "resume")[-1]["world_size"] == 1
    losses = site.shop.losses("cut")
    assert sorted(losses) == list(range(1, STEPS + 1)) and losses == pytest.approx(on_one_host, rel=1e-6)
    assert not site.cluster.wait_until_idle(BUDGET)


def test_a_slow_and_lossy_host_is_named_and_the_run_is_still_right(
    site_of: SiteOf, on_one_host: dict[int, float]
) -> None:
    site = site_of(4)  # of two hosts nobody can say which end of the cable is the slow one
    site.cluster.hosts[1].slow_down(milliseconds=20, loss_percent=1)
    code, out = site.cpt("launch", site.run_file("slow"), "--cluster", site.cluster_file(1, 1, 1, 1))
    assert code == 0, out
    assert site.shop.losses("slow") == pytest.approx(on_one_host, rel=1e-6)
    assert any("n2" in line and "slow" in line for line in out.splitlines()), out
