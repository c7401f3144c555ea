"""Before the ranks of a Slurm job are started: ask its nodes what they are, over srun, and compare.

``python -m launch.slurm.preflight RUN_DIR RUN.yaml ...`` in the job's script, on its first node. Owns how a node is
reached; what is asked and how it is judged is ``launch.preflight.run``'s. Ends with the report's exit code.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from launch.cluster import HostsCluster, hosts_of
from launch.preflight.checks import Report, render_report
from launch.preflight.run import run_preflight
from launch.record import LaunchJob

ANSWER_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table of what was found; 0 where nothing failed, else 2 or 3."""
    run_dir, *trainer = sys.argv[1:] if arguments is None else arguments
    listed = ("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"])
    names = subprocess.run(listed, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=True).stdout.split()
    cluster = cluster_of(os.environ, names)
    job = LaunchJob(Path(run_dir).name, Path(run_dir), tuple(trainer), tuple(trainer), Path.cwd())
    report = without_ssh(run_preflight(cluster, job, hosts_of(cluster), transport=over_srun))
    Console(markup=False, emoji=False, width=160).print(render_report(report))
    return report.exit_code


def cluster_of(environment: Mapping[str, str], names: Sequence[str]) -> HostsCluster:
    """The nodes of this job as hosts, with what the script has found out for its ranks."""
    fields = {
        "hosts": list(names),
        "processes_per_host": int(environment["LOCAL_WORLD_SIZE"]),
        "launcher": "ssh",  # no person starts hosts by hand; ssh itself is not used
        "interface": environment.get("GLOO_SOCKET_IFNAME"),
        "master_address": environment["MASTER_ADDR"],
        "master_port": int(environment["MASTER_PORT"]),
    }
    return HostsCluster.model_validate(fields)


def over_srun(host: str, command: Sequence[str]) -> list[str]:
    """A step of its own on one node, beside others that may run there."""
    place = (f"--nodelist={host}", "--nodes=1", "--ntasks=1", "--overlap", "--export=ALL")
    return ["srun", *place, *command]


def without_ssh(report: Report) -> Report:
    """Programs that only the launchers over ssh need are none of Slurm's."""
    return Report([check for check in report.checks if check.name != "launcher"], report.details)


if __name__ == "__main__":
    sys.exit(main())
