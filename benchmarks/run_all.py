"""Every benchmark of this folder, one after the other: `make bench`. Each says in its own docstring what it claims
and where its result goes.
"""

import subprocess
import sys
from pathlib import Path

CORPORA = Path(__file__).resolve().parents[2] / "shared" / "data" / "corpora"
BENCHMARKS = ("sampler_scale", "step_overhead", "quickstart_run")
NEEDS_GPU = ("gpu_throughput",)
NEEDS_CORPORA = ("tokenize_throughput",)


def main() -> None:
    import torch

    corpora = NEEDS_CORPORA if CORPORA.is_dir() else ()
    chosen = [*BENCHMARKS, *corpora, *(NEEDS_GPU if torch.cuda.is_available() else ())]
    for name in chosen:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    for name in {*NEEDS_GPU, *NEEDS_CORPORA} - set(chosen):
        print(f"== {name} skipped: needs {'a GPU' if name in NEEDS_GPU else CORPORA}")


if __name__ == "__main__":
    main()
