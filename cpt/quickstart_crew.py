"""Who does the quickstart's work: forks of this process, two trainings at a time with one core each.

A training imports for longer than the quickstart's small models train. So this process imports what a training needs
once and computes nothing itself: every training, and every other stage, is a fork of it. Where there may be a GPU a
training gets a process of its own, for a GPU's driver does not survive a fork. Both run ``python -m cpt.train.main``
with the arguments that a user would type. Owns the processes of a stage, their log files and lines of progress; passes
SIGTERM and Ctrl-C on, and raises SystemExit when all have saved and ended.
"""

import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpt.exit_codes import EXIT_STOPPED
from cpt.failures import explain, leave
from cpt.planner.pilot_runs import Launch, Running, StopRequests, environment_of, launch_process
from cpt.report.reading import parse_object
from cpt.rundir import RunDir

SLOTS = 2
POLL_SECONDS = 0.1
TOLD_PARTS = 4  # lines of progress of one training
INHERITED = 1024  # file descriptors below it may be open here
PRELOADED = ("cpt.run", "deepspeed", "transformers.models.llama.modeling_llama")
GPU_DEVICES = ("nvidiactl", "dxg", "kfd")
STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT}
FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Training:
    """One run: what ``cpt.train.main`` is given, and where its output goes."""

    rundir: RunDir
    arguments: tuple[str, ...]
    num_steps: int
    log: Path

    @property
    def name(self) -> str:
        return self.rundir.root.name


class Fork:
    """A forked process with the methods of ``subprocess.Popen`` that a pool needs."""

    def __init__(self, work: Callable[[], None]) -> None:
        # Held back until the fork has its own handlers: taken by ours it would be lost.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._process = FORK.Process(target=_as_own_process, args=(work,))
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None and self._process.pid is not None:
            os.kill(self._process.pid, number)

    def terminate(self) -> None:
        self._process.terminate()

    def wait(self) -> int:
        self._process.join()
        return self._process.exitcode or 0


def _as_own_process(work: Callable[[], None]) -> None:
    os.setsid()  # Ctrl-C reaches it once, through us
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        work()
    except Exception as error:
        code, message = explain(error)
        print(message, file=sys.stderr, flush=True)
        leave(code)
    except SystemExit as ended:
        leave(ended.code if isinstance(ended.code, int) else int(ended.code is not None))
    leave(0)


def in_fork(work: Callable[[], None]) -> None:
    """Do a stage's work in a fork, so that no thread pool of it stays in this process.

    Raises:
        SystemExit: with its exit code, if it did not end well; it has said why.
    """
    stop = StopRequests()
    with stop.listen():
        running = Running(Fork(work), slot=0)
        while (code := running.process.poll()) is None:
            stop.pass_on(running)
            time.sleep(POLL_SECONDS)
    if stop.count:
        end_stopped()
    if code:
        raise SystemExit(code if code > 0 else 128 - code)


def end_stopped() -> None:
    print("stopped; the same command goes on from here", flush=True)
    raise SystemExit(EXIT_STOPPED)


def launcher() -> Launch:
    """How trainings are started here; imports what they need if they are to be forks."""
    if any((Path("/dev") / name).exists() for name in GPU_DEVICES):
        return launch_process
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # said, so that DeepSpeed does not warn about having found no other
    for name in PRELOADED:
        importlib.import_module(name)
    return launch_fork


def launch_fork(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Fork:
    """``python -m MODULE ARGUMENTS`` without the start of Python."""
    *_, module = command[:3]

    def work() -> None:
        os.closerange(3, INHERITED)  # such as locks, which a fork that outlives us must not hold
        _write_to(log)
        os.environ.update(environment)
        if torch := sys.modules.get("torch"):  # it read the environment when it was imported
            torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
        sys.argv = list(command[2:])
        runpy.run_module(module, run_name="__main__", alter_sys=True)

    return Fork(work)


def _write_to(log: Path) -> None:
    with log.open("ab") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for name, number in (("stdout", 1), ("stderr", 2)):  # as a new process would open them, line by line
        binary = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(binary, encoding="utf-8", line_buffering=True))


def train_all(trainings: Sequence[Training]) -> None:
    """Train what is given, two at a time; returns when all are finished.

    Raises:
        SystemExit: 143, after a signal. RuntimeError: a training failed; the others have ended before.
    """
    if not trainings:
        return
    launch, stop = launcher(), StopRequests()
    waiting, running, told = list(trainings), dict[str, Running](), dict[str, int]()
    failed: dict[str, int] = {}
    with stop.listen():
        try:
            while running or (waiting and not stop.count and not failed):
                if waiting and len(running) < SLOTS and not stop.count and not failed:
                    training = waiting.pop(0)
                    running[training.name] = _start(training, launch, {one.slot for one in running.values()})
                for one in running.values():
                    stop.pass_on(one)
                time.sleep(POLL_SECONDS)
                _tell([training for training in trainings if training.name in running], told)
                ended = {name: code for name, one in running.items() if (code := one.process.poll()) is not None}
                failed |= {name: code for name, code in ended.items() if code}
                for name in ended:
                    del running[name]
                _tell_ended([training for training in trainings if ended.get(training.name) == 0])
        finally:  # an error here must leave no child behind
            for one in running.values():
                one.process.terminate()
                one.process.wait()
    if stop.count:
        end_stopped()
    if failed:
        logs = ", ".join(str(training.log) for training in trainings if training.name in failed)
        codes = ", ".join(f"{name} ended with exit code {code}" for name, code in failed.items())
        raise RuntimeError(f"training failed: {codes}; see {logs}. Run the same command again")


def _start(training: Training, launch: Launch, taken: set[int]) -> Running:
    slot = min(set(range(SLOTS)) - taken)
    command = [sys.executable, "-m", "cpt.train.main", *training.arguments]
    training.log.parent.mkdir(exist_ok=True)
    return Running(launch(command, training.log, environment_of(slot, slots=SLOTS)), slot)


def _tell(trainings: Sequence[Training], told: dict[str, int]) -> None:
    """A line per training and quarter of its steps."""
    for training in trainings:
        record = _last_record(training.rundir.metrics)
        part = TOLD_PARTS * int(record.get("step", 0)) // training.num_steps
        if part > told.setdefault(training.name, 0) and part < TOLD_PARTS:
            told[training.name] = part
            step = f"step {record['step']} of {training.num_steps}"
            print(f"      {training.name}: {step}, training loss {record['loss']:.3f}", flush=True)


def _tell_ended(trainings: Sequence[Training]) -> None:
    for training in trainings:
        groups = json.loads(training.rundir.eval_file(training.num_steps).read_bytes())["groups"]
        losses = ", ".join(f"{group} {groups[group]['loss']:.3f}" for group in ("general", "domain"))
        print(f"      {training.name}: finished, held-out loss {losses}", flush=True)


def _last_record(metrics: Path) -> dict[str, float]:
    """The last whole line; empty before there is one."""
    lines = metrics.read_bytes().split(b"\n")[:-1] if metrics.exists() else []
    return (parse_object(lines[-1]) if lines else None) or {}
