"""What a frozen plan will feed, over time: realised shares, epochs and repeats of every source, before anyone trains.

Owns the facts of ``cpt data preview-mix`` and their table. Everything is asked of the sampler, which says what is read
up to any step, so it is what will be trained on, caps and rounding included, and not what was wished. Refuses to know
where a plan comes from.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.data.sampler import epochs_seen, tokens_seen
from cpt.plan import Plan
from cpt.planner.laws.repeats import effective_tokens
from cpt.planner.wording import Facts, amount, percent

WINDOWS = 96  # points in time of a curve; stages are resolved up to as many
BARS = "▁▂▃▄▅▆▇█"
BAR_WIDTH = 32
FREE_EPOCHS = 4  # up to which repetition costs almost nothing: arXiv 2305.16264
NAMED_CHANGES = 6


def mix_facts(
    plan: Plan,
    caps: Mapping[str, float],
    *,
    done_step: int = 0,
    changes: Sequence[int] = (),
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """For ``--json``, the table and the figure.

    ``caps``: epochs by source; ``changes``: steps after which a running job got another mixture; ``done_step``: how far
    it is.
    """
    steps = _grid(plan)
    seen = np.array([list(tokens_seen(plan, step).values()) for step in steps], dtype=np.int64)
    epochs = np.array([list(epochs_seen(plan, step).values()) for step in steps])
    step_tokens = plan.global_batch_tokens
    new = np.diff(seen, axis=0)
    shares = new / new.sum(axis=1, keepdims=True)
    curves = [(int(seen[-1, i]), epochs[:, i], shares[:, i], steps) for i in range(len(plan.sources))]
    sources = [_source(plan, i, caps, curves[i]) for i in range(len(plan.sources))]
    return {
        "fingerprint": plan.fingerprint,
        "steps": plan.num_steps,
        "tokens": plan.num_tokens,
        "share_general": plan.share_general(),
        "share_domain": plan.share_domain(),
        "num_stages": len(plan.stages),
        "done_tokens": done_step * step_tokens,
        "changes": [{"step": step, "tokens": step * step_tokens} for step in changes],
        "at_tokens": [step * step_tokens for step in steps],
        "sources": sources,
        "warnings": [*warnings, *_repeat_warnings(sources)],
    }


def _grid(plan: Plan) -> list[int]:
    """Steps to look at: evenly spaced ones, and the stages' borders where there are not too many."""
    even = np.linspace(0, plan.num_steps, min(WINDOWS, plan.num_steps) + 1).round().astype(int).tolist()
    ends = [plan.first_step(index + 1) for index in range(len(plan.stages))]
    if len(ends) > WINDOWS:
        return sorted({*even})
    return _without_slivers(sorted({*even} - {*ends}), sorted({0, *ends}), max(1, plan.num_steps // WINDOWS))


def _without_slivers(even: Sequence[int], fixed: Sequence[int], width: int) -> list[int]:
    """Evenly spaced steps give way to a border nearby: in a window of few rows a share is mostly rounding."""
    borders = np.array(fixed)
    kept = [step for step in even if np.abs(borders - step).min() >= width]
    return sorted({*kept, *fixed})


def _source(
    plan: Plan, index: int, caps: Mapping[str, float], curves: tuple[int, Any, Any, list[int]]
) -> dict[str, Any]:
    source, (tokens, epochs, shares, steps) = plan.sources[index], curves
    rows = round(float(epochs[-1]) * source.num_rows)  # of the plan's length, where stages have others
    passes, more = divmod(rows, source.num_rows)
    available = source.num_rows * plan.seq_len
    again = np.flatnonzero(epochs > 1)
    return {
        "name": source.name,
        "group": source.group,
        "tokens_available": available,
        "tokens_planned": tokens,
        "share": tokens / plan.num_tokens,
        "epochs": float(epochs[-1]),
        "max_epochs": caps[source.name],
        "rows": source.num_rows,
        "passes": passes,  # so often every row is read; `rows_once_more` of them once more
        "rows_once_more": more,
        "tokens_repeated": max(0, tokens - available),
        "tokens_worth": effective_tokens(tokens, available),  # as fresh ones: arXiv 2305.16264
        "repeats_after_tokens": steps[int(again[0]) - 1] * plan.global_batch_tokens if again.size else None,
        "shares": [round(float(share), 6) for share in shares],
        "epochs_seen": [round(float(n), 6) for n in epochs],
    }


def _repeat_warnings(sources: Sequence[Facts]) -> list[str]:
    return [
        f"source {source['name']!r} is read {source['epochs']:.1f} times: {amount(source['tokens_planned'])} tokens "
        f"worth about {amount(source['tokens_worth'])} fresh ones (up to {FREE_EPOCHS} passes cost almost nothing)"
        for source in sources
        if source["epochs"] > FREE_EPOCHS * 1.02
    ]


def reads_in_words(source: Facts) -> str:
    """``30% once``, ``all once``, ``all twice, 40% a third time``: which part of a source is read how often."""
    part = source["rows_once_more"] / source["rows"]
    if source["passes"] == 0:
        return f"{percent(part)} once" if part else "nothing"
    whole = f"all {_times(source['passes'])}"
    return f"{whole}, {percent(part)} once more" if part else whole


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def render_mix(facts: Facts) -> RenderableType:
    """The table of ``cpt data preview-mix``: a bar is the share over the run, from its first token to its last."""
    highest = max(max(source["shares"]) for source in facts["sources"])
    table = Table()
    for column in ("source", "group", "share over the run"):
        table.add_column(column)
    for column in ("begins", "ends", "tokens", "epochs", "cap"):
        table.add_column(column, justify="right")
    table.add_column("its rows are read")
    widths = [b - a for a, b in pairwise(facts["at_tokens"])]
    for source in facts["sources"]:
        first, last = source["shares"][0], source["shares"][-1]
        planned, epochs = amount(source["tokens_planned"]), f"{source['epochs']:.2f}"
        bars = _bars(source["shares"], widths, highest)
        name = Text(source["name"])  # it may look like markup
        row = (name, source["group"], bars, percent(first), percent(last), planned, epochs)
        table.add_row(*row, f"{source['max_epochs']:g}", reads_in_words(source))
    general, domain = percent(facts["share_general"]), percent(facts["share_domain"])
    stages = "1 stage" if facts["num_stages"] == 1 else f"{facts['num_stages']} stages"
    title = f"plan {facts['fingerprint']}: {facts['steps']:,} steps, {facts['tokens']:,} tokens in {stages}"
    notes = [f"over the run: general {general}, domain {domain}; a full bar is {percent(highest)}"]
    notes += [f"warning: {text}" for text in facts["warnings"]]
    notes += _progress(facts)
    return Group(Text(title, style="bold"), table, *(Text(note) for note in notes))


def _progress(facts: Facts) -> list[str]:
    changes = facts["changes"]
    shown = ", ".join(f"step {change['step']:,}" for change in changes[-NAMED_CHANGES:])
    notes = [f"mixture changed after {shown}"] if changes else []
    done = facts["done_tokens"]
    if done:
        notes.append(f"done and saved: {done:,} tokens ({percent(done / facts['tokens'])})")
    if "applied_from_step" in facts:
        notes.append(f"applied from step {facts['applied_from_step']:,} on; go on with: cpt resume {facts['run_dir']}")
    return notes


def _bars(shares: Sequence[float], widths: Sequence[int], highest: float) -> str:
    """Each character is the mean share over its part of the run; a source that is not read leaves it empty."""
    edges = np.concatenate([[0], np.cumsum(widths)]).astype(float)
    given = np.concatenate([[0.0], np.cumsum(np.array(shares) * widths)])
    ends = np.linspace(0, edges[-1], BAR_WIDTH + 1)
    means = np.diff(np.interp(ends, edges, given)) / (edges[-1] / BAR_WIDTH)
    levels = np.clip(np.ceil(means / highest * len(BARS) - 1e-9).astype(int), 0, len(BARS))
    return "".join(" " if level == 0 else BARS[level - 1] for level in levels)
