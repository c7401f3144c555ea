"""What a run tells while it trains: one record per logging window to metrics.jsonl, to the terminal, and to wandb
where asked.

A window's loss is the sum over all its counted tokens divided by their number; sources likewise.
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
from typing import IO, Any, Literal, Protocol

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

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


class WandbSink:
    """Weights & Biases, offline unless the run says online."""

    def __init__(
        self, *, mode: Literal["offline", "online"], name: str, folder: Path, config: Mapping[str, Any]
    ) -> None:
        import wandb

        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        try:
            self._run = wandb.init(
                project="cpt", name=name, dir=str(folder), mode=mode, config=dict(config), settings=settings
            )
        except wandb.errors.Error as error:
            raise RuntimeError(
                f"wandb does not start ({error}); log in, or set log.wandb=offline or disabled"
            ) from None

    def write(self, record: Record) -> None:
        flat = {f"{k}/{n}": x for k, v in record.items() if isinstance(v, Mapping) for n, x in v.items()}
        self._run.log({**{k: v for k, v in record.items() if not isinstance(v, Mapping)}, **flat}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class Throughput:
    """What turns seconds into utilisation."""

    tokens_per_step: int
    flops_per_token: float
    peak_flops: float | None  # of all devices together


@dataclass
class MetricsHook:
    """Collects every step; every ``every`` steps writes one record to all sinks."""

    sinks: list[Sink]
    every: int
    throughput: Throughput
    tokens_by_source: Callable[[int], dict[str, int]]
    _window: list[StepInfo] = field(default_factory=list)

    def __call__(self, info: StepInfo) -> None:
        self._window.append(info)
        if info.step % self.every == 0:
            self.flush()

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
        seconds = sum(info.step_seconds for info in window)
        tokens_per_second = len(window) * self.throughput.tokens_per_step / seconds
        peak = self.throughput.peak_flops
        return {
            "step": last.step,
            "tokens_seen": last.tokens_seen,
            "loss": sum(sums.values()) / max(1, sum(counts.values())),
            "loss_by_source": {name: sums[name] / counts[name] if counts[name] else None for name in names},
            "tokens_by_source": self.tokens_by_source(last.step),
            "lr": last.lr,
            "grad_norm": last.grad_norm,
            "tokens_per_second": tokens_per_second,
            "mfu": tokens_per_second * self.throughput.flops_per_token / peak if peak else None,
            "step_seconds": seconds / len(window),
            "data_seconds": sum(info.data_seconds for info in window) / len(window),
            "memory_bytes": peak_memory_bytes(),
            "time": time.time(),
        }


def peak_memory_bytes() -> int:
    """Most memory used so far: of the GPU where there is one, else resident memory of this process (ru_maxrss is in
    KiB on Linux).
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
