"""Work that a cluster does as independent tasks, from the lists that other verbs make of it.

    pilots        a trunk, then the branches that need its checkpoint, one after the other: a chain waits for nobody
    tokenisation  `cpt data tokenize ... --task i/n` for every i, then `cpt data merge`

Owns how commands of this machine become commands of a pod: its own python, paths that start at its first mount.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.kube.manifests import Tasks

PYTHON = "python"  # of the image


def pilot_tasks(name: str, jobs: Sequence[Mapping[str, Any]], shell: Mapping[str, str]) -> Tasks:
    """``jobs``: what ``cpt plan pilots --export-commands`` writes, ``collect`` last; each has at most one before it."""
    *pilots, collect = jobs
    after = {job["name"]: job["after"][0] if job["after"] else None for job in pilots}
    roots = [job for job in pilots if after[job["name"]] is None]
    chains = [[_in_pod(job) for job in pilots if _root(job["name"], after) == root["name"]] for root in roots]
    return Tasks(name, chains, _in_pod(collect), shell)


def data_tasks(name: str, arguments: Sequence[str], last: Sequence[str], *, count: int) -> Tasks:
    """A verb of ``cpt data`` with its options, without ``--task``, as ``count`` tasks, and ``last`` after them."""
    command = [PYTHON, "-m", "cpt.cli", "data"]
    tasks = [[[*command, *arguments, "--task", f"{number}/{count}"]] for number in range(count)]
    return Tasks(name, tasks, [*command, *last], os.environ)


def _root(name: str, after: Mapping[str, str | None]) -> str:
    before = after[name]
    return name if before is None else _root(before, after)


def _in_pod(job: Mapping[str, Any]) -> list[str]:
    """The command without this machine's python and folder."""
    folder = f"{Path(job['cwd'])}/"
    return [PYTHON, *(word.removeprefix(folder) for word in job["command"][1:])]
