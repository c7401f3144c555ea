"""Write the report: one self-contained HTML page and its Markdown twin with the figures as files beside it.

The page needs no network, and no script to be read: every figure stands in it as SVG, and the script that is embedded
adds zoom, read-outs, sorting. Everything that comes from files is escaped; only the figures, which this package draws,
go in as they are. Both texts show the same tables in the same order; of long ones the Markdown twin, made for pull
requests, shows what matters.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cpt.report import promise, tables
from cpt.report.benchmark_views import comparison_data
from cpt.report.cells import with_content
from cpt.report.collect import Change, collect_run
from cpt.report.figures import Figures, build_figures
from cpt.report.fleet import fleet_table, settings_table
from cpt.report.goodput_views import goodput_data
from cpt.report.outcomes import Outcomes, read_outcomes
from cpt.report.palette import THEMES
from cpt.report.payload import page_data
from cpt.report.plot_svg import run_classes, standalone, symbol
from cpt.report.plots import Chart
from cpt.report.sections import build_sections
from cpt.report.summary import Summary, plain
from cpt.report.verdict import MANY, Overview, overview
from cpt.rundir import DataError, RunDir, write_atomic

NAMED = 3  # runs that one warning is about, before "and N more"
SENTENCES = 2  # of the verdict on many runs; the others can be opened


@dataclass(frozen=True)
class _Content:
    """What both texts are made of."""

    view: Overview
    outcomes: Outcomes
    figures: Figures


@dataclass(frozen=True)
class ReportPaths:
    """The two files of a report."""

    html: Path
    markdown: Path


def build_report(run_dirs: Sequence[Path], out: Path | None = None) -> ReportPaths:
    """Write ``index.html``, ``report.md`` and ``figures/*.svg`` into ``out``.

    Without ``out`` one run's report goes into its own ``report/``, a comparison into ``report/`` beside the first run,
    since it belongs to none.

    Raises:
        DataError: no run given, or a folder that is missing or not a run folder.
    """
    content = _read(run_dirs)
    first = RunDir(run_dirs[0])
    folder = out or (first.report if len(run_dirs) == 1 else first.root.resolve().parent / "report")
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    charts = content.figures.all
    paths = ReportPaths(html=folder / "index.html", markdown=folder / "report.md")
    for stale in _figures_in(paths.markdown) - {figures / f"{chart.name}.svg" for chart in charts}:
        stale.unlink(missing_ok=True)
    for chart in charts:
        _write(figures / f"{chart.name}.svg", standalone(chart))
    _write(paths.html, _render_html(content))
    _write(paths.markdown, _render_markdown(content))
    return paths


def _figures_in(markdown: Path) -> set[Path]:
    """The figures of the report that was written there before: what else lies in ``figures/`` is somebody else's."""
    text = markdown.read_text(encoding="utf-8", errors="replace") if markdown.is_file() else ""
    found = re.findall(r"^!\[.*\]\((figures/[\w-]+\.svg)\)$", text, re.MULTILINE)
    return {markdown.parent / name for name in found}


def _write(path: Path, text: str) -> None:
    write_atomic(path, text.encode("utf-8", "replace"))  # JSON may hold half a surrogate pair, UTF-8 may not


def report_data(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The report's numbers for ``--json``: losses in nats per token, shares in [0, 1], times in seconds; unknown is
    None.

    Raises:
        DataError: as :func:`build_report`.
    """
    view, _ = _view(run_dirs)
    return {
        "verdict": list(view.verdict),
        "reference": view.reference,
        "runs": [_run_data(item, view) for item in view.summaries],
        "warnings": [{"about": about, "warning": warning} for about, warning in view.warnings],
    }


def _render_html(content: _Content) -> str:
    runs = content.view.summaries
    legend = [
        {"label": item.label, "classes": run_classes(number), "symbol": Markup(symbol(number))}
        for number, item in enumerate(runs)
    ]
    data = Markup(page_data(content.figures.all, runs))
    environment = _environment(autoescape=True)
    environment.filters["figure"] = _with_markup
    return environment.get_template("page.html").render(**_fields(content), legend=legend, data=data, themes=THEMES)


def _with_markup(chart: Chart) -> Markup:
    return Markup(chart.svg)


def _render_markdown(content: _Content) -> str:
    environment = _environment(autoescape=False)
    environment.finalize = _markdown_text
    environment.filters |= {"raw": Markup, "indented": _indented}
    text = environment.get_template("report.md").render(**_fields(content))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _read(run_dirs: Sequence[Path]) -> _Content:
    view, outcomes = _view(run_dirs)
    return _Content(view, outcomes, build_figures(view, outcomes))


def _view(run_dirs: Sequence[Path]) -> tuple[Overview, Outcomes]:
    if not run_dirs:
        raise DataError("no run folder given; use `cpt report RUN_DIR...`, e.g. `cpt report runs/NAME`")
    runs = [collect_run(Path(run_dir)) for run_dir in run_dirs]
    outcomes = read_outcomes(runs)
    view = overview(runs, outcomes.headline)
    kept = [(item.label, promise.in_words(item)) for item in view.summaries if item.run.recommendation]
    doubts = [(item.label, doubt) for item in view.summaries for doubt in promise.doubts(item)]
    doubts += [(view.summaries[number].label, text) for number, text in outcomes.warnings]
    told = [text if len(view.summaries) == 1 else f"{label}: {text}" for label, text in kept]
    warnings = _gathered([*view.warnings, *doubts])
    return replace(view, verdict=(*view.verdict, *told), warnings=warnings), outcomes


def _gathered(warnings: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """What is said of several runs in the same words is said once."""
    about: dict[str, list[str]] = {}
    for label, text in warnings:
        about.setdefault(text, []).append(label)
    return tuple(
        (", ".join(labels[:NAMED]) + (f" and {len(labels) - NAMED} more" if len(labels) > NAMED else ""), text)
        for text, labels in about.items()
    )


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("cpt.report", "templates")
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _fields(content: _Content) -> dict[str, Any]:
    view, runs = content.view, content.view.summaries
    is_many = len(runs) > MANY
    side_by_side = tables.runs_table(view)
    shown = SENTENCES if is_many else len(view.verdict)
    named = f"{len(runs)} runs" if is_many else ", ".join(item.label for item in runs)
    return {
        "title": runs[0].label if len(runs) == 1 else f"Comparison of {named}",
        "verdict": view.verdict[:shown],
        "more_verdict": view.verdict[shown:],
        "facts": tables.headline_facts(runs[0]) if len(runs) == 1 else [],
        "star": content.figures.trade_off,
        "runs": [fleet_table(view), side_by_side] if is_many else [side_by_side],
        "sections": build_sections(view, content.outcomes, content.figures),
        "warnings": view.warnings,
        "settings": with_content([settings_table(view)]),
        "configs": [(item.label, item.run.config_text) for item in runs if item.run.config_text],
        "environments": with_content([tables.environment_table(item) for item in runs]),
    }


def _markdown_text(value: Any) -> Any:
    """Every value printed into the Markdown twin is text, never markup: no tags, no table bars, no line breaks."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    escaped = re.sub(r"([\\`*|\[\]])", r"\\\1", value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())


def _indented(text: str) -> Markup:
    """A Markdown code block; indentation cannot be closed from inside, a fence could."""
    return Markup("\n".join(f"    {line}" for line in text.splitlines()))


def _run_data(item: Summary, view: Overview) -> dict[str, Any]:
    versus = view.versus.get(item.label)
    return {
        "name": item.label,
        "path": str(item.run.root),
        "init_from": item.run.init_from,
        "finished": item.run.finished,
        "steps": item.run.steps_done,
        "tokens": plain(item.tokens),
        "tokens_planned": plain(item.tokens_planned),
        "tokens_by_source": item.realised_by_source,
        "share_general_planned": plain(item.share_planned),
        "share_general_realised": plain(item.share_realised),
        "gain": item.gain,
        "forgetting": item.forgetting,
        "general": _change_data(item.general),
        "domain": _change_data(item.domain),
        "promise": promise.promise_data(item),
        "against_base": comparison_data(item.compared),
        "forgetting_ratio": versus.forgetting_ratio if versus else None,
        "gain_given_up": versus.gain_given_up if versus else None,
        "wall_seconds": plain(item.run.wall_seconds),
        "goodput": goodput_data(item.run.goodput),
        "tokens_per_second": plain(item.median("tokens_per_second")),
        "checkpoint": str(item.run.checkpoint) if item.run.checkpoint else None,
    }


def _change_data(change: Change | None) -> dict[str, Any] | None:
    return asdict(change) if change else None
