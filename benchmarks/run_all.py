"""Every benchmark of this folder, one after the other: `make bench`. Each says in its own docstring what it claims
and where its result goes.
"""

import subprocess
import sys
from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
BENCHMARKS = (
    *("sampler_scale", "step_overhead", "quickstart_run", "planner.dcpt_recovery", "data.fuzz"),
    *("launch.preflight", "eval.watchers", "eval.report_size"),
)
NEEDS_GPU = ("gpu.throughput",)
NEEDS_CORPORA = (
    *("data.tokenize_memory", "data.kills", "data.packing", "data.clean_rules", "data.extend_tokenizer"),
    *("eval.loss_against_transformers", "eval.forgetting_study", "eval.against_lm_eval", "eval.suite_throughput"),
)
NEEDS_PEERS = ("data.tokenize_speed", "data.minhash", "data.decontaminate", "data.ngram")  # by hand: see their --help
NEEDS_HOSTS = ("launch.overhead", "launch.faults")  # by hand: half an hour on a machine that does nothing else
NEEDS_MEASUREMENTS = ("planner.pythia", "planner.regmix", "planner.lr_curves")
NEEDS_QUICKSTART = ("planner.embedded_regret",)


def main() -> None:
    import torch

    needs = (
        (NEEDS_CORPORA, SHARED / "data" / "corpora"),
        (NEEDS_MEASUREMENTS, SHARED / "planner_data"),
        (NEEDS_QUICKSTART, Path("runs/quickstart/base_hf")),
    )
    chosen = [*BENCHMARKS, *(NEEDS_GPU if torch.cuda.is_available() else ())]
    for names, folder in needs:
        chosen += names if folder.is_dir() else ()
    for name in chosen:
        print(f"== {name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
    for names, wanted in (
        *needs,
        (NEEDS_GPU, "a GPU"),
        (NEEDS_PEERS, "an environment with its rivals"),
        (NEEDS_HOSTS, "root"),
    ):
        for name in set(names) - set(chosen):
            print(f"== {name} skipped: needs {wanted}")


if __name__ == "__main__":
    main()
