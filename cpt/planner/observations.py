"""``observations.csv``: what pilot runs measured, checked line by line, and which points laws are fitted on.

Owns the columns, their rules and the rule which points count. Refuses numbers that cannot be: shares that do not sum to
1, losses that are not finite, two values for one measurement; it lists every such line at once. What can be but looks
odd becomes a sentence in ``Observations.warnings``.

Which points count (``samples``): base rows (tokens = 0) only give the starting loss. Of the phases ``stable`` (constant
rate) and ``annealed`` (after a decay) one is used, since their losses differ by the decay alone: the annealed one where
it covers three shares. In the first 5% of a run's tokens the rate is still re-warming (arXiv 2403.08763) and no law of
mixtures describes that, so points there are left out of runs that have four or more.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cpt.planner.csv_table import Table, read_bytes, split_rows
from cpt.planner.fitting import FloatArray
from cpt.planner.laws.law import Inputs, Samples
from cpt.rundir import DataError

REQUIRED = ("run", "params", "tokens")
KNOWN = (*REQUIRED, "base", "lr", "seed", "phase")
SHARE, LOSS = "share_", "loss_"
TRANSIENT_PART = 0.05
ROUNDING = 1e-9  # of a share that a program computed as 1 - x
BASE_TOLERANCE = 0.002  # relative; one model on one held-out text differs by rounding alone, devices included
BILLION = 1e9
MAX_PROBLEMS_SHOWN = 12


@dataclass(frozen=True)
class Observations:
    """Columns of equal length n, in the order of the file; NaN where a cell is empty.

    ``params`` and ``tokens`` are counts; ``shares`` by source, zeros in base rows; ``losses`` by target in nats.
    ``extra`` holds the columns that this file gives no meaning to, as text.
    """

    path: Path
    sha256: str
    run: tuple[str, ...]
    base: tuple[str, ...]
    phase: tuple[str, ...]
    params: FloatArray
    tokens: FloatArray
    lr: FloatArray
    seed: FloatArray
    shares: Mapping[str, FloatArray]
    losses: Mapping[str, FloatArray]
    extra: Mapping[str, tuple[str, ...]]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.run)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self.shares)

    @property
    def two_sided(self) -> bool:
        """One general and one domain source: the case of D-CPT and CMR."""
        return set(self.sources) == {"general", "domain"}

    @cached_property
    def trained(self) -> NDArray[np.bool_]:
        """(n,) True for measurements, False for base rows."""
        return self.tokens > 0

    @property
    def sizes(self) -> FloatArray:
        """Distinct model sizes that were trained, ascending, in parameters."""
        return np.unique(self.params[self.trained])

    def base_losses(self, target: str) -> dict[str, tuple[float, float]]:
        """Base name -> (parameters, loss before training), where it was measured."""
        found = {}
        for i in np.flatnonzero(~self.trained & np.isfinite(self.losses[target])):
            found[self._base_key(int(i))] = (float(self.params[i]), float(self.losses[target][i]))
        return found

    def _base_key(self, row: int) -> str:
        return f"{self.base[row]}@{self.params[row]:.6g}"

    def measured_base(self, target: str) -> FloatArray:
        """(n,) loss of each row's own base, NaN where no base row gives it."""
        known = self.base_losses(target)
        return np.array([known.get(self._base_key(i), (0.0, math.nan))[1] for i in range(len(self))])

    def select(self, index: NDArray[np.bool_]) -> "Observations":
        rows = np.flatnonzero(index)

        def texts(column: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(column[i] for i in rows)

        return replace(
            self,
            run=texts(self.run),
            base=texts(self.base),
            phase=texts(self.phase),
            params=self.params[rows],
            tokens=self.tokens[rows],
            lr=self.lr[rows],
            seed=self.seed[rows],
            shares={name: column[rows] for name, column in self.shares.items()},
            losses={name: column[rows] for name, column in self.losses.items()},
            extra={name: texts(column) for name, column in self.extra.items()},
        )


def read_observations(path: Path) -> Observations:
    """Read and check the file. A byte-order mark and ``;`` as separator (with decimal commas) are understood.

    Raises:
        DataError: naming the file and every line, column, value and rule that does not hold.
    """
    raw = read_bytes(path)
    header, rows = split_rows(path, raw)
    problems: list[str] = []
    table = Table(header, rows, problems)
    _check_header(path, header)
    low, high = -ROUNDING, 1 + ROUNDING
    every = {name.removeprefix(SHARE): table.numbers(name, low=low, high=high) for name in header if _is(name, SHARE)}
    shares = _mixture(every)
    losses = {name.removeprefix(LOSS): table.numbers(name, low=1e-9) for name in header if _is(name, LOSS)}
    observations = Observations(
        path=path,
        sha256=hashlib.sha256(raw).hexdigest(),
        run=table.texts("run", required=True),
        base=table.texts("base"),
        phase=table.texts("phase"),
        params=table.numbers("params", low=1.0, required=True),
        tokens=table.numbers("tokens", low=0.0, required=True),
        lr=table.numbers("lr", low=0.0),
        seed=table.numbers("seed"),
        shares=shares,
        losses=losses,
        extra={name: table.texts(name) for name in header if _is_extra(name, shares)},
    )
    if not problems:
        observations = _checked_shares(observations, table)
        observations = _without_duplicates(observations, table)
        if not observations.trained.any():
            problems.append("it holds no measurement, only base rows (tokens = 0); run pilots first")
    if problems:
        shown = problems[:MAX_PROBLEMS_SHOWN]
        more = [f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else []
        raise DataError("\n".join([f"{path}: cannot be used as observations:", *(f"  - {p}" for p in shown + more)]))
    return replace(observations, warnings=(*observations.warnings, *_oddities(observations)))


def samples(observations: Observations, target: str) -> tuple[Samples, tuple[str, ...]]:
    """The points a law of ``target`` is fitted on, and in words what was left out (rules at the top).

    Raises:
        DataError: the file has no loss of this target.
    """
    if target not in observations.losses:
        known = ", ".join(observations.losses)
        raise DataError(f"{observations.path}: has no column {LOSS}{target}; its targets are {known}")
    notes = []
    keep = observations.trained & np.isfinite(observations.losses[target])
    phase = _phase_used(observations, keep)
    if phase:
        other = keep & (np.array(observations.phase) != phase)
        notes += [f"{int(other.sum())} points of another phase than {phase!r} left out"] if other.any() else []
        keep &= ~other
    early = keep & _transient(observations, keep)
    if early.any():
        notes.append(f"{int(early.sum())} points in the first {TRANSIENT_PART:.0%} of their run's tokens left out")
        keep &= ~early
    if not keep.any():
        raise DataError(f"{observations.path}: no row has a {LOSS}{target} after training; fill the column in")
    chosen = observations.select(keep)
    return Samples(inputs_of(observations, target, keep), chosen.losses[target], _run_index(chosen)), tuple(notes)


def inputs_of(observations: Observations, target: str, keep: NDArray[np.bool_]) -> Inputs:
    return Inputs(
        target=target,
        sources=observations.sources,
        params=observations.params[keep] / BILLION,
        tokens=observations.tokens[keep] / BILLION,
        shares=np.stack([column[keep] for column in observations.shares.values()], axis=1),
        lr=observations.lr[keep],
        base_loss=observations.measured_base(target)[keep],
        bases=tuple(sorted((params / BILLION, loss) for params, loss in observations.base_losses(target).values())),
    )


def _run_index(observations: Observations) -> NDArray[np.int64]:
    """(n,) index of the run each row stems from; a branch counts to its trunk, whose history and seed it shares."""
    trunks = observations.extra.get("trunk", observations.run)
    names = [trunk or run for trunk, run in zip(trunks, observations.run, strict=True)]
    return np.unique(np.array(names), return_inverse=True)[1].astype(np.int64)


def _phase_used(observations: Observations, keep: NDArray[np.bool_]) -> str | None:
    phases = np.array(observations.phase)
    present = {str(phase) for phase in phases[keep]} - {""}
    if len(present) < 2:
        return None
    annealed = keep & (phases == "annealed")
    shares = np.stack([column[annealed] for column in observations.shares.values()], axis=1)
    return "annealed" if len(np.unique(shares, axis=0)) >= 3 else "stable"


def _transient(observations: Observations, keep: NDArray[np.bool_]) -> NDArray[np.bool_]:
    early = np.zeros(len(observations), dtype=bool)
    runs = np.array(observations.run)
    for run in np.unique(runs[keep]):
        rows = np.flatnonzero(keep & (runs == run))
        if len(rows) >= 4:
            tokens = observations.tokens[rows]
            early[rows] = tokens < TRANSIENT_PART * tokens.max()
    return early


def _is(name: str, *prefixes: str) -> bool:
    return any(name.startswith(prefix) and len(name) > len(prefix) for prefix in prefixes)


def _check_header(path: Path, header: list[str]) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    missing = [name for name in REQUIRED if name not in header]
    shares = [name for name in header if _is(name, SHARE)]
    if len(shares) < 2 or shares == ["share_domain"]:
        missing += [name for name in ("share_general", "share_domain") if name not in header]
    wanted = ("loss_general", "loss_domain") if set(shares) <= {"share_general", "share_domain"} else ()
    missing += [name for name in wanted if name not in header]
    if not wanted and not any(_is(name, LOSS) for name in header):
        missing.append("loss_<target>")
    if missing or twice:
        told = [f"misses the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}"] if missing else []
        told += [f"has the column {name} twice" for name in twice]
        raise DataError(
            f"{path}: {'; '.join(told)}. Its columns are {', '.join(header)}; expected are run, base, params, tokens, "
            "share_general, share_domain, loss_general, loss_domain, lr, seed"
        )


def _mixture(every: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Shares that sum to 1: general and domain where these two do, the shares inside a group are then mere detail."""
    pair = {name: every[name] for name in ("general", "domain") if name in every}
    if len(pair) == 2 and len(every) > 2:
        total = np.nan_to_num(pair["general"] + pair["domain"])
        if (np.abs(total[total > 0] - 1) <= 0.0015).all():
            return pair
    return dict(every)


def _is_extra(name: str, shares: Mapping[str, FloatArray]) -> bool:
    if _is(name, SHARE):
        return name.removeprefix(SHARE) not in shares
    return name not in KNOWN and not _is(name, LOSS)


def _checked_shares(observations: Observations, table: Table) -> Observations:
    """Shares that sum to 1 exactly; files round them, so each may be off by half of its third decimal."""
    stacked = np.stack([np.clip(np.nan_to_num(column), 0, 1) for column in observations.shares.values()], axis=1)
    totals = stacked.sum(axis=1)
    slack = max(0.0015, 0.0006 * stacked.shape[1])
    for i in np.flatnonzero(observations.trained & (np.abs(totals - 1) > slack)):
        names = " + ".join(f"{SHARE}{name} {column[i]:g}" for name, column in observations.shares.items())
        told = names if len(observations.shares) <= 4 else f"the {len(observations.shares)} shares"
        table.problem(table.lines[i], f"{told} = {totals[i]:.6g}; shares of tokens sum to 1")
    whole = np.where(totals > 0, totals, 1.0)
    shares = {name: stacked[:, i] / whole for i, name in enumerate(observations.shares)}
    return replace(observations, shares=shares)


def _without_duplicates(observations: Observations, table: Table) -> Observations:
    """Drop rows said twice; the same measurement with two values, or a run with two mixtures, is a problem."""
    seen: dict[tuple[str, str, float, float], int] = {}
    settings: dict[str, int] = {}
    keep = np.ones(len(observations), dtype=bool)
    for i in range(len(observations)):
        key = (observations.run[i], observations.base[i], observations.params[i], observations.tokens[i])
        first = seen.setdefault(key, i)
        if first != i:
            keep[i] = False
            if not _same_values(observations, first, i):
                told = f"run {key[0]!r} at {key[3]:g} tokens is also in line {table.lines[first]}, with other values"
                table.problem(table.lines[i], f"{told}; give repeated runs names of their own")
        elif observations.trained[i]:
            before = settings.setdefault(key[0], i)
            if _setting(observations, before) != _setting(observations, i):
                told = f"run {key[0]!r} has another size, share or seed than in line {table.lines[before]}"
                table.problem(table.lines[i], f"{told}; one run has one of each, name runs apart")
    _check_bases(observations, table)
    if keep.all():
        return observations
    count = int((~keep).sum())
    warning = f"{count} duplicated row{'s' if count > 1 else ''} of the same run and tokens left out"
    return replace(observations.select(keep), warnings=(*observations.warnings, warning))


def _check_bases(observations: Observations, table: Table) -> None:
    """One base has one loss of each kind: two of them would put the runs on different held-out texts."""
    for target, losses in observations.losses.items():
        first: dict[str, int] = {}
        for i in map(int, np.flatnonzero(~observations.trained & np.isfinite(losses))):
            before = first.setdefault(f"{observations.base[i]}@{observations.params[i]:.6g}", i)
            if abs(losses[i] / losses[before] - 1) > BASE_TOLERANCE:
                told = f"{LOSS}{target} of the base is {losses[i]:g}, in line {table.lines[before]} {losses[before]:g}"
                table.problem(table.lines[i], f"{told}; evaluate all runs on the same held-out text")


def _setting(observations: Observations, row: int) -> tuple[float, ...]:
    seed = observations.seed[row]
    shares = (round(float(column[row]), 6) for column in observations.shares.values())
    return (float(observations.params[row]), -1.0 if math.isnan(seed) else float(seed), *shares)


def _same_values(observations: Observations, a: int, b: int) -> bool:
    columns = (*observations.shares.values(), *observations.losses.values())
    return all(np.array_equal(column[a], column[b], equal_nan=True) for column in columns)


def _oddities(observations: Observations) -> list[str]:
    found = []
    if not observations.trained.all() and all(not observations.base_losses(t) for t in observations.losses):
        found.append("base rows (tokens = 0) hold no loss")
    if observations.trained.all():
        found.append("no base row (tokens = 0): forgetting, the rise over the loss before training, cannot be told")
    largest = float(observations.tokens.max())
    size = float(np.median(observations.params[observations.trained]))
    limit = min(0.2 * size, 1e8) if size >= 1e7 else 2000.0
    if largest < limit:
        found.append(
            f"the longest run has {largest:g} tokens for models of {size:.3g} parameters, less than a few steps of "
            "training; are the tokens written in thousands or millions? The column counts single tokens"
        )
    return found
