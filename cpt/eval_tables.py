"""Tables in the terminal for what the `cpt eval` verbs found. No torch.

Owns how a comparison and a gate are shown; takes the facts that --json prints. Losses are in nats per token, accuracies
shares of 1, intervals cover 95%.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cpt.eval.document_texts import one_line

Facts = Mapping[str, Any]
SHOWN = 300  # characters of a text
NARROW: dict[str, Any] = {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0), "show_edge": False}  # 80 columns hold it
STYLES = {"drop": "bold red", "gain": "bold green"}
FAMILIES = {
    "source_groups": "held-out loss, nats per token",
    "sources": "by source",
    "groups": "accuracy, mean over tasks",
    "tasks": "by task",
    "copying": "copying from the context",
}


def render_comparison(facts: Facts) -> Group:
    """Of ``Comparison.to_dict``: the verdict of each run in a few lines, then every row."""
    return Group(*(part for run in facts["runs"] for part in _render_run(run, facts)))


def _render_run(run: Facts, facts: Facts) -> list[Any]:
    title = _title(run, facts)
    verdict = [Text("  ").append_text(_sentence(row)) for row in (*run["source_groups"], *run["groups"])]
    notes = _notes(run)
    tables = [_rows_table(run[family], heading) for family, heading in FAMILIES.items() if run[family]]
    told = Text(
        "p is corrected for the number of rows of its kind (Holm); below 0.05 it is a gain or a drop", style="dim"
    )
    return [Text(title, style="bold"), *verdict, Text(""), *tables, told, *notes, Text("")]


def _title(run: Facts, facts: Facts) -> str:
    """Which checkpoint is compared, and with what."""
    against = "its base" if facts["baseline"] == "base" else facts["baseline"]
    suite = "" if run["suite_step"] is None else f", suite {facts['suite']}"
    step = run["suite_step"] if run["loss_step"] is None else run["loss_step"]
    return f"{run['run']} after step {step:,}, against {against}{suite}"


def _notes(run: Facts) -> list[Text]:
    return [Text(f"  note: {note}", style="dim") for note in run["notes"]]


def _sentence(row: Facts) -> Text:
    """``general loss +0.0312 (+0.0281 to +0.0344): drop``."""
    change = row["change"]
    said = Text(f"{row['name']} {row['metric']} {signed(change['value'])}{_in_brackets(change)}: ")
    return said.append(row["word"], style=STYLES.get(row["word"], ""))


def _rows_table(rows: Sequence[Facts], heading: str) -> Table:
    table = Table(title=Text(heading), title_justify="left", **NARROW)
    truncated, overlap = any(row["truncated"] for row in rows), any(row["overlapping"] for row in rows)
    table.add_column("", overflow="fold", min_width=10)
    for column in ("before", "after", "change", "interval", "p"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("documents" if rows[0]["metric"] == "loss" else "items", justify="right")
    for column, shown in (("truncated", truncated), ("known", overlap), ("without known", overlap)):
        if shown:
            table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row), *_counts(row, truncated=truncated, overlap=overlap))
    return table


def _cells(row: Facts) -> list[Text | str]:
    change = row["change"]
    name = row["name"] if row["metric"] in ("loss", "accuracy", "acc") else f"{row['name']} {row['metric']}"
    return [
        Text(name),
        plain(change["before"]),
        plain(change["after"]),
        signed(change["value"]),
        interval(change["low"], change["high"], form="{:+.4f}", between=".."),
        p_text(row["corrected_p"]),
        Text(row["word"], style=STYLES.get(row["word"], "")),
        f"{change['units']:,}" if change["units"] else "-",
    ]


def _counts(row: Facts, *, truncated: bool, overlap: bool) -> list[str]:
    rest = row["without_overlap"]
    known = [f"{row['overlapping']:,}", signed(rest["value"]) if rest else "-"] if overlap else []
    return [*([f"{row['truncated']:,}"] if truncated else []), *known]


def render_gate(facts: Facts) -> Group:
    """One row per requirement, then why some are not met, or are not surely."""
    table = Table(title=Text(_title(facts, facts)), title_justify="left", **NARROW)
    table.add_column("requirement", overflow="fold")
    for column in ("measured", "interval", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for check in facts["checks"]:
        low, high = check["interval"] or (None, None)
        met = Text("yes", style="green") if check["met"] else Text("NO", style="bold red")
        table.add_row(Text(check["requirement"]), plain(check["value"]), interval(low, high), met)
    notes = [Text(f"  {check['requirement']}: {check['note']}") for check in facts["checks"] if check["note"]]
    failed = sum(not check["met"] for check in facts["checks"])
    number = len(facts["checks"])
    verdict = f"not met: {failed} of {number}" if failed else f"all {number} met"
    return Group(table, *notes, *_notes(facts), Text(verdict, style="bold red" if failed else "bold green"))


def render_suites(evaluated: Sequence[Facts]) -> Group:
    """A table per checkpoint and suite: every task and group with its standard error."""
    return Group(*(_render_suite(facts) for facts in evaluated))


def _render_suite(facts: Facts) -> Group:
    of = "the base" if facts["step"] == 0 else f"step {facts['step']:,}"
    table = Table(title=Text(f"{facts['suite']}, {of}"), title_justify="left")
    table.add_column("task")
    table.add_column("group")
    table.add_column("metric")
    for column in ("value", "± error", "items", "truncated", "known"):
        table.add_column(column, justify="right")
    for name, task in facts["tasks"].items():
        counts = (f"{task['items']:,}", f"{task['truncated']:,}", f"{task['overlapping']:,}")
        words = (Text(each) for each in (name, task["group"], task["metric"]))  # not markup
        table.add_row(*words, plain(task["value"]), plain(task["stderr"]), *counts)
    table.add_section()
    for name, group in facts["groups"].items():
        values = (plain(group["accuracy"]), plain(group["stderr"]), f"{group['items']:,}", "", "")
        table.add_row(Text(name, style="bold"), "", "accuracy", *values)
    if (probe := facts["copying"]) is not None:
        for metric in ("exact_match", "token_accuracy"):
            values = (plain(probe[metric]), plain(probe[f"{metric}_stderr"]), f"{probe['passages']:,}", "", "")
            table.add_row("copying", "", metric, *values)
    return Group(table, *(Text(f"error: {error}", style="red") for error in facts["errors"]))


def render_items(facts: Facts) -> Group:
    """Subsets that lost or gained an item, most net losses first, then examples of what was lost."""
    against = "its base" if facts["baseline"] == "base" else facts["baseline"]
    title = f"{facts['run']} after step {facts['step']:,}, against {against}, suite {facts['suite']}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("task")
    table.add_column("subset")
    for column in ("items", "right before", "right now", "lost", "gained"):
        table.add_column(column, justify="right")
    changed = [diff for diff in facts["subsets"] if diff["lost"] or diff["gained"]]
    for diff in changed:
        counts = (diff[name] for name in ("items", "right_before", "right_after", "lost", "gained"))
        table.add_row(Text(diff["task"]), Text(one_line(diff["subset"], SHOWN)), *(f"{count:,}" for count in counts))
    examples = [_example(diff, each) for diff in changed for each in diff["lost_examples"]]
    total = f"{facts['lost']:,} items lost, {facts['gained']:,} regained"
    same = len(facts["subsets"]) - len(changed)
    return Group(table, Text(f"{total}; {same:,} subsets without a change" if same else total), *examples)


def _example(diff: Facts, example: Facts) -> Text:
    """What was asked, the right answer, and what the model now takes for it."""
    known = " (known to be in the training corpora)" if example["overlap"] else ""
    shown = Text(f"\n{diff['task']} {one_line(diff['subset'], SHOWN)} item {example['item']}{known}\n", style="bold")
    asked = one_line(example["prompt"][-SHOWN:], SHOWN)  # the question stands at its end
    for label, text in (("asked", asked), ("right", example["gold"]), ("chosen now", example["chosen_after"])):
        if text:
            shown.append(f"  {label}: ", style="dim").append(f"{one_line(text, SHOWN)}\n", style="not bold")
    if example["margin_before"] is not None and example["margin_after"] is not None:
        margins = f"{example['margin_before']:+.2f} to {example['margin_after']:+.2f} nats"
        shown.append("  lead of the right answer: ", style="dim").append(margins, style="not bold")
    return shown


def render_sequence(facts: Facts) -> Group:
    """One row per domain in the order of learning, and the three means."""
    table = Table(title=Text("domains in the order of learning, nats per token"), title_justify="left")
    table.add_column("domain")
    table.add_column("sources")
    for column in ("learned", "at the end", "best", "forgetting"):
        table.add_column(column, justify="right")
    for domain in facts["domains"]:
        values = (plain(domain[name]) for name in ("learned", "final", "best"))
        table.add_row(Text(domain["name"]), Text(", ".join(domain["sources"])), *values, signed(domain["forgetting"]))
    table.add_section()
    means = (plain(facts["learned"]), plain(facts["retained"]), "", signed(facts["forgetting"]))
    table.add_row(Text("mean", style="bold"), "", *means)
    told = Text("forgetting: loss at the end over the best one seen, without the last domain", style="dim")
    return Group(table, told, *(Text(f"note: {note}", style="dim") for note in facts["notes"]))


def plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.4f}"


def p_text(value: float | None) -> str:
    return "-" if value is None else "<.001" if value < 1e-3 else f"{value:.3f}".removeprefix("0")


def interval(low: float | None, high: float | None, *, form: str = "{:.4f}", between: str = " to ") -> str:
    return "-" if low is None or high is None else f"{form.format(low)}{between}{form.format(high)}"


def _in_brackets(change: Facts) -> str:
    known = change["low"] is not None and change["high"] is not None
    return f" ({interval(change['low'], change['high'], form='{:+.4f}')})" if known else ""
