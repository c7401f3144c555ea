"""Claim: pilots that cost a tenth of a grid search find a share that is as good as the grid's best.

On the embedded corpus (English prose to Python code) and the quickstart's base: eleven full runs at general shares 0,
0.1 to 1, against four pilot shares with three token budgets each, the longest a fifth of the full run. From the pilots
`cpt plan recommend` picks the share with the lowest domain loss whose general loss stays within a tolerance of the
base; a twelfth full run at that share measures what it is worth. The best share of the grid under the same bound is
read off the eleven measured losses, linearly between them. Regret: domain loss above that best, over the domain gain.

Needs what `cpt quickstart` left (base and stores). About 25 minutes on two cores; resumable, each run is kept.

    python -m benchmarks.planner.embedded_regret [--quickstart runs/quickstart]   # writes results/planner_regret.json
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cpt.planner.observations import Observations, read_observations

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benchmarks" / "results" / "planner_regret.json"
BATCH_TOKENS = 2048
FULL_STEPS = 300
PILOT_STEPS = (21, 42, 63)  # evenly spaced: the re-warming shock of the first dozen steps bends a fit
GRID_SHARES = [round(0.1 * i, 1) for i in range(11)]
PILOT_SHARES = [0.05, 0.15, 0.35, 0.7]
TOLERANCES = (0.03, 0.05, 0.1)


def pilot_file(folder: Path, quickstart: Path, name: str, shares: list[float], steps: tuple[int, ...]) -> Path:
    """Pilots, the grid of full runs, and the twelfth run: all by the trainer, only shares and budgets differ."""
    stores = {"general": str(quickstart / "stores" / "prose"), "domain": str(quickstart / "stores" / "code")}
    template = {
        "run": {"name": "template", "dir": str(folder)},
        "model": {"init_from": str(quickstart / "base_hf")},
        "data": {"stores": stores, "seq_len": 256},
        "train": {
            "tokens": FULL_STEPS * BATCH_TOKENS,
            "global_batch_tokens": BATCH_TOKENS,
            "micro_batch_size": 8,
            "peak_lr": 3e-3,
            "precision": "fp32",
        },
        "eval": {"tokens_per_source": 16_384},
        "log": {"every_steps": 20, "wandb": "disabled"},
    }
    (folder / "template.yaml").write_text(yaml.safe_dump(template))
    pilots = {
        "name": name,
        "dir": str(folder),
        "run": str(folder / "template.yaml"),
        "shares_general": shares,
        "budgets": [count * BATCH_TOKENS for count in steps],
        "evals_per_run": 5,
    }
    file = folder / f"pilots_{name}.yaml"
    file.write_text(yaml.safe_dump({"pilots": pilots}))
    return file


def run_grid(file: Path) -> tuple[Observations, float]:
    """Run it, and return what it measured and its training FLOPs."""
    facts = cpt("plan", "pilots", str(file), "--json")
    return read_observations(Path(facts["observations"])), float(facts["flops"])


def cpt(*arguments: str) -> Any:
    command = [sys.executable, "-m", "cpt.cli", *arguments]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def final_losses(observations: Observations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share, general and domain loss at the end of the full runs, by share."""
    ends = observations.tokens == FULL_STEPS * BATCH_TOKENS
    order = np.argsort(observations.shares["general"][ends])
    columns = observations.shares["general"], observations.losses["general"], observations.losses["domain"]
    share, general, domain = (column[ends][order] for column in columns)
    return share, general, domain


def judge(folder: Path, quickstart: Path, pilots: Path, grid: Observations, tolerance: float) -> dict[str, Any]:
    asked = ["--tokens", str(FULL_STEPS * BATCH_TOKENS), "--tolerance", str(tolerance)]
    out = folder / f"plan_{tolerance:g}.json"
    advised = cpt("plan", "recommend", str(pilots), *asked, "--out", str(out), "--json")
    share = round(float(advised["share_general"]), 4)
    measured, _ = run_grid(pilot_file(folder, quickstart, f"advised_{tolerance:g}", [share], (FULL_STEPS,)))
    _, general, domain = (column[0] for column in final_losses(measured))
    shares, grid_general, grid_domain = final_losses(grid)
    base = {name: next(iter(grid.base_losses(name).values()))[1] for name in ("general", "domain")}
    limit = base["general"] * (1 + tolerance)
    fine = np.linspace(0, 1, 10_001)
    kept = np.interp(fine, shares, grid_general) <= limit
    best = int(np.argmin(np.where(kept, np.interp(fine, shares, grid_domain), np.inf)))
    best_domain = float(np.interp(fine[best], shares, grid_domain))
    on_grid = grid_general <= limit
    gain = base["domain"] - best_domain
    promised = {key: advised["predicted"][f"interval_{key}"] for key in ("general", "domain")}
    return {
        "tolerance": tolerance,
        "advised_share": share,
        "interval": advised["interval"],
        "law": advised["law"],
        "best_share": float(fine[best]),
        "best_share_on_the_grid": float(shares[on_grid][np.argmin(grid_domain[on_grid])]),
        "domain_gain": gain,
        "regret_nats": float(domain) - best_domain,
        "regret_of_gain": (float(domain) - best_domain) / gain,
        "general_above_limit_nats": max(0.0, float(general) - limit),
        "predicted": advised["predicted"],
        "measured": {"loss_general": float(general), "loss_domain": float(domain)},
        "measured_inside": {
            name: bool(promised[name][0] <= value <= promised[name][1])
            for name, value in (("general", float(general)), ("domain", float(domain)))
        },
        "regret_of_rules": {
            line["name"]: rule(line["share_general"], (shares, grid_general, grid_domain), limit, best_domain)
            for line in advised["baselines"]
            if line["share_general"] is not None
        },
    }


def rule(share: float, grid: tuple[np.ndarray, np.ndarray, np.ndarray], limit: float, best: float) -> dict[str, float]:
    """What a rule of thumb would have cost, from the measurements of the grid (share, general and domain loss)."""
    shares, general, domain = grid
    return {
        "share_general": share,
        "regret_nats": float(np.interp(share, shares, domain)) - best,
        "general_above_limit_nats": max(0.0, float(np.interp(share, shares, general)) - limit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_regret"))
    options = parser.parse_args()
    quickstart, folder = options.quickstart.absolute(), options.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    pilots, pilot_flops = run_grid(pilot_file(folder, quickstart, "pilots", PILOT_SHARES, PILOT_STEPS))
    grid, grid_flops = run_grid(pilot_file(folder, quickstart, "grid", GRID_SHARES, (FULL_STEPS,)))
    share, general, domain = final_losses(grid)
    result = {
        "claim": "regret <= 1% of the domain gain under the same general bound; pilots <= 10% of the grid's cost",
        "machine": f"{platform.machine()}, 2 cores, Python {platform.python_version()}",
        "full_run_tokens": FULL_STEPS * BATCH_TOKENS,
        "pilot_cost_over_grid": pilot_flops / grid_flops,
        "grid": [
            {"share_general": float(s), "loss_general": float(g), "loss_domain": float(d)}
            for s, g, d in zip(share, general, domain, strict=True)
        ],
        "by_tolerance": [judge(folder, quickstart, pilots.path, grid, tolerance) for tolerance in TOLERANCES],
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
