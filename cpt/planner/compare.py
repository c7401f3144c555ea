"""Which law predicts these observations best: every law, every target, held out by share, tokens and size.

Owns which laws a question may use, and their ranking by held-out error.

Where little is replayed the general loss rises with tokens, and D-CPT and its kin cannot rise. The runs show up to
which share that happens. Above it such a law may be right; it is then fitted on, and trusted at, the shares above
alone. All laws are judged there, and one that can rise is preferred until it errs ``RISING_PREFERENCE`` times as much.
With fewer than three shares left above, laws that cannot rise are ranked but never chosen.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt.planner.admissibility import rising_runs
from cpt.planner.fitting import FloatArray
from cpt.planner.laws.law import Law, Samples
from cpt.planner.laws.table import LAWS
from cpt.planner.observations import Observations, samples
from cpt.planner.scores import Score, held_out, token_distance
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

Progress = Callable[[str], None]
RISING_PREFERENCE = 1.5
SAME_SIZE = math.log(1.5)  # models up to this factor apart count as one size
MIN_SHARES_ABOVE = 3


@dataclass(frozen=True)
class Wanted:
    """Which law, ``auto`` or a name, and what it is asked for: parameters and tokens in billions, None: as measured.

    ``varies_size``: it is to compare model sizes.
    """

    law: str = "auto"
    params: float | None = None
    tokens: float | None = None
    varies_size: bool = False


@dataclass(frozen=True)
class Ranked:
    """One law on one target. ``excluded`` says why it may not be chosen; empty if it may."""

    law: Law
    target: str
    scores: Mapping[str, Score | None]
    excluded: str = ""
    num_sizes: int = 1
    above: float | None = None  # own shares up to this one are outside the law

    def mean(self, field: str, steps: float = 1.0) -> float | None:
        """Mean of a score over the kinds of folds that count; the token fold counts ``steps`` times.

        Size counts from four sizes on: with three, its fold fits two, and two sizes cannot tell the floor from the size
        term, so that its error is luck.
        """
        weights = {"share": 1.0, "tokens": steps, "params": float(self.num_sizes > 3)}
        known = {kind: getattr(one, field) for kind, one in self.scores.items() if one is not None and weights[kind]}
        if not known:
            return None
        total = sum(weights[kind] * value for kind, value in known.items()) / sum(weights[kind] for kind in known)
        if math.isfinite(total):
            return float(total)
        return None if field == "r2" else math.inf  # a law that breaks in one fold is not excused from it

    def order(self, steps: float = 1.0) -> tuple[bool, float]:
        """Sorts laws: those that may be chosen first, then by error, a preference for laws that can rise included."""
        error = self.mean("mae", steps)
        factor = 1.0 if self.above is None else RISING_PREFERENCE
        return bool(self.excluded), math.inf if error is None else factor * error

    def error(self, distance: FloatArray) -> FloatArray:
        """(n,) typical error of the law's form, in nats, at a share that was not measured and ``distance`` (n,) beyond
        the measured tokens in units of the token fold: an extrapolation errs in proportion to the distance.
        """
        share, tokens = (one.rmse if one else 0.0 for one in (self.scores.get("share"), self.scores.get("tokens")))
        return np.asarray(np.sqrt(share**2 + (tokens * distance) ** 2))


def unsuitable(law: Law, chosen: Samples) -> str:
    """Why a law cannot be fitted on these samples; empty if it can."""
    sources = chosen.inputs.sources
    if not law.many_sources and (len(sources) != 2 or chosen.inputs.target not in sources):
        return "it takes one general and one domain source"
    shares = len(np.unique(chosen.inputs.shares.round(6), axis=0))
    if law.sees_shares and shares < law.min_shares:
        return f"it needs {law.min_shares} shares, the observations hold {shares}"
    return ""


def rank(
    observations: Observations,
    target: str,
    laws: Iterable[Law] = (),
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Ranked]:
    """Laws that suit the observations, best first; those that may not be chosen stand last.

    Raises:
        DataError: no law suits, with what is missing.
    """
    chosen, _ = samples(observations, target)
    candidates = [law for law in (laws or LAWS.values()) if not unsuitable(law, chosen)]
    if not candidates:
        raise DataError(f"{observations.path}: {_too_few(chosen, laws or LAWS.values())}")
    level = _rising_share(chosen) if target == "general" else None
    ranking = []
    for law in candidates:
        if progress:
            progress(f"{target}: {law.name}")
        ranking.append(_judge(law, chosen, level, seed))
    return sorted(ranking, key=Ranked.order)


def _judge(law: Law, chosen: Samples, level: float | None, seed: int) -> Ranked:
    """``level``: the highest own share at which some run rises, None where none does."""
    target, sizes = chosen.inputs.target, len(np.unique(chosen.inputs.params))
    if not law.sees_shares:
        return Ranked(law, target, held_out(law, chosen, seed), "ignores the mixture; a baseline", sizes)
    if level is None:
        return Ranked(law, target, held_out(law, chosen, seed), "", sizes)
    judged = chosen.inputs.own_share > level
    enough = len(np.unique(chosen.inputs.own_share[judged].round(6))) >= MIN_SHARES_ABOVE
    if law.rises:
        return Ranked(law, target, held_out(law, chosen, seed, judged if enough else None), "", sizes)
    if not enough:
        reason = "the general loss rises with tokens in some run, which this law cannot represent"
        return Ranked(law, target, held_out(law, chosen, seed), reason, sizes)
    return Ranked(law, target, held_out(law, chosen.select(judged), seed), "", sizes, level)


def _rising_share(chosen: Samples) -> float | None:
    if chosen.inputs.target not in chosen.inputs.sources:
        return None
    rising = np.isin(chosen.runs, rising_runs(chosen))
    return float(chosen.inputs.own_share[rising].max()) if rising.any() else None


def _too_few(chosen: Samples, laws: Iterable[Law]) -> str:
    reasons = sorted({reason for law in laws if (reason := unsuitable(law, chosen))})
    return "; ".join(reasons) + ". Run pilots at more shares, for example 0, 0.1, 0.25 and 0.5 of general data"


def choose(
    observations: Observations,
    target: str,
    wanted: Wanted,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Ranked:
    """The law that is wanted, or for ``auto`` the best that may answer.

    The further the wanted tokens lie beyond the measured ones, the more the error of extrapolating tokens counts.

    Raises:
        ConfigError: no such law. DataError: it does not suit the observations.
    """
    if wanted.law != "auto":
        return rank(observations, target, [law_called(wanted.law)], seed=seed)[0]
    chosen, _ = samples(observations, target)
    steps = 1.0
    if wanted.tokens is not None:
        steps = max(1.0, float(token_distance(chosen, np.array([wanted.tokens]))[0]))
    ranking = rank(observations, target, seed=seed, progress=progress)
    able = [one for one in ranking if not one.excluded and not unable(one.law, chosen, wanted)]
    if not able:
        reasons = {unable(one.law, chosen, wanted) for one in ranking if not one.excluded} - {""}
        told = f"{'; '.join(sorted(reasons))}. Run pilots that cover the question" if reasons else ""
        raise DataError(f"{observations.path}: no law can answer this: {told or _too_few(chosen, LAWS.values())}")
    return min(able, key=lambda one: one.order(steps))


def law_called(name: str) -> Law:
    """Raises ConfigError: no such law."""
    if name not in LAWS:
        raise ConfigError(Problem("--law", name, "no such law", f"choose auto or one of {', '.join(LAWS)}"))
    return LAWS[name]


def unable(law: Law, chosen: Samples, wanted: Wanted) -> str:
    """Why a law cannot answer what is wanted though it suits the observations; empty if it can."""
    largest = float(chosen.inputs.tokens.max())
    if wanted.tokens is not None and wanted.tokens > law.reach * largest * (1 + 1e-9):
        return f"law {law.name} reaches {law.reach:g} times the measured tokens"
    sizes = np.unique(chosen.inputs.params)
    if law.sizes or (len(sizes) == 1 and not wanted.varies_size):
        return ""
    if wanted.varies_size or (wanted.params is not None and np.abs(np.log(sizes / wanted.params)).min() > SAME_SIZE):
        return f"law {law.name} knows the measured model sizes alone"
    return ""


def compare_facts(observations: Observations, targets: Iterable[str], *, seed: int = 0,
                  progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """``ranking`` over all targets in order of targets and error, for ``cpt plan compare``."""
    rows: list[dict[str, Any]] = []
    for target in targets:
        for one in rank(observations, target, seed=seed, progress=progress):
            rows.append(
                {
                    "law": one.law.name,
                    "target": target,
                    "heldout_mae": one.mean("mae"),
                    "heldout_r2": one.mean("r2"),
                    "heldout": {kind: value.mae if value else None for kind, value in one.scores.items()},
                    "excluded": one.excluded,
                    "trusted_above_share": one.above,
                    "num_points": len(samples(observations, target)[0]),
                    "title": one.law.title,
                }
            )
    return {
        "observations": str(observations.path),
        "num_points": max(row["num_points"] for row in rows),
        "ranking": rows,
        "warnings": list(observations.warnings),
    }
