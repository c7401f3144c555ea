"""How far a run is, read from its folder by anybody who sees it: the same for every kind of cluster.

Owns ``progress``. A rank lives while its heartbeat changes, so a running one is looked at twice; clocks of two hosts
are never compared. Refuses to guess: what is not on disk yet is None.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from cpt.heartbeats import Beat, read_beats
from cpt.rundir import RunDir, parse_lines
from launch.run_folder import newest_step, plain_file

LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 12.0  # ranks write every 5 s at most, and a shared file system may be late
LAST_EVENTS = 5
TAIL_BYTES = 1 << 16
LARGEST = 1e18  # of steps and tokens/s: beyond it a line is damaged


def progress(run_dir: Path, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Step of steps, tokens/s, newest checkpoint, hosts with their ranks, the last events; waits while a rank that
    should be running shows no life, for some seconds.

    Raises:
        DataError: a link or a pipe stands where a file of the run should.
    """
    rundir = RunDir(run_dir.resolve())  # itself it may be a link
    record: dict[str, Any] = next(reversed(_tail(rundir.metrics)), {})
    return {
        "run_dir": str(run_dir),
        "step": _number(record.get("step")),
        "num_steps": _num_steps(rundir.config),
        "tokens_per_second": _number(record.get("tokens_per_second")),
        "checkpoint": newest_step(run_dir),
        "hosts": _hosts(rundir.heartbeats, sleep),
        "events": [_shortened(event) for event in _tail(rundir.events)[-LAST_EVENTS:]],
    }


def _num_steps(config: Path) -> int | None:
    try:
        train = yaml.safe_load(config.read_text(encoding="utf-8"))["train"]
        return int(train["tokens"]) // int(train["global_batch_tokens"])
    except (OSError, yaml.YAMLError, RecursionError, KeyError, TypeError, ValueError, ArithmeticError):
        return None


def _number(value: object) -> int | float | None:
    """None for what no run writes there: a damaged line must not hide all else."""
    return value if isinstance(value, int | float) and abs(value) < LARGEST else None


def _hosts(folder: Path, sleep: Callable[[float], None]) -> dict[str, dict[str, Any]]:
    """By host: its ranks, where the one that is least far stands, and those that show no life."""
    before = read_beats(folder)
    silent = {rank for rank, beat in before.items() if beat.state == "running"}
    waited, now = 0.0, before
    while silent and waited < PATIENCE_SECONDS:
        sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS
        now = {**before, **read_beats(folder)}
        silent = {rank for rank in silent if now[rank] == before[rank]}
    by_host: dict[str, list[Beat]] = {}
    for _, beat in sorted(now.items()):
        by_host.setdefault(beat.host, []).append(beat)
    return {host: _host(beats, silent) for host, beats in by_host.items()}


def _host(beats: list[Beat], silent: set[int]) -> dict[str, Any]:
    last = min(beats, key=lambda beat: beat.place)
    return {
        "ranks": [beat.rank for beat in beats],
        "step": last.step,
        "phase": last.phase,
        "states": sorted({beat.state for beat in beats}),
        "silent": [beat.rank for beat in beats if beat.rank in silent],
        "said": next((beat.message for beat in beats if beat.message), ""),
    }


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last lines that can be read, oldest first."""
    try:
        with open(path, "rb", opener=plain_file) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL_BYTES))
            last = file.read()
    except OSError:
        return []
    return [record for record in parse_lines(last) if record]  # one may be cut at the front by us


def _shortened(event: Mapping[str, Any]) -> dict[str, Any]:
    """Of lists and mappings in it, how many entries they have."""
    return {name: len(value) if isinstance(value, list | dict) else value for name, value in event.items()}
