"""The report's tables as plain text cells: built once, shown twice, so page and Markdown cannot disagree."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cpt.report.cells import NO_VALUE, Row, Table, duration, percent
from cpt.report.collect import Evaluation, Event, SourceEval, setting
from cpt.report.reading import count
from cpt.report.summary import Summary, scaled, signed, tokens_text
from cpt.report.verdict import Overview, Versus, interval_text

ROUTINE_EVENTS = ("eval", "checkpoint", "upload")  # counted, not listed
MAX_EVENTS = 200
MAX_STAGES = 24
LEAD = "; 95% interval "
PHASE_WORDS = {
    "data": "waiting for data",
    "forward": "forward",
    "backward": "backward",
    "optimizer": "optimizer",
    "communication": "communication",
    "checkpoint": "checkpoints",
    "evaluation": "evaluations",
    "loop": "the loop itself",  # what of a step is in no phase
}


@dataclass(frozen=True)
class Fact:
    """One headline figure of a run."""

    label: str
    value: str
    note: str


def headline_facts(item: Summary) -> list[Fact]:
    """The figures of a single run that stand above everything else."""
    facts = []
    if item.domain and item.gain is not None:
        told = interval_text(item.gain_change, lead=LEAD)
        ends = f"loss {item.domain.base:.3f} to {item.domain.final:.3f}"
        facts.append(Fact("Domain gain", signed(item.gain), ends + told))
    if item.general and item.forgetting is not None:
        told = interval_text(item.forgetting_change, lead=LEAD)
        ends = f"loss {item.general.base:.3f} to {item.general.final:.3f}"
        facts.append(Fact("General forgetting", signed(item.forgetting), ends + told))
        facts.append(Fact("Worst forgetting", signed(item.general.worst_rise), f"at step {item.general.worst_step:,}"))
    facts.append(Fact("General share", percent(item.share_realised), f"planned {percent(item.share_planned)}"))
    facts.append(Fact("Trained on", tokens_text(item.tokens), f"planned {tokens_text(item.tokens_planned)}"))
    facts.append(
        Fact("Wall time", duration(item.run.wall_seconds), f"{scaled(item.median('tokens_per_second'))} tokens/s")
    )
    return facts


def runs_table(view: Overview) -> Table:
    """All runs side by side: one column per run, the unit in each line's name."""
    found = (
        ("Result", _result_lines(view)),
        ("Held-out loss, nats per token", _loss_lines()),
        ("Data", _data_lines()),
    )
    note = (
        "Forgetting and gain are measured against each run's own base, the evaluation at step 0. "
        f"Reference: {view.reference}, the run without replay."
    )
    title = "Runs side by side" if len(view.summaries) > 1 else "In numbers"
    return _side_by_side(view, title, found, note if view.reference else "")


def cost_table(view: Overview) -> Table:
    """What the runs cost and where their results lie, one column per run."""
    found = (("Cost", _cost_lines()), ("Where the time went", _time_lines()), ("Where", _place_lines()))
    return _side_by_side(view, "Cost and place", found, "")


def _side_by_side(view: Overview, title: str, blocks: Sequence[tuple[str, "Lines"]], note: str) -> Table:
    rows: list[Row] = []
    for block, lines in blocks:
        filled = [Row((name, *(cell(item) for item in view.summaries))) for name, cell in lines]
        shown = [row for row in filled if any(text != NO_VALUE for text in row.cells[1:])]
        rows += [Row((block,), heading=True), *shown] if shown else []
    labels = [item.label + (" (reference)" if item.label == view.reference else "") for item in view.summaries]
    return Table(title, ("", *labels), tuple(rows), "runs", note)


Lines = tuple[tuple[str, Callable[[Summary], str]], ...]


def _result_lines(view: Overview) -> Lines:
    def against(item: Summary, pick: Callable[[Versus], float | None]) -> str:
        value = pick(view.versus[item.label]) if item.label in view.versus else None
        return NO_VALUE if value is None else percent(value)

    return (
        ("Domain gain, nats", lambda item: _rise(item.gain)),
        ("95% interval of the gain", lambda item: interval_text(item.gain_change) or NO_VALUE),
        ("General forgetting, nats", lambda item: _rise(item.forgetting)),
        ("95% interval of forgetting", lambda item: interval_text(item.forgetting_change) or NO_VALUE),
        ("Worst forgetting, nats", _worst),
        ("Worst at step", _worst_step),
        ("Forgetting, share of the reference's", lambda item: against(item, lambda versus: versus.forgetting_ratio)),
        ("Domain gain given up", lambda item: against(item, lambda versus: versus.gain_given_up)),
    )


def _rise(nats: float | None) -> str:
    return NO_VALUE if nats is None else signed(nats, "")


def _worst(item: Summary) -> str:
    if item.general is None or item.forgetting is None:
        return NO_VALUE
    return signed(item.general.worst_rise, "")


def _worst_step(item: Summary) -> str:
    return f"{item.general.worst_step:,}" if item.general and item.forgetting is not None else NO_VALUE


def _loss_lines() -> Lines:
    return (
        ("General, step 0", lambda item: _digits(item.general.base if item.general else math.nan)),
        ("General, final", lambda item: _digits(item.final_loss("general"))),
        ("Domain, step 0", lambda item: _digits(item.domain.base if item.domain else math.nan)),
        ("Domain, final", lambda item: _digits(item.final_loss("domain"))),
    )


def _data_lines() -> Lines:
    return (
        ("General share, planned", lambda item: percent(item.share_planned)),
        ("General share, realised", lambda item: percent(item.share_realised)),
        ("Tokens", lambda item: _known(item.tokens, scaled)),
        ("Tokens, planned", lambda item: _known(item.tokens_planned, scaled)),
        (
            "Steps",
            lambda item: f"{item.run.steps_done:,}" + (f" of {item.run.plan.num_steps:,}" if item.run.plan else ""),
        ),
    )


def _cost_lines() -> Lines:
    return (
        ("Wall time", lambda item: duration(item.run.wall_seconds)),
        ("Goodput, share of it in steps that counted", lambda item: percent(item.run.goodput.fraction)),
        ("Tokens per second, median", lambda item: _known(item.median("tokens_per_second"), scaled)),
        (
            "The same, evaluations and checkpoints included",
            lambda item: _known(item.median("tokens_per_second_overall"), scaled),
        ),
        (
            "Tokens per second and device, median",
            lambda item: _known(item.median("tokens_per_second_per_device"), scaled),
        ),
        ("Step time, median", lambda item: duration(item.median("step_seconds"))),
        ("Model FLOPs per second, median", lambda item: _known(item.median("flops_per_second"), _flops)),
        ("Model FLOPs utilisation, median", lambda item: percent(item.median("mfu"))),
        (
            "Peak memory per process",
            lambda item: _known(item.peak_memory_bytes, lambda value: f"{value / 2**30:.2f} GiB"),
        ),
    )


def _time_lines() -> Lines:
    """A line for every phase: its share of the time, and its seconds."""

    def line(phase: str) -> tuple[str, Callable[[Summary], str]]:
        def cell(item: Summary) -> str:
            shares = item.share_by_phase
            return (
                f"{percent(shares[phase])} ({duration(item.seconds_by_phase[phase])})" if phase in shares else NO_VALUE
            )

        return PHASE_WORDS[phase].capitalize(), cell

    return tuple(line(phase) for phase in PHASE_WORDS)


def _flops(value: float) -> str:
    return f"{value / 1e12:,.3g} TFLOP/s"


def _place_lines() -> Lines:
    return (
        ("Starts from", lambda item: item.run.init_from or "random weights"),
        ("State", lambda item: "finished" if item.run.finished else "not finished"),
        ("Run folder", lambda item: str(item.run.root)),
        (
            "Checkpoint in it",
            lambda item: str(item.run.checkpoint.relative_to(item.run.root)) if item.run.checkpoint else NO_VALUE,
        ),
    )


def source_table(item: Summary) -> Table:
    """Loss, bits per byte and perplexity of each source at step 0, at its best, worst and last."""
    rows: list[Row] = []
    for name in dict.fromkeys(name for evaluation in item.run.evaluations for name in evaluation.sources):
        found = [evaluation for evaluation in item.run.evaluations if name in evaluation.sources]
        finite = [evaluation for evaluation in found if math.isfinite(evaluation.sources[name].loss)]
        by_loss = sorted(finite, key=lambda evaluation: evaluation.sources[name].loss)
        first = found[0] if found[0].step == 0 else None
        chosen = (first, by_loss[0] if by_loss else None, by_loss[-1] if by_loss else None, found[-1])
        rows.append(Row((f"{name} ({item.groups.get(name, 'unknown')})",), heading=True))
        for measure, cell in _MEASURES:
            rows.append(Row((measure, *(_at(evaluation, name, cell) for evaluation in chosen))))
        rows.append(Row(("at step", *(f"{evaluation.step:,}" if evaluation else NO_VALUE for evaluation in chosen))))
    head = ("", "Base" if item.continues_base else "Start", "Best", "Worst", "Final")
    return Table(
        f"Held-out figures per source: {item.label}", head, tuple(rows), note="" if rows else "No evaluation yet."
    )


_MEASURES: tuple[tuple[str, Callable[[SourceEval], str]], ...] = (
    ("loss, nats per token", lambda source: _digits(source.loss)),
    ("bits per byte", lambda source: _digits(source.bpb)),
    ("perplexity", lambda source: _known(source.ppl, lambda value: f"{value:,.2f}" if value < 1e6 else f"{value:.2e}")),
)


def _at(evaluation: Evaluation | None, name: str, cell: Callable[[SourceEval], str]) -> str:
    return cell(evaluation.sources[name]) if evaluation else NO_VALUE


def stage_table(item: Summary) -> Table | None:
    """The plan's stages: where each begins and what it mixes."""
    plan = item.run.plan
    if plan is None:
        return None
    rows = []
    every = math.ceil(len(plan.stages) / MAX_STAGES)  # a schedule has dozens; the figure shows them all
    for index in range(len(plan.stages)):
        if index % every and index + 1 < len(plan.stages):
            continue
        first, last = plan.first_step(index) + 1, plan.first_step(index + 1)
        tokens = scaled((last - first + 1) * plan.global_batch_tokens)
        if len(plan.seq_lens) > 1:
            tokens += f" in rows of {plan.seq_len_of(index):,}"
        rows.append(
            Row(
                (
                    str(index + 1),
                    f"{first:,} to {last:,}",
                    tokens,
                    *(percent(share) for share in plan.shares(index).values()),
                )
            )
        )
    head = ("Stage", "Steps", "Tokens", *(f"{source.name}, share" for source in plan.sources))
    note = (
        f"Fingerprint {plan.fingerprint}; rows of {plan.seq_len:,} tokens, {plan.global_batch_rows:,} "
        f"rows per step, packing {plan.packing}, "
        f"seed {plan.seed}." + (f" One in {every} stages is shown." if every > 1 else "")
    )
    return Table(f"Plan: {item.label}", head, tuple(rows), note=note)


def quota_table(item: Summary) -> Table | None:
    """Tokens and epochs of each source, planned and realised, and which sources hit the cap on epochs."""
    plan = item.run.plan
    if plan is None:
        return None
    planned, epochs, cap = plan.tokens_by_source(), plan.epochs_by_source(), setting(item.run.config, "data.max_epochs")
    stated = setting(item.run.config, "data.max_epochs_of")
    caps = stated if isinstance(stated, dict) else {}
    rows = []
    for source in plan.sources:
        limit = caps.get(source.name, cap)
        at_cap = isinstance(limit, int | float) and epochs[source.name] >= limit * 0.999
        realised = item.realised_by_source.get(source.name, math.nan)
        rows.append(
            Row(
                (
                    f"{source.name} ({source.group})",
                    scaled(source.num_tokens),
                    scaled(planned[source.name]),
                    _known(realised, scaled),
                    f"{epochs[source.name]:.2f}" + (" (at the cap)" if at_cap else ""),
                    _known(realised / (source.num_rows * plan.seq_len), lambda value: f"{value:.2f}"),
                )
            )
        )
    head = ("Source", "Tokens in store", "Planned", "Realised", "Epochs planned", "Epochs realised")
    wished = setting(item.run.config, "replay.share_general")
    own = ", ".join(f"{name} {limit}" for name, limit in caps.items())
    notes = [f"Cap: {cap:g} epochs per source{f' ({own})' if own else ''}."] if isinstance(cap, int | float) else []
    notes += [f"Wished general share: {percent(wished)}."] if isinstance(wished, int | float) else []
    return Table(f"Tokens and epochs: {item.label}", head, tuple(rows), note=" ".join(notes))


def events_table(item: Summary, most: int = MAX_EVENTS) -> Table:
    routine = Counter(event.kind for event in item.run.events if event.kind in ROUTINE_EVENTS)
    notable = [event for event in item.run.events if event.kind not in ROUTINE_EVENTS]
    rows = tuple(Row((_clock(event), _step(event), event.kind, _details(event))) for event in notable[-most:])
    notes = (
        [f"Not listed: {' and '.join(count(number, kind) for kind, number in sorted(routine.items()))}."]
        if routine
        else []
    )
    notes += [f"The first {len(notable) - most:,} events are left out."] if len(notable) > most else []
    return Table(f"Events: {item.label}", ("Time, UTC", "Step", "Event", "Details"), rows, "words", " ".join(notes))


def environment_table(item: Summary) -> Table:
    rows = tuple(Row((name, _flat(value))) for name, value in item.run.environment.items())
    return Table(f"Environment: {item.label}", ("Item", "Value"), rows, "words")


def _digits(value: float) -> str:
    return _known(value, lambda known: f"{known:.3f}")


def _known(value: float, show: Callable[[float], str]) -> str:
    return show(value) if math.isfinite(value) else NO_VALUE


def _clock(event: Event) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(event.time))
    except (OverflowError, OSError, ValueError):  # not known, or of no calendar
        return NO_VALUE


def _step(event: Event) -> str:
    return NO_VALUE if event.step is None else f"{event.step:,}"


def _details(event: Event) -> str:
    return ", ".join(f"{key} {_flat(value)}" for key, value in event.details.items())


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(part)}" for key, part in value.items())
    if isinstance(value, list):
        return " ".join(_flat(part) for part in value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
