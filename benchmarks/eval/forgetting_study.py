"""Does the evaluation see forgetting where there is some, and call it noise where there is none?

    python -m benchmarks.eval.forgetting_study       writes benchmarks/results/eval_forgetting_study.json

stories260K, a real pre-trained model of 260 thousand parameters, is continued on med_qa (medicine) at one token budget:
without replay, and with a half of the tokens from en_tinystories, text like that of its pre-training. Each end point is
evaluated on BLiMP with `cpt eval --suite` and compared with the base by `cpt eval compare`; the report is asked for its
verdict. A model this small is at chance on most of BLiMP, and what it cannot do it cannot forget: the base alone is
screened on the first 100 items of all 67 subsets, and those where it is right on 65% or more are measured, on other
items. (Unscreened, one subset of each phenomenon, the base is right on 51%, and neither run moved that significantly.)
Training is skipped where the folder holds it from a call before.

Bars: without replay, accuracy on BLiMP and the loss on en_tinystories get worse significantly, and compare and report
name it in their words and figures; with replay each is within noise, or small: under a fifth of what is lost without.
Needs ../shared/data, or CPT_SHARED_DATA.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
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
TOKENS, BATCH_TOKENS = 1_048_576, 2048  # with 81,920 tokens BLiMP does not move yet
SCREENED, KNOWN = 100, 0.65  # items of each subset that the base is screened on, and the accuracy it must have there
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


def write_suite(folder: Path, name: str, subsets: list[str], items: slice) -> Path:
    """These items of each subset of BLiMP, as tasks of lm_eval."""
    tasks = []
    for subset in subsets:
        lines = (SHARED / "evals" / "blimp" / f"{subset}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        file = folder / name / f"{subset}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(lines[items]), encoding="utf-8")
        tasks.append({"task": f"blimp_{subset}", "data": {"test": str(file)}})
    path = folder / f"{name}.yaml"
    suite = {"name": name, "batch_size": 64, "groups": {"general": tasks}, "copying_probe": name == "blimp"}
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def choose_subsets(folder: Path, run_dir: Path) -> dict[str, float]:
    """Subsets that the base can do, with its accuracy on items that nothing else is measured on."""
    from cpt.eval.suite import load_suite
    from cpt.eval_checkpoints import SuiteRun, evaluate_base

    every = sorted(path.stem for path in (SHARED / "evals" / "blimp").glob("*.jsonl"))
    suite = load_suite(write_suite(folder, "screen", every, slice(0, SCREENED)))
    record = evaluate_base(run_dir, SuiteRun(suite, "cpu", folder / "cache")).record
    found = {name.removeprefix("blimp_"): task.value or 0.0 for name, task in record.tasks.items()}
    shutil.rmtree(run_dir / "evals" / "screen")  # the run is judged by one suite
    return {name: accuracy for name, accuracy in found.items() if accuracy >= KNOWN}


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

    of_lost = " ".join(line for line in verdict if "no_replay: " in line)
    accuracy = f"{lost['blimp']['before']:.1%} to {lost['blimp']['after']:.1%}"
    return {
        "blimp_drops_without_replay": lost["blimp"]["word"] == "drop",
        "stories_drop_without_replay": lost["en_tinystories"]["word"] == "drop",
        "report_names_the_rise_of_the_loss": f"no_replay: {lost['en_tinystories']['value']:.3f} nats" in of_lost,
        "report_calls_blimp_what_compare_does": f"{lost['blimp']['word']})" in of_lost and accuracy in of_lost,
        "blimp_with_replay_within_noise_or_small": kept["blimp"]["word"] == "within noise" or small("blimp"),
        "stories_with_replay_within_noise_or_small": kept["en_tinystories"]["word"] != "drop"
        or small("en_tinystories"),
    }


def train(folder: Path, options: argparse.Namespace) -> None:
    """Both continuations, from nothing."""
    shutil.rmtree(folder)
    folder.mkdir()
    build_stores(folder, options.documents)
    for name, share in RUNS.items():
        print(f"{name}: {options.tokens:,} tokens", flush=True)
        cpt(folder, "train", write_run_file(folder, name, share, options.tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark_forgetting")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each continuation")
    parser.add_argument("--limit", type=int, default=300, help="items of each subset of BLiMP")
    parser.add_argument("--documents", type=int, default=None, help="of each corpus; default: all")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    last = options.tokens // BATCH_TOKENS
    run_dirs = [folder / "runs" / name for name in RUNS]
    ends = [run_dir / "checkpoints" / f"step_{last:08d}" for run_dir in run_dirs]
    if not all(end.is_dir() for end in ends):
        train(folder, options)
    chosen = choose_subsets(folder, run_dirs[0])
    print(f"BLiMP, {options.limit} items of {len(chosen)} subsets that the base can do", flush=True)
    suite = write_suite(folder, "blimp", sorted(chosen), slice(SCREENED, SCREENED + options.limit))
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
        "subsets_that_the_base_can_do": chosen,
        "settings": {"tokens": options.tokens, "items_per_subset": options.limit, "share_general": RUNS},
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version()},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(not result["passed"])


if __name__ == "__main__":
    main()
