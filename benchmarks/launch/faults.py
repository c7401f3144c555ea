"""Claim: every fault of a host or of its network ends as docs/cluster.md says, and no checkpoint is lost.

    python -m benchmarks.launch.faults [--only NAME ...] [--runs 5]   root; writes benchmarks/results/launch_faults.json

Two hosts (four where one is slow) that are namespaces of this machine (see tests/multinode), one process each, `cpt
launch` typed on one more; five repetitions of each fault, cables pulled at a step drawn anew each time. "Nothing lost":
every loss on record is that of the same run on one host with two ranks (bit for bit; within 1e-6 with one or four
ranks), and every checkpoint that was complete before the fault still verifies.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.engine.result import write_result
from benchmarks.launch.hosts_of_tests import FIELDS, LIMIT, ROOT, Site, losses_on_one_host, site_of

HANG = float(str(FIELDS["guard.hang_seconds"]))
BUDGET = 4 * HANG + 15  # seconds from the fault to the end of all ranks
NUM_HOSTS = {"slow_host": 4}  # of two nobody can say which end of the cable is the slow one
PORT = 29500
HOLD_PORT = (
    f"import socket, time; s = socket.create_server(('0.0.0.0', {PORT})); print('held', flush=True); time.sleep(99)"
)


class Trial:
    """One launch with one fault, and what turned out wrong."""

    def __init__(self, site: Site, expected: dict[int, float], draw: random.Random) -> None:
        self.site, self.expected, self.draw = site, expected, draw
        self.problems: list[str] = []
        self.facts: dict[str, Any] = {}

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def start(self, *options: str) -> "subprocess.Popen[str]":
        cluster_file = self.site.cluster_file(*(1 for _ in self.site.cluster.hosts))
        return self.site.start("launch", self.site.run_file("run"), "--cluster", cluster_file, *options)

    def cut(self, process: "subprocess.Popen[str]") -> float:
        """Pull n2's cable after a step drawn by lot; when that was."""
        step = self.draw.randrange(6, 24)
        self.site.shop.wait_for_step("run", step, process)
        self.site.cluster.hosts[1].cut()
        self.facts.update(cut_after_step=step, checkpoint_before=self.site.newest_complete("run"))
        return time.monotonic()

    def refused(self, code: int, *said: str, process: "subprocess.Popen[str] | None" = None) -> None:
        began = time.monotonic()
        found, out = self.site.end_of(process or self.start(), LIMIT)
        self.facts["seconds"] = round(time.monotonic() - began, 1)
        self.expect(found == code, f"exit code {found}: {out[-2000:]}")
        for words in said:
            self.expect(words in out, f"{words!r} is not said: {out[-2000:]}")
        self.expect(not (self.site.shop.run_dir("run") / "metrics.jsonl").exists(), "it trained")

    def expect_nothing_lost(self, *, exactly: bool) -> None:
        losses = self.site.shop.losses("run")
        far = 0.0 if exactly else 1e-6
        worse = [step for step, loss in losses.items() if abs(loss / self.expected[step] - 1) > far]
        self.expect(not worse, f"other losses at steps {worse}")
        newest = self.site.newest_complete("run")
        self.expect(newest >= int(self.facts.get("checkpoint_before", 0)), "a checkpoint is lost")
        code, out = self.site.cpt("ckpt", "verify", self.site.shop.run_dir("run"))
        self.expect(code == 0, out)

    def expect_idle(self, seconds: float) -> None:
        left = self.site.cluster.wait_until_idle(max(0.0, seconds))
        self.expect(not left, f"left running: {left}")


def cut_host(trial: Trial) -> None:
    process = trial.start()
    cut = trial.cut(process)
    code, out = trial.site.end_of(process, LIMIT)
    trial.facts["seconds_to_the_end"] = round(time.monotonic() - cut, 1)
    trial.expect(code == 3, f"exit code {code}: {out[-2000:]}")
    trial.expect("n2" in out, "the host is not named")
    trial.expect_idle(BUDGET - (time.monotonic() - cut))
    trial.facts["seconds_until_all_ranks_ended"] = round(time.monotonic() - cut, 1)
    trial.expect_nothing_lost(exactly=True)


def cut_host_supervised(trial: Trial) -> None:
    process = trial.start("--supervise")
    cut = trial.cut(process)
    code, out = trial.site.end_of(process, LIMIT)
    trial.facts["seconds_to_the_end"] = round(time.monotonic() - cut, 1)
    trial.expect(code == 0, f"exit code {code}: {out[-2000:]}")
    worlds = [event["world_size"] for event in trial.site.events("run", "resume")]
    trial.expect(worlds == [1], f"world sizes of the resumes: {worlds}")
    trial.expect(sorted(trial.site.shop.losses("run")) == sorted(trial.expected), "a step is missing")
    trial.expect_idle(BUDGET)
    trial.expect_nothing_lost(exactly=False)


def slow_host(trial: Trial) -> None:
    trial.facts["by"] = trial.site.cluster.hosts[1].slow_down(milliseconds=20, loss_percent=1)
    code, out = trial.site.end_of(trial.start(), LIMIT)
    trial.expect(code == 0, f"exit code {code}: {out[-2000:]}")
    named = [line for line in out.splitlines() if "n2" in line and "slow" in line]
    trial.expect(bool(named), "preflight does not name the slow host")
    trial.expect(sorted(trial.site.shop.losses("run")) == sorted(trial.expected), "a step is missing")
    trial.expect_nothing_lost(exactly=False)
    trial.expect_idle(5)


def other_code(trial: Trial) -> None:
    changed = ROOT / "cpt/train/losses.py"
    trial.site.cluster.hosts[1].replace_file(changed, changed.read_text() + "\n# changed on this host alone\n")
    trial.refused(2, "code", "n2")
    trial.expect_idle(5)


def unreachable_host(trial: Trial) -> None:
    trial.site.cluster.hosts[1].cut()
    trial.refused(3, "n2")
    trial.expect_idle(5)


def port_in_use(trial: Trial) -> None:
    holder = trial.site.cluster.hosts[0].start([sys.executable, "-c", HOLD_PORT])
    assert holder.stdout and holder.stdout.readline() == "held\n"
    trial.refused(2, str(PORT), "n1")
    trial.site.cluster.hosts[0].kill_all()
    trial.expect_idle(5)


FAULTS: dict[str, Callable[[Trial], None]] = {
    "cut_host": cut_host,
    "cut_host_supervised": cut_host_supervised,
    "slow_host": slow_host,
    "other_code": other_code,
    "unreachable_host": unreachable_host,
    "port_in_use": port_in_use,
}


def repeat(folder: Path, fault: str, expected: dict[int, float], options: argparse.Namespace) -> dict[str, Any]:
    facts, failed = [], []
    for index in range(options.runs):
        place = folder / f"{fault}_{index}"
        with site_of(place, num_hosts=NUM_HOSTS.get(fault, 2)) as site:
            trial = Trial(site, expected, random.Random(f"{options.seed} {fault} {index}"))
            try:
                FAULTS[fault](trial)
            except AssertionError as error:  # not ended, or ended before its time: the others are still worth having
                trial.problems.append(str(error)[-2000:])
        print(place.name, trial.problems or "ok", trial.facts, flush=True)
        facts.append(trial.facts)
        failed += [{"run": index, "problems": trial.problems}] if trial.problems else []
        shutil.rmtree(place)
    return {"runs": options.runs, "passed": options.runs - len(failed), "facts": facts, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        expected = losses_on_one_host(Path(name) / "one_host")
        result = {fault: repeat(Path(name), fault, expected, options) for fault in options.only}
    write_result("launch_faults.json", {"steps": len(expected), "hang_seconds": HANG, "faults": result})
    if any(each["passed"] != each["runs"] for each in result.values()):
        raise SystemExit("a fault did not end as documented")


if __name__ == "__main__":
    main()
