"""Claim: the sampler starts and seeks on 10^12 tokens and 1024 ranks in under 1 s and 150 MB, Python's start included.

A fresh process imports the sampler, builds a plan over a described store (a reader whose tokens are computed), packs
rank 0's first micro-batch and the one that holds row 10^8, and reports seconds and peak memory. For comparison a
second fresh process does what many loaders do: it shuffles an array of row numbers, for 1/32 of the same rows.

    python benchmarks/sampler_scale.py            # writes benchmarks/results/sampler_scale.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 10**12
SEQ_LEN = 4096
WORLD_SIZE = 1024
MICRO_BATCH_SIZE = 4
FAR_ROW = 10**8
FRACTION = 32  # the permutation of all rows would take 2 GB and minutes of a small machine
ROUNDS = 5


def peak_rss_mb() -> float:
    """This process alone; getrusage would carry over the parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM; run this benchmark on Linux")


def measure_sampler(started: float) -> dict[str, float]:
    import numpy as np

    from cpt.data.packing import concat_num_rows, concat_row
    from cpt.data.sampler import locate, rows_of_rank
    from cpt.plan import PlanSource, StageWish, build_plan

    class DescribedStore:
        """Documents of 1000 tokens; token p is p modulo 50,000."""

        def __init__(self, num_tokens: int) -> None:
            self.num_tokens = num_tokens

        def read(self, start: int, stop: int) -> np.ndarray:
            return np.arange(start, stop) % 50_000

        def document_starts(self, start: int, stop: int) -> np.ndarray:
            return np.arange(-(-start // 1000) * 1000, stop, 1000)

    imported = time.time()
    stores = {"web": DescribedStore(NUM_TOKENS * 9 // 10), "med": DescribedStore(NUM_TOKENS // 10)}
    rows = {name: concat_num_rows(store.num_tokens, SEQ_LEN) for name, store in stores.items()}
    sources = [
        PlanSource("web", "general", rows["web"], stores["web"].num_tokens, "described"),
        PlanSource("med", "domain", rows["med"], stores["med"].num_tokens, "described"),
    ]
    batch = WORLD_SIZE * MICRO_BATCH_SIZE
    wishes = [StageWish(NUM_TOKENS // 2, 0.9), StageWish(NUM_TOKENS // 2, 0.8)]
    plan, _ = build_plan(sources, wishes, seed=1, seq_len=SEQ_LEN, global_batch_rows=batch, max_epochs=4)
    planned = time.time()

    def read_step(step: int) -> int:
        chosen = rows_of_rank(plan, step, rank=0, world_size=WORLD_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
        at = locate(plan, chosen[0])
        pairs = zip(at.source_index.tolist(), at.row_in_source.tolist(), strict=True)
        packed = [concat_row(stores[sources[i].name], row, SEQ_LEN) for i, row in pairs]
        return sum(len(row.input_ids) for row in packed)

    assert read_step(0) == MICRO_BATCH_SIZE * SEQ_LEN, "the first batch is short"
    first = time.time()
    assert read_step(FAR_ROW // batch) == MICRO_BATCH_SIZE * SEQ_LEN, "the far batch is short"
    sought = time.time()
    for step in range(100):
        locate(plan, rows_of_rank(plan, step, rank=7, world_size=128, micro_batch_size=32))
    return {
        "rows": plan.num_rows,
        "start_and_import_seconds": imported - started,
        "plan_seconds": planned - imported,
        "first_batch_seconds": first - planned,
        "seek_seconds": sought - first,
        "total_seconds": sought - started,
        "locate_32_rows_milliseconds": (time.time() - sought) * 10,
        "peak_rss_mb": peak_rss_mb(),
    }


def measure_permutation(started: float) -> dict[str, float]:
    import numpy as np

    num_rows = NUM_TOKENS // SEQ_LEN // FRACTION
    order = np.random.default_rng(1).permutation(num_rows)
    assert order[0] != order[FAR_ROW // FRACTION], "a permutation repeats nothing"
    return {"rows": num_rows, "total_seconds": time.time() - started, "peak_rss_mb": peak_rss_mb()}


MEASUREMENTS: dict[str, Callable[[float], dict[str, float]]] = {
    "sampler": measure_sampler,
    "permutation": measure_permutation,
}


def in_fresh_process(name: str) -> dict[str, float]:
    """The median round by total time; the clock starts before the interpreter does."""
    rounds = []
    for _ in range(ROUNDS):
        command = [sys.executable, str(Path(__file__).resolve()), "--measure", name, "--started", repr(time.time())]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        found: dict[str, float] = json.loads(done.stdout)
        rounds.append(found)
    return sorted(rounds, key=lambda found: found["total_seconds"])[ROUNDS // 2]


def summarise(sampler: dict[str, float], permutation: dict[str, float]) -> dict[str, object]:
    return {
        "claim": "10^12 tokens, 1024 ranks: construct + first batch + seek to row 10^8 in under 1 s and 150 MB",
        "passed": sampler["total_seconds"] < 1 and sampler["peak_rss_mb"] < 150,
        "sampler": sampler,
        "permutation": permutation | {"of_all_rows": f"1/{FRACTION}"},
        "permutation_over_sampler_seconds": permutation["total_seconds"] / sampler["total_seconds"],
        "permutation_over_sampler_rss": permutation["peak_rss_mb"] / sampler["peak_rss_mb"],
        "median_of_rounds": ROUNDS,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sampler_scale.json")
    parser.add_argument("--measure", choices=sorted(MEASUREMENTS), help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](arguments.started)))
        return 0
    result = summarise(in_fresh_process("sampler"), in_fresh_process("permutation"))
    text = json.dumps(result, indent=1) + "\n"
    print(text, end="")
    arguments.out.write_text(text)
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
