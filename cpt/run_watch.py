"""How a run is watched from inside: its heartbeat, and the ranks that keep the others waiting."""

import sys

from cpt.heartbeats import read_beats
from cpt.live_run import Run
from cpt.train.heartbeat import Heartbeat
from cpt.train.hooks import Hook
from cpt.train.stragglers import WINDOW_STEPS, Straggler, StragglerHook


def watch_hooks(run: Run, heartbeat: Heartbeat) -> list[Hook]:
    """The heartbeat learns the phases and the steps; with several ranks their paces are compared every few log
    records.
    """
    run.phases.listener = heartbeat.enter
    run.saver.on_progress = run.phases.beat
    hooks = [Hook(lambda info: heartbeat.at_step(info.step), every=1)]
    if run.topology.world_size > 1:
        every = run.config.log.every_steps
        window = every * -(-WINDOW_STEPS // every)
        hooks.append(Hook(StragglerHook(run.topology, window, lambda slow, step: _report(run, slow, step)), every=1))
    return hooks


def _report(run: Run, slow: Straggler, step: int) -> None:
    if run.topology.rank != 0:
        return
    beat = read_beats(run.rundir.heartbeats).get(slow.rank)
    host = beat.host if beat else "unknown"
    run.event("straggler", step, rank=slow.rank, host=host, ratio=round(slow.ratio, 3), phase=slow.phase)
    words = (
        f"rank {slow.rank} (host {host}) takes {slow.ratio:.2f} times as long as the others, most of it in {slow.phase}"
    )
    print(f"WARNING: {words}; every step waits for it", file=sys.stderr, flush=True)
