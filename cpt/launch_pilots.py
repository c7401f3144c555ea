"""`cpt launch PILOTS.yaml --cluster C.yaml`: the runs of a grid as tasks of a scheduler, then a job that collects them.

Owns what a grid is to a cluster: which command trains a pilot, and which pilots wait for others. Refuses hosts that are
reached by ssh: there `cpt plan pilots` runs on one of them. ``launch`` knows nothing of pilots: it is given commands.
"""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cpt.plan_cli import print_facts

if TYPE_CHECKING:
    from cpt.planner.pilots import Grid
    from launch.cluster import Cluster
    from launch.kube.manifests import Tasks
    from launch.slurm.verbs import ArrayJob


def is_pilot_file(path: Path) -> bool:
    """Raises ConfigError for a file that cannot be read."""
    from cpt.config import read_mapping

    return path.is_file() and "pilots" in read_mapping(path)


def launch_pilots(config: Path, cluster: Path, *, dry_run: bool, as_json: bool) -> None:
    """Submit a grid, or show what would be; the record, the scripts and the output go to the grid's folder.

    Raises:
        ConfigError: a file is wrong, or the cluster is not one of a scheduler.
        RuntimeError: the scheduler cannot be reached from here.
    """
    from cpt.config import ConfigError, Problem
    from cpt.planner.pilots import load_pilots
    from launch.cluster import KubernetesCluster, SlurmCluster, load_cluster
    from launch.kube import verbs as on_kubernetes
    from launch.slurm import verbs as on_slurm

    grid, chosen = load_pilots(config), load_cluster(cluster)
    _check_world(grid, chosen)
    if isinstance(chosen, SlurmCluster):
        array = slurm_array(grid, config, python="python" if chosen.image else sys.executable)
        facts, render = on_slurm.describe_array(chosen, array), on_slurm.render
        launched = None if dry_run else on_slurm.start_array(chosen, array)
    elif isinstance(chosen, KubernetesCluster):
        tasks = kubernetes_tasks(grid, config)
        facts, render = on_kubernetes.describe_tasks(chosen, tasks), on_kubernetes.render
        launched = None if dry_run else on_kubernetes.start_tasks(chosen, tasks, grid.root)
    else:
        rule = "a grid of pilots needs a scheduler to deal its runs out"
        raise ConfigError(Problem("kind", chosen.kind, rule, f"on one of the hosts: cpt plan pilots {config}"))
    if launched is None:
        print_facts(facts, render, as_json=as_json)
    else:
        text = f"{launched.kind} job {launched.id}: {len(grid.pilots)} pilots; cpt launch status {grid.root}"
        typer.echo(json.dumps(launched.__dict__, indent=1) if as_json else text)


def slurm_array(grid: "Grid", config: Path, *, python: str) -> "ArrayJob":
    """Trunks first; a branch may begin when all trunks have ended, and finds its own by itself."""
    from cpt.planner.pilot_facts import jobs_of
    from cpt.rundir import RunDir
    from launch.slurm.script import Task
    from launch.slurm.verbs import ArrayJob

    *pilots, collect = jobs_of(grid, config, python=python)
    notes = RunDir(grid.root).launch

    def task(job: dict[str, Any]) -> Task:
        name = str(job["name"])
        return Task(tuple(job["command"]), grid.pilot(name).run_dir, notes / name)

    waves = [[task(job) for job in pilots if bool(job["after"]) is waits] for waits in (False, True)]
    last = tuple(collect["command"])
    processes = grid.settings.nproc
    return ArrayJob(grid.settings.name, grid.root, Path.cwd(), [wave for wave in waves if wave], last, processes)


def kubernetes_tasks(grid: "Grid", config: Path) -> "Tasks":
    """One task for each trunk, which trains its branches after it."""
    from cpt.planner.pilot_facts import jobs_of
    from launch.kube.chains import pilot_tasks

    return pilot_tasks(grid.settings.name, jobs_of(grid, config, python="python"), os.environ)


def _check_world(grid: "Grid", cluster: "Cluster") -> None:
    """A pilot must fit into one node. Raises ConfigError."""
    from cpt.config import ConfigError, Problem

    gpus, wanted = getattr(cluster, "gpus_per_node", 0), grid.settings.nproc
    if gpus and wanted > gpus:
        rule = f"is more than a node has GPUs (gpus_per_node: {gpus}); a pilot runs on one node"
        raise ConfigError(Problem("pilots.nproc", wanted, rule, "lower it"))
