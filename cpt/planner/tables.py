"""``cpt plan fit``, ``compare``, ``predict`` and ``recommend`` as tables for a terminal of 80 columns or more.

Each begins with its answer in one bold sentence, then shows the numbers with their units, and ends with the warnings,
each once. Owns what is shown in which order. Refuses to compute: it reads facts dictionaries; what they lack is ``-``.
"""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpt.planner.laws.table import LAWS
from cpt.planner.wording import (
    NO_VALUE,
    Facts,
    amount,
    amount_span,
    at_point,
    by_weight,
    decimals,
    headline,
    interval_of,
    known,
    law_names,
    loss_span,
    number,
    percent,
    share_span,
    targets_of,
    weights_of,
)

BROKEN = "breaks the limit"
HELD_OUT = {"share": "held-out shares", "tokens": "held-out tokens", "params": "held-out size"}


def render_fit(facts: Facts) -> RenderableType:
    """The law's parameters, and how far it errs on what it was and was not fitted on."""
    errors = _table()
    _columns(errors, ["points"], ["MAE, nats", "R2", "Huber"])
    errors.add_row(*_texts(f"fitted, {facts['num_points']} points", *_errors(facts, "mae", "r2", "huber")))
    for kind, words in HELD_OUT.items():
        found = {name: (facts.get(name) or {}).get(kind) for name in ("heldout", "heldout_r2", "heldout_huber")}
        cells = _errors(found, *found)
        errors.add_row(*_texts(words, *cells), style="dim" if cells[0] == NO_VALUE else "")
    values = _table()
    _columns(values, ["parameter"], ["value", "90% interval"])
    intervals = facts.get("params_interval") or {}
    for name, value in facts["params"].items():
        values.add_row(*_texts(name, f"{number(value):.5g}", _five_digits(intervals.get(name))))
    title = "Errors: mean absolute (MAE), share of variance explained (R2), Huber of log losses"
    blocks = [_block(title, errors), _block(f"Parameters of {facts['law']}", values)]
    paper = f" ({facts['paper']})" if facts.get("paper") else ""
    return _page(_fit_headline(facts), [f"{facts['title']}{paper}"], blocks, facts)


def render_compare(facts: Facts) -> RenderableType:
    """Held-out errors of every law, a table per target, best first; laws that may not be chosen are dim."""
    ranking = facts["ranking"]
    targets = list(dict.fromkeys(row["target"] for row in ranking))
    tables = [_ranking(target, [row for row in ranking if row["target"] == target]) for target in targets]
    titles = {row["law"]: row["title"] for row in ranking}
    lines = [
        f"{facts['num_points']} points of {facts['observations']}",
        "recommend and predict count the error by tokens the more, the further --tokens lies beyond the measured ones",
    ]
    return _page(_compare_headline(ranking), lines, [*tables, _laws(titles)], facts)


def render_predict(facts: Facts) -> RenderableType:
    """One predicted loss, and where it holds."""
    interval = loss_span(facts.get("interval"))
    within = "" if interval == NO_VALUE else f" (90%: {interval})"
    first = f"Predicted {facts['target']} loss: {decimals(facts['loss'])} nats per token{within}."
    blocks: list[RenderableType] = [_weights(facts)] if weights_of(facts) else []
    return _page(first, [f"at {at_point(facts)}"], [*blocks, _laws(_titles(facts.get("law")))], facts)


def render_recommend(facts: Facts) -> RenderableType:
    """The recommended mixture or size, the losses it promises, and what the usual rules would cost instead."""
    blocks: list[RenderableType] = [_predicted(facts)]
    if weights_of(facts):
        blocks.insert(0, _weights(facts))
    if facts.get("baselines"):
        blocks.append(_baselines(facts))
    return _page(headline(facts), _terms(facts), [*blocks, _laws(_titles(facts.get("law")))], facts)


def _page(first: str, lines: Iterable[str], blocks: Sequence[RenderableType], facts: Facts) -> Group:
    parts: list[RenderableType] = [Text(first, style="bold"), *(Text(line) for line in lines)]
    for block in blocks:
        parts += [Text(), block]
    warnings = list(dict.fromkeys(facts.get("warnings") or []))
    if warnings:
        told = Table.grid(padding=(0, 1))
        for warning in warnings:
            told.add_row(Text("!", style="bold yellow"), Text(warning, style="yellow"))
        parts += [Text(), Text("Warnings", style="bold yellow"), told]
    return Group(*parts)


def _fit_headline(facts: Facts) -> str:
    text = f"Law {facts['law']} fits the {facts['target']} loss to {decimals(facts.get('mae'))} nats"
    by_kind = facts.get("heldout") or {}
    errors = [f"{HELD_OUT[kind]} {decimals(by_kind[kind])}" for kind in HELD_OUT if known(by_kind.get(kind))]
    return (
        f"{text}; errors where it was not fitted: {', '.join(errors)}." if errors else f"{text}; nothing is held out."
    )


def _compare_headline(ranking: Sequence[Facts]) -> str:
    best: dict[str, str] = {}
    for row in ranking:
        if not row.get("excluded") and known(row.get("heldout_mae")):
            best.setdefault(row["target"], f"{row['law']} ({decimals(row['heldout_mae'])} nats)")
    parts = [
        f"{target} loss is predicted best by {best[target]}"
        if target in best
        else f"no law may be chosen for {target} loss"
        for target in dict.fromkeys(row["target"] for row in ranking)
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if parts else "No law was compared."


def _ranking(target: str, rows: Sequence[Facts]) -> Group:
    reasons = list(dict.fromkeys(row["excluded"] for row in rows if row.get("excluded")))
    table = _table()
    _columns(table, ["law"], ["mean\nnats", "by share\nnats", "by tokens\nnats", "by size\nnats", "R2"])
    table.add_column("", overflow="fold")
    first = next((row for row in rows if not row.get("excluded") and known(row.get("heldout_mae"))), None)
    for row in rows:
        kinds = row.get("heldout") or {}
        cells = [decimals(kinds.get(kind)) for kind in HELD_OUT]
        note = f"not chosen ({reasons.index(row['excluded']) + 1})" if row.get("excluded") else _restricted(row)
        style = "dim" if row.get("excluded") else "bold" if row is first else ""
        cells = [row["law"], decimals(row.get("heldout_mae")), *cells, decimals(row.get("heldout_r2"), 3)]
        table.add_row(*_texts(*cells, f"best {note}".strip() if row is first else note), style=style)
    notes = [f"({place}) {reason}" for place, reason in enumerate(reasons, start=1)]
    if any(_restricted(row) for row in rows):
        told = "above x: cannot rise with tokens, as the loss does up to that share; fitted and trusted above it alone"
        notes.append(f"{told}, and its error counts 1.5 times against laws that can rise")
    return _block(f"{target.capitalize()} loss: mean absolute error on held-out points, nats per token", table, notes)


def _restricted(row: Facts) -> str:
    above = row.get("trusted_above_share")
    return "" if above is None or row.get("excluded") else f"above {percent(above)}"


def _terms(facts: Facts) -> list[str]:
    lines = [] if facts.get("usage") == "flops" else [f"for {at_point(facts)}"]
    if facts.get("usage") == "flops":
        both = f"{percent(facts.get('share_general'))} general and {percent(facts.get('share_domain'))} domain data"
        lines.append(f"for {facts.get('flops'):.3g} floating-point operations, {both}")
    if known(facts.get("limit_general")):
        limit = f"limit: general loss at most {decimals(facts['limit_general'])} nats"
        above = f"{percent(facts['tolerance'])} above the base's" if facts.get("tolerance") else "the base's own"
        lines.append(f"{limit}, {above}")
    trusted = share_span(facts.get("trusted_shares"))
    if trusted not in (NO_VALUE, "0.0% to 100.0%"):
        lines.append(f"searched where the laws can be trusted: {trusted} general data")
    return lines


def _predicted(facts: Facts) -> Group:
    predicted = facts.get("predicted") or {}
    laws = law_names(facts.get("law"))
    table = _table()
    _columns(table, ["of"], ["loss, nats", "90% interval, nats"])
    table.add_column("law", overflow="fold")
    for target in targets_of(predicted):
        cells = decimals(predicted[f"loss_{target}"]), loss_span(interval_of(predicted, target))
        table.add_row(*_texts(target, *cells, laws.get(target, laws.get("", NO_VALUE))))
    notes = []
    if facts.get("usage") == "flops":
        size = f"{amount(facts.get('params'))} parameters, 90% {amount_span(facts.get('params_interval'))}"
        notes.append(f"best size: {size}")
    return _block("Predicted loss at the end of the run", table, notes)


def _weights(facts: Facts) -> Group:
    """One row per source, the heaviest first; what other rules would choose stands beside it."""
    weights, intervals = weights_of(facts), facts.get("weights_interval") or {}
    rivals = [row for row in facts.get("baselines") or [] if row.get("weights")]
    table = _table(gap=1)
    _columns(table, ["source"], ["share", *(["90% interval"] if intervals else []), *map(_narrow, rivals)])
    for name in by_weight(weights):
        within = [share_span(intervals.get(name))] if intervals else []
        others = [percent(row["weights"].get(name)) for row in rivals]
        table.add_row(*_texts(name, percent(weights[name]), *within, *others))
    return _block("Shares of tokens by source" + (", and what other rules choose" if rivals else ""), table)


def _narrow(baseline: Facts) -> str:
    """Its name as a column's head, one word a line."""
    return str(baseline["name"]).replace(" ", "\n").replace("-", "-\n")


def _baselines(facts: Facts) -> Group:
    """The recommendation and the usual rules below one another."""
    many, sized = bool(weights_of(facts)), facts.get("usage") == "flops"
    predicted = facts.get("predicted") or {}
    targets = targets_of(predicted) if len(targets_of(predicted)) <= 3 else []
    shares = not many and not sized
    table = _table(gap=1)  # the widest table: with 2 it would wrap at 80 columns
    _columns(table, ["choice"], ["general\nshare", "domain\nshare"] if shares else [])
    _columns(table, [], [*(f"{target}\nloss, nats" for target in targets), "regret\nnats"])
    table.add_column("", overflow="fold")
    own = {"name": "recommended", "share_general": facts.get("share_general"), "regret": 0.0, **predicted}
    for row in [own, *facts["baselines"]]:
        general = number(row.get("share_general"))
        cells = [percent(general), percent(1 - general)] if shares else []
        cells += [decimals(row.get(f"loss_{target}")) for target in targets] + [decimals(row.get("regret"))]
        broken = row.get("feasible") is False
        style = "bold" if row is own else "dim" if not known(row.get("regret")) else ""
        table.add_row(*_texts(row["name"], *cells), Text(BROKEN if broken else "", style="yellow"), style=style)
    table.columns[0].min_width = min(18, max(len(row["name"]) for row in facts["baselines"]))
    return _block("Instead of the recommendation", table, [*_notes(facts), _regret_words(facts)])


def _notes(facts: Facts) -> list[str]:
    return [f"{row['name']}: {row['note']}" for row in facts["baselines"] if row.get("note")]


def _regret_words(facts: Facts) -> str:
    lost = "domain loss above the recommendation's"
    if weights_of(facts):
        lost = "mean loss of what is learnt above the recommendation's"
    limit = ", plus general loss above the limit" if known(facts.get("limit_general")) else ""
    return f"regret: what the choice costs, in nats per token: {lost}{limit}"


def _laws(titles: Facts) -> Group:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, title in titles.items():
        table.add_row(*_texts(name, title))
    return _block("Laws", table)


def _titles(law: object) -> dict[str, str]:
    return {name: LAWS[name].title if name in LAWS else "" for name in law_names(law).values()}


def _errors(facts: Facts, mae: str, r2: str, huber: str) -> tuple[str, str, str]:
    mean_huber = f"{facts[huber]:.2e}" if known(facts.get(huber)) else NO_VALUE
    return decimals(facts.get(mae)), decimals(facts.get(r2)), mean_huber


def _five_digits(interval: object) -> str:
    if not isinstance(interval, Sequence) or not all(known(end) for end in interval):
        return NO_VALUE
    return " to ".join(f"{end:.5g}" for end in interval)


def _table(gap: int = 2) -> Table:
    return Table(box=None, padding=(0, gap, 0, 0), pad_edge=False)


def _block(title: str, table: Table, notes: Sequence[str] = ()) -> Group:
    """A table under its title; both may be wider than the table, which rich's own title and caption may not."""
    return Group(Text(title, style="italic"), table, *(Text(note, style="dim") for note in notes))


def _columns(table: Table, left: Sequence[str], right: Sequence[str]) -> None:
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)


def _texts(*cells: str) -> list[Text]:
    """Plain text: a source called ``[red]`` is a name, not markup."""
    return [Text(cell) for cell in cells]
