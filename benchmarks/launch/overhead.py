"""Claim: `cpt launch`, preflight included, reaches the first step at most 5 s after the bare deepspeed command would.

    python -m benchmarks.launch.overhead [--rounds 5]     root; writes benchmarks/results/launch_overhead.json

Two hosts that are namespaces of this machine (see tests/multinode), one process each, the same run file. Both commands
are typed on a third machine, one after the other, in turns; the time is from the call to the moment in which the first
step stands in metrics.jsonl. The bare command is given the master's address and no check of ssh, which would cost it
more.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.engine.result import write_result
from benchmarks.launch.hosts_of_tests import LIMIT, Site, site_of

BAR_SECONDS = 5.0
FIELDS = {"train.tokens": 256 * 8, "train.global_batch_tokens": 256, "train.micro_batch_size": 4}


def bare(site: Site, name: str) -> "subprocess.Popen[str]":
    cluster = site.cluster
    variables = cluster.folder / "deepspeed_env"
    variables.write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    words = ["--hostfile", cluster.hostfile(1, 1), "--no_ssh_check", "--master_addr", cluster.hosts[0].address]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *words, "--module", "cpt.train.main"]
    env = {"PDSH_SSH_ARGS_APPEND": f"-F {cluster.ssh_config}", "DS_ENV_FILE": str(variables)}
    return cluster.login.start([*command, site.run_file(name, **FIELDS)], env=env)


def launched(site: Site, name: str) -> "subprocess.Popen[str]":
    return site.start("launch", site.run_file(name, **FIELDS), "--cluster", site.cluster_file(1, 1))


def seconds_to_first_step(site: Site, name: str, start: Callable[[Site, str], "subprocess.Popen[str]"]) -> float:
    began = time.monotonic()
    process = start(site, name)
    site.shop.wait_for_step(name, 1, process)
    seconds = time.monotonic() - began
    code, out = site.end_of(process, LIMIT)
    assert code == 0, out
    assert site.hosts_of_ranks(name) == ["n1", "n2"], "it ran elsewhere"
    shutil.rmtree(site.shop.run_dir(name))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[float]] = {"bare": [], "launch": []}
    with tempfile.TemporaryDirectory() as folder, site_of(Path(folder), num_hosts=2) as site:
        for number in range(options.rounds + 1):
            for name, start in (("bare", bare), ("launch", launched)):
                seconds = seconds_to_first_step(site, f"{name}_{number}", start)
                if number > 0:  # the first round fills the page cache
                    found[name].append(round(seconds, 2))
                print(name, number, round(seconds, 2), flush=True)
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    overhead = round(medians["launch"] - medians["bare"], 2)
    figures = {"rounds": options.rounds, "seconds_to_first_step": found, "median_seconds": medians}
    write_result("launch_overhead.json", {**figures, "overhead_seconds": overhead, "bar_seconds": BAR_SECONDS})
    if overhead > BAR_SECONDS:
        raise SystemExit(f"{overhead} s are more than {BAR_SECONDS} s")


if __name__ == "__main__":
    main()
