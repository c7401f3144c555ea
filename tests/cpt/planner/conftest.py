"""Synthetic observations from D-CPT laws with known parameters."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from cpt.planner.laws.dcpt import dcpt
from cpt.planner.laws.law import Inputs, ParametricFit, Samples

ORDER = ("E", "A", "alpha", "B", "beta", "eta", "C", "gamma", "eps")
# Own test vectors: P satisfies every trend for D >= 0.2107 billion tokens, Q breaks them at both ends, G is a general law.
P = dict(E=1.2, A=0.5, B=0.08, C=0.35, alpha=0.34, beta=0.28, gamma=0.60, eta=1.05, eps=0.35)
Q = dict(E=1.2, A=2.0, B=0.8, C=0.15, alpha=0.35, beta=0.30, gamma=0.55, eta=0.6, eps=0.05)
G = dict(E=1.9, A=0.7, B=0.05, C=0.20, alpha=0.30, beta=0.25, gamma=0.55, eta=1.10, eps=0.10)
SHARES = (0.0, 0.1, 0.2, 0.33, 0.5, 0.67, 0.8, 0.9, 1.0)


def theta_of(values: Mapping[str, float]) -> np.ndarray:
    return np.array([values[name] for name in ORDER])


def law_with(values: Mapping[str, float]) -> ParametricFit:
    """D-CPT with given parameters, as if fitted; no bootstrap replicates."""
    return ParametricFit(ORDER, dcpt, theta_of(values), np.empty((0, len(ORDER))), True)


def inputs_at(
    params: object, tokens: object, share_domain: object, target: str = "domain", base_loss: float = np.nan
) -> Inputs:
    """Two-source inputs; sizes and tokens in billions, scalars are repeated."""
    n, d, r = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, dtype=float)) for x in (params, tokens, share_domain)))
    full = np.ones(len(n))
    return Inputs(target, ("general", "domain"), n * 1.0, d * 1.0, np.stack([1 - r, r], axis=1), np.nan * full,
                  base_loss * full)  # fmt: skip


def grid_samples(
    values: Mapping[str, float],
    *,
    target: str = "domain",
    sizes: tuple[float, ...] = (0.5, 1.8, 4.0),
    shares: tuple[float, ...] = SHARES,
    num_tokens: int = 20,
    noise: float = 0.003,
    seed: int = 0,
) -> tuple[Samples, np.ndarray]:
    """Noisy samples of a law over sizes x shares x tokens, one run per size and share; and the exact losses."""
    tokens = np.linspace(26 / num_tokens, 26, num_tokens)
    rows = np.array([(n, d, r) for n in sizes for r in shares for d in tokens])
    inputs = inputs_at(rows[:, 0], rows[:, 1], rows[:, 2], target)
    exact = dcpt(theta_of(values)[None, :], inputs)[0][0]
    noisy = exact + noise * np.random.default_rng(seed).normal(size=len(exact))
    return Samples(inputs, noisy, np.arange(len(rows)) // num_tokens), exact


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[..., Path]:
    """Write rows (dicts) as CSV; the header is that of the first row."""

    def write(rows: list[dict[str, object]], name: str = "observations.csv") -> Path:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    return write


def rows_of(
    sizes: tuple[float, ...] = (0.5, 1.8, 4.0),
    shares: tuple[float, ...] = (0.0, 0.1, 0.25, 0.5, 0.75),
    num_tokens: int = 6,
    noise: float = 0.001,
    base_general: float | None = 2.8,
) -> list[dict[str, object]]:
    """Rows of an observations.csv: general losses from G, domain losses from P, a base row per size."""
    rng = np.random.default_rng(3)
    rows: list[dict[str, object]] = []
    for n in sizes:
        if base_general is not None:
            rows.append(_row(f"base-{n:g}", n, 0.0, None, base_general + 0.7 * (n**-0.3 - 1.8**-0.3), 2.6))
        for share in shares:
            for d in np.geomspace(1.0, 26.0, num_tokens):
                general = dcpt(theta_of(G)[None, :], inputs_at(n, d, 1 - share, "general"))[0][0, 0]
                domain = dcpt(theta_of(P)[None, :], inputs_at(n, d, 1 - share))[0][0, 0]
                rows.append(
                    _row(f"n{n:g}-s{share:g}", n, d, share, *(np.array([general, domain]) + noise * rng.normal(size=2)))
                )
    return rows


def _row(
    run: str, params: float, tokens: float, share: float | None, general: float, domain: float
) -> dict[str, object]:
    return {
        "run": run,
        "base": f"base-{params:g}",
        "params": params * 1e9,
        "tokens": tokens * 1e9,
        "share_general": "" if share is None else share,
        "share_domain": "" if share is None else 1 - share,
        "loss_general": general,
        "loss_domain": domain,
        "lr": 3e-5,
        "seed": 0,
    }


@pytest.fixture
def synthetic() -> Callable[..., tuple[Samples, np.ndarray]]:
    return grid_samples


@pytest.fixture
def observation_rows() -> Callable[..., list[dict[str, object]]]:
    return rows_of


@pytest.fixture
def exact_law() -> Callable[[str], ParametricFit]:
    """``exact_law("P")``: the law with one of the parameter sets above."""
    sets = {"P": P, "Q": Q, "G": G}
    return lambda name: law_with(sets[name])


@pytest.fixture
def parameter_sets() -> dict[str, dict[str, float]]:
    return {"P": dict(P), "Q": dict(Q), "G": dict(G)}


@pytest.fixture
def two_source_inputs() -> Callable[..., Inputs]:
    return inputs_at
