"""The quickstart from nothing: wall time, peak memory, whether the recommended replay cured the forgetting, and whether
the planner's promise held.

    python -m benchmarks.quickstart_run       writes benchmarks/results/quickstart.json

Runs `cpt quickstart` in an empty folder, as `make quickstart` does after the installation. Peak memory is the
resident sum over the command and all its children, sampled ten times a second; what forks share counts in each of
them. Bars: 6 minutes and 4 GB on two cores; forgetting with the recommended share at most 1/3 of that without replay,
at most 10% of the domain gain given up. Also recorded: what the share promised for the end of its run, and what was
measured there.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from cpt.quickstart_runs import COMPARED, FAST, FULL, PLANNED
from cpt.recommendation import read_recommendation
from cpt.report.render import report_data

RESULT = Path(__file__).parent / "results" / "quickstart.json"
FOLDER = Path("runs/benchmark_quickstart")


def resident_bytes(pid: int) -> int:
    """Of a process and its descendants; those that end meanwhile count 0."""
    total = 0
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def promise_kept(planned: dict[str, Any]) -> dict[str, Any]:
    """Promised and measured losses at the end of the planned run, by group."""
    found = {}
    for group in ("general", "domain"):
        final = next(each for each in planned["promise"][group]["evaluations"] if each["final"])
        found[group] = {
            "promised_nats": round(final["promised"], 4),
            "interval_nats": [round(end, 4) for end in final["interval"]],
            "measured_nats": round(final["measured"], 4),
            "inside": final["inside"],
        }
    return found


def retention(run: dict[str, Any]) -> dict[str, Any]:
    """Gain and forgetting in nats; a new model forgets nothing."""
    names = ("share_general_planned", "gain", "forgetting", "forgetting_ratio", "gain_given_up")
    return {name: None if run[name] is None else round(run[name], 4) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)  # from nothing; left behind for a look at the report
    size = ["--fast"] if options.fast else []
    command = [sys.executable, "-m", "cpt.cli", "quickstart", "--out", str(FOLDER), *size]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        peak = max(peak, resident_bytes(process.pid))
        time.sleep(0.1)
    seconds = time.perf_counter() - started
    if process.returncode != 0:
        sys.exit(f"cpt quickstart ended with exit code {process.returncode}")
    report = report_data([FOLDER / "runs" / name for name in COMPARED])
    runs = {run["name"]: run for run in report["runs"]}
    plan, planned, reference = read_recommendation(FOLDER / "plan.json"), runs[PLANNED], runs["no_replay"]
    limit = runs[PLANNED]["general"]["base"] * (1 + (FAST if options.fast else FULL).tolerance)
    result = {
        "fast": options.fast,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
        "recommended_share_general": round(plan.share_general or 0.0, 4),
        "share_interval": [round(end, 4) for end in plan.interval or ()],
        "laws": {"general": plan.law.general, "domain": plan.law.domain},
        "promise": promise_kept(planned),
        "general_limit_nats": round(limit, 4),
        "keeps_limit": {name: run["general"]["final"] <= limit for name, run in runs.items() if run["general"]},
        "runs": {name: retention(run) for name, run in runs.items()},
        "forgetting_no_replay_nats": round(reference["forgetting"], 4),
        "forgetting_planned_nats": round(planned["forgetting"], 4),
        "forgetting_ratio": round(planned["forgetting_ratio"], 4),
        "domain_gain_no_replay_nats": round(reference["gain"], 4),
        "domain_gain_planned_nats": round(planned["gain"], 4),
        "domain_gain_given_up": round(planned["gain_given_up"], 4),
        "verdict": report["verdict"],
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
