"""Claim: a checkpoint of any ZeRO stage and world size goes on under any other, with the loss it would have had.

    python -m benchmarks.engine.resume_pairs      writes benchmarks/results/engine_resume_pairs.json

Saves after three steps under every (stage, world) of {0,1,2,3} x {1,2,4}, resumes each of the 12 under all 12: 144
real jobs of real processes, fp32, packed documents of two sources. Micro-batch and loader threads change along with
the topology. The next loss is compared with that of the run that was not interrupted (bar 1e-6 relative, per source
too), and so are the tokens of each source, which name the rows; the two losses after it show the optimizer's state.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.engine.ranks import Ranks, in_fork, preload, read_lines, write_run, write_stores
from benchmarks.engine.result import write_result

STAGES, WORLDS = (0, 1, 2, 3), (1, 2, 4)
SAVED_AT, STEPS = 3, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--worlds", type=int, nargs="+", default=WORLDS)
    options = parser.parse_args()
    preload()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), list(itertools.product(options.stages, options.worlds)))
    result["seconds"] = round(time.perf_counter() - started)
    write_result("engine_resume_pairs.json", result)
    if result["passed"] != result["pairs"]:
        raise SystemExit(f"{result['pairs'] - result['passed']} pairs failed: {json.dumps(result['failed'])}")


def measure(folder: Path, topologies: list[tuple[int, int]]) -> dict[str, Any]:
    stores: dict[str, str] = {name: str(folder / "stores" / name) for name in ("general", "domain")}
    in_fork(partial(write_stores, folder / "stores"))
    for stage, world in topologies:
        fields = {"deepspeed__zero_stage": stage, "checkpoint__every_steps": SAVED_AT, "checkpoint__keep_last": 9}
        run_file = write_run(folder / f"from_{stage}_{world}.yaml", stores, steps=STEPS, **fields)
        codes = Ranks([str(run_file)], world, folder / "log").start().wait()
        assert codes == [0] * world, (folder / "log").read_text()[-3000:]
    errors, later, failed = [], [], []
    for (stage, world), (to_stage, to_world) in itertools.product(topologies, topologies):
        name = f"{stage}x{world} -> {to_stage}x{to_world}"
        try:
            worst_next, worst_later = compare(folder, (stage, world), (to_stage, to_world))
        except RuntimeError as error:
            failed.append({"pair": name, "reason": str(error)})
            continue
        errors.append(worst_next)
        later.append(worst_later)
        if not worst_next <= 1e-6:
            failed.append({"pair": name, "relative_error": worst_next})
        print(f"{name}: next loss {worst_next:.1e}, the two after it {worst_later:.1e}", flush=True)
    pairs = len(topologies) ** 2
    worst = {"worst_relative_error": max(errors), "worst_of_the_two_after": max(later)}
    return {"pairs": pairs, "passed": pairs - len(failed), **worst, "bar": 1e-6, "failed": failed}


def compare(folder: Path, source: tuple[int, int], target: tuple[int, int]) -> tuple[float, float]:
    """Worst relative difference of losses right after the resume, and in the steps after that."""
    whole = folder / "from_{}_{}".format(*source)
    copy = folder / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    (copy / "metrics.jsonl").unlink()
    stage, world = target
    micro = 8 // world // (1 + stage % 2)
    changes = [f"deepspeed.zero_stage={stage}", f"train.micro_batch_size={micro}", f"data.loader_threads={1 + stage}"]
    codes = Ranks(["--resume", str(copy), *changes], world, folder / "log").start().wait()
    if codes != [0] * world:
        raise RuntimeError(f"exit codes {codes}: {(folder / 'log').read_text()[-400:]}")
    expected = {line["step"]: line for line in read_lines(whole / "metrics.jsonl")}
    found = read_lines(copy / "metrics.jsonl")
    if [line["step"] for line in found] != list(range(SAVED_AT + 1, STEPS + 1)):
        raise RuntimeError(f"steps {[line['step'] for line in found]}")
    differences = []
    for line in found:
        wanted = expected[line["step"]]
        if line["tokens_by_source"] != wanted["tokens_by_source"]:
            raise RuntimeError(f"step {line['step']}: other rows, {line['tokens_by_source']}")
        pairs = [(line["loss"], wanted["loss"])]
        pairs += [(line["loss_by_source"][name], loss) for name, loss in wanted["loss_by_source"].items()]
        differences.append(max(abs(a - b) / abs(b) for a, b in pairs))
    return differences[0], max(differences[1:])


if __name__ == "__main__":
    main()
