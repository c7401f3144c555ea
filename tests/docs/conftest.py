"""Tables for the commands of docs/planning.md: made by formulas, with noise, since that they run is what is tested."""

import csv
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def write_planning_tables() -> Callable[..., None]:
    """``write(root, params, step_tokens)`` puts them where the page looks; pilots of the quickstart's model have ``params``
    and count in steps of ``step_tokens``.
    """
    return write_tables


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[-1]), restval="")
        writer.writeheader()
        writer.writerows(rows)


def write_tables(root: Path, params: int, step_tokens: int) -> None:
    noise = random.Random(7)
    budgets = [steps * step_tokens for steps in (17, 34, 68)]
    pilots = synthetic_runs([(float(params), "toy")], [0.0, 0.1, 0.25, 0.5, 0.75], budgets, noise)
    write_table(root / "runs" / "pilots_cpu" / "observations.csv", pilots)
    sizes = [(70e6, "70m"), (160e6, "160m"), (410e6, "410m")]
    write_table(root / "yours.csv", synthetic_runs(sizes, [0.05, 0.2, 0.4, 0.6], [2e9, 4e9, 8e9], noise))
    write_table(root / "many.csv", synthetic_mixtures(noise))
    (root / "weights.json").write_text('{"web": 0.5, "law": 0.2, "medicine": 0.3}')
    (root / "available.json").write_text('{"web": 1e12, "law": 1e9, "medicine": 2e9}')
    for name, final in (("cosine", 0.1), ("constant", 1.0), ("wsd", 0.1)):
        write_table(root / f"{name}.csv", synthetic_curve(name, final))


def synthetic_runs(
    sizes: list[tuple[float, str]], shares: list[float], budgets: list[float] | list[int], noise: random.Random
) -> list[dict[str, Any]]:
    """A base row per size, then every share and budget: loss falls with size and tokens, and with the own share."""
    rows: list[dict[str, Any]] = []
    for params, base in sizes:
        size = 0.3 * (params / 1e9) ** -0.1
        first = {"run": base, "base": base, "params": params, "tokens": 0}
        rows.append(first | {"loss_general": 2 + size, "loss_domain": 3.0 + size})
        for share, tokens in itertools.product(shares, budgets):
            scale = 0.2 * (tokens / budgets[-1]) ** -0.3
            general = 1.7 + size + scale + 0.02 / (share + 0.05)
            domain = 1.2 + size + scale + 0.05 / (1.05 - share)
            row = {"run": f"{base}-{share:g}-{tokens:g}", "base": base, "params": params, "tokens": tokens}
            row |= {"share_general": share, "share_domain": 1 - share, "loss_general": general + noise.gauss(0, 1e-3)}
            rows.append(row | {"loss_domain": domain + noise.gauss(0, 1e-3), "lr": 3e-3, "seed": 1})
    return rows


def synthetic_mixtures(noise: random.Random) -> list[dict[str, Any]]:
    """A base row and eighteen mixtures of three sources at one size and budget; each loss falls with its own share."""
    losses = {"loss_general": "web", "loss_law": "law", "loss_medicine": "medicine"}
    toy = {"base": "toy", "params": 70e6}
    rows: list[dict[str, Any]] = [{"run": "base", **toy, "tokens": 0, **dict.fromkeys(losses, 2.4)}]
    for number in range(18):
        drawn = {source: noise.expovariate(1.0) for source in losses.values()}
        shares = {source: value / sum(drawn.values()) for source, value in drawn.items()}
        row = {"run": f"mix{number}", **toy, "tokens": 2e9, **{f"share_{name}": own for name, own in shares.items()}}
        rows.append(row | {name: 2 + 0.5 * math.exp(-4 * shares[own]) for name, own in losses.items()})
    return rows


def synthetic_curve(name: str, final: float, steps: int = 400) -> list[dict[str, Any]]:
    """Losses under a rate that falls from the peak to ``final`` of it, over the last fifth where it is a wsd one."""
    rows: list[dict[str, Any]] = []
    area = 0.0
    for step in range(1, steps + 1):
        done = max(0.0, step / steps - 0.8) / 0.2 if name == "wsd" else step / steps
        rate = 3e-3 * (final + (1 - final) * (1 + math.cos(math.pi * done)) / 2)
        area += rate
        if step % 4 == 0:
            rows.append({"step": step, "lr": rate, "loss": 2.5 + 0.6 * area**-0.4 + 30 * (rate - 3e-3)})
    return rows
