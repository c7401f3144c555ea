"""A trace of a few steps, for Perfetto or chrome://tracing, and a table of where their time went.

Owns what ``cpt train --profile`` writes: torch.profiler's record of a bounded number of steps at one rank, with ranges
named by the loop's phases. Refuses to run on and on: a trace grows by tens of megabytes per step, so there are at most
MAX_STEPS of them, taken once the first steps (compilation, allocator, DeepSpeed's first buckets) are over.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile, schedule

from cpt.train.phases import Phases
from cpt.train.stepinfo import StepInfo

WAIT_STEPS = 3
MAX_STEPS = 20
TOP_OPERATORS = 15
RANGE = "cpt."  # before the phase's name


class StepProfiler:
    """A hook for every step: waits, records ``steps`` steps, writes two files into ``folder``, and is silent after."""

    def __init__(self, folder: Path, *, steps: int, phases: Phases, say: Callable[[str], None] = print) -> None:
        assert 1 <= steps <= MAX_STEPS, f"{steps} steps to profile"
        self._folder, self._phases, self._say = folder, phases, say
        self._recorded: list[StepInfo] = []
        self._seen = 0
        self._active = range(WAIT_STEPS + 1, WAIT_STEPS + steps + 1)  # of the steps seen, from 1
        self._written = False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT_STEPS - 1, warmup=1, active=steps, repeat=1),
            on_trace_ready=self._write,
        )
        phases.ranges = lambda name: record_function(RANGE + name)
        self._profile.start()

    def __call__(self, info: StepInfo) -> None:
        self._seen += 1
        if self._seen in self._active:
            self._recorded.append(info)
        if not self._written:
            self._profile.step()

    def close(self) -> None:
        """Write what there is of a run that ended early, or say that there is nothing."""
        if not self._written:
            self._profile.stop()  # calls _write where it was recording
        if not self._written:
            self._say(f"profile: nothing recorded, the run ended within its first {WAIT_STEPS} steps")

    def _write(self, finished: profile) -> None:
        self._written = True
        self._phases.ranges = nullcontext
        if not self._recorded:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        stem = f"step_{self._recorded[0].step:08d}"
        finished.export_chrome_trace(str(self._folder / f"{stem}.json.gz"))
        table = summary(finished.key_averages(), self._recorded)
        (self._folder / f"{stem}.txt").write_text(table + "\n", encoding="utf-8")
        self._say(f"{table}\nprofile: {self._folder / stem}.json.gz, to be opened at https://ui.perfetto.dev")


def summary(averages: Any, steps: list[StepInfo]) -> str:
    """The share of every phase, then the operators with the most time of their own."""
    total = sum(info.step_seconds for info in steps)
    lines = [f"{len(steps)} steps from {steps[0].step}, {total / len(steps):.4f} s each"]
    for name in steps[0].seconds:
        seconds = sum(info.seconds[name] for info in steps)
        if seconds:
            lines.append(f"  {name:<14} {seconds / total:>6.1%}  {seconds / len(steps):.4f} s")
    operators = [each for each in averages if not each.key.startswith((RANGE, "ProfilerStep"))]
    on_device = any(each.self_device_time_total for each in operators)

    def own_time(operator: Any) -> float:
        """Microseconds."""
        return float(operator.self_device_time_total if on_device else operator.self_cpu_time_total)

    operators.sort(key=own_time, reverse=True)
    all_time = max(1e-9, sum(map(own_time, operators)))
    lines.append(f"operators by their own time on the {'device' if on_device else 'CPU'}")
    for each in operators[:TOP_OPERATORS]:
        figures = f"{own_time(each) / all_time:>6.1%}  {own_time(each) / 1e3:>10.2f} ms  {each.count:>6} x"
        lines.append(f"  {figures}  {each.key[:70]}")
    return "\n".join(lines)
