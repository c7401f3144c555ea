"""More tokens for a run that has begun or finished: ``cpt extend RUN_DIR --tokens +20M [train.schedule...=...]``.

Owns what an extension is. The run file states budget, rate and schedule of what is to come where it stated the old
ones; the old ones move to ``train.past``, so the rate of every update that was trained stays what it was, and the new
schedule is counted from the extension on. Its warm-up starts from the rate that the run had, so the curve does not
leap unless the user asks for a schedule that does, and then it says so. The mixture goes on as it was stated, every
source where it stands; caps on epochs count from the start of the run. Refuses a run that is at work, and a budget
that is no larger.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cpt import schedule_fields as fields
from cpt.config import ConfigError, Problem, RunConfig, apply_override, validate
from cpt.mixtures import num_steps
from cpt.plan import read_plan
from cpt.planner.wording import Facts, amount, percent
from cpt.prepare import Prepared, prepare
from cpt.rate_curve import curve_facts, jump, render_curve
from cpt.remix import check_same_rows, make_stores_absolute, past_of, rest_shares, split_overrides
from cpt.rundir import RunDir, note_event
from cpt.runfolder import check_changeable, check_same_plan, lock_folder, read_raw_config, write_change
from cpt.train.schedules import RateSegment, learning_rates, rate_segments, warmup_steps

RATES = ("train.peak_lr", "train.schedule")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_TOKENS = re.compile(r"(?P<plus>\+?)(?P<number>\d[\d_]*(\.\d+)?(e\+?\d+)?)\s*(?P<unit>[KMBT]?)", re.IGNORECASE)


@dataclass(frozen=True)
class Continuation:
    """Peak and schedule of the steps to come, and why these, in words."""

    peak_lr: float
    schedule: fields.Schedule
    words: str


def split_extension(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Overrides that an extension keeps (rates and mixture), and those that only say how the next process computes.

    Raises:
        ConfigError: for a field that a run keeps for ever.
    """
    mixture, others = split_overrides(overrides)
    kept = [text for text in others if text.startswith(RATES)]
    rest = [text for text in others if text not in kept]
    if any(text.startswith("train.tokens=") for text in rest):
        rule = "is what --tokens states"
        raise ConfigError(Problem("train.tokens", None, rule, "cpt extend RUN_DIR --tokens +20M"))
    check_changeable(rest)
    return [*kept, *mixture], rest


def parse_tokens(text: str, before: int) -> int:
    """The new budget: ``+20M`` more than before, or ``120M`` in all.

    Raises:
        ConfigError: no number, or not more than before.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None:
        rule = "is no number of tokens" if text else "is required: how many tokens the run shall have"
        raise ConfigError(Problem("--tokens", text, rule, "e.g. +20M for 20 million more, or 120M in all"))
    number = float(match["number"].replace("_", "")) * UNITS[match["unit"].upper()]
    total = round(number) + (before if match["plus"] else 0)
    if total <= before:
        rule = f"is no more than the run's {before:,} tokens"
        raise ConfigError(Problem("--tokens", text, rule, f"write +{text} for so many more"))
    return total


def extended(run_dir: Path, tokens: str, overrides: Sequence[str], step: int) -> tuple[Prepared, Continuation]:
    """The run as it would be with another budget after ``step`` steps; writes nothing.

    Raises:
        ConfigError, DataError: a budget, a schedule or a mixture that cannot be had.
    """
    raw = read_raw_config(run_dir)
    old = validate(raw)
    rundir = RunDir(run_dir)
    stored = read_plan(rundir.plan)
    check_same_plan(rundir, prepare(old).plan)
    total = parse_tokens(tokens, old.train.tokens)
    steps = total // old.train.global_batch_tokens
    if steps <= num_steps(old):
        rule = f"adds no whole step of {old.train.global_batch_tokens:,} tokens"
        raise ConfigError(Problem("--tokens", tokens, rule))
    goes_on = _as_asked(continuation(old, step, steps), overrides, steps - step)
    raw["train"] |= {
        "tokens": total,
        "peak_lr": goes_on.peak_lr,
        "schedule": {} if _names_a_schedule(overrides) else goes_on.schedule.model_dump(mode="json"),
        "past": past_rates(old, step),
    }
    raw["data"]["past"] = [past.model_dump(mode="json") for past in past_of(old, step)]
    if raw["data"].get("stages"):  # the last stage is the one that goes on
        raw["data"]["stages"][-1]["tokens"] += total - old.train.tokens
    for override in overrides:
        apply_override(raw, override)
    make_stores_absolute(raw)
    found = prepare(validate(raw))
    check_same_rows(stored, found.plan, step, rundir)
    return found, goes_on


def _as_asked(goes_on: Continuation, overrides: Sequence[str], left: int) -> Continuation:
    """To a peak that the user states the rate warms up, unless told otherwise."""
    if not any(text.startswith("train.peak_lr") for text in overrides) or goes_on.schedule.warmup_steps:
        return goes_on
    schedule = goes_on.schedule.model_copy(update={"warmup_steps": _rewarm(left)})
    return Continuation(goes_on.peak_lr, schedule, goes_on.words)


def _names_a_schedule(overrides: Sequence[str]) -> bool:
    """Another schedule than the one before has none of its fields."""
    return any(text.startswith("train.schedule.name=") for text in overrides)


def extension_facts(run_dir: Path, tokens: str, overrides: Sequence[str], step: int) -> dict[str, Any]:
    """What ``cpt extend`` would do, for ``--dry-run``, ``--json`` and the screen."""
    prepared, goes_on = extended(run_dir, tokens, overrides, step)
    return _facts(run_dir, prepared, (goes_on, overrides), step)


def extend(run_dir: Path, tokens: str, overrides: Sequence[str], step: int) -> dict[str, Any]:
    """Make the extension that ``extended`` describes, and note it in events.jsonl. Cut short at any moment, it is
    either not made, or finished by the next resume.

    Raises:
        RuntimeError: a process is at work in the run folder.
    """
    read_raw_config(run_dir)  # a folder that is no run's gets no lock file
    rundir = RunDir(run_dir)
    with lock_folder(rundir):
        prepared, goes_on = extended(run_dir, tokens, overrides, step)
        facts = _facts(run_dir, prepared, (goes_on, overrides), step)
        write_change(rundir, prepared)
        noted = ("tokens_before", "tokens_after", "steps_before", "steps_after", "changes", "plan_before", "plan_after")
        lr = {"peak_lr": prepared.config.train.peak_lr, "schedule": facts["schedule"]["name"]}
        note_event("extended", step, rundir, **{name: facts[name] for name in noted}, **lr)
    return facts


def past_rates(config: RunConfig, step: int) -> list[dict[str, Any]]:
    """Budgets and rates that led to ``step``, each with the step that it ends at; as ``past_of`` for mixtures."""
    train = config.train
    now = {"tokens": train.tokens, "peak_lr": train.peak_lr, "schedule": train.schedule.model_dump(mode="json")}
    rates = [*(past.model_dump(mode="json") for past in train.past), {"until_step": num_steps(config), **now}]
    kept = [each for each in rates if each["until_step"] < step]
    return [*kept, {**rates[len(kept)], "until_step": step}] if step else []


def continuation(config: RunConfig, step: int, steps: int) -> Continuation:
    """How the rate goes on after ``step`` steps of a run that gets ``steps`` in all, where the user does not say.

    A curve that has not begun its last decay keeps its level and decays at the new end; one that has comes back up,
    from the rate where it stands, in 1% of the new steps (arXiv 2403.08763; for WSD arXiv 2410.05192). A cosine or a
    line that is cut off goes on down from where it is, with the same floor, and is not warmed up again.
    """
    if step == 0:
        return Continuation(config.train.peak_lr, config.train.schedule, "no step is done: the same schedule, longer")
    total_steps = num_steps(config)
    segments = rate_segments(config.train, total_steps=total_steps)
    segment = next(each for each in segments if step <= each.end)
    at = _Moment(segment, step - segment.start, learning_rates(config.train, total_steps=total_steps)(step))
    return GOES_ON[segment.schedule.name](at, steps - step)


@dataclass(frozen=True)
class _Moment:
    """``done`` updates into a segment, at rate ``rate``."""

    segment: RateSegment
    done: int
    rate: float

    @property
    def warmup_left(self) -> int:
        return max(0, warmup_steps(self.segment.schedule, self.segment.total) - self.done)

    @property
    def is_over(self) -> bool:
        return self.done >= self.segment.total


def _rewarm(left: int) -> int:
    return min(max(1, round(0.01 * left)), left - 1)


def _goes_down(at: _Moment, left: int) -> Continuation:
    """rewarm_cosine and linear_to_zero: their curve is made for its length."""
    peak, schedule = at.segment.peak_lr, at.segment.schedule
    if at.is_over:
        words = f"warms up again from {at.rate:.3g}, where it ended, to its peak {peak:.3g}, then the same curve"
        return Continuation(peak, schedule.model_copy(update={"warmup_steps": _rewarm(left)}), words)
    if at.warmup_left:
        words = "goes on warming up, then the same curve over the longer run"
        return Continuation(peak, schedule.model_copy(update={"warmup_steps": at.warmup_left}), words)
    change: dict[str, Any] = {"warmup_steps": 0}
    if isinstance(schedule, fields.RewarmCosine):
        change["min_lr_ratio"] = min(1.0, schedule.min_lr_ratio * peak / at.rate)
    words = f"goes on down from {at.rate:.3g}, where it stands, to the same floor at the new end"
    return Continuation(at.rate, schedule.model_copy(update=change), words)


def _stays(at: _Moment, left: int) -> Continuation:
    schedule = at.segment.schedule.model_copy(update={"warmup_steps": min(at.warmup_left, left)})
    return Continuation(at.segment.peak_lr, schedule, "stays at its rate")


def _wsd(at: _Moment, left: int) -> Continuation:
    schedule, peak = at.segment.schedule, at.segment.peak_lr
    assert isinstance(schedule, fields.WarmupStableDecay)
    decaying = at.done > at.segment.total - schedule.decay_steps
    warmup = _rewarm(left) if decaying else at.warmup_left
    decay = max(1, min(schedule.decay_steps, left - warmup))
    words = f"the plateau at {peak:.3g} goes on, and the decay of {decay} steps moves to the new end"
    if decaying:
        words = f"comes back up from {at.rate:.3g} to the plateau at {peak:.3g}, and decays over the last {decay} steps"
    return Continuation(peak, schedule.model_copy(update={"warmup_steps": warmup, "decay_steps": decay}), words)


def _infinite(at: _Moment, left: int) -> Continuation:
    """Goes on with what is left of warm-up and cooldown; once they are over, the plateau is the peak."""
    schedule, peak = at.segment.schedule, at.segment.peak_lr
    assert isinstance(schedule, fields.Infinite)
    anneal_start = schedule.warmup_steps + schedule.cooldown_steps + schedule.constant_steps
    plateau, floor = peak * schedule.constant_lr_ratio, peak * schedule.min_lr_ratio
    annealing = at.done > anneal_start
    warmup = _rewarm(left) if annealing else at.warmup_left
    cooldown = max(0, schedule.warmup_steps + schedule.cooldown_steps - max(at.done, schedule.warmup_steps))
    top = peak if at.warmup_left else at.rate if cooldown else plateau
    anneal = max(0, min(at.segment.total - anneal_start, left - warmup - cooldown))
    change = {
        "warmup_steps": warmup,
        "cooldown_steps": cooldown,
        "constant_steps": max(0, left - warmup - cooldown - anneal),
        "constant_lr_ratio": min(1.0, plateau / top),
        "min_lr_ratio": min(1.0, floor / top),
    }
    words = f"the plateau at {plateau:.3g} goes on, and the anneal of {anneal} steps moves to the new end"
    if annealing:
        words = f"comes back up from {at.rate:.3g} to the plateau at {plateau:.3g}, and anneals over {anneal} steps"
    return Continuation(top, schedule.model_copy(update=change), words)


GOES_ON = {
    "rewarm_cosine": _goes_down,
    "linear_to_zero": _goes_down,
    "constant": _stays,
    "wsd": _wsd,
    "infinite_cosine": _infinite,
    "infinite_inv_sqrt": _infinite,
}


def _facts(run_dir: Path, prepared: Prepared, chosen: tuple[Continuation, Sequence[str]], step: int) -> dict[str, Any]:
    goes_on, overrides = chosen
    config, plan, stored = prepared.config, prepared.plan, read_plan(RunDir(run_dir).plan)
    train = config.train
    warnings = list(prepared.warnings)
    leap = jump(train, total_steps=plan.num_steps, step=step) if step else None
    if leap:
        warnings.append(f"the learning rate goes from {leap[0]:.3g} to {leap[1]:.3g} in one step, at the extension")
    stated = [text for text in overrides if text.startswith(RATES)]
    words = f"stated: {', '.join(stated)}" if stated else goes_on.words
    return {
        "run_dir": str(run_dir),
        "step": step,
        "tokens_before": stored.num_steps * train.global_batch_tokens,
        "tokens_after": plan.num_steps * train.global_batch_tokens,
        "steps_before": stored.num_steps,
        "steps_after": plan.num_steps,
        "changes": list(overrides),
        "plan_before": stored.fingerprint,
        "plan_after": plan.fingerprint,
        "peak_lr": train.peak_lr,
        "schedule": train.schedule.model_dump(mode="json"),
        "why": words,
        "shares": rest_shares(plan, step),
        "epochs": plan.epochs_by_source(),
        **{name: fact for name, fact in curve_facts(train, total_steps=plan.num_steps).items() if name != "steps"},
        "warnings": warnings,
    }


def render_extension(facts: Facts) -> RenderableType:
    """What is added, the whole curve, and what the sources will have given at the end."""
    more = facts["tokens_after"] - facts["tokens_before"]
    head = (
        f"{amount(facts['tokens_before'])} tokens + {amount(more)} = {amount(facts['tokens_after'])}; "
        f"{facts['steps_before']:,} steps → {facts['steps_after']:,}, from step {facts['step']:,} on"
    )
    sources = ", ".join(
        f"{name} {percent(share)} of the tokens to come, epoch {facts['epochs'][name]:.2f} at the end"
        for name, share in facts["shares"].items()
    )
    notes = [f"learning rate: {facts['why']}", f"mixture: {sources}"]
    notes += [f"warning: {text}" for text in facts["warnings"]]
    return Group(Text(head, style="bold"), render_curve(facts), *(Text(note) for note in notes))
