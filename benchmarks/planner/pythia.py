"""Claim: from four pilot shares the planner finds the critical share of general data, and predicts a share left out.

Real measurements: Pythia-70M continued on the Pile and Python code with four shares (released by the data mixing laws
study, arXiv 2403.16952). Critical share: the smallest share of general data that ends no worse than the base. The study
and two re-derivations put it at 0.283 to 0.287. Then every law predicts each of the four shares from the other three;
of the edges 0.125 and 0.5 this asks for extrapolation.

    python -m benchmarks.planner.pythia          # writes benchmarks/results/planner_pythia.json
"""

import csv
import json
import platform
import tempfile
from pathlib import Path

import numpy as np

from cpt.planner.compare import Wanted, choose, rank
from cpt.planner.laws.table import LAWS
from cpt.planner.observations import read_observations, samples
from cpt.planner.observe import COLUMNS
from cpt.planner.scores import share_folds

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "planner_data" / "pythia70m_pile_python.csv"
HEADER = COLUMNS[:-1]  # without the phase
RESULT = ROOT / "benchmarks" / "results" / "planner_pythia.json"
PARAMS, TOKENS_PER_STEP = 70.4e6, 4096 * 256
KNOWN_SHARE = 0.285


def observations_csv(folder: Path) -> Path:
    """The study's table in the planner's columns."""
    table = folder / "observations.csv"
    with DATA.open() as source, table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for row in csv.DictReader(source):
            share = "" if row["general_share"] == "base" else float(row["general_share"])
            rest = "" if share == "" else 1 - float(share)
            tokens = int(row["step"]) * TOKENS_PER_STEP
            writer.writerow([f"share-{share}" if share else "base", "pythia-70m-step20000", PARAMS, tokens, share, rest,
                             row["loss_pile"], row["loss_python"], "", 0])  # fmt: skip
    return table


def left_out_shares(table: Path) -> dict[str, object]:
    """Target -> law -> mean absolute error at each share when it is left out, nats."""
    observations = read_observations(table)
    found: dict[str, object] = {}
    for target in ("general", "domain"):
        chosen, _ = samples(observations, target)
        masks = share_folds(chosen, edges=True)
        shares = [float(chosen.inputs.shares[~mask][0, 0]) for mask in masks]
        lines = {}
        for one in rank(observations, target):
            predicted = one.law.predict_folds(chosen, masks, 0)
            errors = [float(np.abs(p[~m] - chosen.losses[~m]).mean()) for p, m in zip(predicted, masks, strict=True)]
            lines[one.law.name] = dict(zip(map(str, shares), errors, strict=True))
        found[target] = lines
    return found


def main() -> None:
    from cpt.planner.critical import critical
    from cpt.planner.share_search import CriticalQuery

    with tempfile.TemporaryDirectory() as folder:
        table = observations_csv(Path(folder))
        observations = read_observations(table)
        general, domain = samples(observations, "general")[0], samples(observations, "domain")[0]
        query = CriticalQuery(tokens=float(observations.tokens.max()), epsilons=(0.0, 0.01, 0.02, 0.05))
        facts = critical(general, query, domain)
        errors = left_out_shares(table)
        best = {target: choose(observations, target, Wanted("auto")).law.name for target in ("general", "domain")}
    result = {
        "claim": "critical general share at epsilon 0 within 0.01 of 0.285; shares left out within 0.005 nats",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "critical": facts["critical"],
        "distance_from_known_share": abs(facts["critical"][0]["share_general"] - KNOWN_SHARE),
        "left_out_share_mae": errors,
        "laws": list(LAWS),
        "chosen": best,
        "chosen_interior_mae": {t: float(np.mean([errors[t][best[t]][s] for s in ("0.25", "0.375")])) for t in best},
        "chosen_all_mae": {t: float(np.mean(list(errors[t][best[t]].values()))) for t in best},
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
