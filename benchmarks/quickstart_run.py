"""The quickstart from nothing: wall time, peak memory, and whether replay cured the forgetting.

    python -m benchmarks.quickstart_run       writes benchmarks/results/quickstart.json

Runs `cpt quickstart` in an empty folder, as `make quickstart` does after the installation. Peak memory is the
resident sum over the command and all its children, sampled ten times a second. Bars: 6 minutes and 4 GB on two cores;
forgetting with replay at most 1/3 of that without, at most 10% of the domain gain given up.
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

import psutil

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
    runs = report_data([FOLDER / "runs" / name for name in ("no_replay", "replay", "from_scratch")])
    replay = next(run for run in runs["runs"] if run["name"] == "replay")
    reference = next(run for run in runs["runs"] if run["name"] == "no_replay")
    result = {
        "fast": options.fast,
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(peak / 1e9, 2),
        "forgetting_no_replay_nats": round(reference["forgetting"], 4),
        "forgetting_replay_nats": round(replay["forgetting"], 4),
        "forgetting_ratio": round(replay["forgetting_ratio"], 4),
        "domain_gain_no_replay_nats": round(reference["gain"], 4),
        "domain_gain_replay_nats": round(replay["gain"], 4),
        "domain_gain_given_up": round(replay["gain_given_up"], 4),
        "verdict": runs["verdict"][0],
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
