"""What runs on each host where a scheduler starts hosts, not ranks: a pod, an MPI slot
(``python -m launch.local.node``).

Starts this host's ranks, passes signals on to them and ends with their exit code, which is what a scheduler decides by:
143 after a complete save, 2 where the user must act, anything else is worth a new start. Which host this is stands in
the environment (JOB_COMPLETION_INDEX, or what mpirun sets), where rank 0 is in MASTER_ADDR and MASTER_PORT. The
deepspeed launcher would end with 1 whatever happened, and kill a save that takes longer than 30 seconds. Refuses a
number that is not of this job.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cpt.exit_codes import EXIT_ENVIRONMENT, EXIT_USER
from cpt.problems import ConfigError, Problem
from cpt.rundir import RunDir, read_events
from launch.local.peers import Peers
from launch.local.ranks import Ended, Launcher, Place

NUMBERS = ("JOB_COMPLETION_INDEX", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this host's ranks; returns their exit code."""
    parser = argparse.ArgumentParser(prog="launch.local.node", description="Start the ranks of one host of a job.")
    parser.add_argument("--hosts", type=int, required=True, help="hosts of the job")
    parser.add_argument("--processes", type=int, required=True, help="ranks on each")
    parser.add_argument("--run-dir", type=Path, required=True, help="where the hosts tell each other that they live")
    parser.add_argument("trainer", nargs="+", help="after --: arguments of cpt.train.main")
    options = parser.parse_args(arguments)
    try:
        place = place_of(os.environ, num_hosts=options.hosts)
        ended = _run(options, place)
    except ConfigError as error:
        print(f"configuration error:\n{error}", file=sys.stderr, flush=True)
        return EXIT_USER
    except OSError as error:
        print(f"environment error: {error}", file=sys.stderr, flush=True)
        return EXIT_ENVIRONMENT
    print(f"host {place.host} of {place.num_hosts}: {ended.words} (exit code {ended.code})", flush=True)
    return ended.code


def _run(options: argparse.Namespace, place: Place) -> Ended:
    signs = RunDir(options.run_dir).launch / "hosts"
    with Launcher() as launcher, Peers(signs, host=place.host, num_hosts=place.num_hosts) as peers:
        # Hosts of a run that is over do not come back to meet this one: the trainer finds it finished.
        peers.meet(pause=launcher.wait, enough=lambda: bool(launcher.asked) or is_over(options.run_dir))
        ended = launcher.run(options.trainer, num_processes=options.processes, place=place, verdict=peers.lost)
        peers.conclude(ended)
    return ended


def place_of(environment: Mapping[str, str], *, num_hosts: int) -> Place:
    """Raises ConfigError: the environment does not say which host this is, or where rank 0 is."""
    name = next((name for name in NUMBERS if name in environment), NUMBERS[0])
    number = environment.get(name, "")
    port = environment.get("MASTER_PORT", "")
    problems = []
    if not number.isdecimal() or int(number) >= num_hosts:
        problems.append(Problem(name, number, f"must be the number of this host, from 0 to {num_hosts - 1}"))
    if not environment.get("MASTER_ADDR"):
        problems.append(Problem("MASTER_ADDR", None, "must be the name or address of host 0"))
    if not port.isdecimal():
        problems.append(Problem("MASTER_PORT", port, "must be a port of host 0, e.g. 29500"))
    if problems:
        raise ConfigError(*problems)
    return Place(int(number), num_hosts, environment["MASTER_ADDR"], int(port))


def is_over(run_dir: Path) -> bool:
    """Whether the last word of the run is that it finished. A line that a crash has cut is none."""
    return any(event.get("event") == "finish" for event in read_events(RunDir(run_dir))[-1:])


if __name__ == "__main__":
    sys.exit(main())
