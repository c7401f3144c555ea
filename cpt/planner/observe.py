"""From run folders to ``observations.csv``: one row per evaluation that a law of constant mixture may be fitted on.

Owns the choice of rows. The learning rate decides: a loss measured at the constant rate and one measured after a decay
follow different curves, so every row says its ``phase``:

    stable     at the peak rate, after the warm-up (schedules wsd and constant)
    annealed   after the last step of a finished run whose rate has decayed

Evaluations inside a warm-up or a decay, and those of an unfinished rewarm_cosine run, are neither and are left out; so
are losses that are not finite. The evaluation at step 0 is that of the base model: one row per base, ``tokens`` 0, no
shares. Files only; pilots and full runs are read alike. Refuses: what is no run folder, a mixture that changes on the
way, a model of unknown size, and runs whose evaluations of one base differ: they were measured on other held-out text.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cpt.plan import Plan
from cpt.planner.base_model import base_name, params_of_run
from cpt.planner.observations import BASE_TOLERANCE
from cpt.report.collect import Evaluation, Run, collect_run, setting
from cpt.rundir import DataError, write_atomic

Row = dict[str, Any]

COLUMNS = (
    "run",
    "base",
    "params",
    "tokens",
    "share_general",
    "share_domain",
    "loss_general",
    "loss_domain",
    "lr",
    "seed",
    "phase",
)
STABLE, ANNEALED = "stable", "annealed"


def observe_runs(run_dirs: Sequence[Path]) -> list[Row]:
    """Rows of all runs, bases first.

    Raises:
        DataError: a folder that is no run, or whose losses belong on no curve with the others.
    """
    bases: list[Row] = []
    rows: list[Row] = []
    for run_dir in run_dirs:
        found = _observe(run_dir)
        new = [row for row in found if is_base(row)]
        check_same_bases(bases, new, where=str(run_dir))
        bases += [row for row in new if row["base"] not in {known["base"] for known in bases}]
        rows += [row for row in found if not is_base(row)]
    return bases + rows


def is_base(row: Row) -> bool:
    """Whether a row holds the losses of a base model before any training."""
    return _number(row["tokens"]) == 0


def check_same_bases(known: Iterable[Row], new: Iterable[Row], *, where: str) -> None:
    """Raises DataError where one base has two losses: the evaluations cannot be compared."""
    measured = {row["base"]: row for row in known}
    for row in new:
        other = measured.get(row["base"], {})
        for column in [name for name in row if name.startswith("loss_")]:
            ours, theirs = _number(row.get(column)), _number(other.get(column))
            if abs(ours - theirs) > BASE_TOLERANCE * theirs:
                rule = f"{column} of the base {row['base']} is {ours:.4f}, in the other observations {theirs:.4f}"
                fix = (
                    "the runs were evaluated on different held-out rows; give them the same stores, data.seq_len and "
                    "eval.tokens_per_source"
                )
                raise DataError(f"{where}: {rule}; {fix}")


def write_observations(path: Path, rows: Sequence[Row]) -> None:
    """Write the CSV whole or not at all."""
    names = [*COLUMNS, *sorted({name for row in rows for name in row} - set(COLUMNS))]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.getvalue())


def append_observations(path: Path, rows: Sequence[Row]) -> int:
    """Add rows to a file, whose rows of the same runs they replace; a base that it has keeps its row. Returns how many
    rows the file then holds.

    Raises:
        DataError: the file is no CSV of observations, or its base was measured on other text.
    """
    before = _read_rows(path) if path.exists() else []
    bases = [row for row in before if is_base(row)]
    check_same_bases(bases, filter(is_base, rows), where=str(path))
    known = {row["base"] for row in bases}
    replaced = {row["run"] for row in rows if not is_base(row)}
    kept = [row for row in before if row["run"] not in replaced]
    added = [row for row in rows if not (is_base(row) and row["base"] in known)]
    write_observations(path, kept + added)
    return len(kept) + len(added)


def _read_rows(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    reader = csv.DictReader(io.StringIO(text))
    rows: list[Row] = list(reader)
    if missing := [name for name in COLUMNS[:4] if name not in (reader.fieldnames or [])]:
        raise DataError(f"{path}: has no column {missing[0]!r}; give a file that `cpt plan pilots` or `observe` wrote")
    if long := [number for number, row in enumerate(rows, start=2) if None in row]:
        raise DataError(f"{path}: line {long[0]} has more cells than the header has columns; repair or delete it")
    return rows


def _observe(run_dir: Path) -> list[Row]:
    run = collect_run(run_dir)
    plan = _constant_plan(run)
    params = params_of_run(run_dir, setting(run.config, "model") or {})
    if params is None:
        rule = "the number of parameters is not known: it has no checkpoint, and its model's config.json is not here"
        raise DataError(f"{run_dir}: {rule}; put the model's folder back, or resume the run so that it saves one")
    base = base_name(run.init_from)
    rows: list[Row] = []
    for evaluation in run.evaluations:
        phase = _phase(run, plan, evaluation.step)
        losses = _losses(plan, evaluation)
        if phase is None or not all(math.isfinite(loss) for loss in losses.values()):
            continue
        row: Row = {"run": run.name, "base": base, "params": params, "tokens": int(evaluation.tokens_seen), **losses}
        if evaluation.step == 0:
            rows.append({**row, "run": f"base:{base}"})
        else:
            rate = {"lr": setting(run.config, "train.peak_lr"), "seed": setting(run.config, "run.seed")}
            rows.append({**row, **_shares(plan), **rate, "phase": phase})
    return rows


def _constant_plan(run: Run) -> Plan:
    if run.plan is None:
        raise DataError(f"{run.root}: its plan.json is missing or unreadable, so its shares are not known")
    if setting(run.config, "train.past"):
        rule = "it was extended, so its rate rose again on the way, and the laws are fitted on runs of one schedule"
        raise DataError(f"{run.root}: {rule}; leave this run out")
    if len({stage.block_counts for stage in run.plan.stages}) > 1:
        shares = " -> ".join(f"{run.plan.share_general(index):.3g}" for index in range(len(run.plan.stages)))
        rule = f"share_general changes on the way ({shares}), and the laws are fitted on runs of one mixture"
        raise DataError(f"{run.root}: {rule}; leave this run out")
    return run.plan


def _phase(run: Run, plan: Plan, step: int) -> str | None:
    """Which curve an evaluation lies on; "" for the base, None for neither of them."""
    if step == 0:
        return ""
    schedule: Mapping[str, Any] = setting(run.config, "train.schedule") or {}
    name, last = schedule.get("name"), plan.num_steps
    decay_start = last - int(schedule.get("decay_steps") or 0) if name == "wsd" else last if name == "constant" else 0
    if int(schedule.get("warmup_steps") or 0) <= step <= decay_start:
        return STABLE
    return ANNEALED if step == last else None


def _by_source(plan: Plan) -> bool:
    """Whether the sources say more than their groups."""
    groups = [source.group for source in plan.sources]
    return len(set(groups)) < len(groups)


def _losses(plan: Plan, evaluation: Evaluation) -> dict[str, float]:
    sources = {f"loss_{name}": source.loss for name, source in evaluation.sources.items()} if _by_source(plan) else {}
    return sources | {f"loss_{group}": loss for group, loss in evaluation.groups.items()}


def _shares(plan: Plan) -> dict[str, float]:
    """As planned, caps and whole rows included: what was wished for is not what was trained on."""
    by_source = plan.shares(0)
    general = sum(by_source[source.name] for source in plan.sources if source.group == "general")
    sources = {f"share_{name}": share for name, share in by_source.items()} if _by_source(plan) else {}
    return sources | {"share_general": general, "share_domain": 1.0 - general}


def _number(value: Any) -> float:
    """NaN for an empty cell, which compares unequal to nothing."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
