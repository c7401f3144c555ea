"""Read a run folder, files only, into frozen records.

A report is most wanted when a run went wrong, so this file takes what is there: an unfinished run, a metrics line cut
off by a crash, no evaluation yet, NaN losses. It never does so silently: whatever is missing, unreadable or left out
becomes a sentence in ``Run.warnings``, which the report prints. It refuses only what is not a run folder. It computes
nothing beyond gain, forgetting and goodput.

Metrics after a rollback. A run that logged steps 10, 20, 30, died and resumed from the checkpoint at 15 logs 20, 30
again:

    steps in the file   10  20  30  20  25        kept   10  20  25

A line counts only while no later line has the same or a smaller step, so the 30 of the abandoned attempt goes too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from cpt.plan import Group, Plan, read_plan
from cpt.recommendation import Recommendation, read_recommendation
from cpt.report.goodput import Goodput, measure
from cpt.report.reading import Record, count, load_object, number, read_lines, read_object
from cpt.rundir import DataError, RunDir, step_of

FloatArray = NDArray[np.float64]
SCALARS = (
    "step",
    "tokens_seen",
    "loss",
    "lr",
    "grad_norm",
    "steps",
    "tokens_per_second",
    "tokens_per_second_per_device",
    "tokens_per_second_overall",
    "flops_per_second",
    "mfu",
    "step_seconds",
    "memory_bytes",
    "time",
)


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl as columns of float64, one value per logged step, NaN where a line has none."""

    scalars: Mapping[str, FloatArray]
    loss_by_source: Mapping[str, FloatArray]
    tokens_by_source: Mapping[str, FloatArray]
    phase_seconds: Mapping[str, FloatArray]  # per step, in the order of cpt.train.phases

    @property
    def tokens(self) -> FloatArray:
        return self.scalars["tokens_seen"]

    def __len__(self) -> int:
        return len(self.scalars["step"])


@dataclass(frozen=True)
class SourceEval:
    """Held-out figures of one source: loss in nats per token with its standard error, bits per byte, perplexity."""

    group: str
    loss: float
    bpb: float
    ppl: float
    stderr: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """One file of ``evals/``; ``groups`` maps general and domain to their token-weighted loss in nats."""

    step: int
    tokens_seen: float
    sources: Mapping[str, SourceEval]
    groups: Mapping[str, float]


@dataclass(frozen=True)
class Event:
    """One line of events.jsonl; ``time`` is unix seconds, NaN if the line has none."""

    time: float
    step: int | None
    kind: str
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """Everything the report knows about one run; ``plan`` is None where plan.json is missing or unreadable,
    ``recommendation`` also for a run that follows none."""

    root: Path
    name: str
    config: Mapping[str, Any]
    config_text: str
    plan: Plan | None
    recommendation: Recommendation | None
    environment: Mapping[str, Any]
    metrics: Metrics
    events: tuple[Event, ...]
    evaluations: tuple[Evaluation, ...]
    checkpoint: Path | None
    goodput: Goodput
    warnings: tuple[str, ...]

    @property
    def init_from(self) -> str | None:
        """The base the run started from, None for a run from random weights."""
        value = setting(self.config, "model.init_from")
        return None if value is None else str(value)

    @property
    def finished(self) -> bool:
        """The end of a run that was extended since is none."""
        last = self.plan.num_steps if self.plan else 0
        return any(event.kind == "finish" and (event.step or 0) >= last for event in self.events)

    @property
    def wall_seconds(self) -> float:
        """From the first start to the last word, pauses on request left out; NaN if no times are known."""
        return self.goodput.wall_seconds or math.nan

    @property
    def steps_done(self) -> int:
        return int(self.metrics.scalars["step"][-1]) if len(self.metrics) else 0


@dataclass(frozen=True)
class Change:
    """How one group's held-out loss moved from the base (step 0), in nats; positive is a higher, worse, loss."""

    base: float
    final: float
    worst: float
    worst_step: int

    @property
    def rise(self) -> float:
        """Forgetting, for the general group."""
        return self.final - self.base

    @property
    def fall(self) -> float:
        """Gain, for the domain group."""
        return self.base - self.final

    @property
    def worst_rise(self) -> float:
        """Forgetting at the worst evaluation of the run, never below zero because step 0 is one of them."""
        return self.worst - self.base


def change_of(evaluations: Sequence[Evaluation], group: Group) -> Change | None:
    """Gain and forgetting of one group over a run; None without finite losses at step 0 and later."""
    points = [(e.step, e.groups[group]) for e in evaluations if math.isfinite(e.groups.get(group, math.nan))]
    if len(points) < 2 or points[0][0] != 0:
        return None
    worst_step, worst = max(points, key=lambda point: point[1])
    return Change(base=points[0][1], final=points[-1][1], worst=worst, worst_step=worst_step)


def collect_run(root: Path) -> Run:
    """Read one run folder.

    Raises:
        DataError: the folder does not exist, or holds none of config.yaml, plan.json and metrics.jsonl.
    """
    paths = RunDir(root)
    _check_is_run_folder(paths)
    warnings: list[str] = []
    config_text, config = _read_config(paths.config, warnings)
    lines = read_lines(paths.metrics, warnings)
    said = read_lines(paths.events, warnings)
    events = _to_events(said)
    metrics = _to_metrics(lines, warnings)
    plan = _read_plan(paths.plan, warnings)
    run = Run(
        root=root,
        name=str(setting(config, "run.name") or root.resolve().name),
        config=config,
        config_text=config_text,
        plan=plan,
        recommendation=_read_recommendation(paths.recommendation, setting(config, "plan.fingerprint"), warnings),
        environment=read_object(paths.environment, warnings),
        metrics=metrics,
        events=events,
        evaluations=_read_evaluations(paths, warnings),
        checkpoint=_last_checkpoint(paths, events),
        goodput=measure(said, lines),
        warnings=(),
    )
    return Run(**{**vars(run), "warnings": (*warnings, *_state_warnings(run))})


def is_base_alone(run: Run) -> bool:
    """Evaluated at step 0 and nowhere else."""
    return [each.step for each in run.evaluations] == [0]


def setting(config: Mapping[str, Any], dotted: str) -> Any:
    """``setting(config, "model.init_from")``; None where any part is missing."""
    value: Any = config
    for part in dotted.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _check_is_run_folder(paths: RunDir) -> None:
    if not paths.root.is_dir():
        raise DataError(f"{paths.root}: no such run folder; give the folder that `cpt train` wrote, e.g. runs/NAME")
    expected = (paths.config, paths.plan, paths.metrics)
    if not any(path.exists() for path in expected):
        names = ", ".join(path.name for path in expected)
        raise DataError(
            f"{paths.root}: not a run folder (none of {names} in it); give the folder that `cpt train` "
            "wrote, e.g. runs/NAME"
        )


class _PlainLoader(yaml.SafeLoader):
    """Without aliases, which ``cpt`` never writes: with them a few lines stand for gigabytes, or for themselves."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias, which no config of `cpt` has")
        return super().compose_node(parent, index)


def _read_config(path: Path, warnings: list[str]) -> tuple[str, Record]:
    # Read as plain YAML, not through the config schema: a report must open a run that an older version wrote.
    if not path.exists():
        warnings.append("config.yaml is missing: settings are unknown.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = _PlainLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2024-02-30
        warnings.append(f"config.yaml cannot be read ({' '.join(str(error).split())}): settings are unknown.")
        return text, {}
    return text, config if isinstance(config, dict) else {}


def _read_plan(path: Path, warnings: list[str]) -> Plan | None:
    if not path.exists():
        warnings.append("plan.json is missing: planned shares, stages and caps are unknown.")
        return None
    try:
        return read_plan(path)
    except (ValueError, KeyError, TypeError) as error:
        warnings.append(f"plan.json cannot be read ({error}): planned shares, stages and caps are unknown.")
        return None


def _read_recommendation(path: Path, followed: object, warnings: list[str]) -> Recommendation | None:
    """``followed``: the fingerprint that the config names. A file added by hand to a run without one counts."""
    if not path.exists():
        if followed:
            warnings.append(f"{path.name} is missing, though the run follows {followed}: promised losses are unknown.")
        return None
    try:
        found = read_recommendation(path)
    except DataError as error:
        warnings.append(f"{path.name} cannot be read ({error}): promised losses are unknown.")
        return None
    if followed in (None, found.fingerprint):
        return found
    warnings.append(f"{path.name} is {found.fingerprint}, but the run follows {followed}: it was left out.")
    return None


def _to_metrics(lines: Sequence[Record], warnings: list[str]) -> Metrics:
    stepped = [line for line in lines if math.isfinite(number(line.get("step")))]
    if len(stepped) < len(lines):
        warnings.append(f"metrics.jsonl: {count(len(lines) - len(stepped), 'line')} without a step left out.")
    steps = np.array([number(line["step"]) for line in stepped])
    kept = [line for line, keep in zip(stepped, _not_superseded(steps), strict=True) if keep]
    if len(kept) < len(stepped):
        warnings.append(
            f"metrics.jsonl: {count(len(stepped) - len(kept), 'logged step')} repeated after a resume; the "
            "later values are shown."
        )
    metrics = Metrics(
        scalars={name: _column([line.get(name) for line in kept]) for name in SCALARS},
        loss_by_source=_nested_columns(kept, "loss_by_source"),
        tokens_by_source=_nested_columns(kept, "tokens_by_source"),
        phase_seconds=_nested_columns(kept, "phase_seconds"),
    )
    broken = int(np.sum(~np.isfinite(metrics.scalars["loss"])))
    if broken:
        warnings.append(
            f"metrics.jsonl: the loss is not a finite number at {count(broken, 'logged step')}; the figures "
            "have gaps there."
        )
    return metrics


def _not_superseded(steps: FloatArray) -> NDArray[np.bool_]:
    """True where every later line has a larger step (see the example at the top)."""
    smallest_later = np.append(np.minimum.accumulate(steps[::-1])[::-1][1:], np.inf)[: len(steps)]
    return np.asarray(steps < smallest_later)


def _nested_columns(lines: Sequence[Record], field: str) -> dict[str, FloatArray]:
    objects: list[Record] = [value if isinstance(value := line.get(field), dict) else {} for line in lines]
    names = dict.fromkeys(name for item in objects for name in item)
    return {name: _column([item.get(name) for item in objects]) for name in names}


def _column(values: list[Any]) -> FloatArray:
    """None is NaN, and so is whatever is no number."""
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return np.array([number(value) for value in values])


def _to_events(lines: Sequence[Record]) -> tuple[Event, ...]:
    return tuple(
        Event(
            time=number(line.get("time")),
            step=line["step"] if isinstance(line.get("step"), int) and math.isfinite(number(line["step"])) else None,
            kind=str(line.get("event", "unnamed")),
            details={key: value for key, value in line.items() if key not in ("time", "step", "event")},
        )
        for line in lines
    )


def _read_evaluations(paths: RunDir, warnings: list[str]) -> tuple[Evaluation, ...]:
    files = sorted(file for file in paths.evals.glob("step_*.json") if step_of(file) is not None)
    evaluations = []
    for file in files:
        record = load_object(file)
        if record is None or not isinstance(record.get("groups"), dict) or not isinstance(record.get("sources"), dict):
            warnings.append(f"evals/{file.name} cannot be read and was left out.")
        else:
            evaluations.append(_to_evaluation(step_of(file) or 0, record))
    return tuple(evaluations)


def _to_evaluation(step: int, record: Record) -> Evaluation:
    sources = {name: value for name, value in record["sources"].items() if isinstance(value, dict)}
    groups = {name: value for name, value in record["groups"].items() if isinstance(value, dict)}
    return Evaluation(
        step=step,
        tokens_seen=number(record.get("tokens_seen")),
        sources={
            name: SourceEval(
                str(value.get("group")),
                number(value.get("loss")),
                number(value.get("bpb")),
                number(value.get("ppl")),
                number(value.get("stderr")),
            )
            for name, value in sources.items()
        },
        groups={name: number(value.get("loss")) for name, value in groups.items()},
    )


def _last_checkpoint(paths: RunDir, events: Sequence[Event]) -> Path | None:
    """The newest checkpoint whose end the run logged; a folder without that event may be half written."""
    saved = sorted(
        {event.step for event in events if event.kind == "checkpoint" and event.step is not None}, reverse=True
    )
    return next((path for step in saved if (path := paths.checkpoint(step)).is_dir()), None)


def _state_warnings(run: Run) -> list[str]:
    found = []
    if not run.finished:
        planned = f" of {run.plan.num_steps:,}" if run.plan else ""
        found.append(
            f"The run is not finished: it stands at step {run.steps_done:,}{planned}. Continue it with `cpt "
            f"resume {run.root}`."
        )
    if not run.evaluations or is_base_alone(run):
        what = "Only the base is evaluated" if run.evaluations else "No evaluation yet"
        found.append(f"{what}: gain and forgetting are unknown. Run `cpt eval` on a checkpoint of {run.root}.")
    elif run.evaluations[0].step != 0:
        found.append("No evaluation at step 0: gain and forgetting need the base's loss. Add 0 to eval.at_steps.")
    if any(not math.isfinite(loss) for item in run.evaluations for loss in item.groups.values()):
        found.append("A held-out loss is not a finite number; gain and forgetting use the finite evaluations only.")
    return found
