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
from cpt.planner.laws.law import Law, Samples
from cpt.planner.laws.table import LAWS
from cpt.planner.observations import Observations, samples
from cpt.planner.scores import Score, held_out, mean_score
from cpt.problems import ConfigError, Problem
from cpt.rundir import DataError

Progress = Callable[[str], None]
RISING_PREFERENCE = 1.5
MIN_SHARES_ABOVE = 3


@dataclass(frozen=True)
class Ranked:
    """One law on one target. ``excluded`` says why it may not be chosen; empty if it may."""

    law: Law
    target: str
    scores: Mapping[str, Score | None]
    excluded: str = ""
    num_sizes: int = 1
    above: float | None = None  # own shares up to this one are outside the law

    @property
    def mae(self) -> float:
        """Mean held-out error in nats over the kinds of folds that count; infinite where nothing could be held out."""
        value = self.mean("mae")
        return math.inf if value is None else value

    def mean(self, field: str) -> float | None:
        """Mean of a score over the kinds that count. Size counts from four sizes on: with three, its fold fits two, and
        two sizes cannot tell the floor from the size term, so that its error is luck.
        """
        counted = {kind: one for kind, one in self.scores.items() if kind != "params" or self.num_sizes > 3}
        return mean_score(counted, field)

    @property
    def error(self) -> float:
        """Typical error at a share that was not measured, in nats: what an interval must allow for."""
        share = self.scores.get("share")
        return share.rmse if share is not None else 0.0 if math.isinf(self.mae) else self.mae


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
    return sorted(
        ranking, key=lambda one: (bool(one.excluded), one.mae * (1.0 if one.above is None else RISING_PREFERENCE))
    )


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
    observations: Observations, target: str, name: str, *, seed: int = 0, progress: Progress | None = None
) -> Ranked:
    """The law called ``name``, or for ``auto`` the best that may be chosen.

    Raises:
        ConfigError: no such law. DataError: it does not suit the observations.
    """
    if name == "auto":
        ranking = [one for one in rank(observations, target, seed=seed, progress=progress) if not one.excluded]
        if not ranking:
            raise DataError(f"{observations.path}: no law that sees the mixture suits; run pilots at more shares")
        return ranking[0]
    if name not in LAWS:
        known = ", ".join(LAWS)
        raise ConfigError(Problem("--law", name, "no such law", f"choose auto or one of {known}"))
    return rank(observations, target, [LAWS[name]], seed=seed)[0]


def compare_facts(observations: Observations, targets: Iterable[str], *, seed: int = 0,
                  progress: Progress | None = None) -> dict[str, Any]:  # fmt: skip
    """``ranking`` over all targets in order of targets and error, for ``cpt plan compare``."""
    rows = []
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
                    "title": one.law.title,
                }
            )
    return {
        "observations": str(observations.path),
        "num_points": int(observations.trained.sum()),
        "ranking": rows,
        "warnings": list(observations.warnings),
    }
