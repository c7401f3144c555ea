"""``cpt plan show plan.json``: a recommendation or a run's frozen plan, in words and numbers.

Owns the facts and tables of both kinds, for whoever prints them (``cpt train`` announces its frozen plan with the same
table). Refuses what is neither. Both files are called plan.json where they are made; their content tells them apart.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.plan import Plan, read_plan
from cpt.recommendation import KIND, Recommendation, read_recommendation
from cpt.rundir import DataError

NAMED_STAGES = 4


def show_facts(path: Path) -> dict[str, Any]:
    """What the file says, for ``--json`` and :func:`render`; ``kind`` is ``recommendation`` or ``frozen plan``.

    Raises:
        DataError: no such file, a folder, or neither of the two; or one that was cut short or edited.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give a file in it, such as {path / 'plan.json'}")
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; cpt plan recommend writes a plan.json") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a complete JSON file ({error}); restore it from a copy") from None
    keys = raw.keys() if isinstance(raw, dict) else set()
    if "kind" in keys and raw["kind"] == KIND:
        return {"kind": "recommendation", **recommendation_facts(read_recommendation(path))}
    if {"block_rows", "sources"} <= keys:
        return {"kind": "frozen plan", **frozen_facts(read_plan(path)), "warnings": []}
    wanted = "a recommendation (plan.json of cpt plan recommend) nor a run's frozen plan (RUN_DIR/plan.json)"
    raise DataError(f"{path}: neither {wanted}")


def recommendation_facts(recommendation: Recommendation) -> dict[str, Any]:
    """The record itself, with what is derived from it first."""
    content = json.loads(recommendation.to_json())
    return {
        "fingerprint": recommendation.fingerprint,
        "tokens": recommendation.tokens,
        "share_general": recommendation.share_general,
        **{name: value for name, value in content.items() if name not in ("kind", "format_version", "fingerprint")},
    }


def frozen_facts(plan: Plan) -> dict[str, Any]:
    """Tokens, shares and epochs per source and stage."""
    return {
        "fingerprint": plan.fingerprint,
        "steps": plan.num_steps,
        "tokens": plan.num_tokens,
        "seq_len": plan.seq_len,
        "share_general": plan.share_general(),
        "share_domain": plan.share_domain(),
        "sources": [
            {
                "name": source.name,
                "group": source.group,
                "tokens_available": source.num_tokens,
                "tokens_planned": plan.tokens_by_source()[source.name],
                "epochs": plan.epochs_by_source()[source.name],
                "shares": [plan.shares(stage)[source.name] for stage in range(len(plan.stages))],
            }
            for source in plan.sources
        ],
    }


def render(facts: Mapping[str, Any]) -> RenderableType:
    """The facts as tables for a terminal."""
    return _render_recommendation(facts) if facts["kind"] == "recommendation" else frozen_table(facts)


def frozen_table(facts: Mapping[str, Any]) -> RenderableType:
    """Which source gives how much; ``facts["warnings"]`` stand below it."""
    title = f"plan {facts['fingerprint']}: {facts['steps']:,} steps, {facts['tokens']:,} tokens"
    table = _table(("source", "group"), ("available", "planned", "share", "epochs"))
    for source in facts["sources"]:
        shares = _over_time([f"{share:.1%}" for share in source["shares"]])
        available, planned = f"{source['tokens_available']:,}", f"{source['tokens_planned']:,}"
        table.add_row(source["name"], source["group"], available, planned, shares, f"{source['epochs']:.2f}")
    return _with_words(title, table, facts["warnings"])


def render_steps(stages: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What a step of each stage is made of; stages in a row that have the same steps are one line."""
    table = _table(("stages", "steps"), ("tokens", "row length", "rows/step", "micro-batch", "of these"))
    first = steps = tokens = 0
    for index, stage in enumerate(stages):
        steps, tokens = steps + stage["steps"], tokens + stage["tokens"]
        if index + 1 < len(stages) and stages[index + 1]["seq_len"] == stage["seq_len"]:
            continue
        parts = stage["seq_len"] // stage["tokens_per_rank_and_row"]
        length = f"{stage['seq_len']:,}" + (f" on {parts} ranks" if parts > 1 else "")
        names = f"{first}" if first == index else f"{first} to {index}"
        numbers = (stage["rows_per_step"], stage["micro_batch_size"], stage["micro_batches"])
        table.add_row(names, f"{steps:,}", f"{tokens:,}", length, *(f"{number:,}" for number in numbers))
        first, steps, tokens = index + 1, 0, 0
    return table


def _over_time(shares: Sequence[str]) -> str:
    """Stage by stage; of a schedule of many stages its ends."""
    return " → ".join(shares if len(shares) <= NAMED_STAGES else (shares[0], f"… {len(shares)} stages …", shares[-1]))


def in_words(facts: Mapping[str, Any]) -> str:
    """A recommendation's facts in a clause: ``1f3a..: share_general 31.0% (90% interval 25.0% to 36.0%)``."""
    weights = facts["stages"][0]["weights"]
    parts = ", ".join(f"{source} {weight:.1%}" for source, weight in weights.items())
    share = f"share_general {facts['share_general']:.1%}" if facts["share_general"] is not None else ""
    interval = facts["interval"]
    within = f" (90% interval {interval[0]:.1%} to {interval[1]:.1%})" if interval and share else ""
    return f"{facts['fingerprint']}: {'; '.join(part for part in (share + within, parts) if part)}"


def _render_recommendation(facts: Mapping[str, Any]) -> RenderableType:
    rate = f", peak_lr {facts['lr']:g}" if facts["lr"] is not None else ""
    base = f" of {facts['base']}" if facts["base"] else ""
    laws = f"laws: general {facts['law']['general']}, domain {facts['law']['domain']}"
    notes = [f"for {facts['params']:,.0f} parameters{base}{rate}; usage {facts['usage']}; {laws}"]
    notes.append(f"fitted to {facts['observations']['path']}")
    notes += [f"warning: {warning}" for warning in facts["warnings"]]
    stages = _table(("stage",), ("tokens", "general", "domain", "sources"))
    for index, stage in enumerate(facts["stages"]):
        general, domain = (_percent(stage[name]) for name in ("share_general", "share_domain"))
        sources = ", ".join(f"{name} {weight:.1%}" for name, weight in stage["weights"].items())
        stages.add_row(str(index), f"{stage['tokens']:,}", general, domain, sources or "-")
    shown = _with_words(f"recommendation {in_words(facts)}", stages, notes)
    return Group(shown, _promise_table(facts)) if facts["promise"] else shown


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _promise_table(facts: Mapping[str, Any]) -> RenderableType:
    base = {group: loss for group, loss in facts["base_loss"].items() if loss is not None}
    notes = [f"base: {', '.join(f'{group} {loss:.3f}' for group, loss in base.items())}"] if base else []
    table = _table(("tokens",), ("general", "90%", "domain", "90%"))
    for point in facts["promise"]:
        cells = []
        for group in ("general", "domain"):
            low, high = point[f"{group}_interval"]
            cells += [f"{point[f'loss_{group}']:.3f}", f"{low:.3f} to {high:.3f}"]
        table.add_row(f"{point['tokens']:,.0f}", *cells)
    return _with_words("promised held-out loss, nats per token", table, notes)


def _with_words(title: str, table: Table, notes: Sequence[str]) -> Group:
    """Words above and below a table at the terminal's width; as a title and caption they would wrap at the table's."""
    return Group(Text(title, style="bold"), table, *(Text(note) for note in notes))


def _table(left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table()
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table
