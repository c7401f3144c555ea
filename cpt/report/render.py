"""Write the report: one self-contained HTML page and its Markdown twin with the figures as files beside it.

The page needs no network and no script. Everything that comes from files is escaped; only the figures, which this
package draws, go in as they are. Both texts show the same tables, in the same order: verdict, runs, figures, promise,
sources, plan, goodput, events, warnings, config, environment.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cpt.report import promise, tables
from cpt.report.collect import Change, collect_run
from cpt.report.drawing import THEMES, Chart, standalone
from cpt.report.figures import build_charts
from cpt.report.goodput_views import goodput_data, goodput_table
from cpt.report.summary import Overview, Summary, overview, plain
from cpt.rundir import DataError, RunDir, write_atomic


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
    view = _view(run_dirs)
    first = RunDir(run_dirs[0])
    folder = out or (first.report if len(run_dirs) == 1 else first.root.resolve().parent / "report")
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    charts = build_charts(view)
    for stale in set(figures.glob("*.svg")) - {figures / f"{chart.name}.svg" for chart in charts}:
        stale.unlink()
    for chart in charts:
        write_atomic(figures / f"{chart.name}.svg", standalone(chart))
    paths = ReportPaths(html=folder / "index.html", markdown=folder / "report.md")
    write_atomic(paths.html, render_html(view, charts))
    write_atomic(paths.markdown, render_markdown(view, charts))
    return paths


def report_data(run_dirs: Sequence[Path]) -> dict[str, Any]:
    """The report's numbers for ``--json``: losses in nats per token, shares in [0, 1], times in seconds; unknown is
    None.

    Raises:
        DataError: as :func:`build_report`.
    """
    view = _view(run_dirs)
    return {
        "verdict": list(view.verdict),
        "reference": view.reference,
        "runs": [_run_data(item, view) for item in view.summaries],
        "warnings": [{"about": about, "warning": warning} for about, warning in view.warnings],
    }


def render_html(view: Overview, charts: Sequence[Chart]) -> str:
    pictures = [{"name": c.name, "title": c.title, "caption": c.caption, "svg": Markup(c.svg)} for c in charts]
    return (
        _environment(autoescape=True).get_template("page.html").render(**_content(view), charts=pictures, themes=THEMES)
    )


def render_markdown(view: Overview, charts: Sequence[Chart]) -> str:
    environment = _environment(autoescape=False)
    environment.finalize = _markdown_text
    environment.filters |= {"raw": Markup, "indented": _indented}
    text = environment.get_template("report.md").render(**_content(view), charts=charts)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _view(run_dirs: Sequence[Path]) -> Overview:
    if not run_dirs:
        raise DataError("no run folder given; use `cpt report RUN_DIR...`, e.g. `cpt report runs/NAME`")
    view = overview([collect_run(Path(run_dir)) for run_dir in run_dirs])
    kept = [(item.label, promise.in_words(item)) for item in view.summaries if item.run.recommendation]
    doubts = [(item.label, doubt) for item in view.summaries for doubt in promise.doubts(item)]
    told = [text if len(view.summaries) == 1 else f"{label}: {text}" for label, text in kept]
    return replace(view, verdict=(*view.verdict, *told), warnings=(*view.warnings, *doubts))


def _environment(*, autoescape: bool) -> Environment:
    loader = PackageLoader("cpt.report", "templates")
    return Environment(
        loader=loader, autoescape=autoescape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _content(view: Overview) -> dict[str, Any]:
    runs = view.summaries
    plans = [table for item in runs for table in (tables.stage_table(item), tables.quota_table(item))]
    return {
        "title": runs[0].label if len(runs) == 1 else "Comparison of " + ", ".join(item.label for item in runs),
        "verdict": view.verdict,
        "facts": tables.headline_facts(runs[0]) if len(runs) == 1 else [],
        "runs": tables.runs_table(view),
        "reference": view.reference,
        "sections": [
            ("Promise", tables.with_content([promise.promise_table(item) for item in runs])),
            ("Sources", tables.with_content([tables.source_table(item) for item in runs])),
            ("Plan", tables.with_content(plans)),
            ("Goodput", tables.with_content([goodput_table(item) for item in runs])),
            ("Events", tables.with_content([tables.events_table(item) for item in runs])),
        ],
        "warnings": view.warnings,
        "configs": [(item.label, item.run.config_text) for item in runs if item.run.config_text],
        "environments": tables.with_content([tables.environment_table(item) for item in runs]),
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
        "forgetting_ratio": versus.forgetting_ratio if versus else None,
        "gain_given_up": versus.gain_given_up if versus else None,
        "wall_seconds": plain(item.run.wall_seconds),
        "goodput": goodput_data(item.run.goodput),
        "tokens_per_second": plain(item.median("tokens_per_second")),
        "checkpoint": str(item.run.checkpoint) if item.run.checkpoint else None,
    }


def _change_data(change: Change | None) -> dict[str, Any] | None:
    return asdict(change) if change else None
