"""Claim: every fault ends as docs/operations.md says, and loses nothing.

    python -m benchmarks.engine.faults [--only NAME ...]     writes benchmarks/results/engine_faults.json

Jobs of two ranks (ZeRO 2, fp32, a save every 4 steps), ten of each fault, at a step drawn anew each time. Faults are
put in from outside: files are cut, flipped or crowded out, processes killed or stopped, and for a bad batch a rank's
loader is wrapped before it starts. "Nothing lost" is measured: where the fault leaves the data alone, every loss of
every step equals that of a run that nothing happened to, bit for bit; where rows are skipped, those before the fault
do, no step is missing, and the rows are on record.

The spike comes at step 41 to 58 of 60, in steps of 16 rows. In a first form of this benchmark (8 rows, 40 steps, from
step 21 on, where this model's loss still falls fast) the guard saw a spike a step or more late, and skipped good rows.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.engine.kills import differences, newest_complete
from benchmarks.engine.ranks import Ranks, in_fork, preload, read_lines, write_run, write_stores
from benchmarks.engine.result import write_result

STEPS, ROWS, WORLD = 60, 16, 2
FIELDS: dict[str, Any] = {
    "deepspeed__zero_stage": 2,
    "checkpoint__every_steps": 4,
    "checkpoint__keep_last": 3,
    "eval__tokens_per_source": 512,
}


class Trial:
    """One run with one fault: its folders, the steps of the story, and what turned out wrong."""

    def __init__(self, folder: Path, name: str, draw: random.Random) -> None:
        self.folder, self.name, self.draw = folder, name, draw
        self.run, self.log = folder / name, folder / f"{name}.log"
        self.stores = {source: str(folder / "stores" / source) for source in ("general", "domain")}
        self.problems: list[str] = []
        self.facts: dict[str, Any] = {}

    def run_file(self, **fields: Any) -> str:
        return str(
            write_run(self.folder / f"{self.name}.yaml", self.stores, steps=STEPS, rows=ROWS, **{**FIELDS, **fields})
        )

    def start(self, arguments: list[str], before: Callable[[int], None] = lambda rank: None) -> Ranks:
        return Ranks(arguments, WORLD, self.log, before).start()

    def expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(f"{otherwise}; the log ends: {self.log.read_text()[-500:]}")

    def wait_for_step(self, step: int, still_runs: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while still_runs() and time.monotonic() < deadline:
            if any(line["step"] >= step for line in read_lines(self.run / "metrics.jsonl")):
                return
            time.sleep(0.005)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in read_lines(self.run / "events.jsonl") if line["event"] == name]

    def resume_to_the_end(self) -> None:
        codes = self.start(["--resume", str(self.run)]).wait()
        self.expect(codes == [0] * WORLD, f"resumed: exit codes {codes}")

    def expect_all_as_uninterrupted(self) -> None:
        self.problems += differences(self.run, self.folder / "whole")

    def supervised(self, **fields: Any) -> subprocess.Popen[bytes]:
        """`cpt train --supervise`, as a user types it."""
        command = [
            sys.executable,
            "-m",
            "cpt.cli",
            "train",
            self.run_file(**fields),
            "--nproc",
            str(WORLD),
            "--supervise",
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=self.log.open("ab"), stderr=subprocess.STDOUT, env=environment)

    def pid_of(self, rank: int) -> int:
        return int(json.loads((self.run / "heartbeats" / f"rank_{rank:05d}.json").read_text())["pid"])


# --- bad batches ------------------------------------------------------------------------------------------------------


def _wrap_loader(at_step: int, spoil: Callable[[Any, int], Any], rank: int) -> None:
    """In a rank, before it starts: batches of ``at_step`` go through ``spoil(batch, rank)``."""
    from cpt.data.loader import Loader

    real = Loader.step

    def step(self: Any, number: int, **options: Any) -> Any:
        batches = real(self, number, **options)
        return [spoil(batch, rank) for batch in batches] if number == at_step else batches

    Loader.step = step  # type: ignore[method-assign]


POISON = 3  # a run of this many equal ids marks the row whose loss is made NaN


def _poison_one_row(at_step: int, rank: int) -> None:
    """The first row of rank 1's micro-batches of one step gives NaN, however often it is asked."""
    import torch

    import cpt.train.trainer as trainer
    from cpt.train.losses import Losses

    poisoned: list[torch.Tensor] = []

    def mark(batch: Any, rank: int) -> Any:
        if rank == 1 and not poisoned:
            poisoned.append(batch.input_ids_BT[0].clone())
        return batch

    _wrap_loader(at_step, mark, rank)
    real = trainer.Trainer.__init__

    def init(self: Any, engine: Any, loader: Any, *, forward: Any, **rest: Any) -> None:
        def spoiled(model: Any, batch: Any) -> Any:
            losses = forward(model, batch)
            hit = [
                row
                for ids in poisoned
                for row in range(len(batch.input_ids_BT))
                if torch.equal(batch.input_ids_BT[row], ids)
            ]
            if not hit:
                return losses
            factor = torch.ones(len(batch.input_ids_BT), 1)
            factor[hit] = float("nan")
            return Losses(losses.total * factor.sum(), losses.per_token_BT * factor)

        real(self, engine, loader, forward=spoiled, **rest)

    trainer.Trainer.__init__ = init  # type: ignore[method-assign]


def nan_batch(trial: Trial) -> None:
    step = trial.draw.randrange(1, STEPS)
    codes = trial.start([trial.run_file()], partial(_poison_one_row, step)).wait()
    trial.expect(codes == [0] * WORLD, f"exit codes {codes}")
    _expect_skipped(trial, step, rows=1)


def _shuffle_labels_at_100_times_the_rate(at_step: int, rank: int) -> None:
    import torch

    import cpt.train.trainer as trainer
    from cpt.data.packing import IGNORE_INDEX

    def shuffled(batch: Any, rank: int) -> Any:
        generator = torch.Generator().manual_seed(at_step)
        counted = batch.labels_BT != IGNORE_INDEX
        labels = batch.labels_BT.clone()
        values = labels[counted]
        labels[counted] = values[torch.randperm(len(values), generator=generator)]
        return type(batch)(**{**vars(batch), "labels_BT": labels})

    _wrap_loader(at_step, shuffled, rank)
    real = trainer.Trainer.__init__

    def init(self: Any, engine: Any, loader: Any, *, job: Any, **rest: Any) -> None:
        rate = job.lr_at
        spiked = type(job)(
            **{**vars(job), "lr_at": lambda update: rate(update) * (100 if update == at_step + 1 else 1)}
        )
        real(self, engine, loader, job=spiked, **rest)

    trainer.Trainer.__init__ = init  # type: ignore[method-assign]


def spike_batch(trial: Trial) -> None:
    step = trial.draw.randrange(40, STEPS - 2)  # the curve is known by then
    codes = trial.start([trial.run_file()], partial(_shuffle_labels_at_100_times_the_rate, step)).wait()
    trial.expect(codes == [0] * WORLD, f"exit codes {codes}")
    _expect_skipped(trial, step, rows=None)


def _expect_skipped(trial: Trial, step: int, *, rows: int | None) -> None:
    """Steps are counted from 1 in records, from 0 in the loader."""
    path = trial.run / "skipped_rows.json"
    skipped = json.loads(path.read_text()) if path.exists() else {}
    found = skipped.get("rows", [])
    trial.facts |= {"step": step + 1, "rows_skipped": len(found), "rollbacks": len(trial.events("rollback"))}
    trial.expect(bool(found) and {row["step"] for row in found} == {step + 1}, f"skipped rows are {found}")
    trial.expect(rows is None or len(found) == rows, f"{len(found)} rows were skipped, {rows} were bad")
    expected = {line["step"]: line["loss"] for line in read_lines(trial.folder / "whole" / "metrics.jsonl")}
    losses = {line["step"]: line["loss"] for line in read_lines(trial.run / "metrics.jsonl")}  # the last of each
    trial.expect(set(losses) == set(expected), f"steps {sorted(set(expected) - set(losses))} are missing")
    trial.expect(all(losses[k] == expected[k] for k in expected if k <= step), "losses before the fault differ")
    last = json.loads((trial.run / "evals" / f"step_{STEPS:08d}.json").read_text())["groups"]
    whole = json.loads((trial.folder / "whole" / "evals" / f"step_{STEPS:08d}.json").read_text())["groups"]
    away = max(abs(last[group]["loss"] - whole[group]["loss"]) for group in whole)
    trial.facts["held_out_loss_away"] = round(away, 4)
    trial.expect(away < 0.1, f"held-out losses are {away:.3f} nats from the uninterrupted run's")


# --- files ------------------------------------------------------------------------------------------------------------


def truncated_shard(trial: Trial) -> None:
    """A store's shard loses its second half under the running job; it is put back, and the run resumed."""
    source = Path(shutil.copytree(trial.stores["domain"], trial.folder / f"{trial.name}_domain"))
    trial.stores["domain"] = str(source)
    shard = source / "train" / "tokens_00000.bin"
    whole = shard.read_bytes()
    job = trial.start([trial.run_file()])
    trial.wait_for_step(trial.draw.randrange(1, STEPS // 2), lambda: None in job.codes())
    os.truncate(shard, len(whole) // 2)
    codes = job.wait()
    trial.facts["exit_codes"] = codes
    trial.expect(set(codes) <= {2, 3} and str(shard.name) in trial.log.read_text(), f"exit codes {codes}")
    shard.write_bytes(whole)
    trial.resume_to_the_end()
    trial.expect_all_as_uninterrupted()


def corrupted_newest_checkpoint(trial: Trial) -> None:
    """Killed; then a byte in the middle of the newest checkpoint's largest file is flipped: its size is right."""
    job = trial.start([trial.run_file()])
    trial.wait_for_step(trial.draw.randrange(13, STEPS - 4), lambda: None in job.codes())
    job.send(signal.SIGKILL)
    job.wait()
    newest = trial.run / "checkpoints" / f"step_{newest_complete(trial.run):08d}"
    victim = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    with victim.open("r+b") as file:
        file.seek(victim.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 0x40]))
    trial.resume_to_the_end()
    resumed = trial.events("resume")
    told = json.dumps(resumed[-1].get("skipped_checkpoints", [])) if resumed else ""
    trial.expect(newest.name in told, f"the event does not name {newest.name}: {told}")
    trial.expect(bool(resumed) and resumed[-1]["step"] < int(newest.name.removeprefix("step_")), "it was used")
    trial.expect_all_as_uninterrupted()


def disk_full(trial: Trial) -> None:
    """The run lies on a small disk, which somebody else fills for a while in the middle of the run."""
    disk = trial.folder / f"{trial.name}_disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    try:
        trial.run = disk / trial.name
        job = trial.start([trial.run_file(run__dir=str(disk))])
        trial.wait_for_step(trial.draw.randrange(6, 12), lambda: None in job.codes())
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                pass  # full: that is what it is for
        deadline = time.monotonic() + 120  # metrics.jsonl lies on the full disk, the log does not
        while "step 24/" not in trial.log.read_text() and time.monotonic() < deadline and None in job.codes():
            time.sleep(0.01)
        ballast.unlink()
        codes = job.wait()
        trial.expect(codes == [0] * WORLD, f"exit codes {codes}")
        trial.facts["failed_saves"] = len(trial.events("checkpoint_failed"))
        trial.expect(bool(trial.events("checkpoint_failed")), "no save failed: the disk was not full")
        trial.expect(newest_complete(trial.run) == STEPS, "the last checkpoint is missing")
        _expect_no_other_losses(trial)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _expect_no_other_losses(trial: Trial) -> None:
    """A full disk may cost lines of metrics (said in the log), but no loss may differ."""
    expected = {line["step"]: line["loss_by_source"] for line in read_lines(trial.folder / "whole" / "metrics.jsonl")}
    found = read_lines(trial.run / "metrics.jsonl")
    trial.expect(all(expected[line["step"]] == line["loss_by_source"] for line in found), "other losses")
    trial.expect(bool(found) and found[-1]["step"] == STEPS, "the last step is not on record")


# --- processes --------------------------------------------------------------------------------------------------------


def rank_killed(trial: Trial) -> None:
    job = trial.supervised()
    trial.wait_for_step(trial.draw.randrange(2, STEPS - 4), lambda: job.poll() is None)
    os.kill(trial.pid_of(trial.draw.randrange(WORLD)), signal.SIGKILL)
    _expect_restart(trial, job)


def rank_stopped(trial: Trial) -> None:
    job = trial.supervised(guard__hang_seconds=4.0)
    trial.wait_for_step(trial.draw.randrange(2, STEPS - 4), lambda: job.poll() is None)
    rank = trial.draw.randrange(WORLD)
    os.kill(trial.pid_of(rank), signal.SIGSTOP)
    _expect_restart(trial, job)
    hangs = trial.events("hang")
    named = [each["rank"] for each in hangs[0]["silent"]] if hangs else []
    trial.expect(named == [rank], f"rank {rank} was stopped, the event names {named}")


def _expect_restart(trial: Trial, job: "subprocess.Popen[bytes]") -> None:
    broken = time.monotonic()
    code = job.wait(timeout=300)
    trial.facts["seconds_to_the_end"] = round(time.monotonic() - broken, 1)
    trial.expect(code == 0, f"exit code {code}")
    trial.expect(len(trial.events("restart")) == 1, f"{len(trial.events('restart'))} restarts")
    trial.expect(not _left_over(trial.name), "processes were left over")
    trial.expect_all_as_uninterrupted()


def _left_over(name: str) -> list[int]:
    mine = [process for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid()]
    return [process.pid for process in mine if f"{name}.yaml" in " ".join(process.info["cmdline"] or [])]


FAULTS: dict[str, Callable[[Trial], None]] = {
    "nan_batch": nan_batch,
    "spike_batch": spike_batch,
    "truncated_shard": truncated_shard,
    "rank_killed": rank_killed,
    "rank_stopped": rank_stopped,
    "disk_full": disk_full,
    "corrupted_newest_checkpoint": corrupted_newest_checkpoint,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", choices=FAULTS, nargs="+", default=list(FAULTS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_fork(partial(write_stores, folder / "stores"))
        whole = Trial(folder, "whole", random.Random(0))
        assert whole.start([whole.run_file()]).wait() == [0] * WORLD, whole.log.read_text()
        result = {fault: repeat(folder, fault, options) for fault in options.only}
    write_result("engine_faults.json", {"steps": STEPS, "world": WORLD, "faults": result})
    if any(each["passed"] != each["runs"] for each in result.values()):
        raise SystemExit("a fault did not end as documented")


def repeat(folder: Path, fault: str, options: argparse.Namespace) -> dict[str, Any]:
    trials = []
    for index in range(options.runs):
        trial = Trial(folder, f"{fault}_{index}", random.Random(f"{options.seed} {fault} {index}"))
        FAULTS[fault](trial)
        trials.append(trial)
        print(trial.name, "ok" if not trial.problems else trial.problems, trial.facts, flush=True)
        shutil.rmtree(trial.run, ignore_errors=True)
    failed = [{"run": trial.name, "problems": trial.problems} for trial in trials if trial.problems]
    return {
        "runs": len(trials),
        "passed": len(trials) - len(failed),
        "facts": [t.facts for t in trials],
        "failed": failed,
    }


if __name__ == "__main__":
    main()
