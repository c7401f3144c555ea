"""What a run tells while it trains: one record per logging window to metrics.jsonl, to the terminal, and where asked to
wandb (``cpt.train.wandb_sink``).

A window's loss is the sum over all its counted tokens divided by their number; sources likewise. Evaluations and
checkpoints lie between steps: they are no part of ``step_seconds`` and ``tokens_per_second``, but of
``phase_seconds`` and ``tokens_per_second_overall``. What of them comes after a step counts with the next window.
"""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cpt.train.phases import PHASES
from cpt.train.stepinfo import StepInfo

Record = Mapping[str, Any]

# Dense bf16 peak of one device, FLOP/s, from the makers' data sheets; model FLOPs utilisation is left out for other
# devices.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


class Sink(Protocol):
    """Somewhere that records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends one JSON object per line, flushed, so that a killed run loses at most the line being written."""

    def __init__(self, path: Path) -> None:
        self._file: IO[str] = path.open("a", encoding="utf-8")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # the last run died inside a line: do not glue two records together

    def write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(_json_safe(record)) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a run over its diary
            print(f"WARNING: the metrics of step {record['step']} are lost: {error}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._file.close()


class ConsoleSink:
    """A live bar with the newest numbers under it on a terminal; otherwise one plain line per record."""

    def __init__(self, *, num_steps: int, title: str) -> None:
        self._num_steps = num_steps
        self._live: Live | None = None
        if sys.stdout.isatty():
            columns = (TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns)
            self._task = self._progress.add_task(title, total=num_steps)
            self._live = Live(self._progress, console=Console(), refresh_per_second=4)
            self._live.start()

    def write(self, record: Record) -> None:
        if self._live:
            self._progress.update(self._task, completed=record["step"])
            self._live.update(Group(self._progress, Text(_numbers(record))))
        else:
            print(f"step {record['step']}/{self._num_steps}  {_numbers(record)}", flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()


@dataclass(frozen=True)
class Throughput:
    """What turns seconds into utilisation. FLOPs are the model's, exact (``cpt.model.size``): recomputation counts
    for nothing, attention by the pairs inside documents.
    """

    tokens_per_step: int
    flops_per_token: float  # without attention
    flops_per_pair: float  # of attention: (query, key) pairs, all layers
    peak_flops: float | None  # of all devices together
    num_devices: int = 1


@dataclass
class MetricsHook:
    """Collects every step; every ``every`` steps writes one record to all sinks."""

    sinks: list[Sink]
    every: int
    throughput: Throughput
    tokens_by_source: Callable[[int], dict[str, int]]
    clock: Callable[[], float] = time.perf_counter
    _window: list[StepInfo] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._since = self.clock()

    def __call__(self, info: StepInfo) -> None:
        self._window.append(info)
        if info.step % self.every == 0:
            self.flush()

    def forget_after(self, step: int) -> None:
        """Leave out what was collected after ``step``: those updates were undone."""
        self._window = [info for info in self._window if info.step <= step]

    def flush(self) -> None:
        """Write what has been collected; also called when a run ends inside a window."""
        if self._window:
            record = self._record()
            self._window.clear()
            for sink in self.sinks:
                sink.write(record)

    def close(self) -> None:
        self.flush()
        for sink in self.sinks:
            sink.close()

    def _record(self) -> Record:
        window, last = self._window, self._window[-1]
        names = list(last.loss_sums)
        sums = {name: sum(info.loss_sums[name] for info in window) for name in names}
        counts = {name: sum(info.counted[name] for info in window) for name in names}
        return {
            "step": last.step,
            "steps": len(window),
            "tokens_seen": last.tokens_seen,
            # no number where all rows were left out: their steps made no update
            "loss": sum(sums.values()) / total if (total := sum(counts.values())) else math.nan,
            "loss_by_source": {name: sums[name] / counts[name] if counts[name] else None for name in names},
            "tokens_by_source": self.tokens_by_source(last.step),
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            **self._speed(window),
            "phase_seconds": {
                name: sum(info.seconds.get(name, 0.0) for info in window) / len(window) for name in PHASES
            },
            "memory_bytes": peak_memory_bytes(),
            "memory": memory_by_place(),
            "time": time.time(),
        }

    def _speed(self, window: list[StepInfo]) -> dict[str, float | None]:
        know, now = self.throughput, self.clock()
        tokens, seconds = len(window) * know.tokens_per_step, sum(info.step_seconds for info in window)
        flops = tokens * know.flops_per_token + sum(info.attended_pairs for info in window) * know.flops_per_pair
        wall, self._since = now - self._since, now
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_second_per_device": tokens / seconds / know.num_devices,
            "tokens_per_second_overall": tokens / max(wall, seconds),
            "flops_per_second": flops / seconds if know.flops_per_token else None,
            "mfu": flops / seconds / know.peak_flops if know.peak_flops else None,
            "step_seconds": seconds / len(window),
        }


def peak_memory_bytes() -> int:
    """Most memory used so far: of the GPU where there is one, else resident memory of this process (ru_maxrss is in
    KiB on Linux).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_by_place() -> dict[str, int]:
    """Bytes of this process in host memory, now and at most so far; with a GPU also what tensors take there, and what
    the allocator holds for them at most (the rest of it is fragmentation).
    """
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    now = pages * resource.getpagesize()
    found = {"host": now, "host_peak": max(now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.memory_allocated()
        found["device_peak"] = torch.cuda.max_memory_allocated()
        found["device_reserved_peak"] = torch.cuda.max_memory_reserved()
    return found


def device_peak_flops(device: torch.device) -> float | None:
    """Peak of one device, or None where it is not known (a CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = re.split(r"[^A-Za-z0-9]+", name)  # "NVIDIA A100-SXM4-80GB"; an L40 is no L4
    return next((PEAK_FLOPS[word] for word in words if word in PEAK_FLOPS), None)


def _numbers(record: Record) -> str:
    losses = "  ".join(f"{name} {loss:.3f}" for name, loss in record["loss_by_source"].items() if loss is not None)
    mfu = f"  mfu {record['mfu']:.1%}" if record["mfu"] else ""
    rate = f"{record['tokens_per_second']:,.0f} tok/s"
    return f"loss {record['loss']:.3f}  {losses}  lr {record['lr']:.2e}  norm {record['grad_norm']:.2f}  {rate}{mfu}"


def _json_safe(value: Any) -> Any:
    """NaN and infinity become null: they are not JSON."""
    if isinstance(value, Mapping):
        return {key: _json_safe(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
