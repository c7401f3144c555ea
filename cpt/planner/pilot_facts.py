"""What a grid of pilots is and costs, for people and programs, and its runs as jobs for a cluster.

Owns the words: which learning rate the observations hold for, and when they do not. Starts nothing.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from cpt.model.size import render_count
from cpt.planner.pilot_folders import is_finished, write_run_files
from cpt.planner.pilots import Grid, full_flops

LR_RULE = (
    "The pilots' losses, and a share found from them, hold for this peak learning rate and batch. At another rate run "
    "the pilots again: what a run forgets, and what it learns, depends on how far the rate is re-warmed (arXiv "
    "2403.08763, section 6.1), so at a higher rate the share is too small and at a lower one larger than needed."
)


def grid_facts(grid: Grid) -> dict[str, Any]:
    """The grid for --json and --dry-run: every run with its tokens and FLOPs, and what all of them cost."""
    step_tokens = grid.template.train.global_batch_tokens
    sizes = {pilot.config.model.init_from or "": pilot.params for pilot in grid.pilots}
    full, total = full_flops(grid.settings, sizes), sum(pilot.flops for pilot in grid.pilots)
    runs = [
        {
            "name": pilot.name,
            "base": pilot.base,
            "params": pilot.params,
            "share_general": pilot.share_general,
            "share_domain": 1.0 - pilot.share_general,
            "seed": pilot.config.run.seed,
            "tokens": pilot.num_steps * step_tokens,
            "steps": pilot.num_steps,
            "trained_tokens": (pilot.num_steps - pilot.first_step) * step_tokens,
            "flops": pilot.flops,
            "share_of_full": pilot.flops / full if math.isfinite(full) else None,
            "branches_off": pilot.trunk,
            "finished": is_finished(pilot),
        }
        for pilot in grid.pilots
    ]
    return {
        "name": grid.settings.name,
        "out": str(grid.root),
        "observations": str(grid.observations),
        "runs": runs,
        "num_runs": len(runs),
        "num_trunks": sum(run["branches_off"] is None for run in runs),
        "trained_tokens": sum(run["trained_tokens"] for run in runs),
        "flops": total,
        "full_flops": full if math.isfinite(full) else None,
        "share_of_full": total / full if math.isfinite(full) else None,
        "schedule": grid.pilots[0].config.train.schedule.model_dump(mode="json"),
        "global_batch_tokens": step_tokens,
        "peak_lr": grid.template.train.peak_lr,
        "lr_rule": LR_RULE,
    }


def render_grid(facts: Mapping[str, Any]) -> Table:
    """The grid as a table; its caption states the cost and the learning rate."""
    cost = f"{facts['num_runs']} runs ({facts['num_trunks']} trunks), {render_count(facts['trained_tokens'])} tokens, "
    cost += f"{facts['flops']:.3g} FLOPs"
    if facts["share_of_full"] is not None:
        cost += f" = {facts['share_of_full']:.2%} of the full run"
    rate = f"peak learning rate {facts['peak_lr']:g}. {facts['lr_rule']}"
    title = f"pilots {facts['name']}: {cost}"
    table = Table(title=title, title_justify="left", caption=rate, caption_justify="left")
    for column in ("run", "base"):
        table.add_column(column, overflow="fold")
    for column in ("params", "general", "tokens", "trained", "FLOPs", "of full"):
        table.add_column(column, justify="right")
    table.add_column("state")
    for run in facts["runs"]:
        share = "" if run["share_of_full"] is None else f"{run['share_of_full']:.2%}"
        tokens, trained = f"{run['tokens']:,}", f"{run['trained_tokens']:,}"
        numbers = (render_count(run["params"]), f"{run['share_general']:.1%}", tokens, trained, f"{run['flops']:.2e}")
        state = "finished" if run["finished"] else "branch" if run["branches_off"] else "trunk"
        table.add_row(run["name"], run["base"], *numbers, share, state)
    return table


def export_jobs(grid: Grid, file: Path | None = None) -> list[dict[str, Any]]:
    """Like ``jobs_of``; writes the run files too."""
    write_run_files(grid)
    return jobs_of(grid, file)


def jobs_of(grid: Grid, file: Path | None = None, *, python: str = sys.executable) -> list[dict[str, Any]]:
    """The grid as independent jobs: ``[{"name", "command", "after", "cwd"}]``.

    A job may start when those named in ``after`` have ended. Each can be repeated: a finished run is left alone, a
    stopped one goes on. The last one, ``collect``, writes observations.csv and frees the checkpoints. ``file``: the
    pilot file's path where the jobs run, if it is another one there; ``python``: the one there.
    """
    command = [python, "-m", "cpt.cli", "plan", "pilots", str((file or grid.file).absolute())]

    def job(name: str, command: list[str], after: list[str]) -> dict[str, Any]:
        # Paths in the pilot file and its template count from where the command runs.
        return {"name": name, "command": command, "after": after, "cwd": str(Path.cwd())}

    jobs = [
        job(pilot.name, [*command, "--only", pilot.name], [pilot.trunk] if pilot.trunk else []) for pilot in grid.pilots
    ]
    return [*jobs, job("collect", command, [pilot.name for pilot in grid.pilots])]
