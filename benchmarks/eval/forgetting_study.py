"""Does the evaluation see forgetting where there is some, and call it noise where there is none?

    python -m benchmarks.eval.forgetting_study       writes benchmarks/results/eval_forgetting_study.json

stories260K, a real pre-trained model of 260 thousand parameters, is continued on med_qa (medicine) at one token budget:
without replay, and with a half of the tokens from en_tinystories, text like that of its pre-training. Each end point is
evaluated on BLiMP with `cpt eval --suite` and compared with the base by `cpt eval compare`; the report is asked for its
verdict. Nothing is chosen by its outcome: of each of BLiMP's phenomena the first subset by name, the first 200 items.

Bars: without replay, accuracy on BLiMP and the loss on en_tinystories get worse significantly, and compare and report
name it; with replay each is within noise, or small: under a fifth of what is lost without.
Needs ../shared/data, or CPT_SHARED_DATA.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
import zstandard

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "eval_forgetting_study.json"
SHARED = Path(os.environ.get("CPT_SHARED_DATA", ROOT.parent / "shared" / "data"))
WEIGHTS = SHARED / "weights" / "stories260K"
RUNS = {"no_replay": 0.0, "replay": 0.5}  # share of general tokens
CORPORA = {"stories": ("en_tinystories", "general"), "medicine": ("med_qa", "medicine")}
TOKENS, BATCH_TOKENS = 81_920, 2048
SMALL = 0.2  # of what is lost without replay


def cpt(folder: Path, *arguments: object, seconds: int = 1800) -> str:
    """`cpt ARGUMENTS`; what it printed, or the end of this benchmark."""
    command = [sys.executable, "-m", "cpt.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build_stores(folder: Path, documents: int | None) -> None:
    for source, (corpus, domain) in CORPORA.items():
        file = folder / f"{source}.jsonl"
        with zstandard.open(SHARED / "corpora" / corpus / "train.jsonl.zst", "rt", encoding="utf-8") as lines:
            file.write_text(
                "".join(line for number, line in enumerate(lines) if documents is None or number < documents)
            )
        store = ["--out", folder / "stores" / source, "--source", source, "--domain", domain]
        cpt(folder, "data", "tokenize", "--input", file, "--tokenizer", WEIGHTS, *store, "--heldout-fraction", 0.05)


def write_run_file(folder: Path, name: str, share: float, tokens: int) -> Path:
    steps = tokens // BATCH_TOKENS
    raw = {
        "run": {"name": name, "dir": str(folder / "runs")},
        "model": {"init_from": str(WEIGHTS)},
        "data": {"stores": {source: str(folder / "stores" / source) for source in CORPORA}, "seq_len": 512},
        "replay": {"share_general": share},
        "train": {
            "tokens": tokens,
            "global_batch_tokens": BATCH_TOKENS,
            "micro_batch_size": 4,
            "peak_lr": 2e-3,
            "schedule": {"name": "rewarm_cosine", "warmup_steps": max(1, steps // 20)},
            "precision": "fp32",
        },
        "eval": {
            "at_steps": [step for step in (4, 16) if step < steps],
            "tokens_per_source": 32_768,
        },
        "log": {"wandb": "disabled"},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return file


def choose_subsets() -> list[str]:
    """The first subset by name of each of BLiMP's phenomena."""
    chosen: dict[str, str] = {}
    for path in sorted((SHARED / "evals" / "blimp").glob("*.jsonl")):
        with path.open(encoding="utf-8") as lines:
            chosen.setdefault(json.loads(next(lines))["linguistics_term"], path.stem)
    return sorted(chosen.values())


def write_suite(folder: Path, limit: int) -> Path:
    subsets = choose_subsets()
    tasks = [
        {"task": f"blimp_{name}", "data": {"test": str(SHARED / "evals" / "blimp" / f"{name}.jsonl")}, "limit": limit}
        for name in subsets
    ]
    file = folder / "blimp.yaml"
    suite = {"name": "blimp", "batch_size": 64, "groups": {"general": tasks}, "copying_probe": True}
    file.write_text(yaml.safe_dump(suite, sort_keys=False))
    return file


def told(row: dict[str, Any]) -> dict[str, Any]:
    """One row of a comparison, rounded."""
    change = row["change"]
    figures = {name: change[name] for name in ("before", "after", "value", "low", "high", "stderr")}
    found = {name: None if value is None else round(value, 4) for name, value in figures.items()}
    return {**found, "corrected_p": row["corrected_p"], "word": row["word"], "units": change["units"]}


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """What compare says of one run: both verdict lines, and how many of BLiMP's subsets moved."""
    [general], [stories] = (
        [row for row in run[family] if row["name"] == "general"] for family in ("groups", "source_groups")
    )
    words = [row["word"] for row in run["tasks"]]
    return {
        "blimp": told(general),
        "en_tinystories": told(stories),
        "medicine": told(next(row for row in run["sources"] if row["name"] == "medicine")),
        "copying": {row["metric"]: told(row) for row in run["copying"]},
        "blimp_subsets": {word: words.count(word) for word in ("drop", "gain", "within noise", "not tested")},
        "notes": run["notes"],
    }


def judge(runs: dict[str, dict[str, Any]], verdict: list[str]) -> dict[str, bool]:
    lost, kept = runs["no_replay"], runs["replay"]

    def small(name: str) -> bool:
        return abs(kept[name]["value"]) < SMALL * abs(lost[name]["value"])

    return {
        "blimp_drops_without_replay": lost["blimp"]["word"] == "drop",
        "stories_drop_without_replay": lost["en_tinystories"]["word"] == "drop",
        "report_names_the_drop": any("no_replay" in line for line in verdict),
        "blimp_with_replay_within_noise_or_small": kept["blimp"]["word"] == "within noise" or small("blimp"),
        "stories_with_replay_within_noise_or_small": kept["en_tinystories"]["word"] != "drop"
        or small("en_tinystories"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark_forgetting")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each continuation")
    parser.add_argument("--limit", type=int, default=200, help="items of each subset of BLiMP")
    parser.add_argument("--documents", type=int, default=None, help="of each corpus; default: all")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    folder = options.folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.perf_counter()
    build_stores(folder, options.documents)
    suite = write_suite(folder, options.limit)
    run_dirs = [folder / "runs" / name for name in RUNS]
    for name, share in RUNS.items():
        print(f"{name}: {options.tokens:,} tokens", flush=True)
        cpt(folder, "train", write_run_file(folder, name, share, options.tokens))
    print(f"BLiMP, {options.limit} items of each subset", flush=True)
    last = options.tokens // BATCH_TOKENS
    ends = [run_dir / "checkpoints" / f"step_{last:08d}" for run_dir in run_dirs]
    cpt(folder, "eval", *ends, "--suite", suite, "--device", "cpu", "--cache", folder / "cache")
    compared = json.loads(cpt(folder, "eval", "compare", *run_dirs, "--baseline", "base", "--json"))
    report = json.loads(cpt(folder, "report", *run_dirs, "--json"))
    runs = {run["run"]: summary(run) for run in compared["runs"]}
    bars = judge(runs, report["verdict"])
    gate = subprocess.run(
        [sys.executable, "-m", "cpt.cli", "eval", "gate", run_dirs[0], "--require", "general_forgetting.high <= 0.02"],
        cwd=folder, capture_output=True, timeout=300,
    )  # fmt: skip
    result = {
        "runs": runs,
        "verdict_of_the_report": report["verdict"],
        "gate_exit_code_without_replay": gate.returncode,
        "bars": bars,
        "passed": all(bars.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "settings": {"tokens": options.tokens, "items_per_subset": options.limit, "share_general": RUNS},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
