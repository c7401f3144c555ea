"""`cpt launch`: a run file and a cluster file become a job on many machines; then status, logs and stop of it.

Ten lines per verb; each kind of cluster has its module in ``launch/``, imported when it is called.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cpt.cli_options import Json
from cpt.plan_cli import print_facts

if TYPE_CHECKING:
    from cpt.config import RunConfig
    from launch.cluster import Cluster, HostsCluster, KubernetesCluster, SlurmCluster
    from launch.hostfile import Host
    from launch.record import LaunchJob

MODULES = {"hosts": "launch.hosts.verbs", "slurm": "launch.slurm.verbs", "kubernetes": "launch.kube.verbs"}


class RunByDefault(TyperGroup):
    """`cpt launch RUN.yaml ...` is `cpt launch run RUN.yaml ...`, and of a pilot file `cpt launch pilots ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] in self.commands or args[0] == "--help":
            return super().parse_args(ctx, args)
        if get_close_matches(args[0], self.commands) and not Path(args[0]).exists():
            return super().parse_args(ctx, args)  # a verb that is misspelt, which it says
        from cpt.launch_pilots import is_pilot_file

        files = (arg for before, arg in pairwise(["", *args]) if arg[:1] != "-" and before != "--cluster")
        return super().parse_args(ctx, ["pilots" if is_pilot_file(Path(next(files, ""))) else "run", *args])


launch_app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="""Train on many machines with the same run file: cpt launch RUN.yaml --cluster CLUSTER.yaml

    The cluster file says which machines and how ranks get there: hosts by ssh (configs/clusters/hostfile.yaml), Slurm
    or Kubernetes. Look first, with --dry-run; `cpt launch run --help` lists all options. Then, for every kind:
    cpt launch status RUN_DIR, cpt launch logs RUN_DIR --follow, cpt launch stop RUN_DIR.
    """,
)
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="folder of a run that `cpt launch` started")]


@launch_app.command()
def run(
    config: Annotated[
        Path, typer.Argument(metavar="RUN.yaml|RUN_DIR", help="run file; or folder of a run, to go on with it")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[a.b=c]...", help="fields to change, e.g. train.peak_lr=1e-3")
    ] = None,
    *,
    cluster: Annotated[Path, typer.Option(metavar="CLUSTER.yaml", help="cluster file, see configs/clusters/")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show exact commands, ranks and environment; ask and start nothing")
    ] = False,
    skip_preflight: Annotated[
        bool, typer.Option("--skip-preflight", help="hosts: do not compare code, versions, disks and network before")
    ] = False,
    supervise: Annotated[
        bool,
        typer.Option(
            "--supervise", help="hosts: start it again, on the hosts that still answer, when it crashes or hangs"
        ),
    ] = False,
    max_restarts: Annotated[
        int, typer.Option(help="of --supervise: in a row without a new complete checkpoint", min=0)
    ] = 10,
    include: Annotated[str, typer.Option(help="hosts: only these, as DeepSpeed's: a@b:0,2")] = "",
    exclude: Annotated[str, typer.Option(help="hosts: all but these, as DeepSpeed's: a@b:0,2")] = "",
    node_rank: Annotated[
        int | None, typer.Option(help="hosts, launcher no_ssh: number of this host; start its ranks", min=0)
    ] = None,
    as_json: Json = False,
) -> None:
    """Start a run, or go on with it: cpt launch RUN.yaml --cluster configs/clusters/hostfile.yaml --dry-run

    A run whose folder is there already is continued from its newest complete checkpoint. Hosts: the command stays with
    the run; Ctrl-C saves and stops it. Slurm and Kubernetes: it is submitted.
    """
    loaded, chosen, job = _load(config, overrides or [], cluster)
    if chosen.kind == "hosts":
        from launch.cluster import hosts_of
        from launch.hosts.verbs import check_node_rank, describe, render

        hosts = hosts_of(chosen, include=include, exclude=exclude)
        _check_world(loaded, len(hosts) * len(hosts[0].slots))
        if node_rank is not None:
            check_node_rank(chosen, hosts, node_rank, supervised=supervise)
        if dry_run or (chosen.launcher == "no_ssh" and node_rank is None):
            print_facts(describe(chosen, job, hosts), render, as_json=as_json)
            return
        _check_free(job, node_rank)
        if not skip_preflight:
            _preflight(chosen, job, hosts if node_rank is None else hosts[node_rank : node_rank + 1])
        _start_on_hosts(loaded, chosen, job, hosts=hosts, node_rank=node_rank,
                        max_restarts=max_restarts if supervise else None)  # fmt: skip
    _refuse_hosts_only(
        {"--include": include, "--exclude": exclude, "--supervise": supervise, "--node-rank": node_rank}
        | {"--skip-preflight": skip_preflight}
    )
    _submit(loaded, chosen, job, dry_run=dry_run, as_json=as_json)


@launch_app.command()
def pilots(
    config: Annotated[Path, typer.Argument(metavar="PILOTS.yaml", help="pilot file, see configs/runs/pilots_cpu.yaml")],
    cluster: Annotated[Path, typer.Option(metavar="CLUSTER.yaml", help="of kind slurm or kubernetes")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be submitted")] = False,
    as_json: Json = False,
) -> None:
    """Submit a grid of pilots, a task for each run, and a last job that writes observations.csv: cpt launch
    PILOTS.yaml --cluster configs/clusters/slurm.yaml
    """
    from cpt.launch_pilots import launch_pilots

    launch_pilots(config, cluster, dry_run=dry_run, as_json=as_json)


@launch_app.command()
def status(run_dir: RunDir, as_json: Json = False) -> None:
    """How far a run is, its hosts, and its last events: cpt launch status runs/NAME"""
    from launch.progress import progress
    from launch.record import read_record

    launched = read_record(run_dir)
    facts = {"kind": launched.kind, "id": launched.id, "started": launched.started}
    facts |= import_module(MODULES[launched.kind]).status(launched)
    print_facts({"launch": {"hosts": list(launched.hosts), **facts}, **progress(run_dir)}, _render_status,
                as_json=as_json)  # fmt: skip


@launch_app.command()
def logs(
    run_dir: RunDir,
    follow: Annotated[bool, typer.Option("--follow", help="go on with what comes, until the run ends")] = False,
) -> None:
    """What the run's hosts printed: cpt launch logs runs/NAME --follow"""
    from launch.record import read_record

    launched = read_record(run_dir)
    for line in import_module(MODULES[launched.kind]).logs(launched, follow):
        typer.echo(line)


@launch_app.command()
def stop(run_dir: RunDir) -> None:
    """Have all ranks save and end; nothing is lost: cpt launch stop runs/NAME"""
    from launch.record import read_record

    launched = read_record(run_dir)
    typer.echo(import_module(MODULES[launched.kind]).stop(launched))


def _submit(
    config: "RunConfig", cluster: "SlurmCluster | KubernetesCluster", job: "LaunchJob", *, dry_run: bool, as_json: bool
) -> None:
    """Hand the job to a scheduler, or show what would be handed to it."""
    _check_world(config, cluster.nodes * (cluster.processes_per_host or cluster.gpus_per_node or 1))
    module = import_module(MODULES[cluster.kind])
    if dry_run:
        print_facts(module.describe(cluster, job), module.render, as_json=as_json)
        return
    launched = module.start(cluster, job)
    words = f"{launched.kind} job {launched.id}; cpt launch status {job.run_dir}"
    typer.echo(json.dumps(launched.__dict__, indent=1) if as_json else words)


def _load(config: Path, overrides: list[str], cluster: Path) -> "tuple[RunConfig, Cluster, LaunchJob]":
    """Both files; their problems are told together."""
    from cpt.config import ConfigError
    from launch.cluster import load_cluster

    problems: list[Any] = []

    def tried(load: Callable[[], Any]) -> Any:
        try:
            return load()
        except ConfigError as error:
            problems.extend(error.problems)

    job, chosen = tried(lambda: _job(config, overrides)), tried(lambda: load_cluster(cluster))
    if problems:
        raise ConfigError(*problems)
    return job[0], chosen, job[1]


def _job(config: Path, overrides: list[str]) -> "tuple[RunConfig, LaunchJob]":
    """What is to be run; of a run that is there already only what may change is taken from the run file."""
    from cpt.config import load_config
    from cpt.runfolder import check_changeable, read_run_config
    from launch.record import LaunchJob

    if config.is_dir():
        run_dir = config.absolute()
        check_changeable(overrides)
        loaded, first = read_run_config(run_dir, overrides), [str(run_dir / "config.yaml"), *overrides]
        changes = overrides
    else:
        loaded = load_config(config, overrides)
        run_dir, first = loaded.run_dir, [str(config), *overrides]
        changes = _changes(loaded)
    again = ("--resume", str(run_dir), *changes)
    return loaded, LaunchJob(loaded.run.name, run_dir, tuple(first), again, Path.cwd())


def _changes(config: "RunConfig") -> list[str]:
    """Overrides that give a run folder which is there already the changeable fields of this config; none without.

    Raises:
        ConfigError: other fields differ too: it is another run.
    """
    from cpt.config import ConfigError, Problem
    from cpt.rundir import RunDir as Folder
    from cpt.runfolder import CHANGEABLE, changed_fields

    rundir, raw = Folder(config.run_dir), config.model_dump(mode="json")
    changed = changed_fields(rundir, config) if rundir.config.is_file() else []
    others = [field for field in changed if not field.startswith(CHANGEABLE)]
    if others:
        rule = f"the folder holds another config (differs in {', '.join(others)})"
        fix = f"choose another run.name, or go on with it as it is: cpt launch {rundir.root} --cluster ..."
        raise ConfigError(Problem("run.name", str(rundir.root), rule, fix))
    pairs = [field.split(".", 1) for field in changed]
    return [f"{section}.{field}={json.dumps(raw[section][field])}" for section, field in pairs]


def _check_world(config: "RunConfig", world_size: int) -> None:
    from cpt.world_rules import check_world

    check_world(config, world_size)


def _preflight(cluster: "HostsCluster", job: "LaunchJob", hosts: "tuple[Host, ...]") -> None:
    from rich.console import Console

    from launch.hosts.deepspeed_command import rank_environment
    from launch.preflight.checks import render_report
    from launch.preflight.run import run_preflight

    given = rank_environment(cluster, os.environ, interface=cluster.interface, threads=1)
    report = run_preflight(cluster, job, hosts, environment=given)
    Console(stderr=True, markup=False, emoji=False).print(render_report(report))
    if not report.ok:
        raise typer.Exit(report.exit_code)


def _check_free(job: "LaunchJob", node_rank: int | None) -> None:
    """Nothing else is at work in the run folder: what is found of this run on the hosts is killed before a start.

    Raises:
        RuntimeError: another job holds it.
        typer.Exit: the run is finished.
    """
    from cpt.rundir import RunDir as Folder
    from cpt.runfolder import finished_words, is_finished, lock_folder

    if node_rank or not job.run_dir.is_dir():  # of several hosts that start their own ranks the first one asks
        return
    if Folder(job.run_dir).config.is_file() and is_finished(job.run_dir):
        typer.echo(finished_words(job.run_dir))
        raise typer.Exit
    lock_folder(Folder(job.run_dir)).close()


def _start_on_hosts(
    config: "RunConfig",
    cluster: "HostsCluster",
    job: "LaunchJob",
    *,
    hosts: "tuple[Host, ...]",
    node_rank: int | None,
    max_restarts: int | None,
) -> NoReturn:
    from cpt.config import ConfigError
    from cpt.folder_lock import acquire
    from cpt.rundir import RunDir as Folder
    from launch.hosts.verbs import Care, start

    def fits(world_size: int) -> bool:
        try:
            _check_world(config, world_size)
        except ConfigError:
            return False
        return True

    care = Care(fits, config.guard.hang_seconds, max_restarts, shlex.join(["cpt", *sys.argv[1:]]))
    folder = Folder(job.run_dir).launch
    folder.mkdir(parents=True, exist_ok=True)
    # Ranks take the run's own lock some seconds after their start: before that two launches would end each other's.
    with nullcontext() if node_rank else acquire(folder / ".lock"):
        code = start(cluster, job, care, hosts=hosts, node_rank=node_rank)
    raise typer.Exit(code)


def _refuse_hosts_only(given: Mapping[str, object]) -> None:
    from cpt.config import ConfigError, Problem

    rule = "is for hosts reached by ssh; here the scheduler chooses hosts and restarts"
    problems = [Problem(name, value, rule) for name, value in given.items() if value not in ("", False, None)]
    if problems:
        raise ConfigError(*problems)


def _render_status(facts: dict[str, Any]) -> Any:
    from launch.progress_text import render_progress

    return render_progress(facts)
