"""A launched run is stopped in every way, saves itself completely each time, and leaves nothing running anywhere."""

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest

SiteOf = Callable[[int], Any]
LONGER = {"train.tokens": 2048 * 400, "data.max_epochs": 1000}
WAYS = ("Ctrl-C", "SIGTERM", "stop")


def test_it_stops_with_143_by_ctrl_c_by_sigterm_and_by_the_verb_and_goes_on_each_time(
    site_of: SiteOf,
) -> None:
    site = site_of(2)
    run_file, run_dir, reached = site.run_file("stopped", **LONGER), site.shop.run_dir("stopped"), 0
    for way, launcher in zip(WAYS, ("pdsh", "ssh", "pdsh"), strict=True):
        process = site.start("launch", run_file, "--cluster", site.cluster_file(1, 1, launcher=launcher))
        site.shop.wait_for_step("stopped", reached + 3, process)
        if way == "Ctrl-C":
            _look_at(site, run_dir)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: everything in the foreground gets it
        elif way == "SIGTERM":
            process.terminate()
        else:
            assert site.cpt("launch", "stop", run_dir)[0] == 0
        code, out = site.end_of(process)
        assert code == 143, (way, out)
        before, reached = reached, max(site.shop.losses("stopped"))
        assert reached > before and site.newest_complete("stopped") == reached, (way, out)
        assert not site.cluster.wait_until_idle(5), way
    steps = [record["step"] for record in site.shop.records("stopped")]
    assert steps == list(range(1, reached + 1)), "a step was lost or trained twice"
    code, out = site.cpt("launch", "status", run_dir)
    assert code == 0 and "step" in out, out


def _look_at(site: Any, run_dir: Any) -> None:
    code, out = site.cpt("launch", "status", run_dir)
    assert code == 0 and "n1" in out and "n2" in out, out
    code, out = site.cpt("launch", "logs", run_dir)
    assert code == 0 and "step 1/" in out, out


@pytest.mark.long
def test_the_file_stop_ends_it_on_all_hosts(site_of: SiteOf) -> None:
    site = site_of(2)
    process = site.start("launch", site.run_file("stopped", **LONGER), "--cluster", site.cluster_file(1, 1))
    site.shop.wait_for_step("stopped", 3, process)
    (site.shop.run_dir("stopped") / "STOP").touch()
    code, out = site.end_of(process)
    assert code == 143 and site.newest_complete("stopped") == max(site.shop.losses("stopped")), out
    assert not site.cluster.wait_until_idle(5)
